"""The tokenizer of a GGUF file: byte-level BPE for Hugging Face's tokenizers, or a SentencePiece model.

A file names the rule that divides text into words before BPE (`tokenizer.ggml.pre`) and does not hold it. Here are the
rules of the models' own tokenizer.json; other names are refused, since a wrong rule gives other tokens without any
error. transformers, where it reads a GGUF file, leaves out a part of two: that SmolLM's digits are words of their own,
and that Qwen2's text is composed (NFC).
"""

import hashlib
import struct
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.schema import declared, validate
from lavin.weights.gguf.file import GGUFFile

LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of tokens: SentencePiece's numbers, in both kinds

TokenId = Annotated[int, Field(ge=0, lt=2**24)]


@declared
class Vocabulary(TypedDict):
    """Metadata `tokenizer.ggml.*`."""

    model: Literal["gpt2", "llama"]  # byte-level BPE, SentencePiece
    tokens: Annotated[list[str], Field(min_length=1)]
    token_type: list[int]
    eos_token_id: TokenId
    bos_token_id: NotRequired[TokenId]
    add_bos_token: NotRequired[bool]
    pre: NotRequired[str]
    merges: NotRequired[list[str]]
    scores: NotRequired[list[float]]
    add_space_prefix: NotRequired[bool]
    remove_extra_whitespaces: NotRequired[bool]


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Raises UserError where the metadata lack something, contradict each other, or are of another kind."""
    source = f"{file.path}: tokenizer.ggml"
    fix = "name another --llm_model, or fetch it again"
    vocabulary = validate(file.entries("tokenizer.ggml."), Vocabulary, source, fix)
    needed = "merges" if vocabulary["model"] == "gpt2" else "scores"
    if needed not in vocabulary:
        raise UserError(f"{source}.{needed} is missing: fetch the file again")
    n = len(vocabulary["tokens"])
    for key in ("token_type", *(("scores",) if needed == "scores" else ())):
        if len(vocabulary[key]) != n:  # type: ignore[literal-required]
            raise UserError(f"{source}.{key} does not have as many entries as the {counted(n, 'token')}: "
                            "fetch the file again")
    if max(vocabulary.get("bos_token_id", 0), vocabulary["eos_token_id"]) >= n:
        raise UserError(f"{source}: BOS or EOS is none of its {counted(n, 'token')}: fetch the file again")
    if needed == "merges" and vocabulary.get("pre") not in PRE_TOKENIZERS:
        raise UserError(f"{source}.pre is {vocabulary.get('pre')}, and LaVIN knows the words of "
                        f"{', '.join(PRE_TOKENIZERS)}: take the model's Hugging Face folder")
    return vocabulary


def bos_id(vocabulary: Vocabulary) -> int | None:
    """The token that text begins with, or None. A file without the flag is read as llama.cpp reads it."""
    default = vocabulary["model"] == "llama" or vocabulary.get("pre") == "llama-bpe"
    return vocabulary.get("bos_token_id") if vocabulary.get("add_bos_token", default) else None


def sha256(vocabulary: Vocabulary) -> str:
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()


def special_ids(vocabulary: Vocabulary) -> set[int]:
    """The ids of tokens that no text becomes; BOS and EOS are among them, whatever their types."""
    control = {token for token, kind in enumerate(vocabulary["token_type"]) if kind == CONTROL}
    return control | {vocabulary.get("bos_token_id", vocabulary["eos_token_id"]), vocabulary["eos_token_id"]}


# --- Byte-level BPE ---

def byte_level_bpe(vocabulary: Vocabulary, tokenizers: Any) -> Any:
    """Returns the `tokenizers.Tokenizer` of a vocabulary. tokenizers: the package, which is optional."""
    tokens, special = vocabulary["tokens"], special_ids(vocabulary)
    words = [i for i, kind in enumerate(vocabulary["token_type"]) if kind == USER_DEFINED and i not in special]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in vocabulary["merges"]],
        ignore_merges=vocabulary["pre"] == "llama-bpe"))
    if vocabulary["pre"] == "qwen2":
        model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = pre_tokenizer(vocabulary["pre"], tokenizers)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(tokens[i], normalized=False) for i in sorted(special)])
    model.add_tokens([tokenizers.AddedToken(tokens[i], normalized=False) for i in words])
    model.encode_special_tokens = True  # as the text that they look like
    return model


def pre_tokenizer(name: str, tokenizers: Any) -> Any:
    pre, split_words = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return split_words
    if name == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), split_words])
    words = LLAMA3_WORDS if name == "llama-bpe" else LLAMA3_WORDS.replace("{1,3}", "")
    return pre.Sequence([pre.Split(tokenizers.Regex(words), "isolated"),
                         pre.ByteLevel(add_prefix_space=False, use_regex=False)])


# --- SentencePiece ---

def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """A serialized ModelProto, as in a tokenizer.model: pieces (1), trainer_spec (2), normalizer_spec (3).

    Numbers of fields are those of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """
    tokens, special = vocabulary["tokens"], special_ids(vocabulary)
    types = [CONTROL if i in special else kind for i, kind in enumerate(vocabulary["token_type"])]
    pieces = [field(1, field(1, token.encode()) + float_field(2, score) + field(3, kind))
              for token, score, kind in zip(tokens, vocabulary["scores"], types, strict=True)]
    eos = vocabulary["eos_token_id"]
    bos = vocabulary.get("bos_token_id", eos)
    unknown = tokens[types.index(UNKNOWN)].encode() if UNKNOWN in types else b""  # refused by SentencePiece
    trainer = (field(3, 2) + field(35, int(BYTE in types)) + field(45, unknown)  # 2: BPE
               + field(46, tokens[bos].encode()) + field(47, tokens[eos].encode()))
    normalizer = (field(1, b"identity") + field(3, int(vocabulary.get("add_space_prefix", True)))
                  + field(4, int(vocabulary.get("remove_extra_whitespaces", False))))
    return b"".join(pieces) + field(2, trainer) + field(3, normalizer)


def varint(value: int) -> bytes:
    head = bytearray()
    while value > 0x7F:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*head, value])


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer's message: https://protobuf.dev/programming-guides/encoding."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def float_field(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)

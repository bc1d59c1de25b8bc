"""Tokenizers of four formats: SentencePiece, Hugging Face's tokenizer.json, tiktoken, and those of GGUF files.

Text never becomes BOS, EOS or another special token, whatever it looks like: `</s>` in a question is four characters.

A tokenizer has `n_words`, the size of its vocabulary, `bos_id` (None where the model has no BOS), `eos_id`, and
`library`, which names the package and its version. `encode_continuation` gives the ids of a text that follows another
one: there is no space before it that SentencePiece puts before a text.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import sentencepiece
from pydantic import BeforeValidator
from typing_extensions import TypedDict

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.schema import declared, read_validated
from lavin.weights.gguf import vocabulary as gguf
from lavin.weights.gguf.file import is_gguf, open_file

# files beside a tokenizer.json that may name BOS (`bos`) and EOS, with the entry of each; the first that does counts
SPECIAL_IDS = {"tokenizer_config.json": "{}_token", "config.json": "{}_token_id"}

# Llama 3's, 3.1's, 3.2's and 3.3's; behind their tokens come BOS, EOS, and others that are of no use here
LLAMA3_TOKENS, LLAMA3_SPECIAL_TOKENS = 128_000, 256
LLAMA3_BOS_EOS = "<|begin_of_text|>", "<|end_of_text|>"
RANKED = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")  # a line of tiktoken's format: a token in base64, and its rank

# a special token is text, or an object with its text; its id is a number, or a list whose first is the usual one
Token = Annotated[str | None, BeforeValidator(lambda token: token.get("content") if isinstance(token, dict) else token)]
TokenId = Annotated[int | None, BeforeValidator(lambda ids: ids[0] if isinstance(ids, list) and ids else ids)]


@declared
class TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json, or config.json in the same folder."""

    bos_token: Token
    eos_token: Token
    bos_token_id: TokenId
    eos_token_id: TokenId


class SentencePiece:
    """LLaMA's `tokenizer.model`. content: the model, where the file at `path` holds more than it."""

    library = f"sentencepiece {sentencepiece.__version__}"
    bos_id: int | None

    def __init__(self, path: Path, content: bytes | None = None):
        try:  # the content, since a name may be no UTF-8
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content or path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is no SentencePiece model: fetch or copy it again") from error
        self.n_words, self.bos_id, self.eos_id = self.model.vocab_size(), self.model.bos_id(), self.model.eos_id()
        if min(self.model.bos_id(), self.eos_id) < 0:
            raise UserError(f"{path} has no BOS or no EOS token: take the tokenizer.model of the base model")
        # protocol buffers that follow each other are merged: this sets normalizer_spec.add_dummy_prefix
        continuing = self.model.serialized_model_proto() + gguf.field(3, gguf.field(3, False))
        self.encode_continuation = sentencepiece.SentencePieceProcessor(model_proto=continuing).encode
        self.encode, self.decode = self.model.encode, self.model.decode


class FastTokenizer:
    """A tokenizer of Hugging Face's library tokenizers. bos_id: the id of BOS; None where a model has none."""

    n_words: int
    bos_id: int | None
    eos_id: int

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{path} is read by Hugging Face's tokenizers: pip install tokenizers") from error
        self.library = f"tokenizers {tokenizers.__version__}"
        try:
            self.model = self.read(path, tokenizers)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(f"{path} is no tokenizer ({first_line(error)}): fetch or copy it again") from error

    def read(self, path: Path, tokenizers):
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another one."""
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class HuggingFaceTokenizer(FastTokenizer):
    """A `tokenizer.json`; BOS and EOS come from tokenizer_config.json or else config.json in the same folder."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.n_words = max(self.model.get_vocab().values(), default=-1) + 1
        self.bos_id = None if self.leaves_bos_out(path) else self.special_id(path, "bos")
        self.eos_id = self.special_id(path, "eos")
        special = [self.model.id_to_token(token) for token in (self.bos_id, self.eos_id) if token is not None]
        for model in (self.model, self.continuing):
            model.add_special_tokens(special)  # some files declare theirs as words
            model.encode_special_tokens = True  # as the text that they look like
            model.no_truncation()  # both may be left in the file by what it was trained with
            model.no_padding()

    def read(self, path: Path, tokenizers):
        text = path.read_text(encoding="utf-8")
        model, content = tokenizers.Tokenizer.from_str(text), json.loads(text)
        for token in content.get("added_tokens", []):
            if model.token_to_id(token["content"]) != token["id"]:  # the library closes gaps
                raise UserError(f"{path}: the added token {token['content']} cannot have the id {token['id']}: take "
                                "the model's tokenizer.model")
        changed = {name: without_prefix(content.get(name)) for name in ("normalizer", "pre_tokenizer")}
        is_same = all(content.get(name) == part for name, part in changed.items())
        self.continuing = model if is_same else tokenizers.Tokenizer.from_str(json.dumps({**content, **changed}))
        return model

    def encode_continuation(self, text: str) -> list[int]:
        return self.continuing.encode(text, add_special_tokens=False).ids

    def leaves_bos_out(self, path: Path) -> bool:
        """Whether the file says `"bos_token": null`, as Qwen's do, whose training does not use config.json's BOS."""
        config = read_config(path.with_name("tokenizer_config.json"))
        return "bos_token" in config and config["bos_token"] is None

    def special_id(self, path: Path, name: str) -> int:
        for file, key in SPECIAL_IDS.items():
            config_path, key = path.with_name(file), key.format(name)
            value = read_config(config_path).get(key)
            token_id = self.model.token_to_id(value) if isinstance(value, str) else value
            if token_id in range(self.n_words):
                return token_id
            if value is not None:
                raise UserError(f"{config_path}: {key}: {path.name} has no token {value!r}: fetch both again")
        raise UserError(f"{path}: neither tokenizer_config.json nor config.json in its folder names a {name.upper()} "
                        "token: copy them there")


def without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json, changed so that it puts no space before a text."""
    if part is None:
        return None
    if part["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    parts = {key: [without_prefix(inner) for inner in part[key]] for key in ("normalizers", "pretokenizers")
             if key in part}
    scheme = {"prepend_scheme": "never"} if part["type"] == "Metaspace" else {}
    prefix = {"add_prefix_space": False} if part.get("add_prefix_space") else {}
    return {**part, **parts, **scheme, **prefix}


def special_id_files(path: Path) -> list[Path]:
    """The files, beside that of the tokenizer, which say its BOS and EOS."""
    beside = [path.with_name(name) for name in SPECIAL_IDS] if path.suffix == ".json" else []
    return [file for file in beside if file.is_file()]


def read_config(path: Path) -> Any:
    """The content of a configuration beside a tokenizer.json; empty where there is none."""
    return read_validated(path, TokenizerConfig) if path.is_file() else {}


class Tiktoken(FastTokenizer):
    """Llama 3's `tokenizer.model` as Meta ships it, in tiktoken's format: tokens by rank, which is also their id."""

    def read(self, path: Path, tokenizers):
        ranks = read_ranks(path)
        self.n_words = len(ranks) + LLAMA3_SPECIAL_TOKENS
        self.bos_id, self.eos_id = len(ranks), len(ranks) + 1
        character = byte_characters()
        vocabulary = {token: "".join(character[byte] for byte in token) for token in ranks}
        merges = [(vocabulary[left], vocabulary[right]) for left, right in merge_order(ranks)]
        model = tokenizers.Tokenizer(tokenizers.models.BPE(
            {vocabulary[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(gguf.LLAMA3_WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        model.decoder = tokenizers.decoders.ByteLevel()
        model.add_special_tokens(list(LLAMA3_BOS_EOS))
        model.encode_special_tokens = True  # as the text that they look like
        return model


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is in tiktoken's format, by its first line."""
    with open(path, "rb") as file:
        return bool(RANKED.fullmatch(file.readline(1000).rstrip()))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens by rank. Raises UserError unless it is Llama 3's number of them: those of a file that was cut would pass,
    and give BOS another id."""
    lines = path.read_bytes().splitlines()
    ranks = {}
    for number, line in enumerate(lines):
        match = RANKED.fullmatch(line)
        token = base64.b64decode(match[1]) if match else b""
        if not match or int(match[2]) != number or token in ranks:
            raise UserError(f"{path} is broken in line {number + 1}: copy it again")
        ranks[token] = number
    if len(ranks) != LLAMA3_TOKENS:
        raise UserError(f"{path} has {counted(len(ranks), 'token')}, and Llama 3's {LLAMA3_TOKENS:,}: copy it again, "
                        "or take the tokenizer.json of another model")
    return ranks


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE (GPT-2's): printable ones for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merge_order(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """tiktoken merges the pair whose result has the lowest rank, however it is divided."""
    for token in ranks:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        yield from sorted((pair for pair in pairs if pair[0] in ranks and pair[1] in ranks),
                          key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


class GGUFBytePairs(FastTokenizer):
    """Byte-level BPE in the metadata of a GGUF file."""

    def __init__(self, path: Path, vocabulary: gguf.Vocabulary):
        self.vocabulary = vocabulary
        self.n_words, self.eos_id = len(vocabulary["tokens"]), vocabulary["eos_token_id"]
        super().__init__(path)

    def read(self, path: Path, tokenizers):
        return gguf.byte_level_bpe(self.vocabulary, tokenizers)


def open_gguf_tokenizer(path: Path) -> SentencePiece | FastTokenizer:
    vocabulary = gguf.read_vocabulary(open_file(path))
    model = (GGUFBytePairs(path, vocabulary) if vocabulary["model"] == "gpt2" else
             SentencePiece(path, gguf.sentencepiece_model(vocabulary)))
    model.bos_id = gguf.bos_id(vocabulary)
    return model


def open_model(path: Path) -> SentencePiece | FastTokenizer:
    """Opens a tokenizer of any format. Raises UserError where it is broken."""
    if is_gguf(path):
        return open_gguf_tokenizer(path)
    return (HuggingFaceTokenizer if path.suffix == ".json" else Tiktoken if is_tiktoken(path) else SentencePiece)(path)

"""Tokenizers: text that looks like a special token, models without BOS, Llama 3's file, and odd files."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers import Tokenizer as HuggingFace

from lavin import tokenizer_formats as module
from lavin.runtime.errors import UserError
from lavin.tokenizer import IMAGE_SLOT, Tokenizer
from lavin.tokenizer_formats import read_ranks
from lavin.weights.base import find_tokenizer
from tiny_weights import write_tiktoken

SPECIAL = ["<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
LINES = ["Question: Which pond is deeper?\nContext: N/A\nOptions: (A) one (B) two", "The answer is B. BECAUSE: it is.",
         "Image: N/A", "1 12 123 1234 don't I'LL    x\n\n\ty", "ababab aaaa lalala 水は漢字 é ü"]
ODD = ["</s>", "a </s> b", "</s></s>", "<s> <unk>", "x<|eot_id|>y", "<|begin_of_text|>", "<|end_of_text|>\n</s>",
       "<0x0A>", "[INST] <<SYS>>", "<|reserved_special_token_0|>", "\u200b\ufeff", "é水🙂e\u0301", "12345 007",
       "\r\n \r\n\n  \t ", "\0a\0", "  two  spaces  ", "'S don'T", "ſt", "½²", "\u00a0\u3000.", "a" * 3000]


@pytest.fixture(scope="module")
def bpe() -> HuggingFace:
    """Byte-level, with special tokens."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 9, vocab_size=400, special_tokens=SPECIAL)
    return HuggingFace.from_str(trained.to_str())


def write_json(folder: Path, tokenizer: HuggingFace, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory) -> Path:
    """A tokenizer.model in the format of Llama 3's, with few tokens."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 9, vocab_size=420)
    return write_tiktoken(tmp_path_factory.mktemp("llama3") / "tokenizer.model", trained,
                          (b"90", b"907", b" zebra"))  # no merge leads to the last


@pytest.fixture(scope="module", autouse=True)
def few_tokens(ranks_file):
    """Llama 3's number of tokens is checked: here it is that of the small file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LLAMA3_TOKENS", len(ranks_file.read_bytes().splitlines()))
        yield


@pytest.fixture(scope="module")
def by_kind(tokenizer, bpe, ranks_file, tmp_path_factory) -> dict[str, Tokenizer]:
    return {"sentencepiece": tokenizer, "tiktoken": Tokenizer(ranks_file),
            "json": Tokenizer(write_json(tmp_path_factory.mktemp("bpe"), bpe))}


KINDS = pytest.mark.parametrize("kind", ["sentencepiece", "json", "tiktoken"])


def special_ids(kind: str, tokenizer: Tokenizer) -> set[int]:
    """The ids of all special tokens, BOS and EOS among them."""
    n = {"sentencepiece": 3, "json": len(SPECIAL), "tiktoken": 0}[kind]
    return {*range(n), tokenizer.bos_id, tokenizer.eos_id, *range(tokenizer.n_words, tokenizer.n_words + 9)}


# --- Text stays text ---

@KINDS
@pytest.mark.parametrize("text", ODD)
def test_text_never_becomes_a_special_token(by_kind, kind, text):
    tokenizer = by_kind[kind]
    ids = tokenizer.encode(text)
    assert not special_ids(kind, tokenizer) & set(ids)
    assert tokenizer.decode(ids) == text
    example = tokenizer.example(f"Question: {text}\nResponse:", f"The answer is {text}.")
    assert example.ids.count(tokenizer.eos_id) == example.ids.count(tokenizer.bos_id) == 1


@KINDS
@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from([*SPECIAL, "<", "|", ">", "/s>", " ", "a", "é", "水", "\n"])).map("".join))
def test_no_mix_of_pieces_becomes_a_special_token(by_kind, kind, text):
    ids = by_kind[kind].encode(text)
    assert not special_ids(kind, by_kind[kind]) & set(ids) and by_kind[kind].decode(ids) == text


def test_eos_declared_as_a_word_is_special(bpe, tmp_path):
    words = HuggingFace.from_str(bpe.to_str())
    words.add_tokens([AddedToken("<end>", special=False)])
    tokenizer = Tokenizer(write_json(tmp_path, words, eos_token="<end>"))
    assert tokenizer.eos_id == words.token_to_id("<end>")
    ids = tokenizer.encode("the <end>")
    assert tokenizer.eos_id not in ids and tokenizer.decode([*ids, tokenizer.eos_id]) == "the <end>"


def test_other_added_words_keep_their_ids(bpe, tmp_path):
    """Phi's and Pythia's runs of spaces are such words: without them, the model would read tokens it never saw."""
    words = HuggingFace.from_str(bpe.to_str())
    words.add_tokens([AddedToken("    ", special=False, normalized=False)])
    ids = Tokenizer(write_json(tmp_path, words)).encode("a    b")
    assert words.token_to_id("    ") in ids and ids == words.encode("a    b", add_special_tokens=False).ids


def test_truncation_and_padding_left_in_the_file_are_off(bpe, tmp_path):
    cut = HuggingFace.from_str(bpe.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=16)
    tokenizer = Tokenizer(write_json(tmp_path, cut))
    for text in ("a", LINES[0]):
        assert tokenizer.decode(tokenizer.encode(text)) == text and 0 not in tokenizer.encode(text)


def test_an_id_that_the_library_would_change_is_refused(bpe, tmp_path):
    content = json.loads(bpe.to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 900, "content": "<far>"})
    path = write_json(tmp_path, bpe, eos_token="<far>")
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="added token <far> cannot have the id 900"):
        Tokenizer(path)


def test_ids_of_the_vocabulary_may_have_gaps(bpe, tmp_path):
    content = json.loads(bpe.to_str())
    content["model"]["vocab"]["far"] = 900
    path = write_json(tmp_path, bpe)
    path.write_text(json.dumps(content))
    assert Tokenizer(path).n_words == 901


# --- Without BOS ---

@pytest.fixture
def qwen_folder(bpe, tmp_path):
    """A folder such as Qwen's: transformers leaves BOS out, though config.json has an id."""
    write_json(tmp_path, bpe, bos_token=None, eos_token="<|end_of_text|>", tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    return tmp_path


def test_bos_is_left_out_where_the_model_has_none(qwen_folder):
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(qwen_folder / "tokenizer.json")
    theirs = PreTrainedTokenizerFast.from_pretrained(qwen_folder)
    assert tokenizer.bos_id is theirs.bos_token_id is None and tokenizer.eos_id == theirs.eos_token_id
    assert tokenizer.encode("A pond.", bos=True) == theirs("A pond.")["input_ids"]
    prefix = tokenizer.encode("Image: ")
    assert tokenizer.prefix(2) == [*prefix, IMAGE_SLOT, IMAGE_SLOT]
    example = tokenizer.example("Which pond?", " The old one.")
    assert tokenizer.decode(example.ids[:-1]) == "Image: N/AWhich pond? The old one."
    assert tokenizer.decode(example.ids[example.answer_start:]) == " The old one."
    assert example.ids[-1] == tokenizer.eos_id and None not in example.ids


def test_a_model_without_eos_is_refused(qwen_folder):
    (qwen_folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": null}')
    (qwen_folder / "config.json").unlink()
    with pytest.raises(UserError, match="names a EOS token"):
        Tokenizer(qwen_folder / "tokenizer.json")


def test_tokenizer_model_knows_its_own_bos_and_eos(tokenizer_file, tmp_path):
    """The first conversions of LLaMA have empty names and the ids 0 and 1 beside it."""
    shutil.copy(tokenizer_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "", "eos_token": ""}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_an_added_token_counts_as_a_word(bpe, tmp_path):
    """A base without a row for it is therefore refused (tests/weights/test_base_weights.py)."""
    padded = HuggingFace.from_str(bpe.to_str())
    padded.add_special_tokens(["[PAD]"])
    assert Tokenizer(write_json(tmp_path, padded)).n_words == bpe.get_vocab_size() + 1


# --- Llama 3's tokenizer.model ---

# of Meta's llama3/tokenizer.py
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def oracle(ranks_file):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("llama3", pat_str=WORDS, mergeable_ranks=read_ranks(ranks_file),
                             special_tokens={})


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.text("ab lx1'sS\n\r\t é水<|>_", max_size=60)))
def test_ids_equal_those_of_tiktoken(by_kind, oracle, text):
    ids = by_kind["tiktoken"].encode(text)
    assert ids == oracle.encode(text, disallowed_special=()) and by_kind["tiktoken"].decode(ids) == text


def test_odd_texts_equal_tiktoken(by_kind, oracle):
    for text in [*ODD, *LINES, "a zebra, zebras 907 9079", "\x85\x1c\u2028 \u180e x", "ᾳͅ İ ß ſ K", "٣٤٥٦ Ⅷ ①"]:
        assert by_kind["tiktoken"].encode(text) == oracle.encode(text, disallowed_special=()), text


def test_special_tokens_follow_the_ranks(by_kind, ranks_file):
    n, tokenizer = module.LLAMA3_TOKENS, by_kind["tiktoken"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (n, n + 1, n + 256)
    ids = tokenizer.encode("The pond.", bos=True, eos=True)
    assert ids[0] == n and ids[-1] == n + 1 and tokenizer.decode([*ids, n + 9]) == "The pond."
    assert tokenizer.decode(tokenizer.encode("水")[:-1]) in ("\ufffd", "水"[:0])  # half a character, as others write it


def test_metas_folder_is_read_as_downloaded(ranks_file, tmp_path):
    (tmp_path / "Llama3-8B").mkdir()
    shutil.copy(ranks_file, tmp_path / "Llama3-8B")
    path = find_tokenizer(str(tmp_path), "Llama3-8B")
    assert Tokenizer(path).bos_id == module.LLAMA3_TOKENS


@pytest.mark.parametrize("damage, message", [
    (lambda lines: lines[:-1], "copy it again"),  # cut at a line's end: only the number tells
    (lambda lines: [*lines[:-1], lines[-1][:-2]], "is broken in line"),
    (lambda lines: [*lines[:9], b"no token", *lines[10:]], "is broken in line 10"),
    (lambda lines: [*lines[:9], *lines[10:]], "is broken in line 10"),
    (lambda lines: [*lines[:9], lines[8].split()[0] + b" 9", *lines[10:]], "is broken in line 10"),
    (lambda lines: [*lines, b"emViZWJlcg== %d" % len(lines)], "or take the tokenizer.json of another model")])
def test_damaged_ranks_are_refused(ranks_file, tmp_path, damage, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(damage(ranks_file.read_bytes().splitlines())))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nothing", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
                                     b"<!DOCTYPE html>", b"\0" * 99])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            Tokenizer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

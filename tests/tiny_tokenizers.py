"""Small tokenizer files of each kind that LaVIN reads, of which some byte-level ones have tokens such as `:The` and
`.\\n`, which join what is tokenized apart."""

import json
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tiny_gguf import sentencepiece_vocabulary, write_gguf
from tiny_weights import write_tiktoken

SPECIAL = ["<unk>", "<s>", "</s>"]
LINES = ["Question: Which pond is deeper?\nContext: N/A\nOptions: (A) one (B) two\nResponse:The answer is A.",
         "BECAUSE: it is. 1 12 123 don't I'LL  x\n\n\ty 水は漢字 é ü",
         "Instruction: Is it a pond?\nResponse:Yes, it is.",
         *(f"The answer is {letter}.\n" for letter in "ABCDE")]
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
NO_MODEL = SimpleNamespace(state_dict=dict, config=SimpleNamespace(
    num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, vocab_size=8,
    rms_norm_eps=1e-6, rope_parameters={"rope_theta": 1e4}))


def byte_level(words=None, spaced: bool = False) -> Tokenizer:
    """Trains a byte-level tokenizer. words: the pre-tokenizer that divides text into words before the bytes; GPT-2's
    come last where it is None or Digits. spaced: whether a text gets a space before it, as some converters write."""
    is_gpt2 = not isinstance(words, pre_tokenizers.Split)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([
        *([words] if words else []), pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=is_gpt2)])
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(LINES * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return model


def qwen() -> Tokenizer:
    model = byte_level(pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"))
    model.normalizer = normalizers.NFC()
    return model


def llama(sentencepiece_file: Path, style: str) -> Tokenizer:
    """The pieces of a SentencePiece model as transformers has written LLaMA's tokenizer.json over the years."""
    entries = sentencepiece_vocabulary(sentencepiece_file)
    ids = {token: i for i, token in enumerate(entries["tokens"])}
    pairs = [(ids[piece], piece[:cut], piece[cut:]) for piece in ids for cut in range(1, len(piece))
             if piece[:cut] in ids and piece[cut:] in ids]
    by_score = sorted(pairs, key=lambda pair: (-entries["scores"][pair[0]], ids[pair[1]], ids[pair[2]]))
    model = Tokenizer(models.BPE(ids, [(left, right) for _, left, right in by_score], unk_token="<unk>", fuse_unk=True,
                                 byte_fallback=True))
    if style == "normalizer":
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=style, split=False)
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    model.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return model


def write_json(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder / "tokenizer.json"


def gguf_entries(tokenizer: Tokenizer, words: str) -> dict:
    """A byte-level tokenizer as metadata below `tokenizer.ggml`. words: the name of its rule."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": words, "tokens": tokens, "merges": merges, "bos_token_id": 1, "eos_token_id": 2,
            "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))}


def write_all(folder: Path, sentencepiece_file: Path) -> dict[str, Path]:
    """The files by kind."""
    folder.mkdir(exist_ok=True)
    plain = qwen()
    plain_bytes = Tokenizer(models.BPE({token: i - 3 for token, i in plain.get_vocab().items() if i >= 3}, []))
    models_of_json = {"qwen": qwen(), "smollm2": byte_level(pre_tokenizers.Digits(individual_digits=True)),
                      "spaced byte-level": byte_level(spaced=True),
                      **{f"llama, {style}": llama(sentencepiece_file, style)
                         for style in ("normalizer", "first", "always")}}
    gguf = {f"gguf, {words}": gguf_entries(plain, words) for words in ("gpt-2", "llama-bpe", "qwen2", "smollm")}
    gguf["gguf, llama"] = sentencepiece_vocabulary(sentencepiece_file)
    return {"sentencepiece": sentencepiece_file, "tiktoken": write_tiktoken(folder / "tokenizer.model", plain_bytes),
            **{kind: write_json(folder / kind, model) for kind, model in models_of_json.items()},
            **{kind: write_gguf(folder / f"{kind}.gguf", NO_MODEL, entries) for kind, entries in gguf.items()}}

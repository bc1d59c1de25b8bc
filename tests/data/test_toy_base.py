"""The toy base: files in the formats that train.py reads, made from the train split only."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from killed import killed_after
from lavin.mm_adapter import AdapterConfig
from lavin.tokenizer import Tokenizer
from lavin.weights.load import load_base
from tools import make_toy_base
from tools.make_mini_scienceqa import write_mini_scienceqa
from util.data.datasets import load_scienceqa


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    write_mini_scienceqa(root, {"train": 160, "val": 100, "test": 40}, 0)
    return root


def build(data_root: Path, out: Path, vit_only: bool = False, split: str = "train") -> Path:
    """Run make_toy_base.main with only a few training steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_toy_base, "LLAMA_STEPS", 3)
        patch.setattr(make_toy_base, "VIT_EPOCHS", 2)
        make_toy_base.main(Namespace(data_root=str(data_root), out=out, seed=0, vit_only=vit_only, split=split))
    return out


@pytest.fixture(scope="module")
def toy(mini, tmp_path_factory):
    return build(mini, tmp_path_factory.mktemp("weights") / "toy")


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer(toy / "tokenizer.model")


def weights(toy: Path) -> dict[str, torch.Tensor]:
    llama = torch.load(toy / "consolidated.00.pth", weights_only=True)
    return {**llama, **load_file(toy / "vit" / "model.safetensors")}


def vocabulary(toy: Path) -> list[tuple[str, float]]:
    """The tokens and their scores; tokenizer.model also contains the path of its training data, which differs."""
    model = SentencePieceProcessor(model_file=str(toy / "tokenizer.model"))
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]


def test_build_is_reproducible_and_does_not_read_val_and_test(mini, toy, tmp_path):
    """A build from a copy whose val and test splits have other texts and captions, and no images, is identical."""
    copy = tmp_path / "mini"
    shutil.copytree(mini, copy)
    for split in ("val", "test"):
        shutil.rmtree(copy / "images" / split)
    problems = json.loads((copy / "problems.json").read_text())
    captions = json.loads((copy / "captions.json").read_text())
    for qid, problem in problems.items():
        if problem["split"] != "train":
            problem.update(question="Zebras?", choices=["quartz", "jasper"], answer=0, lecture="Quokka.", solution="")
            captions["captions"][qid] = "A quokka with a zebra."
    (copy / "problems.json").write_text(json.dumps(problems))
    (copy / "captions.json").write_text(json.dumps(captions))

    again = build(copy, tmp_path / "toy")
    assert vocabulary(again) == vocabulary(toy)
    first, second = weights(toy), weights(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_vit_only_writes_the_same_vit_and_nothing_else(mini, toy, tmp_path):
    alone = build(mini, tmp_path / "toy", vit_only=True)
    first, second = (load_file(base / "vit" / "model.safetensors") for base in (toy, alone))
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    assert files == {Path("vit/config.json"), Path("vit/model.safetensors")}


def test_split_chooses_what_is_learned_from(mini, toy, tmp_path):
    other = build(mini, tmp_path / "toy", vit_only=True, split="val")
    first, second = (load_file(base / "vit" / "model.safetensors") for base in (toy, other))
    assert not torch.equal(first["patch_embed.proj.weight"], second["patch_embed.proj.weight"])


def test_tokenizer_has_llamas_special_tokens_and_bytes(toy, tokenizer):
    model = SentencePieceProcessor(model_file=str(toy / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.is_byte(model.piece_to_id("<0x0A>"))
    text = "Question: Where?\nContext: 372 €\nOptions: (A) here (B) 東\nResponse:"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert model.piece_to_id("<0x0A>") in tokenizer.encode("a\nb")


def test_digits_are_single_tokens(mini, tmp_path):
    data = load_scienceqa(str(mini), "train", str(mini / "captions.json"))
    for problem in data.problems.values():
        problem["question"] += " 1984"
    make_toy_base.train_tokenizer(data, tmp_path / "tokenizer.model")
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokens = [model.id_to_piece(i) for i in range(model.vocab_size()) if not model.is_byte(i)]
    assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))


def test_each_letter_after_a_space_is_one_token(tokenizer):
    prefix = tokenizer.encode("The answer is")
    answers = [tokenizer.encode(f"The answer is {letter}") for letter in "ABCDE"]
    assert all(ids[:-1] == prefix for ids in answers) and len({ids[-1] for ids in answers}) == 5


def test_load_base_loads_it(toy):
    params = json.loads((toy / "params.json").read_text())
    assert params["vocab_size"] == -1
    model, tokenizer = load_base(str(toy.parent), toy.name, str(toy / "vit"), AdapterConfig(), torch.device("cpu"),
                                 torch.float32)
    assert len(model.vision.vit.blocks) == 6
    saved = weights(toy)
    assert saved["tok_embeddings.weight"].shape == (tokenizer.n_words, params["dim"])
    assert torch.equal(model.llama.layers[0].attention.wq.weight, saved["layers.0.attention.wq.weight"])
    assert torch.equal(model.vision.vit.blocks[5].attn.qkv.weight, saved["blocks.5.attn.qkv.weight"])


def test_lessons_contain_the_caption_and_weight_the_letter(mini, tokenizer):
    data = load_scienceqa(str(mini), "train", str(mini / "captions.json"))
    for qid, problem in data.problems.items():
        ids, loss_weights = make_toy_base.lesson(data, qid, tokenizer)
        assert len(ids) == len(loss_weights) and ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        start = loss_weights.index(1.0)  # the prompt's loss weight is 0
        prompt, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
        letter = "ABCDE"[problem["answer"]]
        assert answer.startswith(f"The answer is {letter}.")
        weighted = [i for i, weight in zip(ids, loss_weights, strict=True) if weight == make_toy_base.LETTER_WEIGHT]
        assert tokenizer.decode(weighted).strip() == letter
        assert problem["question"] in prompt and all(choice in prompt for choice in problem["choices"])
        assert data.captions.get(qid, "") in prompt


def test_where_the_weights_are_all_is_whole_whenever_the_builder_was_killed(mini, toy, tmp_path, monkeypatch):
    """The files that the scripts look for; also where it writes over another base."""
    llama, vit = tmp_path / "consolidated.00.pth", tmp_path / "vit" / "model.safetensors"
    with monkeypatch.context() as patch:  # training takes long
        patch.setattr(make_toy_base, "fit", lambda *arguments: None)
        for n_files in range(4):  # the ViT's two, params.json, weights; SentencePiece writes its own
            build(mini, tmp_path)
            with killed_after(n_files):
                build(mini, tmp_path)
            assert not llama.exists() and vit.exists() == (n_files >= 2)

"""The folder that export_hf.py writes, loaded by transformers, against LaVIN."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import reference
from lavin.generation.generate import generate
from lavin.mm_adapter import AdapterConfig
from lavin.model import pack
from lavin.runtime.errors import UserError
from lavin.tokenizer import Example, Tokenizer
from lavin.weights.load import load_base
from tiny import randomise_adapters, save_adapters
from tiny_weights import HF_VARIANTS, write_hugging_face, write_tiktoken
from tools import export_hf
from util.data.images import load_image

ADAPTER = {"adapter_dim": 4, "adapter_scale": 0.7, "temperature": 2.0, "hidden_proj": 8}
PROMPT = "Question: Which pond is deeper?\nContext: N/A\nOptions: (A) one (B) two\nResponse:"


@pytest.fixture(scope="module", params=["attn", "block"])
def trained(request, base, tmp_path_factory):
    """A model with random adapters, its tokenizer, and its checkpoint."""
    adapter = AdapterConfig(adapter_type=request.param, **ADAPTER)
    model, tokenizer = load_base(str(base.weights), "tiny", str(base.vision), adapter, torch.device("cpu"),
                                 torch.float32)
    torch.manual_seed(3)
    randomise_adapters(model)
    path = tmp_path_factory.mktemp("run") / "checkpoint-0.pth"
    save_adapters(model, path, epoch=0, flags={})
    return model.eval(), tokenizer, path


def export(base, path, out, *flags):
    from transformers import LlamaForCausalLM
    export_hf.main(export_hf.get_args_parser().parse_args([
        *base.flags, "--adapter_path", str(path), "--out", str(out), "--precision", "fp32", *map(str, flags)]))
    model, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or mismatched tensors
    return model.eval()


@torch.no_grad()
def test_logits_and_answers_without_images(base, trained, tmp_path, monkeypatch):
    model, tokenizer, path = trained
    monkeypatch.setattr("util.shared_base.speed_up", None)  # the export must not call it: it fuses weight matrices
    theirs = export(base, path, tmp_path / "hf")
    example = tokenizer.example(PROMPT)
    ids = torch.tensor(example.ids)[None]
    expected = reference.logits(model, [example])[0, 1:]  # without the modality token
    torch.testing.assert_close(theirs(ids).logits[0], expected, atol=1e-4, rtol=1e-4)
    output_ids = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode([i for i in output_ids[0, len(example.ids):].tolist() if i != tokenizer.eos_id])
    assert answer and answer == generate(model, tokenizer, [example], 12)[0]


def test_exported_tokenizer(base, trained, tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models through protobuf")
    from transformers import AutoTokenizer
    _, tokenizer, path = trained
    export(base, path, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    for text in ("Image: N/A", PROMPT):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)
    assert theirs.decode(tokenizer.encode(PROMPT)) == PROMPT


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json as SmolLM2's: nothing in it adds BOS, and a space belongs to the word behind it."""
    from tokenizers import ByteLevelBPETokenizer
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([PROMPT, "Image: N/A", "The answer is A. BECAUSE: it is."] * 9, vocab_size=380,
                                special_tokens=["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("byte_level")
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}))
    return folder / "tokenizer.json"


@pytest.fixture(params=["tokenizer.model", "tokenizer.json of a tokenizer.model", "byte-level", "byte-level, no BOS",
                        "byte-level, BOS added", "byte-level, named otherwise", "tiktoken"])
def tokenizer_path(request, base, byte_level, tmp_path, monkeypatch):
    source, name = base.weights / "tokenizer.model", request.param
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models through protobuf")
    if name == "tokenizer.model":
        return source
    folder = tmp_path / "base"
    if name == "tokenizer.json of a tokenizer.model":
        from transformers import LlamaTokenizer
        LlamaTokenizer.from_pretrained(source.parent).save_pretrained(folder)
        return folder / "tokenizer.json"
    if name == "tiktoken":
        from tokenizers import ByteLevelBPETokenizer
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator([PROMPT, "Image: N/A"] * 9, vocab_size=380)
        monkeypatch.setattr("lavin.tokenizer_formats.LLAMA3_TOKENS", trained.get_vocab_size())
        return write_tiktoken(tmp_path / "tokenizer.model", trained)
    shutil.copytree(byte_level.parent, folder)
    path = folder / "tokenizer.json"
    if name == "byte-level, no BOS":
        (folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    if name == "byte-level, BOS added":  # as Llama 3's, and EOS besides
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": {
            "type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}}))
    return path.rename(folder / "other.json") if name == "byte-level, named otherwise" else path


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3"])
def test_an_exported_tokenizer_gives_the_ids_of_training(tokenizer_path, tmp_path, model_type):
    from transformers import AutoTokenizer
    tokenizer = Tokenizer(tokenizer_path)
    theirs = {}
    for modality in export_hf.MODALITIES:
        (tmp_path / modality).mkdir()
        export_hf.write_tokenizer(tmp_path / modality, tokenizer, modality)
        (tmp_path / modality / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs[modality] = AutoTokenizer.from_pretrained(tmp_path / modality)
        assert theirs[modality].bos_token_id == tokenizer.bos_id and theirs[modality].eos_token_id == tokenizer.eos_id
        assert theirs[modality].pad_token_id == tokenizer.eos_id and theirs[modality].padding_side == "left"
    for text in (PROMPT, "Image: N/A", "a </s> b <s>", "</s>", "<|begin_of_text|>", "x  y\n\n z", "水🙂"):
        assert theirs["text"](text)["input_ids"] == tokenizer.encode(text, bos=True)
        assert theirs["text"](f"Image: N/A {text}")["input_ids"] == tokenizer.example(text).ids
        assert theirs["image"](text)["input_ids"] == tokenizer.encode(text)  # behind inputs_embeds, which hold BOS
    assert theirs["text"].decode(tokenizer.encode(PROMPT)) == PROMPT


def assert_same_answers(folder, model, tokenizer, prompts) -> None:
    """Greedy, from a text on, by a pipeline of transformers, alone and in batches, and by ours."""
    from transformers import pipeline
    chat = pipeline("text-generation", model=str(folder), device="cpu")
    alone, answers = [], []
    for prompt in prompts:
        example = tokenizer.example(prompt)
        # as ids: the two libraries write the broken UTF-8 of a random model in different ways
        alone += chat(f"Image: N/A {prompt}", max_new_tokens=16, do_sample=False, return_tensors=True)
        ids = alone[-1]["generated_token_ids"]
        assert list(ids[:len(example.ids)]) == example.ids
        answers.append(tokenizer.decode([i for i in ids[len(example.ids):] if i != tokenizer.eos_id]))
        assert answers[-1] == generate(model, tokenizer, [example], 16)[0]
    assert len(set(answers)) == len(prompts) and all(answers)
    batches = chat([f"Image: N/A {prompt}" for prompt in prompts], batch_size=2, max_new_tokens=16, do_sample=False,
                   return_tensors=True)
    assert [without_padding(found, tokenizer) for found, in batches] == [without_padding(found, tokenizer)
                                                                         for found in alone]
    assert len({len(found["generated_token_ids"]) for found in alone}) > 1


def without_padding(found: dict, tokenizer) -> list[int]:
    """Shorter texts of a batch begin with EOS, and shorter answers end with it."""
    ids = list(found["generated_token_ids"])
    while tokenizer.eos_id in (ids[0], ids[-1]):
        ids.pop(0 if ids[0] == tokenizer.eos_id else -1)
    return ids


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_pipeline_of_transformers_gives_our_answer(base, byte_level, tmp_path, kind):
    path, folder = base.weights / "tokenizer.model" if kind == "sentencepiece" else byte_level, tmp_path / "base"
    write_hugging_face(folder, path, vocab_size=Tokenizer(path).n_words)
    if kind == "byte-level":
        (folder / "tokenizer.model").unlink()
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    model, tokenizer = load_base("nowhere", str(folder), str(base.vision), AdapterConfig(**ADAPTER),
                                 torch.device("cpu"), torch.float32)
    randomise_adapters(model.eval())
    save_adapters(model, tmp_path / "checkpoint-0.pth", epoch=0, flags={})
    export(base, tmp_path / "checkpoint-0.pth", tmp_path / "hf", "--llm_model", folder)
    assert_same_answers(tmp_path / "hf", model, tokenizer,
                        (PROMPT, "Instruction: Name the ponds.\nResponse:", "Question: a </s> b?\nResponse:"))


@torch.no_grad()
def test_logits_with_an_image(base, trained, scienceqa, tmp_path):
    """--modality image: the saved embeddings of the image, followed by those of the prompt; in several shards."""
    from safetensors.torch import load_file
    model, tokenizer, path = trained
    image_path = scienceqa / "images" / "train" / "101" / "image.png"
    export_hf.SHARD_BYTES, default = 20_000, export_hf.SHARD_BYTES
    try:
        theirs = export(base, path, tmp_path / "hf", "--modality", "image", "--pictures", image_path)
    finally:
        export_hf.SHARD_BYTES = default
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    image_embeds = load_file(tmp_path / "hf" / "image.inputs_embeds.safetensors")["inputs_embeds"]
    ids = tokenizer.encode(PROMPT)
    inputs_embeds = torch.cat((image_embeds, theirs.get_input_embeddings()(torch.tensor(ids))))[None]
    example = tokenizer.example(PROMPT, None, load_image(image_path, model.vision.image_size))
    assert len(example.ids) == inputs_embeds.shape[1]
    expected = reference.logits(model, [example])[0, 1:]
    torch.testing.assert_close(theirs(inputs_embeds=inputs_embeds).logits[0], expected, atol=1e-4, rtol=1e-4)
    text = Example(tokenizer.example(PROMPT).ids, 0)
    difference = theirs(torch.tensor(text.ids)[None]).logits[0] - reference.logits(model, [text])[0, 1:]
    assert difference.abs().max() > 0.1  # this export is for prompts with an image only


@torch.no_grad()
def test_pictures_of_one_name_keep_apart(base, trained, scienceqa, tmp_path):
    """ScienceQA's are all image.png: their folder, the question's id, tells them apart."""
    from safetensors.torch import load_file
    model, tokenizer, path = trained
    folder = scienceqa / "images" / "train"
    pictures = {qid: folder / qid / "image.png" for qid in ("101", "103", "105")}
    export(base, path, tmp_path / "hf", "--modality", "image", "--pictures", *pictures.values())
    assert {file.name for file in (tmp_path / "hf").glob("*.inputs_embeds.safetensors")} == {
        f"{qid}_image.inputs_embeds.safetensors" for qid in pictures}
    for qid, picture in pictures.items():
        image_embeds = load_file(tmp_path / "hf" / f"{qid}_image.inputs_embeds.safetensors")["inputs_embeds"]
        example = tokenizer.example(PROMPT, None, load_image(picture, model.vision.image_size))
        torch.testing.assert_close(image_embeds, model.embed(pack([example]))[:len(image_embeds)])


@pytest.mark.parametrize("paths, names", [
    (["a/x.png", "b/y.jpg"], ["x", "y"]), (["a/x.png", "b/x.jpg"], ["a_x", "b_x"]), (["x/y.png"], ["y"]),
    (["a/x.png", "b/x.png", "b/y.png"], ["a_x", "b_x", "b_y"]),
    (["train/7/x.png", "test/7/x.png"], ["train_7_x", "test_7_x"]), (["b/../a/x.png", "./b/x.png"], ["a_x", "b_x"])])
def test_names_of_pictures(paths, names):
    """The stem, behind as many folders as tell all apart."""
    assert export_hf.picture_names([Path(path) for path in paths]) == names


def test_export_of_a_base_from_hugging_face(base, tokenizer_file, tmp_path):
    """The base has Llama 3's RoPE scaling, wide heads and tied embeddings."""
    write_hugging_face(tmp_path / "llama3", tokenizer_file, **HF_VARIANTS["llama3"], tie_word_embeddings=True)
    flags = ["--llm_model", tmp_path / "llama3", "--vision_model", base.vision]
    model, tokenizer = load_base("nowhere", str(tmp_path / "llama3"), str(base.vision), AdapterConfig(**ADAPTER),
                                 torch.device("cpu"), torch.float32)
    randomise_adapters(model)
    save_adapters(model, tmp_path / "checkpoint-0.pth", epoch=0, flags={})
    theirs = export(base, tmp_path / "checkpoint-0.pth", tmp_path / "hf", *flags)
    ids = torch.randint(480, (70,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.eval().llama.output(model.hidden_states(pack([Example(ids.tolist(), 70)])))
        torch.testing.assert_close(theirs(ids[None]).logits[0], ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flags, words", [
    (["--pictures", "a.png"], "--modality image"), (["--bits", "fp8"], "--bits"),
    (["--model_parallel_size", "2"], "--model_parallel_size"),
    (["--modality", "image", "--pictures", "a/x.png", "a/../a/x.png"], "a/x.png .*: rename one"),
    (["--modality", "image", "--pictures", "a/x.png", "a/x.jpg"], "a/x.jpg .*: rename one"),
    (["--modality", "image", "--pictures", "no.png"], "no.png")])
def test_invalid_flags(base, trained, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        export(base, trained[2], tmp_path / "hf", *flags)
    assert not (tmp_path / "hf").exists() or not list((tmp_path / "hf").iterdir())


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_others_can_read_an_export_as_the_umask_lets_them(base, trained, tmp_path, umask, mode):
    """This holds also for the copy of a tokenizer that only its owner may read."""
    private = shutil.copy(base.weights / "tokenizer.model", tmp_path)
    Path(private).chmod(0o600)
    before = os.umask(umask)
    try:
        export(base, trained[2], tmp_path / "hf", "--tokenizer_path", private)
    finally:
        os.umask(before)
    files = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "tokenizer.model", "config.json"} <= files.keys() and {*files.values()} == {mode}


def test_existing_model_is_not_overwritten(base, trained, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model"):
        export(base, trained[2], tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {}

"""Instruction tuning: data_processing.py on small files in the published formats, and training on its output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import reference
import train
from lavin.mm_adapter import AdapterConfig
from lavin.runtime.errors import UserError
from lavin.tokenizer import IMAGE_SLOT
from lavin.weights.load import load_base
from tiny import IMAGE_SIZE, ROOT
from tools import data_processing
from util.data.examples import load_examples, load_training_data
from util.data.images import LazyImage, decode_images, load_image
from util.data.instructions import Instructions
from util.data.settings import TrainingData


def human_and_gpt(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ALPACA = [{"instruction": "Name a pond.", "input": "", "output": "The north pond."},
          {"instruction": "Sort.", "input": "pond, map", "output": "map,\npond"}]
CONVERSATION = [{"id": "1", "image": "1.jpg", "conversations": human_and_gpt(
    "What is it?\n<image>", "A pond.", "Is it  deep?", "No.")}]
DETAIL = [{"id": "2", "image": "2.jpg", "conversations": human_and_gpt("<image>\nDescribe it.", "A map of a pond.")}]
COMPLEX = [{"id": "1", "image": "1.jpg", "conversations": human_and_gpt("Why?\n<image>", "It rained.")}]
EXPECTED = [  # prompt, answer, image
    ("Instruction: Name a pond.\nResponse:", "The north pond.", None),
    ("Instruction: Sort. pond, map\nResponse:", "map,\npond", None),
    ("Instruction: Why?\nResponse:", "It rained.", "1.jpg"),
    ("Instruction: Describe it.\nResponse:", "A map of a pond.", "2.jpg"),
    ("Instruction: What is it?\nResponse:", "A pond.", "1.jpg"),
    ("Instruction: Is it deep?\nResponse:", "No.", "1.jpg")]


def write(root: Path, **changes) -> Path:
    files = {"alpaca_data": ALPACA, "conversation_58k": CONVERSATION, "detail_23k": DETAIL,
             "complex_reasoning_77k": COMPLEX, **changes}
    for name, items in files.items():
        (root / f"{name}.json").write_text(json.dumps(items))
    folder = root / "images" / "train2014"
    folder.mkdir(parents=True)
    for i in (1, 2):
        Image.effect_noise((40, 30), 60 * i).convert("RGB").save(folder / f"COCO_train2014_{i}.jpg")
    return root


def process(root: Path) -> str:
    """Run data_processing.py in a subprocess; returns its output."""
    done = subprocess.run([sys.executable, "-m", "tools.data_processing", "--data_root", str(root)], cwd=ROOT,
                          capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.fixture
def root(tmp_path):
    data_processing.process(write(tmp_path), tmp_path / "all_data.json")
    return tmp_path


def settings(root: Path, **changes) -> TrainingData:
    return TrainingData(data_root=str(root), do_pretrain=True, max_seq_len=100, **changes)


def load(settings: TrainingData, tokenizer):
    return load_examples(load_training_data(settings), settings, tokenizer, 16, n_prompt=6, threads=4)


def test_each_question_becomes_one_record(root):
    records = json.loads((root / "all_data.json").read_text())["all"]
    assert [(r["instruction"], r["answer"], r["image"]) for r in records] == EXPECTED
    assert [r["image_source"] for r in records] == [None, None] + ["mscoco"] * 4
    assert len({r["qid"] for r in records}) == 6


def test_malformed_records_are_named_and_counted(tmp_path):
    turns = DETAIL[0]["conversations"]
    write(tmp_path, alpaca_data=[{"instruction": "No output."}, *ALPACA, 7, {**ALPACA[0], "output": None}],
          detail_23k=[{"image": "2.jpg", "conversations": turns[:1]}, {"image": "2.jpg", "conversations": turns[::-1]},
                      {"conversations": turns}, {"image": 3, "conversations": turns}, *DETAIL,
                      {"image": "2.jpg", "conversations": human_and_gpt("<image>", "A map.")}])
    printed = process(tmp_path)
    for part in ("alpaca_data.json, record 0: lacks output", "alpaca_data.json, record 3: ",
                 "alpaca_data.json, record 4: its answer is no text",
                 "detail_23k.json, record 0: its turns", "detail_23k.json, record 1: its turns",
                 "detail_23k.json, record 2: lacks image", "detail_23k.json, record 3: its image",
                 "detail_23k.json, record 5: its question or answer is empty", "6 records, 8 left out"):
        assert part in printed
    records = json.loads((tmp_path / "all_data.json").read_text())["all"]
    assert [(r["instruction"], r["answer"], r["image"]) for r in records] == EXPECTED


TURNS = DETAIL[0]["conversations"]


@pytest.mark.parametrize("content, words", [
    ([{"image": ["2.jpg"], "conversations": TURNS}], "record 0: its image is not a file name"),
    ([{"image": "coco/train2017/2.jpg", "conversations": TURNS}], "record 0: its image is not a file name"),
    ([{"image": "2.jpg", "conversations": [{"from": "system", "value": "Be kind."}, *TURNS]}], "do not alternate"),
    ([{"image": "2.jpg", "conversations": [{"role": role, "content": "Why?"} for role in ("user", "assistant")]}],
     "record 0: lacks from"),
    ({"data": DETAIL}, "holds no list of records"), ("\ufeff[]", "BOM"), ("{}\n{}", "Extra data")])
def test_records_as_other_programs_write_them(tmp_path, content, words):
    (tmp_path / "detail_23k.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"detail_23k.json.*{words}"):
        data_processing.process(tmp_path, tmp_path / "all_data.json")


def test_missing_and_broken_files_raise_one_line_errors(tmp_path):
    out = tmp_path / "all_data.json"
    with pytest.raises(UserError, match="has none of alpaca_data.json"):
        data_processing.process(tmp_path, out)
    (tmp_path / "alpaca_data.json").write_text("[{")
    assert process(tmp_path).startswith("data_processing.py: error: ") and not out.exists()
    (tmp_path / "alpaca_data.json").write_text('[{"instruction": "No output."}]')
    with pytest.raises(UserError, match="record 0: lacks output"):
        data_processing.process(tmp_path, out)
    (tmp_path / "alpaca_data.json").write_text(json.dumps(ALPACA))
    assert data_processing.process(tmp_path, out) == (2, [])  # one of the four files is enough


def test_examples_have_prompt_answer_and_an_undecoded_image(root, tokenizer):
    by_record = load(settings(root), tokenizer)
    assert list(by_record) == [f"record {i}" for i in range(6)]
    examples = list(by_record.values())
    for example, (prompt, answer, image) in zip(examples, EXPECTED, strict=True):
        assert tokenizer.decode(list(example.ids[example.answer_start:])) == answer
        assert list(example.ids) == tokenizer.example(prompt, answer, image, 6).ids
        assert example.image == (image and LazyImage(root / "images" / "train2014" / f"COCO_train2014_{image}", 16))
    decoded = decode_images(examples)
    assert [example.ids for example in decoded] == [example.ids for example in examples]
    assert decode_images(decoded) == decoded
    for example, (*_, image) in zip(decoded, EXPECTED, strict=True):
        if image:
            path = root / "images" / "train2014" / f"COCO_train2014_{image}"
            assert torch.equal(example.image, load_image(path, 16)) and IMAGE_SLOT in example.ids
        else:
            assert example.image is None


def test_bad_images_are_named_or_skipped(root, tokenizer):
    path = root / "images" / "train2014" / "COCO_train2014_2.jpg"
    for fault, break_file in (("does not decode", lambda: path.write_bytes(path.read_bytes()[:80])),
                              ("is missing", path.unlink)):
        break_file()
        with pytest.raises(UserError, match=f"COCO_train2014_2.jpg {fault}.* \\(1 of 2 in all\\): "):
            load(settings(root), tokenizer)
        assert list(load(settings(root, skip_bad=True), tokenizer)) == [f"record {i}" for i in (0, 1, 2, 4, 5)]


def test_other_files_are_refused(root):
    for name in ("alpaca_data.json", "none.json"):  # the published command names alpaca_data.json
        with pytest.raises(UserError, match=f"{name}.* with --data_path"):
            load_training_data(settings(root, data_path=str(root / name)))
    (root / "all_data.json").write_text('{"all": [{"instruction": "x"}]}')
    with pytest.raises(UserError, match="all_data.json: record 0: answer: is missing .*-m tools.data_processing"):
        load_training_data(settings(root))


def test_training_on_texts_and_images(base, root, tmp_path, tokenizer):
    """The first loss equals the reference loss of the untrained model; then it falls."""
    args = train.get_args_parser().parse_args([
        *base.flags, "--data_root", str(root), "--output_dir", str(tmp_path / "run"), "--device", "cpu",
        "--do_pretrain", "--batch_size", "6", "--epochs", "9", "--warmup_epochs", "0", "--lr", "3e-2",
        "--max_seq_len", "100", "--dropout_prob", "0"])
    train.main(args)
    losses = [json.loads(line)["train_closs"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    examples = []
    for prompt, answer, image in EXPECTED:
        path = root / "images" / "train2014" / f"COCO_train2014_{image}"
        examples.append(tokenizer.example(prompt, answer, load_image(path, IMAGE_SIZE) if image else None))
    torch.manual_seed(args.seed)
    model, _ = load_base(str(base.weights), "tiny", str(base.vision), AdapterConfig(dropout_prob=0.0),
                         torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = reference.logits(model, examples)
    # the modality token shifts positions by one: position `at` predicts token `at`
    log_probabilities = [logits[i, at].log_softmax(-1)[example.ids[at]].item() for i, example in enumerate(examples)
                         for at in range(example.answer_start, len(example.ids))]
    assert losses[0] == pytest.approx(-sum(log_probabilities) / len(log_probabilities), abs=1e-5)
    assert losses[-1] < losses[0] - 0.4


def test_the_fingerprint_of_instructions_sees_every_part_of_a_record(tmp_path):
    record = {"instruction": "Instruction: Why?\nResponse:", "answer": "So.", "image": "1.jpg"}
    changes = [{}, {"instruction": "Instruction: How?\nResponse:"}, {"answer": "Thus."}, {"image": "2.jpg"},
               {"image": None}]
    seen = [Instructions(tmp_path, [{**record, **change}]).fingerprint for change in changes]
    seen += [Instructions(tmp_path, [record, record]).fingerprint, Instructions(tmp_path, []).fingerprint]
    assert len(set(seen)) == len(seen)
    assert Instructions(tmp_path / "elsewhere", [record]).fingerprint == seen[0]

"""ScienceQA's files: what is read, and the one line that each fault ends in."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lavin.runtime.errors import UserError
from tiny import IMAGE_SIZE
from util.data.batches import build_example
from util.data.datasets import load_scienceqa
from util.data.images import image_to_tensor, load_images


def test_split_in_its_order_with_captions(scienceqa):
    data = load_scienceqa(scienceqa, "test", scienceqa / "captions.json")
    assert list(data.problems) == [str(i) for i in range(112, 118)]
    assert data.captions["112"] == "A pond seen from above."
    assert load_scienceqa(scienceqa, "test").captions == {}
    assert data.picture_path("113") == scienceqa / "images" / "test" / "113" / "image.png"
    assert not data.picture_path("112")


def test_pictures_are_resized_bicubically_without_keeping_their_aspect(scienceqa):
    data = load_scienceqa(scienceqa, "test")
    pictures = load_images(data, IMAGE_SIZE, 2, skip_bad=False)
    assert set(pictures) == {"113", "115", "117"}
    for qid, picture in pictures.items():
        with Image.open(data.picture_path(qid)) as image:
            assert image.size == (20, 30)
            expected = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC))
        assert picture.dtype == torch.uint8 and picture.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        assert (picture.permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 7, [7, 7, 7]), ("P", 0, [0, 0, 0]), ("RGBA", (1, 2, 3, 255), [1, 2, 3]), ("1", 1, [255, 255, 255])])
def test_pictures_of_every_mode_become_rgb(mode, colour, expected):
    pixels = image_to_tensor(Image.new(mode, (5, 4), colour), 8)
    assert pixels.shape == (3, 8, 8) and pixels[:, 3, 3].tolist() == expected


def test_problem_json_is_accepted_beside_problems_json(own_scienceqa):
    whole = load_scienceqa(own_scienceqa, "train").problems
    (own_scienceqa / "problems.json").rename(own_scienceqa / "problem.json")
    assert load_scienceqa(own_scienceqa, "train").problems == whole
    (own_scienceqa / "problems.json").write_text("{}")  # where both are there, ScienceQA's own name counts
    with pytest.raises(UserError, match=r"problems\.json lacks problem 100"):
        load_scienceqa(own_scienceqa, "train")


def error(root, split="train", captions=None) -> str:
    with pytest.raises(UserError) as caught:
        load_images(load_scienceqa(root, split, captions), IMAGE_SIZE, 2, skip_bad=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named(own_scienceqa):
    for name in ("pid_splits.json", "problems.json"):
        (own_scienceqa / name).unlink()
        assert str(own_scienceqa / name) in error(own_scienceqa) and "--data_root" in error(own_scienceqa)


def test_missing_captions_are_named(own_scienceqa):
    assert "nowhere.json" in error(own_scienceqa, captions=own_scienceqa / "nowhere.json")


@pytest.mark.parametrize("text", ['{"100": ', "", "\x00", "[1, 2", "\udcff"])
@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "captions.json"])
def test_broken_json_is_named(own_scienceqa, name, text):
    (own_scienceqa / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(own_scienceqa / name) in error(own_scienceqa, captions=own_scienceqa / "captions.json")


@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "captions.json"])
def test_json_of_another_kind_is_named(own_scienceqa, name):
    (own_scienceqa / name).write_text("[1, 2]")
    assert str(own_scienceqa / name) in error(own_scienceqa, captions=own_scienceqa / "captions.json")


def test_unknown_split_is_named_with_those_there_are(own_scienceqa):
    message = error(own_scienceqa, split="dev")
    assert "--split dev" in message and "train, test" in message


def test_faulty_problems_are_named(own_scienceqa):
    path = own_scienceqa / "problems.json"
    problems = json.loads(path.read_text())
    good = problems["100"]
    for fault, words in [({k: v for k, v in good.items() if k not in ("hint", "lecture")}, "lacks hint, lecture"),
                         ({**good, "answer": 2}, "no choice number 2"), ({**good, "answer": -1}, "no choice number -1")]:
        path.write_text(json.dumps({**problems, "100": fault}))
        assert "problem 100" in error(own_scienceqa) and words in error(own_scienceqa)
    del problems["100"]
    path.write_text(json.dumps(problems))
    assert "lacks problem 100" in error(own_scienceqa)


def spoil(root) -> list:
    """Two bad pictures of three in the test split: one missing, one cut short."""
    paths = [root / "images" / "test" / qid / "image.png" for qid in ("113", "117")]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    return paths


def test_bad_pictures_are_named(own_scienceqa):
    missing, broken = spoil(own_scienceqa)
    message = error(own_scienceqa, "test")
    assert str(missing) in message and "missing" in message and "--skip_bad" in message
    missing.write_bytes(b"no picture")
    assert str(missing) in error(own_scienceqa, "test") and "does not decode" in error(own_scienceqa, "test")
    Image.new("RGB", (4, 4)).save(missing)
    assert str(broken) in error(own_scienceqa, "test")


def test_skip_bad_leaves_out_and_counts(own_scienceqa):
    spoil(own_scienceqa)
    data = load_scienceqa(own_scienceqa, "test")
    pictures = load_images(data, IMAGE_SIZE, 2, skip_bad=True)
    assert sorted(data.skipped) == ["113", "117"] and set(pictures) == {"115"}
    assert list(data.problems) == ["112", "114", "115", "116"]


def test_nothing_left_is_an_error(own_scienceqa):
    spoil(own_scienceqa)
    splits = {"test": ["113", "117"]}
    (own_scienceqa / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match="no problem is left"):
        load_images(load_scienceqa(own_scienceqa, "test"), IMAGE_SIZE, 2, skip_bad=True)


def test_empty_split_is_an_error(own_scienceqa):
    (own_scienceqa / "pid_splits.json").write_text('{"train": []}')
    assert "no problem" in error(own_scienceqa)


def test_example_holds_prompt_answer_picture_and_caption(scienceqa, tokenizer):
    data = load_scienceqa(scienceqa, "train", scienceqa / "captions.json")
    picture = load_images(data, IMAGE_SIZE, 1, False)["101"]
    example = build_example(data, "101", picture, tokenizer, "QCM-A", 6, 512)
    text = tokenizer.decode([i for i in example.ids if i >= 0])
    assert "Context: The walk began in the north. A pond seen from above.\n" in text
    assert text.endswith("Response:The answer is B.") and example.image is picture

"""Reading ScienceQA's files, and the one-line errors for faulty ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lavin.runtime.errors import UserError
from tiny import IMAGE_SIZE
from user_errors import error_message
from util.data.datasets import load_scienceqa
from util.data.examples import load_examples, load_training_data
from util.data.images import image_to_tensor, load_images, to_rgb
from util.data.settings import TrainingData


def test_split_is_loaded_in_order_with_captions(scienceqa):
    data = load_scienceqa(scienceqa, "test", scienceqa / "captions.json")
    assert list(data.problems) == [str(i) for i in range(112, 118)]
    assert data.captions["112"] == "A pond seen from above."
    assert load_scienceqa(scienceqa, "test").captions == {}
    assert data.picture_path("113") == scienceqa / "images" / "test" / "113" / "image.png"
    assert not data.picture_path("112")


def test_captions_are_read_where_use_caption_asks_for_them(scienceqa, tmp_path):
    def caption(**settings) -> str | None:
        return load_training_data(TrainingData(data_root=str(scienceqa), **settings)).captions.get("101")

    other = tmp_path / "other.json"
    other.write_text('{"captions": {"101": "A walk."}}')
    assert caption() is caption(caption_file=str(other)) is None
    assert caption(use_caption=True) == "A pond seen from above."
    assert caption(use_caption=True, caption_file=str(other)) == "A walk."


def test_images_are_resized_with_bicubic_interpolation_ignoring_aspect_ratio(scienceqa):
    data = load_scienceqa(scienceqa, "test")
    tensors = load_images(data, IMAGE_SIZE, 2, skip_bad=False)
    assert set(tensors) == {"113", "115", "117"}
    for qid, tensor in tensors.items():
        with Image.open(data.picture_path(qid)) as image:
            assert image.size == (20, 30)
            expected = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC))
        assert tensor.dtype == torch.uint8 and tensor.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        assert (tensor.permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 7, [7, 7, 7]), ("P", 0, [0, 0, 0]), ("RGBA", (1, 2, 3, 255), [1, 2, 3]), ("1", 1, [255, 255, 255])])
def test_images_of_every_mode_become_rgb(mode, colour, expected):
    pixels = image_to_tensor(to_rgb(Image.new(mode, (5, 4), colour)), 8)
    assert pixels.shape == (3, 8, 8) and pixels[:, 3, 3].tolist() == expected


def test_problem_json_is_an_alternative_name(scienceqa_copy):
    problems = load_scienceqa(scienceqa_copy, "train").problems
    (scienceqa_copy / "problems.json").rename(scienceqa_copy / "problem.json")
    assert load_scienceqa(scienceqa_copy, "train").problems == problems
    (scienceqa_copy / "problems.json").write_text("{}")  # if both exist, ScienceQA's original name is used
    with pytest.raises(UserError, match=r"problems\.json lacks problem 100"):
        load_scienceqa(scienceqa_copy, "train")


def message_of_loading(root, split="train", captions=None) -> str:
    return error_message(lambda: load_images(load_scienceqa(root, split, captions), IMAGE_SIZE, 2, skip_bad=False))


def test_error_names_the_missing_file(scienceqa_copy):
    for name in ("pid_splits.json", "problems.json"):
        (scienceqa_copy / name).unlink()
        message = message_of_loading(scienceqa_copy)
        assert str(scienceqa_copy / name) in message and "--data_root" in message


def test_error_names_the_missing_captions(scienceqa_copy):
    assert "nowhere.json" in message_of_loading(scienceqa_copy, captions=scienceqa_copy / "nowhere.json")


@pytest.mark.parametrize("text", ['{"100": ', "", "\x00", "[1, 2", "\udcff"])
@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "captions.json"])
def test_error_names_the_broken_json_file(scienceqa_copy, name, text):
    (scienceqa_copy / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(scienceqa_copy / name) in message_of_loading(scienceqa_copy, captions=scienceqa_copy / "captions.json")


@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "captions.json"])
def test_error_names_the_json_file_that_is_no_object(scienceqa_copy, name):
    (scienceqa_copy / name).write_text("[1, 2]")
    assert str(scienceqa_copy / name) in message_of_loading(scienceqa_copy, captions=scienceqa_copy / "captions.json")


def test_error_for_an_unknown_split_lists_the_splits(scienceqa_copy):
    message = message_of_loading(scienceqa_copy, split="dev")
    assert "--split dev" in message and "train, test" in message


def test_error_names_the_faulty_problem(scienceqa_copy):
    path = scienceqa_copy / "problems.json"
    problems = json.loads(path.read_text())
    good = problems["100"]
    for faulty, words in [({k: v for k, v in good.items() if k not in ("hint", "lecture")}, "hint: is missing (and 1 "),
                          ({**good, "answer": 2}, "no choice number 2"),
                          ({**good, "answer": -1}, "no choice number -1"), ({**good, "hint": None}, "hint: "),
                          ({**good, "image": {"bytes": "iVBO", "path": "image.png"}}, "image: ")]:
        path.write_text(json.dumps({**problems, "100": faulty}))
        assert "problem 100" in message_of_loading(scienceqa_copy) and words in message_of_loading(scienceqa_copy)
    del problems["100"]
    path.write_text(json.dumps(problems))
    assert "lacks problem 100" in message_of_loading(scienceqa_copy)


def break_images(root) -> list:
    """Break two of the test split's three images: one is missing, one truncated. Returns their paths."""
    paths = [root / "images" / "test" / qid / "image.png" for qid in ("113", "117")]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    return paths


def test_error_names_the_bad_image(scienceqa_copy):
    missing, broken = break_images(scienceqa_copy)
    message = message_of_loading(scienceqa_copy, "test")
    assert str(missing) in message and "missing" in message and "--skip_bad" in message
    missing.write_bytes(b"no image")
    message = message_of_loading(scienceqa_copy, "test")
    assert str(missing) in message and "does not decode" in message
    Image.new("RGB", (4, 4)).save(missing)
    assert str(broken) in message_of_loading(scienceqa_copy, "test")


def test_skip_bad_skips_and_counts(scienceqa_copy):
    break_images(scienceqa_copy)
    data = load_scienceqa(scienceqa_copy, "test")
    images = load_images(data, IMAGE_SIZE, 2, skip_bad=True)
    assert sorted(data.bad_pictures) == ["113", "117"] and set(images) == {"115"}
    assert list(data.problems) == ["112", "114", "115", "116"]


def test_error_if_all_problems_are_skipped(scienceqa_copy):
    break_images(scienceqa_copy)
    splits = {"test": ["113", "117"]}
    (scienceqa_copy / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match="no problem is left"):
        load_images(load_scienceqa(scienceqa_copy, "test"), IMAGE_SIZE, 2, skip_bad=True)


def test_empty_split_is_an_error(scienceqa_copy):
    (scienceqa_copy / "pid_splits.json").write_text('{"train": []}')
    assert "no problem" in message_of_loading(scienceqa_copy)


def test_example_has_prompt_answer_image_and_caption(scienceqa, tokenizer):
    data = load_scienceqa(scienceqa, "train", scienceqa / "captions.json")
    image = load_images(data, IMAGE_SIZE, 1, False)["101"]
    settings = TrainingData(prompt_format="QCM-A")
    example = load_examples(data, settings, tokenizer, IMAGE_SIZE, n_prompt=6, threads=1)["101"]
    text = tokenizer.decode([i for i in example.ids if i >= 0])
    assert "Context: The walk began in the north. A pond seen from above.\n" in text
    assert text.endswith("Response:The answer is B.") and torch.equal(example.image, image)

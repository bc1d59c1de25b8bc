"""MME: reading folders and answers, scores computed by hand, and eval_mme.py in one and in two processes."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, strategies
from PIL import Image

import eval_mme
from forked import in_processes
from lavin.runtime.errors import UserError
from tiny_runs import write_run
from util.data.mme import COGNITION, PERCEPTION, is_decided, load_mme, read_answer, score


@pytest.mark.parametrize("text, label", [
    ("yes", "yes"), (" Yes.", "yes"), ("YES, there is", "yes"), ("no", "no"), ("\nNo, it is not", "no"),
    ("None of them", "no"), ("Not yes", "no"), ("I know", "other"),  # only the first four characters count
    ("The answer is yes", "other"), ("", "other"), ("ye", "other"), ("n", "other"), ("A no", "no"), ("    yes", "yes")])
def test_official_rule_for_reading_answers(text, label):
    assert read_answer(text) == label


@example("A no")
@example("A not yes")
@given(strategies.text(alphabet=" \nyesno.aA", max_size=12))
def test_decided_answers_stay_the_same(text):
    """Text after is_decided cannot change the answer; is_decided happens within four characters."""
    decided = next((text[:end] for end in range(len(text) + 1) if is_decided(text[:end])), None)
    if decided is not None:
        assert read_answer(decided) == read_answer(text)
    else:
        assert read_answer(text) == "other" and len(text.strip()) < 4


def answers(subtask: str, *predictions: str) -> list[dict]:
    """Two letters per image, one per question: y (yes), n (no), o (other). The right answers are yes, then no."""
    words = {"y": "yes", "n": "no", "o": "other"}
    return [{"subtask": subtask, "picture": f"{subtask}/{i}.jpg", "answer": answer, "prediction": words[letter]}
            for i, letters in enumerate(predictions) for answer, letter in zip(("yes", "no"), letters, strict=True)]


def test_scores_computed_by_hand():
    # Right answers: 2 + 1 + 1 + 0 of 8. One of the four images has both right. Three answers are neither yes nor no.
    scores = score(answers("count", "yn", "yy", "on", "oo"))
    assert scores["subtasks"] == {
        "count": {"accuracy": 50.0, "accuracy+": 25.0, "score": 75.0, "questions": 8, "other": 3}}
    assert scores["perception"] is None and scores["cognition"] is None


def test_sums_of_perception_and_cognition():
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)
    all_right = [answer for name in PERCEPTION + COGNITION for answer in answers(name, "yn")]
    assert (score(all_right)["perception"], score(all_right)["cognition"]) == (2000, 800)
    some_wrong = [answer | ({"prediction": "no"} if answer["subtask"] == "OCR" else {}) for answer in all_right]
    assert (score(some_wrong)["perception"], score(some_wrong)["cognition"]) == (1850, 800)  # OCR: 50 + 0


def write_mme(root: Path) -> Path:
    """Both layouts: three images in the same folder as their texts, two in separate folders."""
    for subtask, names, text_folder, image_folder in (("color", "abc", "", ""),
                                                      ("artwork", "de", "questions_answers_YN", "images")):
        for i, name in enumerate(names):
            for folder in (text_folder, image_folder):
                (root / subtask / folder).mkdir(parents=True, exist_ok=True)
            suffix = "png" if i else "jpg"
            Image.new("RGB", (20, 20), (80 * i, 0, 200)).save(root / subtask / image_folder / f"{name}.{suffix}")
            (root / subtask / text_folder / f"{name}.txt").write_text(
                f"Is pond {name} old? Please answer yes or no.\tYes\nIs it new? Please answer yes or no.\tNo\n\n")
    return root


def test_both_layouts_are_read(tmp_path):
    pairs = load_mme(str(write_mme(tmp_path)))
    assert [pair.name for pair in pairs] == ["color/a.jpg", "color/b.png", "color/c.png", "artwork/d.jpg",
                                             "artwork/e.png"]
    assert all(pair.picture.is_file() and pair.answers == ("yes", "no") for pair in pairs)
    assert pairs[3].questions == ("Is pond d old? Please answer yes or no.", "Is it new? Please answer yes or no.")


@pytest.mark.parametrize("text, words", [
    (b"One?\tYes\n", "b.txt is not two lines"), (b"a\tYes\nb\tNo\nc\tNo\n", "b.txt is not two lines"),
    (b"", "b.txt is not two lines"), (b"One?\tYes\n\nTwo?\tPerhaps\n", "b.txt, line 3 has the answer 'Perhaps'"),
    (b"One? Yes\nTwo? No\n", "b.txt, line 1 is not question, tab,"), (b"One?\tYes\n\tNo\n", "b.txt, line 2 is not "),
    (b"One?\tYes\nTwo?\tNo\tYes\tmaybe\n", "b.txt, line 2 has the answer 'maybe'"),
    (b"One?\tYes\nTw\xf6?\tNo\n", "b.txt cannot be read as text")])
def test_error_names_the_malformed_text(tmp_path, text, words):
    write_mme(tmp_path)
    (tmp_path / "color" / "b.txt").write_bytes(text)
    with pytest.raises(UserError, match=f"color/{words}") as caught:
        load_mme(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_texts_and_pictures_as_they_come_from_other_systems(tmp_path):
    """A byte order mark, CRLF, a suffix in capitals, and what macOS puts beside files in archives."""
    folder = write_mme(tmp_path) / "color"
    expected = load_mme(str(tmp_path))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "a.txt").read_bytes().replace(b"\n", b"\r\n"))
    (folder / "._a.txt").write_bytes(b"\0\5\x16\7\0\2\xff\xfe")
    assert load_mme(str(tmp_path)) == expected
    for old, new in (("a.jpg", "a.JPG"), ("b.png", "b.PNG"), ("c.png", "c.JPEG")):
        (folder / old).rename(folder / new)
    pairs = load_mme(str(tmp_path))
    assert [pair.name for pair in pairs[:3]] == ["color/a.JPG", "color/b.PNG", "color/c.JPEG"]
    assert [pair.questions for pair in pairs] == [pair.questions for pair in expected]


def test_names_with_dots_and_spaces_and_lines_of_old_systems(tmp_path):
    folder = write_mme(tmp_path) / "color"
    expected = load_mme(str(tmp_path))[0].questions
    (folder / "a.jpg").rename(folder / "a 1.5.b.jpg")
    (folder / "a 1.5.b.txt").write_bytes((folder / "a.txt").read_bytes().replace(b"\n", b"\r"))
    (folder / "a.txt").unlink()
    pair = load_mme(str(tmp_path))[0]
    assert (pair.name, pair.questions) == ("color/a 1.5.b.jpg", expected)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e"])
def test_a_question_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path, separator):
    folder = write_mme(tmp_path) / "color"
    (folder / "a.txt").write_bytes(f"Is it{separator}old?\tYes\nIs it new?\tNo\n".encode())
    assert load_mme(str(tmp_path))[0].questions == (f"Is it{separator}old?", "Is it new?")


def test_a_text_in_another_encoding_is_refused_with_the_fix(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        (write_mme(tmp_path) / "color" / "b.txt").write_text("Is Zo\xeb old?\tYes\nNew?\tNo\n", encoding=encoding)
        with pytest.raises(UserError, match="b.txt cannot be read as text .*save it as UTF-8$"):
            load_mme(str(tmp_path))


def test_errors_name_missing_images_and_folders(tmp_path):
    with pytest.raises(UserError, match="--mme_root"):
        load_mme(str(tmp_path))
    write_mme(tmp_path)
    (tmp_path / "artwork" / "images" / "e.png").unlink()
    with pytest.raises(UserError, match="questions_answers_YN/e.txt has no picture"):
        load_mme(str(tmp_path))


def test_batch_size_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match="--max_batch_size 0 does not lie in"):
        eval_mme.main(eval_mme.get_args_parser().parse_args(["--output_dir", str(tmp_path), "--max_batch_size", "0"]))


def test_one_and_two_processes_give_the_same_scores(base, tmp_path):
    write_run(tmp_path / "run", base, 1)
    write_mme(tmp_path / "mme")

    def evaluate(max_batch_size: str) -> None:
        eval_mme.main(eval_mme.get_args_parser().parse_args([
            "--adapter_path", str(tmp_path / "run"), "--device", "cpu", "--mme_root", str(tmp_path / "mme"),
            "--max_batch_size", max_batch_size]))
    evaluate("64")
    one_process = [(tmp_path / "run" / name).read_text() for name in ("mme_answers.jsonl", "mme_scores.json")]
    lines = [json.loads(line) for line in one_process[0].splitlines()]
    assert [line["picture"] for line in lines[::2]] == ["color/a.jpg", "color/b.png", "color/c.png", "artwork/d.jpg",
                                                        "artwork/e.png"]
    assert all(is_decided(line["text"]) or not line["text"] for line in lines)
    assert all(line["prediction"] == read_answer(line["text"]) for line in lines)
    assert all(len(line["text"].strip()) < 40 for line in lines)  # stopped early, before ANSWER_TOKENS
    (tmp_path / "run" / "mme_scores.json").unlink()  # else it was scored before
    scores = json.loads(one_process[1])
    assert scores["subtasks"] == score(lines)["subtasks"] and scores["subtasks"]["color"]["questions"] == 6
    in_processes(lambda: evaluate("2"), 2)
    two_processes = [(tmp_path / "run" / name).read_text() for name in ("mme_answers.jsonl", "mme_scores.json")]
    assert two_processes == one_process

"""MME: reading of folders and answers, scores counted by hand, and eval_mme.py in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, strategies
from PIL import Image

import eval_mme
from lavin.runtime.errors import UserError
from tiny import ROOT
from tiny_runs import write_run
from util.data.mme import COGNITION, PERCEPTION, is_decided, load_mme, read_answer, score


@pytest.mark.parametrize("text, label", [
    ("yes", "yes"), (" Yes.", "yes"), ("YES, there is", "yes"), ("no", "no"), ("\nNo, it is not", "no"),
    ("None of them", "no"), ("Not yes", "no"), ("I know", "other"),  # the first four characters alone
    ("The answer is yes", "other"), ("", "other"), ("ye", "other"), ("n", "other"), ("A no", "no"), ("    yes", "yes")])
def test_the_official_rule(text, label):
    assert read_answer(text) == label


@example("A no")
@example("A not yes")
@given(strategies.text(alphabet=" \nyesno.aA", max_size=12))
def test_what_is_told_early_stays(text):
    """Whatever follows; and what is not told yet may still become yes."""
    first = next((text[:end] for end in range(len(text) + 1) if is_decided(text[:end])), None)
    if first is not None:
        assert read_answer(first) == read_answer(text)
    else:
        assert read_answer(text) == "other" and len(text.strip()) < 4


def answers(subtask: str, *pictures: str) -> list[dict]:
    """`yn`: yes to the first question, whose answer is yes, and no to the second, whose answer is no; o: other."""
    words = {"y": "yes", "n": "no", "o": "other"}
    return [{"subtask": subtask, "picture": f"{subtask}/{i}.jpg", "answer": answer, "prediction": words[letter]}
            for i, letters in enumerate(pictures) for answer, letter in zip(("yes", "no"), letters)]


def test_scores_counted_by_hand():
    # 8 questions: right are 2, 1, 1, 0 = 4; one picture of four has both right; three are neither yes nor no
    found = score(answers("count", "yn", "yy", "on", "oo"))
    assert found["subtasks"] == {"count": {"accuracy": 50.0, "accuracy+": 25.0, "score": 75.0, "questions": 8, "other": 3}}
    assert found["perception"] is None and found["cognition"] is None


def test_sums_of_perception_and_cognition():
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)
    everything = [answer for name in PERCEPTION + COGNITION for answer in answers(name, "yn")]
    assert (score(everything)["perception"], score(everything)["cognition"]) == (2000, 800)
    wrong = [answer | ({"prediction": "no"} if answer["subtask"] == "OCR" else {}) for answer in everything]
    assert (score(wrong)["perception"], score(wrong)["cognition"]) == (1850, 800)  # OCR: 50 + 0


def write_mme(root: Path) -> Path:
    """Both layouts: three pictures side by side with their texts, two in folders of their own."""
    for subtask, names, texts, pictures in (("color", "abc", "", ""), ("artwork", "de", "questions_answers_YN", "images")):
        for i, name in enumerate(names):
            for folder in (texts, pictures):
                (root / subtask / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (80 * i, 0, 200)).save(root / subtask / pictures / f"{name}.{'png' if i else 'jpg'}")
            (root / subtask / texts / f"{name}.txt").write_text(
                f"Is pond {name} old? Please answer yes or no.\tYes\nIs it new? Please answer yes or no.\tNo\n\n")
    return root


def test_both_layouts_are_read(tmp_path):
    pairs = load_mme(str(write_mme(tmp_path)))
    assert [pair.name for pair in pairs] == ["color/a.jpg", "color/b.png", "color/c.png", "artwork/d.jpg", "artwork/e.png"]
    assert all(pair.picture.is_file() and pair.answers == ("yes", "no") for pair in pairs)
    assert pairs[3].questions == ("Is pond d old? Please answer yes or no.", "Is it new? Please answer yes or no.")


@pytest.mark.parametrize("text", ["One?\tYes\n", "One?\tYes\nTwo?\tPerhaps\n", "One? Yes\nTwo? No\n",
                                  "a\tYes\nb\tNo\nc\tNo\n"])
def test_a_malformed_text_is_named(tmp_path, text):
    write_mme(tmp_path)
    (tmp_path / "color" / "b.txt").write_text(text)
    with pytest.raises(UserError, match="color/b.txt is not two lines"):
        load_mme(str(tmp_path))


def test_missing_pictures_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="--mme_root"):
        load_mme(str(tmp_path))
    write_mme(tmp_path)
    (tmp_path / "artwork" / "images" / "e.png").unlink()
    with pytest.raises(UserError, match="questions_answers_YN/e.txt has no picture"):
        load_mme(str(tmp_path))


def test_a_batch_of_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="--max_batch_size 0 must be at least 1"):
        eval_mme.main(eval_mme.get_args_parser().parse_args(["--output_dir", str(tmp_path), "--max_batch_size", "0"]))


def test_it_is_scored_alike_by_one_process_and_by_two(base, tmp_path):
    write_run(tmp_path / "run", base, 1)
    command = ["eval_mme.py", "--adapter_path", str(tmp_path / "run"), "--device", "cpu",
               "--mme_root", str(write_mme(tmp_path / "mme"))]
    eval_mme.main(eval_mme.get_args_parser().parse_args([*command[1:], "--max_batch_size", "64"]))
    found = [(tmp_path / "run" / name).read_text() for name in ("mme_answers.jsonl", "mme_scores.json")]
    lines = [json.loads(line) for line in found[0].splitlines()]
    assert [line["picture"] for line in lines[::2]] == ["color/a.jpg", "color/b.png", "color/c.png", "artwork/d.jpg",
                                                        "artwork/e.png"]
    assert all(is_decided(line["text"]) or not line["text"] for line in lines)
    assert all(line["prediction"] == read_answer(line["text"]) for line in lines)
    assert all(len(line["text"].strip()) < 40 for line in lines)  # told early, not ANSWER_TOKENS long
    scores = json.loads(found[1])
    assert scores["subtasks"] == score(lines)["subtasks"] and scores["subtasks"]["color"]["questions"] == 6
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command,
                           "--max_batch_size", "2"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / "run" / name).read_text() for name in ("mme_answers.jsonl", "mme_scores.json")] == found

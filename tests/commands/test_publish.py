"""tools/publish.py: what is shared gives the same answers, from a folder and from a hub."""

import json
import re

import pytest
from huggingface_hub import constants

import eval as eval_command
from hub_server import TOKEN, serving, use
from lavin.weights import hub
from lavin.weights.adapters import SHARED_SETTINGS, SHARED_TENSORS, read_adapters
from tiny_runs import train_run
from tools.publish import publish, push
from user_errors import change_json, error_message
from util.runs import GENERATIONS


def score(base, scienceqa, adapters, folder=None):
    args = ["--adapter_path", str(adapters), "--data_root", str(scienceqa), "--device", "cpu", "--max_seq_len", "160",
            *base.flags, *(["--output_dir", str(folder)] if folder else [])]
    eval_command.main(eval_command.get_args_parser().parse_args(args))


@pytest.fixture(scope="module")
def run(base, scienceqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "LaVIN-7B-step"
    train_run(base, scienceqa, folder, "--lr_schedule", "step", "--adapter_dim", "4")
    score(base, scienceqa, folder)
    return folder


@pytest.fixture
def shared(run, tmp_path):
    publish(run, tmp_path / "shared", run.name, "shared")
    return tmp_path / "shared"


def test_the_same_answers_from_a_folder(run, shared, base, scienceqa, tmp_path):
    assert sorted(path.name for path in shared.iterdir()) == sorted(
        [SHARED_TENSORS, SHARED_SETTINGS, "recipe.json", "scores.json", "README.md"])
    score(base, scienceqa, shared, tmp_path / "results")
    assert (tmp_path / "results" / GENERATIONS).read_bytes() == (run / GENERATIONS).read_bytes()
    message = error_message(score, base, scienceqa, shared)
    assert message.endswith("holds adapters that were shared: name a folder for their results with --output_dir")


def test_the_same_answers_from_a_hub(run, shared, base, scienceqa, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    with serving(tmp_path / "site") as server:
        use(server.url, tmp_path / "hub", monkeypatch)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "the hub refuses it" in error_message(push, shared, "lab/step")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert push(shared, "lab/step") == f"{server.url}/lab/step"
        hub.cached_or_fetched.cache_clear()
        score(base, scienceqa, "lab/step", tmp_path / "results")
        assert (tmp_path / "results" / GENERATIONS).read_bytes() == (run / GENERATIONS).read_bytes()


def test_the_card_says_what_the_scores_say(run, shared, base):
    card, scores = (shared / "README.md").read_text(), json.loads((run / "scores.json").read_text())
    assert card.startswith("---\ntags:\n") and "$" not in card
    header, rules, accuracies = re.findall(r"^\| .*\|$|^\|.*:.*\|$", card[card.index("## Scores"):], re.MULTILINE)
    assert header.count("|") == rules.count("|") == accuracies.count("|")  # else it is no table
    columns, values = ([cell.strip() for cell in row.strip("|").split("|")] for row in (header, accuracies))
    assert {column: float(value) for column, value in zip(columns, values, strict=True)} == {
        column: round(scores[column], 2) for column in columns}
    low, high = map(float, re.search(r"interval from ([\d.]+) to ([\d.]+)\.\s", card).groups())
    assert low < scores["Avg"] < high and scores["base_sha256"] in card and "`--lr_schedule step`" in card


def test_no_path_of_this_machine_is_shared(shared, tmp_path, base):
    for path in shared.iterdir():
        content = path.read_bytes()
        assert str(base.weights.parent).encode() not in content and str(tmp_path).encode() not in content
    flags = json.loads((shared / SHARED_SETTINGS).read_text())["flags"]
    assert flags["llm_model"] == "tiny" and flags["vision_model"] == base.vision.name
    assert not {"llama_model_path", "data_root", "output_dir"} & flags.keys()


def test_changed_files_are_refused(shared):
    change_json(shared / SHARED_SETTINGS, {"epoch": 7})
    assert "was changed after it was written" in error_message(read_adapters, shared / SHARED_TENSORS)
    (shared / SHARED_SETTINGS).unlink()
    assert "copy it beside the tensors" in error_message(read_adapters, shared / SHARED_TENSORS)


def test_only_a_run_that_is_scored_is_shared(run, base, scienceqa, tmp_path):
    train_run(base, scienceqa, tmp_path / "new")
    assert "has no scores.json: score it" in error_message(publish, tmp_path / "new", tmp_path / "out", "new", "out")
    (tmp_path / "new" / "scores.json").write_text((run / "scores.json").read_text())
    change_json(tmp_path / "new" / "scores.json", {"checkpoint": "checkpoint-0.pth"})
    assert "is of checkpoint-0.pth, not of checkpoint-2.pth" in error_message(
        publish, tmp_path / "new", tmp_path / "out", "new", "out")
    change_json(tmp_path / "new" / "scores.json", {"checkpoint": "checkpoint-2.pth", "checkpoint_sha256": 64 * "0"})
    assert "is of checkpoint-2.pth, not of checkpoint-2.pth as it is" in error_message(
        publish, tmp_path / "new", tmp_path / "out", "new", "out")
    change_json(tmp_path / "new" / "scores.json", {"checkpoint_sha256": None})
    (tmp_path / "new" / "recipe.json").write_text("{}")
    assert "recipe.json: recipe: is missing: put it back, or train again" in error_message(
        publish, tmp_path / "new", tmp_path / "out", "new", "out")
    assert not (tmp_path / "out").exists()

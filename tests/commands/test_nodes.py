"""Nodes that have copies of the files: what a result is of is the same on all, or refused by the node's name."""

import json
import os
import shutil
import socket

import pytest
from PIL import Image

import eval as evaluation
import train
from forked import in_processes, joined
from lavin.runtime import distributed
from lavin.runtime.errors import UserError
from tiny_runs import run_flags, write_run
from user_errors import error_message
from util.data import checksums
from util.data.instructions import Instructions, load_pictures
from util.training.command import require_equal_examples


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_answers(path) -> None:
    problems = json.loads(path.read_text())
    path.write_text(json.dumps({qid: {**problem, "answer": 0} for qid, problem in problems.items()}))


def run(command, flags: list[str]) -> str | None:
    """Returns what a user error says, if there is one."""
    try:
        command.main(command.get_args_parser().parse_args(flags))
        return None
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def said(base, scienceqa, tmp_path_factory):
    """Returns the output of train.py and eval.py on two nodes. Each has folders of the same names; on the second, one
    of them has something else in it."""
    root = tmp_path_factory.mktemp("nodes")
    write_run(root / "trained", base, 0)
    for node in (root / "0", root / "1"):
        for names, source in ((("weights", "other_weights"), base.weights), (("vit", "other_vit"), base.vision),
                              (("data", "other_data", "other_problems"), scienceqa),
                              (("run", "other_run"), root / "trained")):
            for name in names:
                shutil.copytree(source, node / name)
    second = root / "1"
    flip_a_bit(second / "other_weights" / "tiny" / "consolidated.00.pth")
    flip_a_bit(second / "other_vit" / "model.safetensors")
    flip_a_bit(second / "other_run" / "checkpoint-3.pth")
    Image.new("RGB", (9, 9)).save(second / "other_data" / "images" / "train" / "101" / "image.png")
    Image.new("RGB", (9, 9)).save(second / "other_data" / "images" / "test" / "113" / "image.png")
    other_answers(second / "other_problems" / "problems.json")
    models = type(base)("weights", "vit")
    commands = {name: (train, run_flags(models, "data", root / name, "--epochs", "1", "--warmup_epochs", "0", *more))
                for name, more in {"other_weights": ("--llama_model_path", "other_weights"),
                                   "other_vit": ("--vision_model", "other_vit"),
                                   "other_data": ("--data_root", "other_data"),
                                   "other_problems": ("--data_root", "other_problems"), "same": ()}.items()}
    scored = ["--llama_model_path", "weights", "--vision_model", "vit", "--device", "cpu", "--decode", "score",
              "--data_root"]
    commands |= {"scored_data": (evaluation, [*scored, "other_data", "--adapter_path", "run"]),
                 "scored": (evaluation, [*scored, "data", "--adapter_path", "run", "--output_dir",
                                         str(root / "scored")]),
                 "scored_run": (evaluation, [*scored, "data", "--adapter_path", "other_run"])}

    def run_all() -> dict:
        os.chdir(root / os.environ["RANK"])
        os.environ["LOCAL_RANK"] = "0"
        with joined():
            return {name: run(command, flags) for name, (command, flags) in commands.items()}
    return root, *in_processes(run_all, 2)


@pytest.mark.parametrize("name, words", [
    ("other_weights", "other files of --llm_model"), ("other_vit", "other files of --vision_model"),
    ("other_data", "other pictures of --data_root"), ("scored_data", "pictures"), ("scored_run", "checkpoint")])
def test_a_node_with_other_files_is_named(said, name, words):
    root, *by_rank = said
    message = (f"rank 1 on {socket.gethostname()} reads something else than rank 0 ({words}): give all nodes the same "
               "files and GPUs")
    assert [of_rank[name] for of_rank in by_rank] == [message] * 2 and not (root / name).exists()


def test_nodes_with_copies_work_together(said):
    root, *by_rank = said
    assert all(of_rank["same"] is of_rank["scored"] is None for of_rank in by_rank)
    assert (root / "same" / "checkpoint-0.pth").is_file() and (root / "scored" / "scores.json").is_file()


def test_all_processes_have_the_problems_that_rank_0_has_read(said):
    root, *_ = said
    recipes = [json.loads((root / name / "recipe.json").read_text())["recipe"] for name in ("same", "other_problems")]
    assert recipes[0]["data"] == recipes[1]["data"]
    logs = [json.loads((root / name / "log.txt").read_text())["train_closs"] for name in ("same", "other_problems")]
    assert logs[0] == logs[1]


def test_one_process_of_a_node_makes_what_all_compare(monkeypatch):
    made = []
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [("rank 0 on a", "x"), None, value])
    for local_rank, expected in ((0, ["rank 0 on a", f"rank 2 on {socket.gethostname()}"]), (1, ["rank 0 on a"])):
        monkeypatch.setattr(distributed, "launched_as", lambda local_rank=local_rank: (2, 3, local_rank))
        assert list(distributed.from_each_node(lambda: made.append(1) or "x")) == expected
    assert made == [1]


def test_processes_with_other_token_ids_are_named(monkeypatch):
    """The versions of libraries may differ, where the files do not."""
    monkeypatch.setattr(distributed, "all_gather_object", lambda sha256: [sha256, "b", sha256, "c"])
    assert error_message(require_equal_examples, "a").startswith("rank 1, 3 has other token ids than rank 0")
    monkeypatch.setattr(distributed, "all_gather_object", lambda sha256: [sha256] * 3)
    require_equal_examples("a")


def test_pictures_of_instructions_are_not_hashed_by_every_process(tmp_path, monkeypatch):
    folder = tmp_path / "images" / "train2014"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "COCO_train2014_a.png")
    monkeypatch.setattr(checksums, "part_digest", None)
    data = Instructions(tmp_path, [{"instruction": "a", "answer": "b", "image": "a.png"}])
    assert list(load_pictures(data, 8, 1, skip_bad=False)) == ["a.png"]

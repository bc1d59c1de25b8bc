"""tools/lmms_eval_plugin: lmms-eval scores a run as eval.py does, question by question.

The tests run lmms-eval itself, and are skipped where it is not installed (requirements/lmms-eval.txt).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import eval as eval_command
from tiny import ROOT
from tiny_runs import train_run
from user_errors import error_message
from util.data.datasets import load_scienceqa
from util.evaluation.answers import read_answers
from util.runs import GENERATIONS

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
pytest.importorskip("lmms_eval.api.model")
from tools.lmms_eval_plugin.model import LaVINModel, before, command_line, given_letter, sampling_of  # noqa: E402

PLUGIN = ROOT / "tools" / "lmms_eval_plugin"
OF_LMMS_EVAL = Path(sys.modules["lmms_eval"].__path__[0]) / "tasks" / "scienceqa" / "scienceqa.yaml"
TASKS = {"generated": PLUGIN / "scienceqa_lavin.yaml", "scored": PLUGIN / "scienceqa_lavin_score.yaml",
         "theirs": OF_LMMS_EVAL}
# a torchvision that is made for another torch would stop lmms-eval, as it would the tests (conftest.py)
START = "from lavin.timm_compat import import_timm; import_timm(); from lmms_eval.cli.dispatch import main; main()"


def write_parquet(root: Path, path: Path) -> None:
    """The test split in the form of the hub's copy, derek-thomas/ScienceQA."""
    data = load_scienceqa(str(root), "test")
    texts = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    schema = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"), "choices": datasets.List(
            datasets.Value("string")), "answer": datasets.Value("int8"),
        **{name: datasets.Value("string") for name in texts[1:]}}).arrow_schema
    rows = [{"image": {"bytes": data.picture_path(qid).read_bytes(), "path": problem["image"]} if problem["image"]
             else None, "choices": problem["choices"], "answer": problem["answer"],
             **{name: problem.get(name, "") for name in texts}} for qid, problem in data.problems.items()]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)


def write_tasks(folder: Path, parquet: Path) -> None:
    """Each task as it is, but with the questions of a local file."""
    folder.mkdir()
    for name, path in TASKS.items():
        task = {"include": str(path), "task": name, "dataset_path": "parquet", "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": str(parquet)}}}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def register(folder: Path) -> Path:
    """A folder for PYTHONPATH with what `pip install -e .` writes there: the entry points of pyproject.toml."""
    [section] = re.findall(r'^\[project\.entry-points\."(lmms_eval\.models)"\]\nlavin = "(.+)"$',
                           (ROOT / "pyproject.toml").read_text(), re.M)
    (folder / "lavin-0.dist-info").mkdir(parents=True)
    (folder / "lavin-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lavin\nVersion: 0\n")
    (folder / "lavin-0.dist-info" / "entry_points.txt").write_text("[{}]\nlavin = {}\n".format(*section))
    return folder


def run_lmms_eval(tmp_path: Path, run: Path, base, scienceqa: Path, *flags: str) -> dict[str, list[dict]]:
    """The logged samples of each task, in the order of the questions."""
    write_parquet(scienceqa, tmp_path / "test.parquet")
    write_tasks(tmp_path / "tasks", tmp_path / "test.parquet")
    model_args = f"adapter_path={run},device=cpu," + ",".join(
        f"{name.removeprefix('--')}={value}" for name, value in zip(base.flags[::2], base.flags[1::2], strict=True))
    path = os.pathsep.join([str(ROOT), str(register(tmp_path / "site")), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", START, "--model", "lavin", "--model_args", model_args, "--tasks", ",".join(TASKS),
         "--include_path", str(tmp_path / "tasks"), "--batch_size", "4", "--log_samples", "--output_path",
         str(tmp_path / "out"), "--verbosity", "DEBUG", *flags],
        cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
                                                       "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    samples = {}
    for name in TASKS:
        [file] = (tmp_path / "out").rglob(f"*samples_{name}.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = sorted(lines, key=lambda line: line["doc_id"])
    return samples


@pytest.fixture(scope="module")
def run(base, scienceqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_run(base, scienceqa, folder, "--adapter_dim", "4")
    return folder


def answers_of_eval(run, base, scienceqa, out: Path, decode: str):
    args = ["--adapter_path", str(run), "--data_root", str(scienceqa), "--device", "cpu", "--output_dir", str(out),
            "--decode", decode, *base.flags]
    eval_command.main(eval_command.get_args_parser().parse_args(args))
    return read_answers(out / GENERATIONS)


def test_scores_are_those_of_eval(run, base, scienceqa, tmp_path):
    samples = run_lmms_eval(tmp_path, run, base, scienceqa)
    generated = answers_of_eval(run, base, scienceqa, tmp_path / "generate", "generate")
    assert [sample["filtered_resps"][0] for sample in samples["generated"]] == [answer.text for answer in generated]
    assert [sample["exact_match"] for sample in samples["generated"]] == [
        float(answer.parsed and answer.correct) for answer in generated]
    scored = answers_of_eval(run, base, scienceqa, tmp_path / "score", "score")
    assert [sample["acc"] for sample in samples["scored"]] == [float(answer.correct) for answer in scored]
    losses = [[loss for loss, _ in sample["filtered_resps"]] for sample in samples["scored"]]
    assert [row.index(min(row)) for row in losses] == [answer.prediction for answer in scored]
    print([s["filtered_resps"] for s in samples["theirs"]], [a.text for a in generated])
    assert 0



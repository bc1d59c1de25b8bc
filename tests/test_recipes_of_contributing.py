"""CONTRIBUTING.md's recipes for a schedule, a method and a flag, followed word for word in a copy of the tree.

One process then uses the copy as people would: it trains, resumes, scores and draws with what was added.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tiny import ROOT

# what the process does in the copy: its last line is what it found
STEPS = """
import json, sys
from contextlib import suppress
from pathlib import Path
import pytest
import eval as evaluation
import plot_results, train
from lavin.runtime.errors import UserError
from util.search.settings import SPACE
from util.search.space import read_space

flags, runs = json.loads(sys.argv[1]), Path(sys.argv[2])
linear, found = ["--lr_schedule", "linear", "--min_lr", "1e-5"], {}

def run(command, *words):
    command.main(command.get_args_parser().parse_args([str(word) for word in words]))

def refusal(*words):
    try:
        run(train, *words)
    except UserError as error:
        return str(error)

for name, more in (("base", []), ("linear", linear)):
    run(train, *flags, "--output_dir", runs / name, *more, "--stop_after_epoch", 1)
    recipe = runs / name / "recipe.json"
    content = json.loads(recipe.read_text())
    found["recipe"] = dict(content["recipe"])
    del content["recipe"]["label_smoothing"]  # as an older version wrote it
    recipe.write_text(json.dumps(content))
    run(train, *flags, "--output_dir", runs / name, *more, "--stop_after_epoch", 1)  # is done
    run(train, "--resume", runs / name, "--device", "cpu")
    run(evaluation, "--adapter_path", runs / name, "--device", "cpu", "--decode", "score")
run(plot_results, runs / "base", runs / "linear", "--out", runs / "plots")
found["log"] = [json.loads(line) for line in (runs / "linear" / "log.txt").read_text().splitlines()]
found["other recipe"] = refusal(*flags, "--output_dir", runs / "linear", *linear, "--label_smoothing", "0.1")
found["wrong schedule"] = refusal("--lr_schedule", "linaer")
found["wrong value"] = refusal("--label_smoothing", "1")
found["help"] = train.get_args_parser().format_help()
space = read_space(SPACE)
found["space"] = {"parameters": space.parameters, "enqueue": space.enqueue}
tests = ["tests/comparison/test_methods.py",
         "tests/search/test_space.py::test_the_first_trials_are_the_published_methods"]
found["tests"] = int(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *tests]))
print(json.dumps(found))
"""


def recipes() -> list[str]:
    """The code blocks of CONTRIBUTING.md's section: a formula, its entry, a method, its script, a flag."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add a schedule, a method or a flag")[1]
    return re.findall(r"```\w+\n(.*?)```", section.split("\n## ")[0], re.S)


def follow(copy) -> None:
    """Edits the places that the recipes name, and no other ones."""
    formula, entry, method, script, flag = recipes()
    schedules, methods = copy / "util" / "lr_sched.py", copy / "scripts" / "methods.json"
    insert(schedules, f"\n\n{formula}", before="\n\n@dataclass(frozen=True)\nclass Schedule:\n")
    insert(schedules, entry, before="}\n\n\ndef schedule_of(")
    insert(methods, f",\n{method.rstrip()}", before="\n}\n")
    (copy / "scripts" / "finetuning_sqa_7b_linear.sh").write_text(script)
    factorial = copy / "scripts" / "run_factorial.sh"
    factorial.write_text(factorial.read_text().replace("step exponential", "step exponential linear"))
    insert(copy / "util" / "training" / "settings.py", flag, before="\n    def effective_batch(")


def insert(path, new: str, before: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, f"{path}: {before}"
    path.write_text(text.replace(before, new + before))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(base, scienceqa, runs, tmp_path_factory) -> dict:
    """The findings of a process that uses the copy in which the recipes were followed."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("lavin", "util", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, copy)
    (copy / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "published.json", copy / "assets")
    follow(copy)
    (copy / "steps.py").write_text(STEPS)
    flags = [*base.flags, "--data_root", str(scienceqa), "--device", "cpu", "--epochs", "2", "--warmup_epochs", "0",
             "--lr", "1e-2", "--max_seq_len", "160", "--seed", "0", "--num_workers", "0"]
    done = subprocess.run([sys.executable, "steps.py", json.dumps(flags), str(runs)], cwd=copy, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *report, last = done.stdout.splitlines()
    return {**json.loads(last), "report": "\n".join(report)}


def test_the_schedule_trains_and_goes_on(found, runs):
    first, last = (line["train_lr"] for line in found["log"])
    assert 0.005 < first < 1e-2 and 1e-5 < last < 0.005  # means of the halves of a line from 1e-2 to 1e-5
    assert (runs / "linear" / "checkpoint-1.pth").is_file() and (runs / "linear" / "scores.json").is_file()


def test_tables_and_figures_name_the_method(found, runs):
    rows = (runs / "plots" / "table.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:3]] == ["Base", "Linear"]
    assert "Linear" in (runs / "plots" / "loss.svg").read_text()


def test_a_search_varies_the_schedule_and_tries_the_method(found):
    parameters = found["space"]["parameters"]
    assert parameters["lr_schedule"]["choices"][-1] == "linear"
    assert all("linear" in parameters[flag]["when"]["lr_schedule"] for flag in ("min_lr", "warmup_epochs"))
    assert found["space"]["enqueue"][-1] == {"lr_schedule": "linear", "min_lr": 1e-5}


def test_scripts_and_table_agree(found):
    assert found["tests"] == 0, found["report"]


def test_wrong_values_are_refused_by_name(found):
    assert found["wrong schedule"].startswith("--lr_schedule invalid choice: 'linaer' (choose from ")
    assert "linear" in found["wrong schedule"]
    assert found["wrong value"].startswith("--label_smoothing 1 does not lie in [0, 1)")


def test_the_flag_belongs_to_the_recipe(found):
    assert found["recipe"]["label_smoothing"] == 0
    assert "belongs to another recipe (--label_smoothing 0.1, not 0.0)" in found["other recipe"]


def test_help_shows_the_flag_in_its_group(found):
    heading = re.findall(r"^(\w.*):\n(?:  .*\n|\n(?=  ))*?  --label_smoothing LABEL_SMOOTHING\n", found["help"], re.M)
    assert heading == ["optimization"]
    assert max(map(len, found["help"].splitlines())) <= 80

"""The embedded default at its real size: the toy base is weak, fine-tuning teaches it, and it looks at the pictures.

The slowest test file: it builds data and base as quickstart does, and trains the base method once.
"""

import json
import math
import os
import random
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

import eval as evaluation
import make_mini_scienceqa
import make_toy_base
import train
from tiny import ROOT


def quickstart_flags(weights: Path) -> list[str]:
    """Those of the script itself, so that what is tested is what it runs."""
    show = 'eval "$(sed -n "/^FLAGS=/,/)$/p" scripts/quickstart.sh)"; printf "%s\\n" "${FLAGS[@]}"'
    env = {**os.environ, "WEIGHTS": str(weights), "MODEL": "toy"}
    return subprocess.run(["bash", "-c", show], cwd=ROOT, env=env, capture_output=True, text=True, check=True
                          ).stdout.split()


def scores(folder: Path, *flags: str) -> dict:
    evaluation.main(evaluation.get_args_parser().parse_args([*flags, "--output_dir", str(folder)]))
    return json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    root = tmp_path_factory.mktemp("learned")
    data, weights, run = root / "mini", root / "weights", root / "run"
    make_mini_scienceqa.write_mini_scienceqa(data, make_mini_scienceqa.SIZES, 0)
    make_toy_base.main(Namespace(data_root=str(data), out=weights / "toy", seed=0))
    base = ["--llm_model", "toy", "--llama_model_path", str(weights), "--data_root", str(data)]
    train.main(train.get_args_parser().parse_args([*base, "--output_dir", str(run), *quickstart_flags(weights)]))
    yield {"data": data, "run": run, "tuned": scores(run, "--adapter_path", str(run)),
           "untuned": scores(root / "untuned", *base, "--vision_model", str(weights / "toy" / "vit"))}


def shuffle_test_pictures(data: Path, out: Path) -> Path:
    """The same data, each test picture moved to another question."""
    out.mkdir()
    for name in ("problems.json", "pid_splits.json", "captions.json"):
        shutil.copy(data / name, out)
    qids = sorted(path.name for path in (data / "images" / "test").iterdir())
    random.Random(0).shuffle(qids)
    for qid, other in zip(qids, qids[1:] + qids[:1]):  # round a circle: none stays where it was
        shutil.copytree(data / "images" / "test" / other, out / "images" / "test" / qid)
    return out


def test_fine_tuning_reaches_what_the_toy_base_lacks(learned):
    # two bases and two seeds gave 86.5 to 90.0 and 82.8 to 85.6 where this was written; another processor rounds otherwise
    assert learned["tuned"]["Avg"] >= 85 and learned["tuned"]["IMG"] >= 80
    assert learned["untuned"]["Avg"] < learned["tuned"]["Avg"] - 10


def test_accuracy_on_pictures_falls_to_chance_when_they_are_shuffled(learned, tmp_path):
    data = shuffle_test_pictures(learned["data"], tmp_path / "shuffled")
    blind = scores(tmp_path / "run", "--adapter_path", str(learned["run"]), "--data_root", str(data))
    problems = json.loads((data / "problems.json").read_text())
    chances = [1 / len(p["choices"]) for p in problems.values() if p["split"] == "test" and p["image"]]
    chance = sum(chances) / len(chances)
    deviation = math.sqrt(sum(p * (1 - p) for p in chances)) / len(chances)
    assert blind["counts"]["IMG"] == len(chances)
    assert blind["IMG"] / 100 < chance + 3 * deviation
    for column in ("LAN", "NO"):  # what has no picture stays as it was
        assert blind[column] == learned["tuned"][column]

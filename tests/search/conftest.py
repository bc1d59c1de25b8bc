"""Data for a search."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def data(scienceqa_copy) -> Path:
    """ScienceQA with three questions to validate on."""
    path = scienceqa_copy / "pid_splits.json"
    splits = json.loads(path.read_text())
    path.write_text(json.dumps({**splits, "val": splits["train"][9:], "train": splits["train"][:9]}))
    return scienceqa_copy

"""The rows that are no methods: chance and the untuned base, which are found, checked, shown, and never tested."""

import csv
import io
import json
from pathlib import Path

import pytest
from test_comparison import CYCLICAL, INPUTS, OWN, STEP, write_run

from user_errors import error_message
from util.comparison.comparison import compare
from util.comparison.statistics import wilson
from util.comparison.tables import csv_table, latex_table, markdown_table, text_table
from util.evaluation.scoring import COLUMNS

CHANCE = {column: 40.25 if column in ("NAT", "TXT", "G1-6", "Avg") else None for column in COLUMNS}
MODELS = {name: INPUTS[name] for name in ("base", "base_sha256", "vision", "vision_sha256")}
UNTUNED = {**OWN, **MODELS, "checkpoint": None, "checkpoint_sha256": None, "chance": CHANCE}


def write_study(folder: Path, seeds: int = 1) -> None:
    for seed in range(seeds):
        for name, right, flags in (("base", "1111110000", {}), ("step", "1111111000", STEP),
                                   ("cyclical", "1111110001", CYCLICAL)):
            run = folder / f"{name}{seed}"
            write_run(run, right, scored={**OWN, "chance": CHANCE}, seed=seed, prompt_format="QCM-ALE", bits="16bit",
                      precision="auto", **flags)
            (run / "recipe.json").write_text(json.dumps({"recipe": INPUTS, "flags": {}}))


def write_untuned(folder: Path, right: str = "1111000000", **scored) -> str:
    return write_run(folder, right, files={"config.json": None, "log.txt": None}, scored={**UNTUNED, **scored})


@pytest.mark.parametrize("seeds", [1, 3])
def test_untuned_base_and_chance_are_rows_and_change_no_number_of_a_method(tmp_path, seeds):
    write_study(tmp_path / "runs", seeds)
    alone = compare([str(tmp_path / "runs")])
    untuned = write_untuned(tmp_path / "runs" / "untuned")
    comparison = compare([str(tmp_path / "runs")])
    assert comparison.methods == alone.methods and comparison.differences == alone.differences
    assert not comparison.excluded and [reference.name for reference in alone.references] == ["chance"]
    base, chance = comparison.references
    assert (base.name, base.overall, base.accuracies["IMG"]) == ("untuned base", 40, None)
    assert base.interval == pytest.approx([100 * end for end in wilson(4, 10)]) and untuned in base.note
    assert (chance.name, chance.accuracies, chance.interval) == ("chance", CHANCE, None)
    table = {row.split(" | ")[0][2:]: row for row in markdown_table(comparison).splitlines() if row.startswith("| ")}
    assert list(table)[-3:] == ["untuned base", "chance", "questions"]
    for name, accuracy in (("untuned base", "40.00"), ("chance", "40.25")):
        assert accuracy in table[name] and table[name].endswith(" –" * 1 + " |") and "better" not in table[name]
        assert f"\n{name}" in text_table(comparison, 80) and f"\n{name} & " in latex_table(comparison)
    assert f"not tested: untuned base (without adapters, in {untuned}); chance (guessing" in text_table(comparison)


def test_in_csv_they_have_no_seeds_and_no_differences(tmp_path):
    write_study(tmp_path / "runs", 2)
    write_untuned(tmp_path / "runs" / "untuned", parse_failures=3)
    rows = list(csv.DictReader(io.StringIO(csv_table(compare([str(tmp_path / "runs")])))))
    assert [row["method"] for row in rows if row["seeds"] == "0"] == ["untuned base", "chance"]
    untuned, chance = rows[-2:]
    assert (untuned["Avg"], chance["Avg"], chance["NAT"], chance["IMG"]) == ("40.0000", "40.2500", "40.2500", "")
    assert untuned["Avg_low"] and not chance["Avg_low"]
    assert (untuned["parse_failures"], chance["parse_failures"]) == ("30.0000", "")
    for row in (untuned, chance):
        assert None not in row.values() and not any(row[name] for name in ("difference", "p", "p_holm", "Avg_sd"))


OTHER = {
    "the untuned base has other files of --llm_model than": {"base": "x", "base_sha256": "x"},
    "the untuned base has other files of --vision_model than": {"vision_sha256": "x"},
    "scored with --prompt_format QCM-LEA, and not QCM-ALE": {"prompt_format": "QCM-LEA"},
    "scored with --bits 4bit, and not 16bit": {"bits": "4bit"},
    "scored with --decode score, not generate": {"decode": "score"},
    "scored with --precision fp32, not bf16 or fp16": {"precision": "fp32"},
    "scored with data of checksum 9876543210, not 0123456789": {"data": "9876543210"},
    "scored with pictures of checksum fedc, not abcd": {"pictures": "fedc"},
    "of split val, not test": {"split": "val"},
}


@pytest.mark.parametrize("reason, scored", OTHER.items())
def test_the_untuned_base_of_something_else_is_left_out(tmp_path, reason, scored):
    write_study(tmp_path / "runs")
    folder = write_untuned(tmp_path / "runs" / "a-first", **scored)
    comparison = compare([str(tmp_path / "runs")])
    assert [reference.name for reference in comparison.references] == ["chance"] and len(comparison.methods) == 3
    (line,) = comparison.excluded
    assert line.startswith(f"{folder}: ") and reason in line


def test_other_questions_a_second_one_and_unknown_bases_are_left_out(tmp_path):
    write_study(tmp_path / "runs")
    for name, right in (("fewer", "1110"), ("one", "1111000000"), ("two", "1111000000")):
        write_untuned(tmp_path / "runs" / f"u-{name}", right)
    fewer, second = compare([str(tmp_path / "runs")]).excluded
    assert "its 4 questions and the others' 10 differ" in fewer
    assert second == f"{tmp_path / 'runs' / 'u-two'}: the untuned base is in {tmp_path / 'runs' / 'u-one'} already"
    (tmp_path / "runs" / "base0" / "recipe.json").unlink()
    assert "cannot be told: it needs a recipe.json" in "".join(compare([str(tmp_path / "runs")]).excluded)


def test_the_untuned_base_alone_is_no_comparison(tmp_path):
    folder = write_untuned(tmp_path / "untuned")
    assert f"{folder}: the untuned base is no run" in error_message(compare, [folder])


@pytest.mark.parametrize("content", ["{", "[]", '{"checkpoint": null}'])
def test_broken_scores_of_the_untuned_base_are_named(tmp_path, content):
    write_study(tmp_path / "runs")
    (Path(write_untuned(tmp_path / "runs" / "untuned")) / "scores.json").write_text(content)
    (line,) = compare([str(tmp_path / "runs")]).excluded
    assert "untuned" in line and "scores.json" in line


def test_runs_that_an_earlier_version_scored_say_how_to_learn_of_chance(tmp_path):
    write_run(tmp_path / "base", scored=OWN)
    comparison = compare([str(tmp_path)])
    assert comparison.references == [] and "eval.py --adapter_path RUN adds it" in text_table(comparison)

"""A variant of one's own, from training to the table: a copy of the base's command with another flag."""

import pytest

import eval as evaluation
import plot_results
import train
from tiny_runs import run_flags
from util.comparison import figures


@pytest.mark.parametrize("changed, name", [
    (("--lr", "5e-3"), "Base + lr 0.005"),
    (("--weight_decay", "0.1", "--warmup_epochs", "0.5"), "Base + warmup_epochs 0.5 + weight_decay 0.1")])
def test_a_variant_is_trained_scored_and_compared(base, scienceqa, tmp_path, monkeypatch, capsys, changed, name):
    monkeypatch.setitem(figures.RC_PARAMS, "figure.dpi", 40)
    folders = {tmp_path / "LaVIN-tiny-base": (), tmp_path / "LaVIN-tiny-mine": changed}
    for folder, flags in folders.items():
        train.main(train.get_args_parser().parse_args(run_flags(base, scienceqa, folder, "--epochs", "2", *flags)))
        evaluation.main(evaluation.get_args_parser().parse_args(
            ["--adapter_path", str(folder), "--device", "cpu"]))
    capsys.readouterr()
    for runs in (list(folders), [*folders][::-1]):  # in either order
        plot_results.main(plot_results.get_args_parser().parse_args([*map(str, runs), "--out", str(tmp_path / "out")]))
        rows = (tmp_path / "out" / "table.csv").read_text().splitlines()
        assert rows[1].startswith("Base,") and rows[2].startswith(f"{name},")
        assert [row.partition(",")[0] for row in rows[3:]] == ["chance"]
    assert "Base" in capsys.readouterr().out

"""Numbers that could depend on the number of processes: the rate, the weights of the loss, who draws which mask."""

import json
import shutil

import pytest
import torch

import train
from forked import in_processes, joined
from tiny_runs import run_flags
from watched import watched

DROPOUT = ("--dropout_prob", "0.3", "--dropout_lim", "0.3", "--batch_size", "2")
UNEVEN = ("--batch_size", "5", "--accum_iter", "2")  # 20 samples a step on two processes, of which eleven are there


@pytest.fixture(scope="module")
def eleven(scienceqa, tmp_path_factory):
    """ScienceQA without its last train problem: two processes cannot share the rest evenly. The answers have very
    different lengths."""
    root = tmp_path_factory.mktemp("eleven") / "data"
    shutil.copytree(scienceqa, root)
    problems = json.loads((root / "problems.json").read_text())
    for i, problem in enumerate(problems.values()):
        problem["solution"] = "It is so." + " Yes." * (i * i % 13)
    (root / "problems.json").write_text(json.dumps(problems))
    splits = json.loads((root / "pid_splits.json").read_text())
    splits["train"].pop()
    (root / "pid_splits.json").write_text(json.dumps(splits))
    return root


@pytest.fixture(scope="module")
def runs(base, scienceqa, eleven, tmp_path_factory):
    """The folder of each run, and the passes of both processes."""
    out = tmp_path_factory.mktemp("two")
    flags = {"0": (scienceqa, *DROPOUT, "--seed", "0", "--epochs", "2"), "1": (scienceqa, *DROPOUT, "--seed", "1"),
             "microbatch": (eleven, *UNEVEN, "--loss_norm", "microbatch"), "batch": (eleven, *UNEVEN)}
    commands = {name: run_flags(base, data, out / name, "--epochs", "1", "--warmup_epochs", "0", *more)
                for name, (data, *more) in flags.items()}
    commands["blr"] = run_flags(base, scienceqa, out / "blr", "--epochs", "1", "--warmup_epochs", "0", "--batch_size",
                                "2", "--lr_schedule", "step", "--blr", "0.512")
    position = commands["blr"].index("--lr")
    del commands["blr"][position:position + 2]

    def train_all():
        made = {}
        with joined():
            for name, flags in commands.items():
                with watched() as passes:
                    train.main(train.get_args_parser().parse_args(flags))
                made[name] = [vars(one) for one in passes]
                torch.distributed.barrier()  # rank 0 writes the checkpoint
        return made
    by_rank = in_processes(train_all, 2)
    return {name: (out / name, [made[name] for made in by_rank]) for name in commands}


def test_blr_is_scaled_by_the_samples_of_all_processes(runs):
    """Two samples on each of two processes: 0.512 * 4 / 256."""
    entry, = map(json.loads, (runs["blr"][0] / "log.txt").read_text().splitlines())
    assert entry["train_lr"] == pytest.approx(0.008)


def test_processes_begin_with_the_same_adapters_and_draw_masks_of_their_own(runs):
    drawn = []
    for name, n_steps in (("0", 6), ("1", 3)):
        first, second = runs[name][1]
        assert len(first) == len(second) == n_steps
        for made, other in zip(first, second, strict=True):
            for parameter, tensor in made["parameters"].items():
                assert tensor.equal(other["parameters"][parameter]), parameter
        drawn += [tuple(made["draws"][0].flatten()[:8].tolist()) for made in first + second]
    assert len(set(drawn)) == len(drawn) == 18  # (seed, epoch, step, rank) each has masks of its own


@pytest.mark.parametrize("loss_norm, sizes", [("microbatch", [4, 4, 3]), ("batch", [11])])
def test_loss_weights_count_the_answer_tokens_and_micro_batches_of_all_processes(runs, loss_norm, sizes):
    """Eleven samples, of which the processes take six and five, make three micro-batches of at most 5, whichever
    process takes which. The samples of a micro-batch have one weight, and those of others have others."""
    folder, by_rank = runs[loss_norm]
    assert sorted((sum(len(made["samples"]) for made in passes) for passes in by_rank), reverse=True) == [6, 5]
    groups: dict[float, list[list[float]]] = {}
    for weights in (weights for passes in by_rank for made in passes for weights in made["weights"]):
        groups.setdefault(weights[0], []).append(weights)
    assert sorted(map(len, groups.values()), reverse=True) == sizes
    for of_group in groups.values():
        tokens = sum(of_group, [])
        assert tokens == pytest.approx([1 / (len(tokens) * len(sizes))] * len(tokens))
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["effective_batch"] == 20

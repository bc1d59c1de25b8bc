"""--seed of train.py decides the initial adapters, the order of samples and the dropout masks, each by itself."""

import itertools

import pytest
import torch

import train
from tiny_runs import run_flags
from watched import Pass, watched

SEEDS = (0, 1, 2)
EPOCHS, STEPS = 2, 3  # of the twelve train problems in batches of four


def train_watched(base, scienceqa, folder, *flags) -> list[Pass]:
    """All passes of a short run, one for each optimizer step, whose adapters hardly change."""
    flags = run_flags(base, scienceqa, folder, "--epochs", str(EPOCHS), "--lr", "1e-30", "--dropout_prob", "0.3",
                      "--dropout_lim", "0.3", "--drop_path", "0.2", *flags)
    with watched() as passes:
        train.main(train.get_args_parser().parse_args(flags))
    return passes


@pytest.fixture(scope="module")
def passes(base, scienceqa, tmp_path_factory) -> dict[int, list[Pass]]:
    """The passes of one run for each seed."""
    root = tmp_path_factory.mktemp("seeds")
    return {seed: train_watched(base, scienceqa, root / str(seed), "--seed", str(seed)) for seed in SEEDS}


def all_distinct(values) -> bool:
    values = list(values)
    return len(values) > 1 and len(set(values)) == len(values)


def test_initial_adapters_depend_on_the_seed(passes):
    """Every tensor that is not constant at the start is another one with every seed."""
    drawn = set()
    for (_, first), (_, second) in itertools.combinations(passes.items(), 2):
        for name, tensor in first[0].parameters.items():
            if tensor.unique().numel() > 1:
                drawn.add(name)
                assert not torch.isclose(tensor, second[0].parameters[name]).any(), name
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in drawn} >= {
        "conv_A", "expert_weights", "adapter_modality_embedding"}


def test_layers_begin_with_adapters_of_their_own(passes):
    first = [tuple(tensor.flatten()[:4].tolist()) for name, tensor in passes[0][0].parameters.items()
             if name.endswith("conv_A.weight")]
    assert all_distinct(first)


def test_the_order_of_samples_depends_on_the_seed_and_the_epoch(passes):
    assert all(len(of_seed) == EPOCHS * STEPS for of_seed in passes.values())
    orders = [tuple(frozenset(made.samples) for made in of_seed[start:start + STEPS])
              for of_seed in passes.values() for start in range(0, EPOCHS * STEPS, STEPS)]
    assert all_distinct(orders)
    assert len({frozenset().union(*order) for order in orders}) == 1  # every epoch has all samples


def test_dropout_masks_depend_on_the_seed_the_epoch_and_the_step(passes):
    assert all_distinct(made.first_draws for of_seed in passes.values() for made in of_seed)


def test_each_layer_draws_a_mask_of_its_own(passes):
    for made in passes[0]:
        assert len(made.draws) == 2 * 3 + 6  # two layers, with stochastic depth twice, and six blocks of the ViT
        assert all_distinct(tuple(draw.flatten()[:4].tolist()) for draw in made.draws if draw.numel() >= 4)


def test_the_same_seed_repeats_everything_whatever_was_drawn_before(passes, base, scienceqa, tmp_path):
    torch.manual_seed(99)
    for made, again in zip(passes[1], train_watched(base, scienceqa, tmp_path / "run", "--seed", "1"), strict=True):
        assert made.samples == again.samples
        for value, other in ((made.draws, again.draws), (made.parameters.values(), again.parameters.values())):
            assert all(torch.equal(a, b) for a, b in zip(value, other, strict=True))

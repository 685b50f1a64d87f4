from __future__ import annotations

import pytest
import torch

from padst_compiler.layers import sparse_layers
from padst_compiler.mixer import Images, digits
from padst_compiler.trial import VARIANTS, accuracy, train


def few(count: int) -> Images:
    images = digits()
    return Images(
        "few", images.train_x[:count], images.train_y[:count], images.test_x, images.test_y
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_ends_hard(variant: str) -> None:
    ticks: list[int] = []
    result = train(few(480), variant, seed=0, epochs=6, tick=ticks.append)
    assert ticks == list(range(6))
    assert len(result.curve) == 6
    assert result.accuracy > 30.0  # chance is 10
    layers = sparse_layers(result.model)
    assert len(layers) == (0 if variant == "dense" else 4)
    assert all(layer.soft_permutation is None for layer in layers.values())
    assert all(abs(layer.sparsity - 0.9) < 1e-6 for layer in layers.values())


def test_a_training_depends_on_its_seed_only() -> None:
    before = torch.random.get_rng_state()
    runs = [train(few(192), "block", seed=s, epochs=1, tick=len_of) for s in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [next(iter(run.model.parameters())).detach() for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def len_of(epoch: int) -> None:
    del epoch


def test_sparse_variants_hold_a_tenth_of_the_optimiser_state() -> None:
    dense, sparse = (train(few(192), v, 0, 1, len_of) for v in VARIANTS[:2])
    assert sparse.optimizer_bytes < 0.2 * dense.optimizer_bytes


@pytest.mark.slow
def test_hardening_by_the_gap_rule_moves_the_accuracy_by_less_than_a_tenth_of_a_point() -> None:
    result = train(digits(), "block + permutation", seed=0, epochs=25, tick=len_of)
    assert len(result.moved) >= 1  # the rule fired
    assert max(abs(change) for change in result.moved) < 0.1
    assert result.accuracy == accuracy(result.model, digits())

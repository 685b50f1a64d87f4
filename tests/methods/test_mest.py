"""MEST drops by |w| + lambda |g|, on every structure, and grows at random."""

import math

import pytest
import torch
from torch import nn

from padst_compiler.layers import SparseLinear
from padst_compiler.methods import Mest
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured
from padst_compiler.training import DynamicSparsity

FAMILIES: list[Structure] = [Block(4), NM(m=4), Diagonal(), FanIn(), Unstructured()]


@pytest.mark.parametrize("structure", FAMILIES, ids=lambda s: s.name)
def test_the_units_with_the_least_weight_and_gradient_go(structure: Structure) -> None:
    """40 random cases for each of five structures, against sums over dense matrices."""
    shape = Shape(8, 12)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        dense = nn.Linear(12, 8, dtype=torch.float64)
        scores = torch.rand(8, 12, generator=generator)
        kept = max(1, structure.kept(shape, 0.5))
        layer = SparseLinear.adopt(dense, structure, structure.select(scores, kept), None, "input")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        weight = 10 ** float(torch.rand((), generator=generator) * 3 - 2)
        training = DynamicSparsity(
            layer, optimizer, Mest(weight), total_steps=4, update_every=1, drop_fraction=0.6
        )
        x = torch.randn(6, 12, generator=generator, dtype=torch.float64)
        grad = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        strength = layer.weight.detach().abs() + weight * (grad.t() @ x).abs()
        before = structure.slots(layer.indices, shape).clone()
        units = [
            (float(structure.unit_scores(strength)[group, unit]), group, place)
            for group, row in enumerate(before.tolist())
            for place, unit in enumerate(row)
        ]
        layer(x).backward(grad)
        optimizer.step()
        n_drop = int(training.schedule.drop_at(1) * len(units))
        dropped = {(group, place) for _, group, place in sorted(units)[:n_drop]}
        after = structure.slots(layer.indices, shape)
        moved = {tuple(place) for place in (after != before).nonzero().tolist()}
        assert moved <= dropped
        assert len(moved) == round(training.history[-1]["churn"] * len(units))
        assert int(layer.mask().sum()) == layer.values.numel()


def test_what_is_large_by_its_gradient_stays() -> None:
    results = []
    for weight in (0.0, 1e6):
        dense = nn.Linear(8, 1, bias=False)
        start = torch.tensor([[0, 1]], dtype=torch.int32)
        layer = SparseLinear.adopt(dense, FanIn(), start, None, "input")
        layer.values.data.copy_(torch.tensor([[1.0, 2.0]]))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        options = {"total_steps": 4, "update_every": 1, "drop_fraction": 0.9}
        DynamicSparsity(layer, optimizer, Mest(weight), **options)  # type: ignore[arg-type]
        layer(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])).sum().backward()
        optimizer.step()
        results.append(layer.indices[0].tolist())
    assert results[0][1] == 1 and results[1][0] == 0


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="Expected a finite weight of at least 0"):
        Mest(weight)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.passes.lower_weights import LowerWeights
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

Rewrite = Callable[..., Any]
permute: Callable[..., Tensor] = torch.ops.padst.permute
inverse: Callable[..., Tensor] = torch.ops.padst.invert
STRUCTURES = [Block(4), Block(2, 4), NM(4), Diagonal(), FanIn(), Unstructured()]
each = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
O, I = 16, 8  # noqa: E741


def d(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def held(structure: Structure) -> dict[str, Tensor]:
    indices = structure.select(torch.rand(O, I), structure.kept(Shape(O, I), 0.5))
    return {"v": structure.pack(d(O, I), indices).contiguous(), "k": indices}


def unpacked(structure: Structure, v: Tensor, k: Tensor) -> Tensor:
    made: Tensor = torch.ops.padst.unpack(v, k, structure.name, O, I)
    return made


def ours(result: Any) -> list[str]:
    return [str(n.target) for n in result.graph.nodes if "padst" in str(n.target)]


@each
def test_a_weight_becomes_plain_aten(rewrite: Rewrite, structure: Structure) -> None:
    stored = held(structure)
    run = lambda x, v, k: x * unpacked(structure, v, k)  # noqa: E731
    result = rewrite(LowerWeights(), run, d(O, I), **stored)
    assert ours(result) == [] and result.fired == ["unpack is plain ATen"]
    assert result.where == ["k"]


@each
def test_a_gradient_becomes_plain_aten(rewrite: Rewrite, structure: Structure) -> None:
    stored = held(structure)
    unit = list(stored["v"].shape[stored["k"].dim() :])
    run = lambda x, k: torch.ops.padst.pack(x * 2, k, structure.name, unit)  # noqa: E731
    result = rewrite(LowerWeights(), run, d(O, I), k=stored["k"])
    assert ours(result) == [] and result.fired == ["pack is plain ATen"]


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_maps_on_weights_become_gathers(rewrite: Rewrite, side: str) -> None:
    def run(x: Tensor, v: Tensor, k: Tensor, p: Tensor) -> Tensor:
        w = unpacked(FanIn(), v, k)
        w = permute(w, p) if side == "columns" else permute(w.t(), p).t()
        return x * w

    table = torch.randperm(I if side == "columns" else O)
    result = rewrite(LowerWeights(), run, d(O, I), p=table, **held(FanIn()))
    assert ours(result) == [] and len(result.fired) == 2


def test_maps_on_gradients_become_gathers(rewrite: Rewrite) -> None:
    stored = held(Block(4))

    def run(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
        made: Tensor = torch.ops.padst.pack(permute(x * 2, p), k, "block", [4, 4])
        return made

    result = rewrite(LowerWeights(), run, d(O, I), p=torch.randperm(I), k=stored["k"])
    assert ours(result) == [] and len(result.fired) == 2


def test_maps_on_activations_stay(rewrite: Rewrite) -> None:
    def run(x: Tensor, v: Tensor, k: Tensor, p: Tensor) -> Tensor:
        return permute(x, p) * unpacked(FanIn(), v, k)

    result = rewrite(LowerWeights(), run, d(O, I), p=torch.randperm(I), **held(FanIn()))
    assert ours(result) == ["padst.permute.default"] and len(result.fired) == 1


def test_a_graph_without_weights_is_left_alone(rewrite: Rewrite) -> None:
    result = rewrite(LowerWeights(), lambda x, p: permute(x, p), d(3, I), p=torch.randperm(I))
    assert ours(result) == ["padst.permute.default"] and result.fired == []

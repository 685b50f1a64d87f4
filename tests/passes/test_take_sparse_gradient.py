from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.passes.take_sparse_gradient import TakeSparseGradient
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

Rewrite = Callable[..., Any]
permute: Callable[..., Tensor] = torch.ops.padst.permute
inverse: Callable[..., Tensor] = torch.ops.padst.invert
STRUCTURES = [Block(4), Block(2, 4), NM(4), Diagonal(), FanIn(), Unstructured()]
each = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
O, I, T = 16, 8, 5  # noqa: E741
STEP = TakeSparseGradient()


def d(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def packing(structure: Structure) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Return what packs a gradient under a mask, and the mask's indices."""
    indices = structure.select(torch.rand(O, I), structure.kept(Shape(O, I), 0.5))
    unit = list(structure.pack(d(O, I), indices).shape[indices.dim() :])

    def pack(grad: Tensor, k: Tensor) -> Tensor:
        made: Tensor = torch.ops.padst.pack(grad, k, structure.name, unit)
        return made

    return pack, indices


@each
@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_is_taken_from_its_factors(
    rewrite: Rewrite, structure: Structure, turned: bool
) -> None:
    pack, k = packing(structure)

    def run(dy: Tensor, x: Tensor, k: Tensor) -> Tensor:
        return pack((x.t() @ dy).t() if turned else dy.t() @ x, k)

    result = rewrite(STEP, run, d(T, O), d(T, I), k=k)
    assert f"{structure.name}_linear_dw" in result.after
    assert not {"mm", "pack"} & set(result.after)
    assert result.fired == ["pack is taken from its factors"]


@each
def test_behind_maps_and_batches_too(rewrite: Rewrite, structure: Structure) -> None:
    pack, k = packing(structure)

    def run(dy: Tensor, x: Tensor, k: Tensor, p: Tensor, q: Tensor) -> Tensor:
        grad = permute((dy.t() @ x), p)
        return pack(permute(grad.t(), inverse(q)).t(), k)

    tables = {"p": torch.randperm(I), "q": torch.randperm(O)}
    result = rewrite(STEP, run, d(T, O), d(T, I), k=k, **tables)
    assert f"{structure.name}_linear_dw" in result.after and "mm" not in result.after
    run_batched = lambda dy, x, k: pack(torch.bmm(dy.mT, x).view(O, I), k)  # noqa: E731
    result = rewrite(STEP, run_batched, d(1, T, O), d(1, T, I), k=k)
    assert f"{structure.name}_linear_dw" in result.after and "bmm" not in result.after


def test_a_sum_of_products_is_a_sum_of_gradients(rewrite: Rewrite) -> None:
    pack, k = packing(FanIn())

    def run(dy: Tensor, x: Tensor, k: Tensor) -> Tensor:
        return pack(dy.t() @ x + (x.t() @ dy).t() + dy.relu().t() @ x, k)

    result = rewrite(STEP, run, d(T, O), d(T, I), k=k)
    assert result.after.count("fan_in_linear_dw") == 3 and "mm" not in result.after


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "not a product": lambda dy, x: dy[:O, :I] * 2,
    "scaled": lambda dy, x: (dy.t() @ x) * 3.0,
    "a difference": lambda dy, x: dy.t() @ x - dy.t() @ x.relu(),
    "a sum with another": lambda dy, x: dy.t() @ x + dy.t().sum() * x.new_ones(O, I),
    "a weighted sum": lambda dy, x: torch.add(dy.t() @ x, dy.t() @ x.relu(), alpha=2.0),
    "cast": lambda dy, x: (dy.float().t() @ x.float()).double(),
    "with a bias": lambda dy, x: torch.addmm(x.new_ones(I), dy.t(), x),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_gradients_are_left_alone(rewrite: Rewrite, name: str) -> None:
    pack, k = packing(FanIn())
    result = rewrite(
        STEP,
        lambda dy, x, k: pack(LEFT[name](dy, x), k),
        d(16, O),
        d(16, I),
        k=k,
        compare=name != "cast",
    )
    assert "pack" in result.after and result.fired == []
    assert "fan_in_linear_dw" not in result.after


def test_a_graph_without_gradients_is_left_alone(rewrite: Rewrite) -> None:
    result = rewrite(STEP, lambda x, w: x @ w, d(3, I), w=d(I, I))
    assert (result.after, result.fired) == (["mm"], [])

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from padst_compiler.compat import inductor_decompositions, trace_aten
from padst_compiler.ops import LINEAR, LINEAR_DX
from padst_compiler.passes.lower_maps import LowerMaps
from padst_compiler.rewrite import Facts
from padst_compiler.structures import Block, Shape

permute, inverse = torch.ops.padst.permute, torch.ops.padst.invert
Rewrite = Callable[..., Any]
IRREGULAR = torch.tensor([3, 1, 4, 0, 7, 6, 2, 5])
REMAINS = "a gather remains, fused with its neighbours"


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_a_map_becomes_a_gather(rewrite: Rewrite, shape: tuple[int, ...]) -> None:
    table = IRREGULAR
    result = rewrite(LowerMaps(), lambda x, p: permute(x, p), x(*shape), p=table)
    assert (result.before, result.after) == (["permute"], ["index_select"])
    assert (result.left, result.where) == ([REMAINS], ["p"])


FORMULAS = {
    "roll": torch.arange(8).roll(3),
    "flip": torch.arange(8).flip(0),
    "channel shuffle": torch.arange(8).view(2, 4).T.flatten(),
    "heads roll": torch.arange(8).view(4, 2).roll(1, 0).flatten(),
    "halves turn within": torch.arange(8).view(2, 4).roll(2, 1).flatten(),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_formula_loads_no_table(rewrite: Rewrite, name: str, turned: bool) -> None:
    def run(x: Tensor, p: Tensor) -> Tensor:
        moved: Tensor = permute(x.mT if turned else x, p)
        return moved.view(-1).exp()

    result = rewrite(LowerMaps(), run, x(3, 8, 8), p=FORMULAS[name])
    assert "permute" in result.before
    assert not {"index_select", "index", "gather", "padst"} & set(result.after)
    (said,) = result.left
    assert said.startswith("a movement by ") and "j" in said and result.where == ["p"]


def test_an_inverse_becomes_plain_torch_and_costs_no_gather(rewrite: Rewrite) -> None:
    result = rewrite(LowerMaps(), lambda p: inverse(p), IRREGULAR)
    assert "invert" not in result.after
    assert result.left == []


def test_every_map_is_counted_once(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        once = permute(x, p)
        return once, permute(once.relu(), inverse(q))

    result = rewrite(LowerMaps(), run, x(3, 8), p=IRREGULAR, q=IRREGULAR)
    assert result.left == [REMAINS, REMAINS]
    assert not {"permute", "invert"} & set(result.after)


# -- kernels of ours -------------------------------------------------------------------------------


def blocks(width: int = 12) -> dict[str, Tensor]:
    structure, shape = Block(4), Shape(width, 8)
    indices = structure.select(x(width, 8), structure.kept(shape, 0.5))
    return {"v": structure.pack(x(width, 8), indices), "i": indices}


THROUGH = "a gather remains, in a kernel of ours"
OUT = torch.randperm(12)


def test_kernels_read_and_write_through_maps(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        moved = permute(x, p)
        y = LINEAR["block"](moved, v, i, None, 12)
        return permute(y, q).exp(), LINEAR["block"](moved, v, i, None, 12)

    result = rewrite(LowerMaps(), run, x(3, 8), p=IRREGULAR, q=OUT, **blocks())
    assert sorted(result.after) == ["block_linear_mapped", "block_linear_mapped", "exp"]
    assert result.left == [THROUGH, THROUGH]


def test_gradients_too(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, v: Tensor, i: Tensor) -> Tensor:
        y: Tensor = permute(LINEAR_DX["block"](permute(x, p), v, i, 8), q)
        return y

    result = rewrite(LowerMaps(), run, x(2, 3, 12), p=OUT, q=IRREGULAR, **blocks())
    assert result.after == ["block_linear_dx_mapped"]


@pytest.mark.parametrize("case", ["read", "written", "bias", "twice"])
def test_a_map_that_kernels_alone_do_not_see_stays_a_gather(rewrite: Rewrite, case: str) -> None:
    def run(x: Tensor, p: Tensor, v: Tensor, i: Tensor, b: Tensor) -> Any:
        if case == "written":
            y = LINEAR["block"](x, v, i, None, 8)
            return permute(y, p), y.exp()
        if case == "twice":  # one map is enough for one place
            return LINEAR["block"](permute(permute(x, p), p), v, i, None, 8)
        moved = permute(x, p)
        y = LINEAR["block"](moved, v, i, b if case == "bias" else None, 8)
        return (y, moved.exp()) if case == "read" else y

    result = rewrite(LowerMaps(), run, x(3, 8), p=IRREGULAR, b=x(8), **blocks(8))
    assert result.after.count("index_select") == 1
    assert REMAINS in result.left


def test_half_precision_and_symbolic_batches(rewrite: Rewrite) -> None:
    half = torch.randn(3, 8).bfloat16()
    result = rewrite(LowerMaps(), lambda x, p: permute(x, p), half, dynamic=True, p=IRREGULAR)
    gather = next(n for n in result.graph.nodes if n.target is torch.ops.aten.index_select.default)
    assert isinstance(gather.meta["val"].shape[0], torch.SymInt)


def test_a_joint_graph_gets_operators_that_it_may_still_hold() -> None:
    table = inductor_decompositions()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (x(3, 8), IRREGULAR)]
    traced = trace_aten(lambda x, p: permute(x, inverse(p)), fakes, table=table)
    LowerMaps()(traced.graph, Facts(table=table))
    traced.recompile()
    again = trace_aten(traced, fakes, table=table)
    before, after = (
        {str(node.target) for node in graph.nodes if node.op == "call_function"}
        for graph in (traced.graph, again.graph)
    )
    assert before == after  # nothing is left to decompose

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.ops import LINEAR
from padst_compiler.passes.fold_permutations import FoldPermutations
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

permute = torch.ops.padst.permute
Rewrite = Callable[..., Any]
FROZEN_MAP = "the map is not frozen: it may change between calls"
FROZEN_WEIGHT = "the reader's weight is not frozen"
I, O = 16, 24  # noqa: E741


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stored(structure: Structure, shape: Shape = Shape(O, I)) -> dict[str, Any]:  # noqa: B008
    dense = x(shape.out_features, shape.in_features)
    indices = structure.select(dense, structure.kept(shape, 0.5))
    return {"values": structure.pack(dense, indices), "indices": indices}


def reader(structure: Structure, out_features: int = O) -> Callable[..., Tensor]:
    op = LINEAR[structure.name]

    def run(x: Tensor, p: Tensor, values: Tensor, indices: Tensor, bias: Any = None) -> Tensor:
        y: Tensor = op(permute(x, p), values, indices, bias, out_features)
        return y

    return run


def whole_blocks(size: int, side: int) -> Tensor:
    """Return a map that moves whole blocks and shuffles within each."""
    return torch.cat([b * side + torch.randperm(side) for b in torch.randperm(size // side)])


# -- dense readers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, I), (2, 3, I)])
def test_a_dense_reader_absorbs_any_map(rewrite: Rewrite, shape: tuple[int, ...]) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: F.linear(permute(x, p), w, b),
        x(*shape),
        p=torch.randperm(I),
        w=x(O, I),
        b=x(O),
    )
    assert [n for n in result.before if n != "view"] == ["permute", "addmm"]
    assert [n for n in result.after if n != "view"] == ["addmm"]
    assert result.fired == ["columns of a dense linear"]
    assert result.where == ["p"]


def test_a_dense_reader_without_bias_absorbs_any_map(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: F.linear(permute(x, p), w),
        x(2, 3, I),
        p=torch.randperm(I),
        w=x(O, I),
    )
    assert result.after == ["view", "mm", "_unsafe_view"]


def test_a_tied_weight_is_reordered_for_one_reader_only(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(permute(x, p), w).relu(), w)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), w=x(I, I))
    assert result.after == ["mm", "relu", "mm"]


def test_addmm_with_factors_keeps_them(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: torch.addmm(b, permute(x, p), w, beta=0.5, alpha=3.0),
        x(3, I),
        p=torch.randperm(I),
        w=x(I, O),
        b=x(O),
    )
    assert result.after == ["addmm"]


# -- structured readers ----------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [FanIn(), Unstructured()], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(I,), (3, I), (2, 3, I)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fan_in_and_unstructured_readers_absorb_any_map(
    rewrite: Rewrite, structure: Structure, shape: tuple[int, ...], with_bias: bool
) -> None:
    bias = {"bias": x(O)} if with_bias else {}
    result = rewrite(
        FoldPermutations(),
        reader(structure),
        x(*shape),
        p=torch.randperm(I),
        **stored(structure),
        **bias,
    )
    assert result.before == ["permute", f"{structure.name}_linear"]
    assert result.after == [f"{structure.name}_linear"]


@pytest.mark.parametrize("structure", [FanIn(), Unstructured(), Block(4)], ids=lambda s: s.name)
def test_the_report_names_the_map_and_its_reader(rewrite: Rewrite, structure: Structure) -> None:
    given = {"p": whole_blocks(I, 4), **stored(structure)}
    result = rewrite(FoldPermutations(), reader(structure), x(3, I), **given)
    assert result.fired == [f"columns of indices ({structure.name}_linear)"]
    assert result.where == ["p"]


@pytest.mark.parametrize(
    ("structure", "shape", "table"),
    [
        (Block(4), Shape(O, I), lambda: whole_blocks(I, 4)),
        (Block(8), Shape(O, I), lambda: whole_blocks(I, 8)),
        (NM(m=4), Shape(O, I), lambda: whole_blocks(I, 4)),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).roll(-5)),
        (Diagonal(), Shape(8, I), lambda: torch.arange(I).roll(3)),
    ],
)
def test_a_structured_reader_absorbs_its_symmetry(
    rewrite: Rewrite, structure: Structure, shape: Shape, table: Callable[[], Tensor]
) -> None:
    result = rewrite(
        FoldPermutations(),
        reader(structure, shape.out_features),
        x(3, I),
        p=table(),
        bias=x(shape.out_features),
        **stored(structure, shape),
    )
    assert result.after == [f"{structure.name}_linear"]
    assert result.left == []


@pytest.mark.parametrize(
    ("structure", "shape", "table"),
    [
        (Block(4), Shape(O, I), lambda: torch.arange(I).roll(1)),
        (NM(m=4), Shape(O, I), lambda: torch.arange(I).roll(1)),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).flip(0)),
        (Diagonal(), Shape(O, I), lambda: torch.arange(I).roll(1)),  # it wraps around the rows
    ],
)
def test_a_map_outside_the_readers_symmetry_is_left(
    rewrite: Rewrite, structure: Structure, shape: Shape, table: Callable[[], Tensor]
) -> None:
    result = rewrite(
        FoldPermutations(),
        reader(structure, shape.out_features),
        x(3, I),
        p=table(),
        **stored(structure, shape),
    )
    assert result.after == result.before
    assert result.left == [f"the map lies outside what the columns of {structure.name} absorb"]


# -- between the map and its reader ----------------------------------------------------------------


def test_views_and_copies_that_keep_the_axis_are_passed(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
        y = permute(x, p).view(6, I).clone().reshape(3, 2, I).view(2, 3, I)
        return F.linear(y, w)

    result = rewrite(FoldPermutations(), run, x(2, 3, I), p=torch.randperm(I), w=x(O, I))
    assert "permute" not in result.after
    assert "clone" in result.after


@pytest.mark.parametrize(
    "between",
    [
        torch.relu,  # pointwise: the map must move up into its writer instead
        lambda y: y.roll(1, -1),
        lambda y: y.cumsum(-1),
        lambda y: y.softmax(-1),
        lambda y: torch.cat([y[..., 1:], y[..., :1]], dim=-1),
        lambda y: y.view(-1, 4, 4).transpose(1, 2).reshape(-1, I),
        lambda y: y.view(-1, 4).view(-1, I),
        lambda y: y.t().reshape(-1, I),
    ],
)
def test_anything_else_between_stops_it(
    rewrite: Rewrite, between: Callable[[Tensor], Tensor]
) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: F.linear(between(permute(x, p)), w),
        x(I, I),
        p=torch.randperm(I),
        w=x(O, I),
    )
    assert result.after == result.before
    assert (result.fired, result.left) == ([], [])


def test_a_slice_between_stops_it(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: F.linear(permute(x, p)[..., :8], w),
        x(3, I),
        p=torch.randperm(I),
        w=x(O, 8),
    )
    assert result.after == result.before


@pytest.mark.parametrize(
    "read",
    [
        lambda y, w: y.softmax(-1),
        lambda y, w: y @ y.t(),  # a product, but no weight in it
        lambda y, w: torch.bmm(y[None], w.t()[None]),
        lambda y, w: w[:, :3] @ y,  # the map lies on the other operand
    ],
)
def test_a_reader_that_is_no_linear_keeps_the_map(
    rewrite: Rewrite, read: Callable[[Tensor, Tensor], Tensor]
) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: read(permute(x, p), w),
        x(3, I),
        p=torch.randperm(I),
        w=x(O, I),
    )
    assert result.after == result.before
    assert result.fired == []


# -- readers, frozen and not -----------------------------------------------------------------------


def test_two_readers_of_one_map_both_absorb_it(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, k: Tensor) -> Tensor:
        y = permute(x, p)
        return F.linear(y, q) * F.linear(y, k)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), q=x(O, I), k=x(O, I))
    assert result.after == ["mm", "mm", "mul"]
    assert len(result.fired) == 2


def test_a_map_whose_result_leaves_the_graph_stays_for_that_reader(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = permute(x, p)
        return y, F.linear(y, w)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), w=x(O, I))
    assert result.after == ["permute", "mm"]
    assert result.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0].args[
        0
    ] in result.graph.find_nodes(op="placeholder")


def test_a_reader_that_refuses_does_not_stop_another(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        y = permute(x, p)
        z: Tensor = LINEAR["block"](y, values, indices, None, O)
        return z + F.linear(y, w)

    result = rewrite(
        FoldPermutations(),
        run,
        x(3, I),
        p=torch.arange(I).roll(1),
        w=x(O, I),
        **stored(Block(4)),
    )
    assert len(result.fired) == len(result.left) == 1
    assert sorted(result.after) == ["add", "block_linear", "mm", "permute"]


def test_a_map_that_is_not_frozen_is_left(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: F.linear(permute(x, p), w),
        x(3, I),
        torch.randperm(I),
        w=x(O, I),
    )
    assert result.after == result.before
    assert result.left == [FROZEN_MAP]


def test_a_dense_weight_that_is_not_frozen_is_left(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, w, p: F.linear(permute(x, p), w),
        x(3, I),
        x(O, I),
        p=torch.randperm(I),
    )
    assert result.left == [FROZEN_WEIGHT]


@pytest.mark.parametrize("written", ["values", "indices"])
def test_a_structured_weight_that_is_not_frozen_is_left(rewrite: Rewrite, written: str) -> None:
    op, parts = LINEAR["fan_in"], stored(FanIn())
    loose = parts.pop(written)

    def run(x: Tensor, loose: Tensor, p: Tensor, **rest: Tensor) -> Tensor:
        both = {written: loose, **rest}
        y: Tensor = op(permute(x, p), both["values"], both["indices"], None, O)
        return y

    result = rewrite(FoldPermutations(), run, x(3, I), loose, p=torch.randperm(I), **parts)
    assert result.left == [FROZEN_WEIGHT]


def test_two_inputs_multiplied_are_left(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, y, p: permute(x, p) @ y,
        x(3, I),
        x(I, 5),
        p=torch.randperm(I),
    )
    assert result.left == [FROZEN_WEIGHT]


def test_half_precision_readers_absorb_too(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: F.linear(permute(x, p), w),
        x(3, I).bfloat16(),
        p=torch.randperm(I),
        w=x(O, I).bfloat16(),
    )
    assert result.after == ["mm"]


@pytest.mark.parametrize("structure", [FanIn(), Block(4)], ids=lambda s: s.name)
def test_symbolic_batches_stay_symbolic(rewrite: Rewrite, structure: Structure) -> None:
    result = rewrite(
        FoldPermutations(),
        reader(structure),
        x(2, 3, I),
        dynamic=True,
        p=whole_blocks(I, 4),
        **stored(structure),
    )
    assert result.after == [f"{structure.name}_linear"]
    (op,) = result.graph.find_nodes(op="call_function", target=LINEAR[structure.name])
    assert isinstance(op.meta["val"].shape[0], torch.SymInt)

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
Net = Callable[..., Any]
I, O = 16, 24  # noqa: E741
OUTPUT = "it reaches an output of the graph"
INPUT = "it permutes a graph input (arg0_1)"
UNPROVED = "is not proved to move with a permutation"


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stored(structure: Structure, shape: Shape = Shape(O, I)) -> dict[str, Any]:  # noqa: B008
    dense = x(shape.out_features, shape.in_features)
    indices = structure.select(dense, structure.kept(shape, 0.5))
    return {"values": structure.pack(dense, indices), "indices": indices}


def weights() -> dict[str, Tensor]:
    return {"p": torch.randperm(O), "w": x(O, I), "b": x(O)}


def whole_blocks(size: int, side: int) -> Tensor:
    """Return a map that moves whole blocks and shuffles within each."""
    return torch.cat([b * side + torch.randperm(side) for b in torch.randperm(size // side)])


def moves(operators: list[str]) -> int:
    """Return how often data are moved."""
    return sum(name in ("permute", "index_select", "index") for name in operators)


def reader(structure: Structure, out_features: int = O) -> Net:
    op = LINEAR[structure.name]

    def run(x: Tensor, p: Tensor, values: Tensor, indices: Tensor, bias: Any = None) -> Any:
        return op(permute(x, p), values, indices, bias, out_features)

    return run


def writer(structure: Structure, out_features: int) -> Net:
    op = LINEAR[structure.name]

    def run(x: Tensor, p: Tensor, values: Tensor, indices: Tensor, bias: Any = None) -> Any:
        return permute(torch.relu(op(x, values, indices, bias, out_features)), p)

    return run


# -- dense readers and writers ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, I), (2, 3, I)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_dense_reader_absorbs_any_map(
    rewrite: Rewrite, shape: tuple[int, ...], with_bias: bool
) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b=None: F.linear(permute(x, p), w, b),
        x(*shape),
        p=torch.randperm(I),
        w=x(O, I),
        **({"b": x(O)} if with_bias else {}),
    )
    assert (moves(result.before), moves(result.after)) == (1, 0)
    assert (result.fired, result.left) == (["columns of w (dense)"], [])
    assert result.where == ["p"]


def test_the_map_moves_through_an_activation_into_a_dense_writer(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.gelu(F.linear(x, w, b)), p),
        x(3, I),
        **weights(),
    )
    assert result.before == ["addmm", "gelu", "permute"]
    assert result.after == ["addmm", "gelu"]
    assert result.fired == ["rows of w (dense)"]
    assert result.where == ["p"]


def test_a_tied_weight_is_reordered_where_it_reads_only(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(permute(x, p), w).relu(), w)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), w=x(I, I))
    assert result.after == ["mm", "relu", "mm"]


def test_a_tied_weight_is_reordered_where_it_writes_only(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(permute(F.linear(F.linear(x, w, b).relu(), w, b).relu(), p), w, b)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), w=x(I, I), b=x(I))
    assert result.after == ["addmm", "relu", "addmm", "relu", "addmm"]


@pytest.mark.parametrize("bias", [(3, O), (O,), (1, O), (1,), (3, 1)])
@pytest.mark.parametrize("reads", [True, False])
def test_addmm_keeps_its_factors_and_any_bias(
    rewrite: Rewrite, bias: tuple[int, ...], reads: bool
) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        if reads:
            return torch.addmm(b, permute(x, p), w, beta=2.0, alpha=0.5)
        return permute(torch.addmm(b, x, w, beta=2.0, alpha=0.5), p)

    p = torch.randperm(I if reads else O)
    result = rewrite(FoldPermutations(), run, x(3, I), p=p, w=x(I, O), b=x(*bias))
    assert result.after == ["addmm"]


@pytest.mark.parametrize("reads", [True, False])
def test_half_precision_absorbs_too(rewrite: Rewrite, reads: bool) -> None:
    halves = {k: v if k == "p" else v.bfloat16() for k, v in weights().items()}
    halves["p"] = torch.randperm(I if reads else O)

    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(permute(x, p), w, b) if reads else permute(F.linear(x, w, b), p)

    assert rewrite(FoldPermutations(), run, x(3, I).bfloat16(), **halves).after == ["addmm"]


# -- structured readers and writers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "make"),
    [
        *((FanIn(), reader), (FanIn(), writer), (NM(m=4), writer)),
        *((Unstructured(), reader), (Unstructured(), writer)),
    ],
)
@pytest.mark.parametrize("shape", [(I,), (3, I), (2, 3, I)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_independent_rows_and_columns_absorb_any_map(
    rewrite: Rewrite, structure: Structure, make: Net, shape: tuple[int, ...], with_bias: bool
) -> None:
    given = {"p": torch.randperm(I if make is reader else O), **stored(structure)}
    if with_bias:
        given["bias"] = x(O)
    result = rewrite(FoldPermutations(), make(structure, O), x(*shape), **given)
    assert result.after == [f"{structure.name}_linear"] + ["relu"] * (make is writer)
    side = "columns" if make is reader else "rows"
    assert result.fired == [f"{side} of indices ({structure.name})"]
    assert result.where == ["p"]


@pytest.mark.parametrize(
    ("structure", "shape", "table", "make"),
    [
        (Block(4), Shape(O, I), lambda: whole_blocks(I, 4), reader),
        (Block(8), Shape(O, I), lambda: whole_blocks(I, 8), reader),
        (NM(m=4), Shape(O, I), lambda: whole_blocks(I, 4), reader),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).roll(-5), reader),
        (Diagonal(), Shape(8, I), lambda: torch.arange(I).roll(3), reader),
        (Block(4), Shape(O, I), lambda: whole_blocks(O, 4), writer),
        (Block(8), Shape(O, I), lambda: whole_blocks(O, 8), writer),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).roll(-5), writer),
        (Diagonal(), Shape(O, I), lambda: torch.arange(O).roll(3), writer),
    ],
)
def test_a_structure_absorbs_its_symmetry(
    rewrite: Rewrite, structure: Structure, shape: Shape, table: Callable[[], Tensor], make: Net
) -> None:
    result = rewrite(
        FoldPermutations(),
        make(structure, shape.out_features),
        x(3, I),
        p=table(),
        bias=x(shape.out_features),
        **stored(structure, shape),
    )
    assert moves(result.after) == 0
    assert result.left == []


@pytest.mark.parametrize(
    ("structure", "shape", "table", "make"),
    [
        (Block(4), Shape(O, I), lambda: torch.arange(I).roll(1), reader),
        (NM(m=4), Shape(O, I), lambda: torch.arange(I).roll(1), reader),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).flip(0), reader),
        (Diagonal(), Shape(O, I), lambda: torch.arange(I).roll(1), reader),  # around the rows
        (Block(4), Shape(O, I), lambda: torch.arange(O).roll(1), writer),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).flip(0), writer),
        (Diagonal(), Shape(8, I), lambda: torch.arange(8).roll(1), writer),  # around the columns
    ],
)
def test_a_map_outside_the_symmetry_is_left(
    rewrite: Rewrite, structure: Structure, shape: Shape, table: Callable[[], Tensor], make: Net
) -> None:
    net = make(structure, shape.out_features)
    given = {"p": table(), **stored(structure, shape)}
    result = rewrite(FoldPermutations(), net, x(3, I), **given)
    side = "columns" if make is reader else "rows"
    outside = f"the map lies outside what the {side} of indices ({structure.name}) absorb"
    assert result.after == result.before
    assert result.left == [f"{INPUT}; {outside}" if make is reader else f"{outside}; {OUTPUT}"]


# -- between the map and its reader or writer ------------------------------------------------------


@pytest.mark.parametrize(
    "between",
    [
        lambda h, v: h * h.sigmoid(),  # a diamond
        lambda h, v: F.silu(h) + h.tanh() * (h > 0),
        lambda h, v: torch.where(h > 0, h, 0.1 * h),
        lambda h, v: h * 2.0 + 1,
        lambda h, v: h * v + v.exp(),  # frozen vectors along the axis
        lambda h, v: v / (h.square() + 1.0),  # the frozen one first
        lambda h, v: h * v[0],  # a frozen scalar
        lambda h, v: h.float().double().relu(),  # casts
        lambda h, v: F.softplus(h).clamp(0.1, 2.0).clamp(min=v),
        lambda h, v: torch.lerp(h, v, 0.3).pow(2),
        lambda h, v: h.masked_fill(v > 0, 0.5),
        lambda h, v: torch.addcmul(h, h, v, value=2.0),
        lambda h, v: h.softmax(-1),  # every number stays with its own
        lambda h, v: F.layer_norm(h, (O,), v, v.exp()),
        lambda h, v: h / h.exp().sum(-1, keepdim=True),
        lambda h, v: h * torch.linspace(0, 1, O, dtype=torch.float64),  # a constant of the graph
        lambda h, v: h.reshape(-1, 4).relu().view(-1, O),  # only the numbers are regrouped
        lambda h, v: h.reshape(3, 2, O).clone().view(2, 3, O).view(6, O).relu(),
    ],
)
@pytest.mark.parametrize("reads", [True, False])
def test_what_moves_with_a_map_lets_it_through(rewrite: Rewrite, between: Net, reads: bool) -> None:
    def run(x: Tensor, p: Tensor, v: Tensor, w: Tensor) -> Any:
        if reads:
            return F.linear(between(permute(x, p), v), w)
        return permute(between(F.linear(x, w), v), p)

    given = {"p": torch.randperm(O), "v": x(O), "w": x(O, O)}
    result = rewrite(FoldPermutations(), run, x(6, O), **given)
    assert moves(result.after) == 0
    assert result.fired == [f"{'columns' if reads else 'rows'} of w (dense)"]
    assert result.left == []


@pytest.mark.parametrize(
    "gate",
    [
        lambda h, x: h * x.mean(-1, keepdim=True),  # the same number along the whole axis
        lambda h, x: h + x[:, :1],
        lambda h, x: h * x.sum(),
    ],
)
def test_an_operand_that_is_constant_along_the_axis_stays(rewrite: Rewrite, gate: Net) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(gate(F.linear(x, w, b), x), p),
        x(3, I),
        **weights(),
    )
    assert moves(result.after) == 0


def test_a_frozen_vector_spreads_a_column_over_the_axis(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        return permute(F.linear(x, w[:1]) * b, p)  # (3, 1) * (O,)

    assert moves(rewrite(FoldPermutations(), run, x(3, I), **weights()).after) == 0


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda h: h.roll(1, -1), f"roll.default {UNPROVED}"),
        (lambda h: h.flip(-1), f"flip.default {UNPROVED}"),
        (lambda h: h.cumsum(-1), f"cumsum.default {UNPROVED}"),
        (lambda h: F.pad(h, (1, -1)), f"constant_pad_nd.default {UNPROVED}"),
        (lambda h: h.sort(-1).values, f"sort.default {UNPROVED}"),
        (lambda h: h[:, torch.arange(O).flip(0)], "positions are read in their own order"),
        (lambda h: h.as_strided((O, O), (1, O)), f"as_strided.default {UNPROVED}"),
        (  # rotate-half
            lambda h: torch.cat([-h[:, 12:], h[:, :12]], dim=-1),
            "the map mixes parts of an axis that are used apart",
        ),
        (lambda h: h.view(-1, 4, 6).softmax(-1).view(-1, O), "uses a part of an axis"),  # H * D
        (lambda h: h.view(16, 36).view(-1, O), "a view cuts across an axis"),
    ],
)
@pytest.mark.parametrize("reads", [True, False])
def test_what_is_not_proved_stops_it(rewrite: Rewrite, between: Net, why: str, reads: bool) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        if reads:
            return F.linear(between(permute(x, p)).relu(), w)
        return permute(between(F.linear(x, w)).relu(), p)

    result = rewrite(FoldPermutations(), run, x(O, O), p=torch.randperm(O), w=x(O, O))
    assert moves(result.after) == moves(result.before)
    assert result.fired == []
    assert len(result.left) == 1
    if not reads:
        assert result.left == [f"{why}; {OUTPUT}"]
    else:
        assert result.left[0].startswith(INPUT)


def test_a_slice_between_keeps_the_map(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: F.linear(permute(x, p)[..., :8], w),
        x(3, I),
        p=torch.randperm(I),
        w=x(O, 8),
    )
    assert moves(result.after) == 1


@pytest.mark.parametrize(
    ("read", "left"),
    [
        (lambda y, w: y.softmax(-1), 1),
        (lambda y, w: w[:, :3] @ y, 1),  # the map lies on the other operand
        (lambda y, w: y @ y.t(), 0),  # the sum of both does not see it
        (lambda y, w: torch.bmm(y[None], w.t()[None]), 0),
    ],
)
def test_a_reader_that_is_no_linear(rewrite: Rewrite, read: Net, left: int) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: read(permute(x, p), w),
        x(3, I),
        p=torch.randperm(I),
        w=x(O, I),
    )
    assert moves(result.after) == left
    assert (len(result.fired), len(result.left)) == (1 - left, left)


# -- random numbers --------------------------------------------------------------------------------


def test_a_random_vector_is_moved_in_place_of_the_data(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        return permute(F.linear(x, w, b) * torch.rand(O, dtype=torch.float64), p)

    given = weights()
    result = rewrite(FoldPermutations(), run, x(3, I), compare=False, **given)
    assert moves(result.after) == 0  # of what depends on the input
    moved = [n for n in result.graph.nodes if n.target is torch.ops.padst.permute.default]
    assert [n.args[0].target for n in moved] == [torch.ops.aten.rand.default]


def test_dropout_stops_it(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.dropout(F.linear(x, w, b), 0.5, training=True), p),
        x(3, I),
        compare=False,
        **weights(),
    )
    assert moves(result.after) == 1
    assert result.left == [f"native_dropout.default {UNPROVED}; {OUTPUT}"]


# -- inputs, outputs, several readers and writers --------------------------------------------------


@pytest.mark.parametrize("shape", [(I,), (3, I)])
def test_a_permuted_input_is_left(rewrite: Rewrite, shape: tuple[int, ...]) -> None:
    result = rewrite(FoldPermutations(), lambda x, p: permute(x, p), x(*shape), p=torch.randperm(I))
    assert result.after == ["permute"]
    assert result.left == [f"{INPUT}; {OUTPUT}"]


def test_a_residual_from_the_input_stops_it(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(x + F.linear(x, w, b), p),
        x(3, I),
        p=torch.randperm(I),
        w=x(I, I),
        b=x(I),
    )
    assert result.after == result.before
    assert result.left == [f"{INPUT}; {OUTPUT}"]


def test_two_readers_of_one_map_both_absorb_it(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, k: Tensor) -> Tensor:
        y = permute(x, p)
        return F.linear(y, q) * F.linear(y, k)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), q=x(O, I), k=x(O, I))
    assert result.after == ["mm", "mm", "mul"]
    assert result.fired == ["columns of q (dense), columns of k (dense)"]


def test_two_writers_of_a_product_both_change_their_rows(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor, values: Tensor, indices: Tensor) -> Any:
        sparse = LINEAR["fan_in"](x, values, indices, b, O)
        return permute(F.silu(F.linear(x, w, b)) * sparse, p)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights(), **stored(FanIn()))
    assert sorted(result.after) == ["addmm", "fan_in_linear", "mul", "silu"]
    assert result.fired == ["rows of indices (fan_in), rows of w (dense)"]


def test_a_map_whose_result_leaves_the_graph_is_moved_once(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = permute(x, p)
        return y, F.linear(y, w)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), w=x(O, I))
    assert result.after == ["permute", "mm"]
    assert result.left == [f"{INPUT}; {OUTPUT}"]


def test_a_reader_that_refuses_leaves_one_movement(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        y = permute(x, p)
        z: Tensor = LINEAR["block"](y, values, indices, None, O)
        return z + F.linear(y, w)

    p = torch.arange(I).roll(1)
    result = rewrite(FoldPermutations(), run, x(3, I), p=p, w=x(O, I), **stored(Block(4)))
    assert sorted(result.after) == ["add", "block_linear", "mm", "permute"]
    outside = "the map lies outside what the columns of indices (block) absorb"
    assert result.left == [f"{INPUT}; {outside}"]


@pytest.mark.parametrize(
    ("read", "left"),
    [
        (lambda h: h.softmax(-1), 1),
        (lambda h: h, 1),
        (lambda h: h[:, :4], 1),
        (lambda h: h.sum(-1), 0),
        (lambda h: h.amax(-1, keepdim=True), 0),
    ],
)
def test_another_reader_of_the_old_order(rewrite: Rewrite, read: Net, left: int) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b).relu()
        return permute(h, p), read(h)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights())
    assert moves(result.after) == left
    assert len(result.left) == left
    assert all(why.endswith(OUTPUT) for why in result.left)
    assert result.where == ["p"]


@pytest.mark.parametrize("early", [True, False])
def test_a_sum_over_the_axis_does_not_see_the_map(rewrite: Rewrite, early: bool) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b).exp()
        if early:
            return permute(h, p) * h.sum(-1, keepdim=True)
        return permute(h / h.sum(-1, keepdim=True), p)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights())
    assert moves(result.after) == 0


def test_of_two_maps_of_one_tensor_one_is_left(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b)
        return permute(h, p), permute(h, q)

    result = rewrite(FoldPermutations(), run, x(3, I), q=torch.randperm(O), **weights())
    assert result.after == ["addmm", "permute"]
    assert result.fired == ["rows of w (dense)", "a simpler map is left"]


def test_equal_maps_of_one_tensor_are_one_movement(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor) -> Any:
        return permute(x, p), permute(x, q).exp()

    p = torch.randperm(I)
    result = rewrite(FoldPermutations(), run, x(3, I), p=p, q=p.clone())
    assert result.after == ["permute", "exp"]
    assert result.fired == ["shares the movement of p"]
    assert result.left == [f"{INPUT}; {OUTPUT}"]


def test_one_map_that_is_not_frozen_is_applied_once(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p: (permute(x, p), permute(x, p).exp()),
        x(3, I),
        torch.randperm(I),
    )
    assert result.after == ["permute", "exp"]


def test_a_chain_of_maps_goes_into_one_writer(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor, b: Tensor) -> Any:
        return permute(permute(F.linear(x, w, b), q).relu(), p)

    result = rewrite(FoldPermutations(), run, x(3, I), q=torch.randperm(O), **weights())
    assert result.after == ["addmm", "relu"]


# -- what is not frozen ----------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False])
def test_a_map_that_is_not_frozen_is_left(rewrite: Rewrite, reads: bool) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return F.linear(permute(x, p), w) if reads else permute(F.linear(x, w), p)

    result = rewrite(FoldPermutations(), run, x(3, I), torch.randperm(I), w=x(I, I))
    assert result.after == result.before
    assert result.left == ["the map is not frozen: it may change between calls"]


def test_two_inputs_multiplied_are_left(rewrite: Rewrite) -> None:
    given = (x(3, I), x(I, 5))
    result = rewrite(
        FoldPermutations(), lambda x, y, p: permute(x, p) @ y, *given, p=torch.randperm(I)
    )
    assert moves(result.after) == 1
    assert result.left == [f"{INPUT}; it permutes a graph input (arg1_1)"]


@pytest.mark.parametrize("reads", [True, False])
def test_a_dense_weight_that_is_not_frozen_is_left(rewrite: Rewrite, reads: bool) -> None:
    def run(x: Tensor, w: Tensor, p: Tensor) -> Any:
        return F.linear(permute(x, p), w) if reads else permute(F.linear(x, w), p)

    result = rewrite(FoldPermutations(), run, x(3, I), x(I, I), p=torch.randperm(I))
    weight = "it permutes a graph input (arg1_1)"
    assert moves(result.after) == 1
    assert result.left == [f"{INPUT}; {weight}" if reads else f"{weight}; {OUTPUT}"]


def test_a_bias_that_is_not_frozen_is_moved_in_place_of_the_data(rewrite: Rewrite) -> None:
    def run(x: Tensor, b: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(F.linear(x, w, b), p)

    result = rewrite(FoldPermutations(), run, x(3, I), x(O), p=torch.randperm(O), w=x(O, I))
    assert result.after == ["permute", "addmm"]
    (moved,) = result.graph.find_nodes(op="call_function", target=permute.default)
    assert moved.meta["val"].shape == (O,)


@pytest.mark.parametrize("written", ["values", "indices", "bias"])
@pytest.mark.parametrize("make", [reader, writer])
def test_a_structured_weight_that_is_not_frozen_is_left(
    rewrite: Rewrite, written: str, make: Net
) -> None:
    given = {**stored(FanIn()), "bias": x(O), "p": torch.randperm(I if make is reader else O)}
    loose = given.pop(written)

    def run(x: Tensor, loose: Tensor, **rest: Tensor) -> Any:
        return make(FanIn(), O)(x, **{written: loose, **rest})

    result = rewrite(FoldPermutations(), run, x(3, I), loose, **given)
    owner = "arg1_1" if written == "indices" else "indices"
    why = f"the weight of {owner} (fan_in) is not frozen"
    assert moves(result.after) == 1
    assert result.left == [f"{INPUT}; {why}" if make is reader else f"{why}; {OUTPUT}"]


# -- symbolic batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [FanIn(), Block(4)], ids=lambda s: s.name)
@pytest.mark.parametrize("make", [reader, writer])
def test_symbolic_batches_stay_symbolic(rewrite: Rewrite, structure: Structure, make: Net) -> None:
    result = rewrite(
        FoldPermutations(),
        make(structure, O),
        x(2, 3, I),
        dynamic=True,
        p=whole_blocks(I if make is reader else O, 4),
        **stored(structure),
    )
    assert moves(result.after) == 0
    (op,) = result.graph.find_nodes(op="call_function", target=LINEAR[structure.name])
    assert isinstance(op.meta["val"].shape[0], torch.SymInt)

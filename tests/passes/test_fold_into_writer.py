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


# -- what it does ----------------------------------------------------------------------------------


def test_the_map_moves_through_an_activation_into_a_dense_writer(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.gelu(F.linear(x, w, b)), p),
        x(3, I),
        **weights(),
    )
    assert result.before == ["addmm", "gelu", "permute"]
    assert result.after == ["addmm", "gelu"]
    assert result.fired == ["rows of a dense linear"]


@pytest.mark.parametrize("keep", [lambda y: y, torch.sum], ids=["fired", "left"])
def test_the_report_names_the_map(rewrite: Rewrite, keep: Net) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b)
        return permute(h, p), keep(h) if keep is torch.sum else 0

    assert rewrite(FoldPermutations(), run, x(3, I), **weights()).where == ["p"]


@pytest.mark.parametrize(
    "between",
    [
        lambda h, p, v: h,
        lambda h, p, v: h * h.sigmoid(),  # a diamond
        lambda h, p, v: F.silu(h) + h.tanh() * (h > 0),
        lambda h, p, v: torch.where(h > 0, h, 0.1 * h),
        lambda h, p, v: h * 2.0 + 1,
        lambda h, p, v: h * v + v.exp(),  # frozen vectors along the axis
        lambda h, p, v: v / (h.square() + 1.0),  # the frozen one first
        lambda h, p, v: h * v[0],  # a frozen scalar
        lambda h, p, v: h.float().double().relu(),  # casts
        lambda h, p, v: F.softplus(h).clamp(0.1, 2.0).clamp(min=v),
        lambda h, p, v: torch.lerp(h, v, 0.3).pow(2),
        lambda h, p, v: h.masked_fill(v > 0, 0.5),
        lambda h, p, v: torch.addcmul(h, h, v, value=2.0),
    ],
)
def test_pointwise_operations_let_it_through(rewrite: Rewrite, between: Net) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b, v: permute(between(F.linear(x, w, b), p, v), p),
        x(3, I),
        v=x(O),
        **weights(),
    )
    assert "permute" not in result.after
    assert result.left == []


def test_views_that_keep_the_axis_let_it_through(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b).reshape(3, 2, O).clone()
        return permute(h.relu().view(6, O), p)

    result = rewrite(FoldPermutations(), run, x(2, 3, I), **weights())
    assert "permute" not in result.after


def test_a_writer_without_bias(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: permute(F.linear(x, w).relu(), p),
        x(2, 3, I),
        p=torch.randperm(O),
        w=x(O, I),
    )
    assert result.after == ["view", "mm", "_unsafe_view", "relu"]


def test_a_late_bias_moves_with_it(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.linear(x, w) + b, p),
        x(2, 3, I),
        **weights(),
    )
    assert "permute" not in result.after


def test_two_writers_of_a_sum_both_change_their_rows(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor, values: Tensor, indices: Tensor) -> Any:
        sparse = LINEAR["fan_in"](x, values, indices, b, O)
        return permute(F.silu(F.linear(x, w, b)) * sparse, p)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights(), **stored(FanIn()))
    assert sorted(result.after) == ["addmm", "fan_in_linear", "mul", "silu"]
    assert result.fired == ["rows of a dense linear, indices"]


def test_a_tied_weight_is_reordered_for_one_writer_only(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(permute(F.linear(F.linear(x, w, b).relu(), w, b).relu(), p), w, b)

    result = rewrite(FoldPermutations(), run, x(3, I), p=torch.randperm(I), w=x(I, I), b=x(I))
    assert result.after == ["addmm", "relu", "addmm", "relu", "addmm"]


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
    assert "permute" not in result.after


def test_a_frozen_vector_spreads_a_column_over_the_axis(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        return permute(F.linear(x, w[:1]) * b, p)  # (3, 1) * (O,)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights())
    assert "permute" not in result.after


@pytest.mark.parametrize("bias", [(3, O), (O,), (1, O)])
def test_any_bias_along_the_axis_is_reordered(rewrite: Rewrite, bias: tuple[int, ...]) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(torch.addmm(b, x, w, beta=2.0, alpha=0.5), p),
        x(3, I),
        p=torch.randperm(O),
        w=x(I, O),
        b=x(*bias),
    )
    assert result.after == ["addmm"]


# -- structured writers ----------------------------------------------------------------------------


def writer(structure: Structure, out_features: int) -> Net:
    def run(x: Tensor, p: Tensor, values: Tensor, indices: Tensor, bias: Any = None) -> Any:
        y = LINEAR[structure.name](x, values, indices, bias, out_features)
        return permute(torch.relu(y), p)

    return run


@pytest.mark.parametrize("structure", [FanIn(), Unstructured(), NM(m=4)], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(I,), (3, I), (2, 3, I)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_writers_with_independent_rows_absorb_any_map(
    rewrite: Rewrite, structure: Structure, shape: tuple[int, ...], with_bias: bool
) -> None:
    bias = {"bias": x(O)} if with_bias else {}
    result = rewrite(
        FoldPermutations(),
        writer(structure, O),
        x(*shape),
        p=torch.randperm(O),
        **stored(structure),
        **bias,
    )
    assert result.after == [f"{structure.name}_linear", "relu"]
    assert result.fired == ["rows of indices"]


@pytest.mark.parametrize(
    ("structure", "shape", "table"),
    [
        (Block(4), Shape(O, I), lambda: whole_blocks(O, 4)),
        (Block(8), Shape(O, I), lambda: whole_blocks(O, 8)),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).roll(-5)),
        (Diagonal(), Shape(O, I), lambda: torch.arange(O).roll(3)),
    ],
)
def test_a_structured_writer_absorbs_its_symmetry(
    rewrite: Rewrite, structure: Structure, shape: Shape, table: Callable[[], Tensor]
) -> None:
    result = rewrite(
        FoldPermutations(),
        writer(structure, shape.out_features),
        x(3, I),
        p=table(),
        bias=x(shape.out_features),
        **stored(structure, shape),
    )
    assert result.after == [f"{structure.name}_linear", "relu"]


@pytest.mark.parametrize(
    ("structure", "shape", "table"),
    [
        (Block(4), Shape(O, I), lambda: torch.arange(O).roll(1)),
        (Diagonal(), Shape(I, I), lambda: torch.arange(I).flip(0)),
        (Diagonal(), Shape(8, I), lambda: torch.arange(8).roll(1)),  # it wraps around the columns
    ],
)
def test_a_map_outside_the_writers_symmetry_is_left(
    rewrite: Rewrite, structure: Structure, shape: Shape, table: Callable[[], Tensor]
) -> None:
    result = rewrite(
        FoldPermutations(),
        writer(structure, shape.out_features),
        x(3, I),
        p=table(),
        **stored(structure, shape),
    )
    assert result.after == result.before
    assert result.left == [f"the map lies outside what the rows of {structure.name} absorb"]


# -- what stops it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (lambda h: h.softmax(-1), "_softmax"),
        (lambda h: h.roll(1, -1), "roll"),
        (lambda h: h.flip(-1), "flip"),
        (lambda h: h.cumsum(-1), "cumsum"),
        (lambda h: torch.cat([-h[:, 12:], h[:, :12]], dim=-1), "cat"),  # rotate-half
        (
            lambda h: h.view(-1, 4, 6).transpose(1, 2).reshape(-1, O),
            "_unsafe_view",
        ),  # channel shuffle
        (lambda h: h.view(-1, 4, 6).softmax(-1).view(-1, O), "view"),  # H * D
        (lambda h: h.t().contiguous().view(-1, O), "view"),
        (lambda h: F.pad(h, (1, -1)), "constant_pad_nd"),
        (lambda h: F.layer_norm(h, (O,)), "getitem"),
        (lambda h: h.sort(-1).values, "getitem"),
        (lambda h: h[:, torch.arange(O).flip(0)], "index"),
        (lambda h: h.as_strided((3, O), (1, 3)), "as_strided"),
        (lambda h: h * torch.linspace(0, 1, O, dtype=torch.float64), "linspace"),
    ],
)
def test_an_operation_that_is_not_proved_stops_it(
    rewrite: Rewrite, between: Net, name: str
) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(between(F.linear(x, w, b)).relu(), p),
        x(3, I),
        **weights(),
    )
    assert "permute" in result.after
    assert result.fired == []
    (why,) = result.left
    assert why.split()[0].startswith(name), why
    assert why.endswith("is not proved to move with a permutation")


def test_random_numbers_stop_it(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.linear(x, w, b) * torch.rand(O, dtype=torch.float64), p),
        x(3, I),
        compare=False,
        **weights(),
    )
    assert result.left == ["rand.default is not proved to move with a permutation"]
    assert "permute" in result.after


def test_dropout_stops_it(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.dropout(F.linear(x, w, b), 0.5, training=True), p),
        x(3, I),
        compare=False,
        **weights(),
    )
    assert "permute" in result.after
    assert result.left[0].endswith("is not proved to move with a permutation")


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
    assert result.left[0].startswith("it permutes a graph input (")


@pytest.mark.parametrize("shape", [(I,), (3, I)])
def test_a_permuted_input_is_left(rewrite: Rewrite, shape: tuple[int, ...]) -> None:
    result = rewrite(FoldPermutations(), lambda x, p: permute(x, p), x(*shape), p=torch.randperm(I))
    assert result.after == ["permute"]
    assert result.left[0].startswith("it permutes a graph input (")


@pytest.mark.parametrize(
    ("read", "who"),
    [
        (lambda h: h.softmax(-1), "_softmax.default"),
        (lambda h: h, "output"),
        (lambda h: h.sum(-1), "sum.dim_IntList"),
        (lambda h: h[:, :4], "slice.Tensor"),
    ],
)
def test_another_reader_of_the_old_order_stops_it(rewrite: Rewrite, read: Net, who: str) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b).relu()
        return permute(h, p), read(h)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights())
    assert result.after == result.before
    assert result.left == [f"relu.default has another reader ({who})"]


def test_a_reader_further_up_stops_it_too(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b)
        return permute(h.relu(), p) * h.sum(-1, keepdim=True)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights())
    assert result.left == ["addmm.default has another reader (sum.dim_IntList)"]


def test_a_sum_over_the_axis_in_a_diamond_stops_it(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b).exp()
        return permute(h / h.sum(-1, keepdim=True), p)

    result = rewrite(FoldPermutations(), run, x(3, I), **weights())
    assert result.left == ["exp.default has another reader (sum.dim_IntList)"]


def test_two_maps_of_one_tensor_stop_each_other(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor, b: Tensor) -> Any:
        h = F.linear(x, w, b)
        return permute(h, p), permute(h, q)

    result = rewrite(FoldPermutations(), run, x(3, I), q=torch.randperm(O), **weights())
    assert result.fired == []
    assert result.left == ["addmm.default has another reader (permute.default)"] * 2


def test_a_chain_of_maps_moves_up_one_by_one(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor, b: Tensor) -> Any:
        return permute(permute(F.linear(x, w, b), q).relu(), p)

    result = rewrite(FoldPermutations(), run, x(3, I), q=torch.randperm(O), **weights())
    assert result.after == ["addmm", "relu"]


def test_a_permuted_result_that_is_the_output_is_absorbed(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(), lambda x, p, w, b: permute(F.linear(x, w, b), p), x(3, I), **weights()
    )
    assert result.after == ["addmm"]


def test_a_map_that_is_not_frozen_is_left(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.linear(x, w, b), p),
        x(3, I),
        torch.randperm(O),
        w=x(O, I),
        b=x(O),
    )
    assert result.left == ["the map is not frozen: it may change between calls"]


@pytest.mark.parametrize(("loose", "what"), [("w", "weight"), ("b", "bias")])
def test_a_dense_writer_that_is_not_frozen_is_left(rewrite: Rewrite, loose: str, what: str) -> None:
    given = weights()

    def run(x: Tensor, loosened: Tensor, **rest: Tensor) -> Any:
        both = {loose: loosened, **rest}
        return permute(F.linear(x, both["w"], both["b"]), both["p"])

    result = rewrite(FoldPermutations(), run, x(3, I), given.pop(loose), **given)
    assert result.after == result.before
    assert result.left == [f"the writer's {what} is not frozen"]


@pytest.mark.parametrize("loose", ["values", "indices", "bias"])
def test_a_structured_writer_that_is_not_frozen_is_left(rewrite: Rewrite, loose: str) -> None:
    given = {**stored(FanIn()), "bias": x(O), "p": torch.randperm(O)}
    loosened = given.pop(loose)

    def run(x: Tensor, loosened: Tensor, **rest: Tensor) -> Any:
        return writer(FanIn(), O)(x, **{loose: loosened, **rest})

    result = rewrite(FoldPermutations(), run, x(3, I), loosened, **given)
    assert result.left == ["the writer's weight is not frozen"]


def test_a_broadcast_bias_is_left(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(torch.addmm(b, x, w), p),
        x(3, I),
        p=torch.randperm(O),
        w=x(I, O),
        b=x(1),
    )
    assert result.left == ["the writer's bias is broadcast"]


def test_half_precision_writers_absorb_too(rewrite: Rewrite) -> None:
    halves = {k: v if k == "p" else v.bfloat16() for k, v in weights().items()}
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w, b: permute(F.gelu(F.linear(x, w, b)), p),
        x(3, I).bfloat16(),
        **halves,
    )
    assert result.after == ["addmm", "gelu"]


@pytest.mark.parametrize("structure", [FanIn(), Block(4)], ids=lambda s: s.name)
def test_symbolic_batches_stay_symbolic(rewrite: Rewrite, structure: Structure) -> None:
    result = rewrite(
        FoldPermutations(),
        writer(structure, O),
        x(2, 3, I),
        dynamic=True,
        p=whole_blocks(O, 4),
        **stored(structure),
    )
    assert result.after == [f"{structure.name}_linear", "relu"]

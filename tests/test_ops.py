from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from padst_compiler.index_map import invert
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX, STRUCTURE_OF
from padst_compiler.structures import (
    NM,
    STRUCTURES,
    Block,
    Diagonal,
    FanIn,
    Shape,
    Structure,
    Unstructured,
    unit_of,
)

SAMPLES: dict[type[Structure], Structure] = {
    Block: Block(2),
    NM: NM(4),
    Diagonal: Diagonal(),
    FanIn: FanIn(),
    Unstructured: Unstructured(),
}
SHAPES = [Shape(8, 4), Shape(4, 8)]
Kinds = pytest.mark.parametrize("kind", STRUCTURES, ids=lambda kind: str(kind.name))
Shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
Tokens = pytest.mark.parametrize("tokens", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
PADST = torch.ops.padst


def storage(
    kind: type[Structure], shape: Shape, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and indices, and the weight that they stand for."""
    structure = SAMPLES[kind]
    dense = torch.randn(shape.out_features, shape.in_features, dtype=dtype)
    indices = structure.select(dense, structure.kept(shape, 0.5))
    values = structure.pack(dense, indices)
    return values, indices, structure.unpack(values, indices, shape)


def test_every_structure_has_its_three_operators() -> None:
    names = [kind.name for kind in STRUCTURES]
    assert list(LINEAR) == list(LINEAR_DX) == list(LINEAR_DW) == names
    for kind in STRUCTURES:
        mine = [op for op, of in STRUCTURE_OF.items() if of is kind]
        assert mine == [LINEAR[kind.name], LINEAR_DX[kind.name], LINEAR_DW[kind.name]]
        assert [op.name() for op in mine] == [
            f"padst::{kind.name}_linear{end}" for end in ("", "_dx", "_dw")
        ]
        assert not any(op._schema.is_mutable for op in mine)


# -- torch's own checks: schema, fake, autograd, symbolic sizes ------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@Shapes
@Kinds
def test_linear_passes_opcheck(kind: type[Structure], shape: Shape, bias: bool) -> None:
    values, indices, _ = storage(kind, shape, torch.float32)
    x = torch.randn(2, 3, shape.in_features, requires_grad=True)
    b = torch.randn(shape.out_features, requires_grad=True) if bias else None
    args = (x, values.requires_grad_(), indices, b, shape.out_features)
    torch.library.opcheck(LINEAR[kind.name], args)


@Kinds
def test_the_gradients_pass_opcheck(kind: type[Structure]) -> None:
    shape = SHAPES[0]
    values, indices, _ = storage(kind, shape, torch.float32)
    x, grad = torch.randn(2, 3, shape.in_features), torch.randn(2, 3, shape.out_features)
    torch.library.opcheck(LINEAR_DX[kind.name], (grad, values, indices, shape.in_features))
    torch.library.opcheck(LINEAR_DW[kind.name], (grad, x, indices, unit_of(values, indices)))


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)], ids=str)
def test_the_maps_pass_opcheck(tokens: tuple[int, ...]) -> None:
    x = torch.randn(*tokens, 6, requires_grad=True)
    perm = torch.randperm(6)
    torch.library.opcheck(PADST.permute.default, (x, perm))
    torch.library.opcheck(PADST.invert.default, (perm,))


@Shapes
@Kinds
def test_gradcheck(kind: type[Structure], shape: Shape) -> None:
    values, indices, _ = storage(kind, shape)
    x = torch.randn(3, shape.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape.out_features, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = LINEAR[kind.name](x, values, indices, bias, shape.out_features)
        return y

    assert torch.autograd.gradcheck(run, (x, values.requires_grad_(), bias))


def test_gradcheck_of_permute() -> None:
    x, perm = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randperm(5)
    run: Callable[[Tensor], Tensor] = lambda x: PADST.permute(x, perm)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@Kinds
def test_second_derivatives_raise(kind: type[Structure]) -> None:
    shape = SHAPES[0]
    values, indices, _ = storage(kind, shape)
    x = torch.randn(3, shape.in_features, dtype=torch.float64, requires_grad=True)
    y = LINEAR[kind.name](x, values.requires_grad_(), indices, None, shape.out_features)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.square().sum().backward()


# -- shapes, strides and dtypes --------------------------------------------------------------------


@Tokens
@Shapes
@Kinds
def test_any_number_of_tokens_forward_and_backward(
    kind: type[Structure], shape: Shape, tokens: tuple[int, ...]
) -> None:
    values, indices, weight = storage(kind, shape)
    x = torch.randn(*tokens, shape.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape.out_features, dtype=torch.float64, requires_grad=True)
    inputs = (x, values.requires_grad_(), bias)
    y = LINEAR[kind.name](x, values, indices, bias, shape.out_features)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, upstream)
    wanted_y = x @ weight.t() + bias
    dx, db = torch.autograd.grad(wanted_y, (x, bias), upstream)
    dense = upstream.reshape(-1, shape.out_features).t() @ x.reshape(-1, shape.in_features)
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(found, (dx, SAMPLES[kind].pack(dense, indices), db))


@pytest.mark.parametrize("tokens", [(), (3,), (0,)], ids=str)
def test_permute_gathers_and_its_gradient_scatters(tokens: tuple[int, ...]) -> None:
    x, perm = torch.randn(*tokens, 5, requires_grad=True), torch.tensor([4, 0, 3, 1, 2])
    y = PADST.permute(x, perm)
    assert torch.equal(y, x[..., perm])
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    wanted = torch.zeros_like(x)
    wanted[..., perm] = upstream
    assert torch.equal(dx, wanted)
    assert torch.equal(PADST.invert(perm), invert(perm))


@Kinds
def test_strided_inputs_and_gradients(kind: type[Structure]) -> None:
    shape = SHAPES[0]
    values, indices, weight = storage(kind, shape)
    x = torch.randn(shape.in_features, 6, dtype=torch.float64).t().requires_grad_()
    values.requires_grad_()
    y = LINEAR[kind.name](x, values, indices, None, shape.out_features)
    assert y.is_contiguous()
    found = torch.autograd.grad(y.sum(), (x, values))  # the gradient is one number, expanded
    ones = torch.ones(6, shape.out_features, dtype=torch.float64)
    torch.testing.assert_close(y, x @ weight.t())
    torch.testing.assert_close(found, (ones @ weight, SAMPLES[kind].pack(ones.t() @ x, indices)))


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
@Kinds
def test_only_the_gradients_that_are_needed_are_computed(
    kind: type[Structure], needed: str
) -> None:
    shape = SHAPES[0]
    values, indices, _ = storage(kind, shape)
    given = {
        "x": torch.randn(3, shape.in_features, dtype=torch.float64),
        "values": values,
        "bias": torch.randn(shape.out_features, dtype=torch.float64),
    }
    given[needed].requires_grad_()
    called: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    y = LINEAR[kind.name](
        given["x"], given["values"], indices, given["bias"], shape.out_features
    ).sum()
    with Watch():  # type: ignore[no-untyped-call]
        y.backward()
    ours = [name for name in called if name.startswith("padst.")]
    wanted = {"x": [f"padst.{kind.name}_linear_dx.default"], "bias": []}
    assert ours == wanted.get(needed, [f"padst.{kind.name}_linear_dw.default"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@Kinds
def test_half_precision_stays_half_precision(kind: type[Structure], dtype: torch.dtype) -> None:
    shape = SHAPES[1]
    values, indices, weight = storage(kind, shape, torch.float32)
    x = torch.randn(3, shape.in_features)
    y = LINEAR[kind.name](x.to(dtype), values.to(dtype), indices, None, shape.out_features)
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), x @ weight.t(), rtol=2e-2, atol=5e-2)


# -- in a compiled graph ---------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@Kinds
def test_a_training_step_compiles_into_one_graph(kind: type[Structure], dynamic: bool) -> None:
    shape, perm = SHAPES[0], torch.tensor([2, 0, 3, 1])
    values, indices, weight = storage(kind, shape)
    bias = torch.randn(shape.out_features, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()

    def step(x: Tensor) -> Tensor:
        x = PADST.permute(x, perm)
        y: Tensor = LINEAR[kind.name](x, values, indices, bias, shape.out_features)
        return y.tanh()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5, 7) if dynamic else (3,):
        x = torch.randn(tokens, shape.in_features, dtype=torch.float64, requires_grad=True)
        wanted = (x[:, perm] @ weight.t() + bias).tanh()
        y = compiled(x)
        torch.testing.assert_close(y, wanted)
        found = torch.autograd.grad(y.sum(), (x, values, bias))
        eager = torch.autograd.grad(step(x).sum(), (x, values, bias))
        torch.testing.assert_close(found, eager)
    assert counter.frame_count == 1


@Kinds
def test_new_indices_of_the_same_shape_need_no_second_compilation(kind: type[Structure]) -> None:
    shape = SHAPES[0]
    values, indices, _ = storage(kind, shape)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        y: Tensor = LINEAR[kind.name](x, values, indices, None, shape.out_features)
        return y

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    x = torch.randn(3, shape.in_features, dtype=torch.float64)
    for _ in range(4):
        _, indices, _ = storage(kind, shape)
        torch.testing.assert_close(compiled(x, indices), run(x, indices))
    assert counter.frame_count == 1

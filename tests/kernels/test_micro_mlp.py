"""Two layers of blocks as one kernel, compiled by Inductor; the pass has tests of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import padst_compiler as padst
from padst_compiler.activation import ACTIVATIONS
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.kernels import install
from padst_compiler.kernels.micro_mlp import WRITTEN
from padst_compiler.structures import Block, Shape

from .stored import weights


@pytest.fixture(autouse=True)
def lowered() -> None:
    install()
    torch._dynamo.reset()


class Mlp:
    """Random weights of two layers, and what float64 makes of inputs."""

    def __init__(self, one: Block, two: Block, inputs: int, hidden: int, outputs: int) -> None:
        v1, i1, self.dense1 = weights(one, Shape(hidden, inputs))
        v2, i2, self.dense2 = weights(two, Shape(outputs, hidden))
        self.bias, self.hidden, self.outputs = torch.randn(hidden), hidden, outputs
        self.tensors = (v1, i1, self.bias, v2, i2)

    def run(self, activation: str = "gelu", *maps: Tensor | None) -> Callable[..., Tensor]:
        """Return a call of the operator on x and the tensors."""
        maps = maps or (None, None)

        def call(x: Tensor, *tensors: Tensor) -> Tensor:
            y: Tensor = BLOCK_MLP(x, *tensors, self.hidden, self.outputs, activation, *maps)
            return y

        return call

    def expected(self, x: Tensor, activation: str = "gelu") -> Tensor:
        function = ACTIVATIONS[activation]
        return function(x.double() @ self.dense1.t() + self.bias) @ self.dense2.t()


def small() -> Mlp:
    return Mlp(Block(8), Block(8), 16, 48, 24)


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, list[int]]:
    """Return the result, how often the kernel is called in it, and how often the operator."""
    result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    code = "\n".join(codes)
    return result, [code.count("padst::block_mlp<"), code.count("= torch.ops.padst.")]


def close(y: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert y.shape == expected.shape and y.is_contiguous()
    assert float((y.double() - expected).abs().max()) <= 1e-5 * scale


def some(*names: str, ordinary: int) -> list[Any]:
    """Return parameters of which the first ones are in the ordinary suite: each is a compile."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names[ordinary:]]
    return [*names[:ordinary], *slow]


@pytest.mark.parametrize("activation", some(*ACTIVATIONS, ordinary=2))
def test_every_activation_is_computed_on_the_tiles(activation: str) -> None:
    assert list(WRITTEN) == list(ACTIVATIONS)
    mlp = small()
    x = 3.0 * torch.randn(2, 61, 16)  # at every fourth number the tail of a vector
    y, used = compiled(mlp.run(activation), x, *mlp.tensors)
    assert used == [1, 0]
    close(y, mlp.expected(x, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.slow
def test_large_and_special_numbers_are_those_of_eager(activation: str) -> None:
    """A first layer that passes numbers on: the activation sees them as they are."""
    mlp = Mlp(Block(16), Block(16), 16, 16, 16)
    one, first = torch.eye(16).view(1, 1, 16, 16), torch.zeros(1, 1, dtype=torch.int32)
    given = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 90.0, -90.0, 1e38, -1e38, 1e-3])
    x = torch.zeros(11, 16)
    x[:, 3] = given
    tensors = (one, first, torch.zeros(16), one, first)
    y, used = compiled(mlp.run(activation), x, *tensors)
    assert used == [1, 0]
    torch.testing.assert_close(y[:, 3], ACTIVATIONS[activation](given), rtol=1e-6, atol=1e-37)
    x[5, 3] = torch.nan
    assert bool(torch.compile(mlp.run(activation))(x, *tensors)[5].isnan().all())


SIDES = [(Block(4), Block(4)), (Block(32), Block(32)), (Block(16, 8), Block(8, 24))]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.slow
def test_both_layers_have_their_own_blocks(sides: tuple[Block, Block]) -> None:
    (r1, c1), (r2, c2) = (kind.sides for kind in sides)
    mlp = Mlp(*sides, 3 * c1, 2 * r1 * c2, 4 * r2)
    x = torch.randn(77, 3 * c1)
    y, used = compiled(mlp.run(), x, *mlp.tensors)
    assert used == [1, 0]
    close(y, mlp.expected(x))


def test_what_follows_is_computed_on_the_tiles() -> None:
    mlp, bias, residual = small(), torch.randn(24), torch.randn(5, 24)
    x = torch.randn(5, 16)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.tanh(mlp.run()(x, *tensors) + bias) + residual

    y, codes = run_and_get_code(torch.compile(run), x, *mlp.tensors)
    assert sum(code.count("async_compile.cpp_pybinding(") for code in codes) == 1
    close(y, torch.tanh(mlp.expected(x) + bias) + residual)


@pytest.mark.parametrize("where", some("both", "in", "out", ordinary=1))
def test_maps_are_read_and_written_through(where: str) -> None:
    mlp, residual = small(), torch.randn(2, 37, 24)
    x = torch.randn(2, 37, 16 if where == "out" else 40)
    p = None if where == "out" else torch.randperm(40)[:16]
    q = None if where == "in" else torch.randperm(24)

    def run(x: Tensor, p: Tensor | None, q: Tensor | None, *tensors: Tensor) -> Tensor:
        return mlp.run("relu", p, q)(x, *tensors) + residual

    y, used = compiled(run, x, p, q, *mlp.tensors)
    assert used == [1, 0]
    expected = mlp.expected(x if p is None else x[..., p], "relu")
    close(y, (expected if q is None else expected[..., q]) + residual)
    for table, limit in ((p, 40), (q, 24)):
        if table is not None:
            kept = int(table[3])
            table[3] = limit
            with pytest.raises(RuntimeError, match=f"features below {limit}. Got {limit}"):
                torch.compile(run)(x, p, q, *mlp.tensors)
            table[3] = kept


def test_one_graph_serves_every_number_of_tokens() -> None:
    mlp, counter = small(), CompileCounterWithBackend("inductor")
    run = torch.compile(
        lambda x: mlp.run("silu")(x, *mlp.tensors) * 2.0, dynamic=True, backend=counter
    )
    for tokens in (2, 3, 31, 42, 43, 97, 400):
        x = torch.randn(tokens, 16)
        close(run(x), 2.0 * mlp.expected(x, "silu"))
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", some("one", "page", "transposed", "strided", "vector", ordinary=2))
def test_inputs_may_lie_in_any_way(how: str) -> None:
    mlp = Mlp(Block(8), Block(8), 1024, 48, 24) if how == "page" else small()
    x = {
        "transposed": torch.randn(16, 9).t(),
        "strided": torch.randn(9, 40)[:, 3:35:2],
        "page": torch.randn(60, 1024),  # rows a page apart are copied
        "one": torch.randn(1, 16),
        "vector": torch.randn(16),
    }[how]
    y, used = compiled(mlp.run(), x, *mlp.tensors)
    assert used == [1, 0]
    close(y, mlp.expected(x))


def test_without_a_bias() -> None:
    mlp = small()
    v1, i1, _, v2, i2 = mlp.tensors
    mlp.bias, x = torch.zeros(48), torch.randn(9, 16)
    y, used = compiled(lambda x, *t: mlp.run()(x, *t[:2], None, *t[2:]), x, v1, i1, v2, i2)
    assert used == [1, 0]
    close(y, mlp.expected(x))


@pytest.mark.parametrize("why", some("free", "odd", "float64", "int32", "subset", ordinary=1))
def test_what_the_kernel_does_not_do_calls_the_operator(why: str) -> None:
    two = {"free": Block(8, balanced=False), "odd": Block(6, 8)}.get(why, Block(8))
    mlp = Mlp(Block(8), two, 16, 48, 24)
    p, q = torch.randperm(16), torch.randperm(24)
    maps = {"int32": (p.int(), q), "subset": (p, q[:10])}.get(why, (None, None))
    x: Tensor = torch.randn(9, 16)
    tensors: tuple[Tensor, ...] = mlp.tensors
    if why == "float64":
        x, tensors = x.double(), tuple(t.double() if t.is_floating_point() else t for t in tensors)
    y, used = compiled(mlp.run("gelu", *maps), x, *tensors)
    assert used == [0, 1]
    expected = mlp.expected(x if maps[0] is None else x[:, p])
    close(y, expected if maps[1] is None else expected[:, maps[1]])


ENDS: dict[str, nn.Module] = {
    "gelu": nn.GELU(),
    "tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
}


@pytest.mark.parametrize(
    ("act", "dtype"),
    [
        *((name, torch.float32) for name in list(ENDS)[:1]),
        *(pytest.param(name, torch.float32, marks=pytest.mark.slow) for name in list(ENDS)[1:]),
        pytest.param("gelu", torch.bfloat16, marks=pytest.mark.slow),
        *(pytest.param(n, torch.bfloat16, marks=pytest.mark.exhaustive) for n in list(ENDS)[1:]),
    ],
)
def test_a_model_infers_through_one_kernel(
    act: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"architecture": "x86_64"}  # a CPU that multiplies bf16 would run two layers of pairs
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), ENDS[act], nn.Linear(64, 32))
    config = padst.SparseConfig("block:16", sparsity=0.5, permutation="random")
    padst.harden(padst.sparsify(net, config, filter_fn=lambda site: True)).to(dtype)
    x = torch.randn(3, 7, 32, dtype=dtype)
    fast = torch.compile(net, backend="padst", options={"kernels": "sparse", "verify": "strict"})
    with torch.no_grad():
        y, codes = run_and_get_code(fast, x)
        exact = net.float()(x.float())
    code = "\n".join(codes)
    assert code.count("padst::block_mlp<") == 1 and "= torch.ops.padst." not in code
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), exact, rtol=limit, atol=limit)

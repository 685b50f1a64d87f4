"""Two layers of blocks as one Triton kernel: against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from padst_compiler.activation import ACTIVATIONS
from padst_compiler.kernels.triton_block import sizes_of
from padst_compiler.kernels.triton_mlp import MLP, WRITTEN, fits, mlp, programs, repeats
from padst_compiler.structures import Block, Shape
from padst_compiler.triton_text import written

from .stored import weights

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy

LIMITS = {torch.float32: 5e-6, torch.float16: 2**-8, torch.bfloat16: 2**-6}
"""Of the largest magnitude; hidden features are rounded, and the interpreter cuts off."""


class Mlp:
    """Random weights of two layers, and what float64 makes of inputs."""

    def __init__(
        self,
        one: Block,
        two: Block,
        rows: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        sparsity: float = 0.6,
    ) -> None:
        self.inputs, self.hidden, self.outputs = rows
        self.dtype, self.device = dtype, device
        first, second = Shape(self.hidden, self.inputs), Shape(self.outputs, self.hidden)
        v1, i1, self.dense1 = weights(one, first, dtype, sparsity)
        v2, i2, self.dense2 = weights(two, second, dtype, sparsity)
        self.first, self.second = (v1.to(device), i1.to(device)), (v2.to(device), i2.to(device))
        self.bias: Tensor | None = torch.randn(self.hidden).to(device, dtype)

    def x(self, *shape: int, width: int | None = None) -> Tensor:
        """Return random inputs."""
        return torch.randn(*shape, width or self.inputs).to(self.device, self.dtype)

    def check(
        self,
        x: Tensor,
        activation: str = "gelu",
        p: Tensor | None = None,
        q: Tensor | None = None,
    ) -> None:
        """Compare the kernel with float64; ``q`` is read by outputs, as the operator's map."""
        into = None if q is None else torch.argsort(q).to(self.device)
        from_ = None if p is None else p.to(self.device)
        sizes = (self.hidden, self.outputs)
        y = mlp(x, *self.first, self.bias, *self.second, *sizes, activation, from_, into)
        expected = self.expected(x.cpu() if p is None else x.cpu()[..., p], activation)
        expected = expected if q is None else expected[..., q]
        assert y.shape == expected.shape and y.dtype is x.dtype and y.is_contiguous()
        error = (y.cpu().double() - expected).abs().max() / expected.abs().max()
        assert float(error) <= LIMITS[self.dtype]

    def expected(self, x: Tensor, activation: str) -> Tensor:
        bias = 0.0 if self.bias is None else self.bias.cpu().double()
        return ACTIVATIONS[activation](x.double() @ self.dense1.t() + bias) @ self.dense2.t()


def alike(side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Mlp:
    """Return two layers of square blocks, of which each keeps two in five."""
    return Mlp(Block(side), Block(side), (5 * side, 5 * side, 3 * side), device, dtype)


@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_every_type_and_size(
    dtype: torch.dtype, side: int, tokens: int, device: torch.device
) -> None:
    net = alike(side, device, dtype)
    net.check(net.x(tokens))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    assert list(WRITTEN) == list(ACTIVATIONS)
    net = alike(16, device, dtype)
    net.check(net.x(21), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_special_numbers_are_those_of_eager(
    activation: str, device: torch.device
) -> None:
    """Layers that pass numbers on: the activation sees them as they are."""
    one, first = torch.eye(16).view(1, 1, 16, 16), torch.zeros(1, 1, dtype=torch.int32)
    layer = (one.to(device), first.to(device))
    given = torch.tensor([0.0, 1e-20, 1e-3, 0.7, 9.0, 90.0, 1e4, 1e38])
    given = torch.cat([given, -given])
    x = torch.zeros(given.shape[0], 16)
    x[:, 3] = given

    def run() -> Tensor:
        return mlp(x.to(device), *layer, None, *layer, 16, 16, activation).cpu()

    y = run()
    # gelu_tanh(-9) is -1e-28; eager says 0
    torch.testing.assert_close(y[:, 3], ACTIVATIONS[activation](given), rtol=1e-5, atol=1e-27)
    assert not bool(y[:, :3].any()) and not bool(y[:, 4:].any())
    x[5, 3] = torch.nan
    assert bool(run()[5].isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_hidden_features_are_numbers(
    activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    net = alike(16, device, dtype)
    net.check(60.0 * net.x(5), activation)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_without_a_bias(dtype: torch.dtype, device: torch.device) -> None:
    net = alike(16, device, dtype)
    net.bias = None
    net.check(net.x(7))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("where", ["in", "out", "both"])
def test_maps_are_read_and_written_through(where: str, biased: bool, device: torch.device) -> None:
    net = alike(16, device)
    if not biased:
        net.bias = None
    p = None if where == "out" else torch.randperm(100)[: net.inputs]
    q = None if where == "in" else torch.randperm(net.outputs)
    net.check(net.x(2, 9, width=net.inputs if p is None else 100), "relu", p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_maps_of_16_bit_inputs(dtype: torch.dtype, device: torch.device) -> None:
    net = alike(32, device, dtype)
    net.check(net.x(70), "silu", torch.randperm(net.inputs), torch.randperm(net.outputs))


SIDES = [
    (Block(16, 8), Block(8, 16)),
    (Block(32, 24), Block(48, 32)),
    (Block(16, 48), Block(136, 16)),  # a row of blocks is two tiles
    (Block(48, 16), Block(16, 48)),  # hidden blocks in pieces of 16
    (Block(128, 16), Block(16, 128)),  # and of 64
    (Block(64, 8), Block(40, 64)),
]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_layers_have_their_own_blocks(
    sides: tuple[Block, Block], dtype: torch.dtype, device: torch.device
) -> None:
    (r1, c1), (r2, _) = (kind.sides for kind in sides)
    net = Mlp(*sides, (7 * c1, 3 * r1, 2 * r2), device, dtype)
    net.check(net.x(19))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_long_first_layer_keeps_its_loop(dtype: torch.dtype, device: torch.device) -> None:
    net = Mlp(Block(16), Block(16), (880, 32, 16), device, dtype)
    sizes = sizes_of(net.first[0]), sizes_of(net.second[0])
    assert not programs(*sizes, 256, dtype, "gelu", biased=True).values["UNROLLED"]
    net.check(net.x(130 if dtype.itemsize == 2 else 129))


@pytest.mark.parametrize("shape", [(2, 9), (3, 1, 5), (0,), ()], ids=str)
def test_inputs_of_any_rank(shape: tuple[int, ...], device: torch.device) -> None:
    net = alike(16, device)
    x = net.x(*shape)
    if x.numel():
        net.check(x)
        return
    y = mlp(x, *net.first, None, *net.second, net.hidden, net.outputs, "gelu")
    assert y.shape == (*shape, net.outputs)


def test_inputs_may_lie_in_any_way(device: torch.device) -> None:
    net = alike(16, device)
    net.check(net.x(net.inputs, width=9).t())
    net.check(net.x(9, width=3 * net.inputs)[:, ::3])


def test_what_the_kernel_does_not_do_is_said() -> None:
    assert fits((4, 1, 8, 48), (4, 1, 48, 8))
    assert not fits((4, 1, 8, 16), (4, 1, 32, 8))
    assert not fits((4, 1, 8, 24), (4, 1, 24, 8))
    with pytest.raises(ValueError, match="Got 16 and 32"):
        programs((4, 1, 8, 16), (4, 1, 32, 8), 9, torch.float32, "relu", biased=True)


def test_repeats_count_hidden_blocks_over_rows() -> None:
    vit = {16: (5, 19), 32: (2, 10), 64: (1, 5)}  # ViT-B at 90 %
    counts = [repeats((3072 // b, n, b, b), (768 // b, m, b, b)) for b, (n, m) in vit.items()]
    assert counts == [4.75, 2.5, 1.25]
    assert repeats((8, 1, 16, 16), (4, 2, 16, 256)) == 2.0  # two tiles a row of blocks


def test_bias_and_activation_are_constants_of_the_text() -> None:
    first, second = (4, 1, 16, 16), (4, 2, 16, 16)
    sizes = {"X": (None, 64), "W1": first, "I1": first[:2], "W2": second, "I2": second[:2]}
    how = programs(first, second, 64, torch.float16, "relu", biased=False)
    rest = {"IN_MAP": False, "OUT_MAP": False, "DOT": "tl.float16", "INDEX_DTYPE": "tl.int32"}
    text = written(MLP, sizes, 64, {**how.values, **rest})
    assert WRITTEN["relu"] in text and "B1" not in text and "sigmoid" not in text
    assert text.count("tl.store") == 1

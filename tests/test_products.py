from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from padst_compiler.products import PRODUCTS, Use, flops_of, summed_dims
from padst_compiler.tracer import trace

ATEN = torch.ops.aten


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm": (ATEN.mm, (r(3, 4), r(4, 5))),
    "bmm": (ATEN.bmm, (r(2, 3, 4), r(2, 4, 5))),
    "mv": (ATEN.mv, (r(3, 4), r(4))),
    "linear": (ATEN.linear, (r(2, 3, 4), r(5, 4))),
    "matmul": (ATEN.matmul, (r(2, 3, 4), r(4, 5))),
    "addmm": (ATEN.addmm, (r(5), r(3, 4), r(4, 5))),
    "addmm_activation": (ATEN._addmm_activation, (r(5), r(3, 4), r(4, 5))),
    "addmv": (ATEN.addmv, (r(3), r(3, 4), r(4))),
    "addbmm": (ATEN.addbmm, (r(3, 5), r(2, 3, 4), r(2, 4, 5))),
    "baddbmm": (ATEN.baddbmm, (r(2, 3, 5), r(2, 3, 4), r(2, 4, 5))),
}
NONE = (0, 0)
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "plain": (r(2, 4, 7), r(6, 4, 3), None, [1], [0], [1], False, [0], 1),
    "grouped": (r(2, 4, 7), r(6, 2, 3), None, [1], [0], [1], False, [0], 2),
    "strided": (r(2, 4, 7, 8), r(6, 4, 3, 2), None, [2, 1], NONE, [1, 1], False, NONE, 1),
    "transposed": (r(2, 4, 7), r(4, 6, 3), None, [2], [0], [1], True, [0], 1),
}
CALLS |= {f"convolution, {name}": (ATEN.convolution, args) for name, args in CONVOLUTIONS.items()}


def multiplications(packet: Any, args: tuple[Any, ...]) -> int:
    """Count how often two numbers meet: ones against ones sum to it, but for what is added."""
    at = PRODUCTS[packet]
    ones = [a.new_ones(a.shape) if isinstance(a, Tensor) else a for a in args]
    for place in set(range(min(at))):
        ones[place] = torch.zeros_like(ones[place])
    if packet is ATEN._addmm_activation:
        packet = ATEN.addmm
    return int(packet(*ones).sum())


@pytest.mark.parametrize("name", CALLS)
def test_flops_are_two_for_each_pair_that_meets(name: str) -> None:
    packet, args = CALLS[name]
    first, second = (args[at] for at in PRODUCTS[packet])
    assert flops_of(packet, args, first, second, packet(*args)) == 2 * multiplications(packet, args)


@pytest.mark.parametrize("name", [n for n in CALLS if "activation" not in n and "conv" not in n])
def test_the_axes_that_are_summed_over_shrink_nothing_else(name: str) -> None:
    packet, args = CALLS[name]
    first, second = PRODUCTS[packet]
    sums = summed_dims(packet, args, args[second])
    for place, dims in zip((first, second), sums, strict=True):
        alone = list(args)
        other = second if place == first else first
        alone[other] = torch.ones_like(args[other])
        before = packet(*alone)
        for dim in range(-args[place].dim(), 0):  # a sum does not mind the order
            alone[place] = args[place].flip(dim)
            same = torch.allclose(packet(*alone), before)
            assert same == ({dim, dim + args[place].dim()} & set(dims) != set())


def test_a_convolution_sums_over_all_but_the_channels_that_it_makes() -> None:
    for name, axes in (("plain", (1, 2)), ("strided", (1, 2, 3)), ("transposed", (0,))):
        args = CONVOLUTIONS[name]
        assert summed_dims(ATEN.convolution, args, args[1]) == ((1,), axes)


def test_a_nested_operand_is_counted_by_its_rows() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    weight = torch.randn(6, 4)
    result = torch.nn.functional.linear(nested, weight)
    assert flops_of(ATEN.linear, (nested, weight), nested, weight, result) == 2 * 5 * 4 * 6


def test_a_use_counts_tokens() -> None:
    use = Use(("w",), (4, 8), flops=2 * 32 * 5)
    assert (use.weights, use.tokens, use.columns()) == (32, 5, None)
    assert Use(("w",), (0, 8)).tokens == 0


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.w)


def test_the_largest_product_says_which_axes_are_inputs() -> None:
    both = Calls(lambda x, w: (x[:9, :3] @ w.t()).sum() + (x @ w), (8, 3))
    (use,) = trace(both, torch.randn(50, 8)).uses.values()
    assert (use.count, use.columns()) == (2, (0,))

"""Products with parameters: which operators multiply, along which axes, what a run used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.ops import LINEAR
from padst_compiler.provenance import summed_axes

__all__ = ["FUSED", "PRODUCTS", "Use", "flops_of", "summed_dims"]

_ATEN = torch.ops.aten
# Where a product's two operands stand; either may be the weight.
PRODUCTS: dict[Any, tuple[int, int]] = {
    _ATEN.mm: (0, 1),
    _ATEN.bmm: (0, 1),
    _ATEN.mv: (0, 1),
    _ATEN.linear: (0, 1),
    _ATEN.matmul: (0, 1),
    _ATEN.convolution: (0, 1),
    _ATEN.addmm: (1, 2),
    _ATEN._addmm_activation: (1, 2),
    _ATEN.addmv: (1, 2),
    _ATEN.addbmm: (1, 2),
    _ATEN.baddbmm: (1, 2),
    _ATEN._grouped_mm: (0, 1),
}
# One call, one or several layers: all parameters among the arguments are weights. Behind each
# operator: where the number of features stands among its arguments; 0 where the input has it.
FUSED: dict[Any, int] = {
    _ATEN._native_multi_head_attention: 3,
    _ATEN._transformer_encoder_layer_fwd: 1,
    _ATEN.mkldnn_rnn_layer: 0,
    _ATEN._cudnn_rnn: 0,
    _ATEN._trilinear: 0,
} | {op.overloadpacket: 0 for op in LINEAR.values()}


@dataclass
class Use:
    """How the run used one parameter in linear operations."""

    names: tuple[str, ...]  # qualified names, the first one first
    shape: tuple[int, ...]
    ops: tuple[str, ...] = ()
    count: int = 0
    flops: int = 0
    reads: tuple[str, ...] = ()  # the nodes whose features it multiplied, in order
    met: bool = False  # something that is no weight
    computed: bool = False  # by more than scaling, before the product
    looked_up: bool = False  # as an embedding
    largest: tuple[int, fx.Node, tuple[int, ...]] | None = None  # product: FLOPs, operand, sum

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def tokens(self) -> int:
        """How often each weight was multiplied: the rows that it met."""
        return round(self.flops / (2 * self.weights)) if self.weights else 0

    def columns(self) -> tuple[int, ...] | None:
        """Return the axes that its largest product summed over; None where that is not known."""
        return None if self.largest is None else summed_axes(self.largest[1], self, self.largest[2])


def summed_dims(packet: Any, args: Any, second: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes of the two operands that a product sums over.

    Args:
        packet: an operator of ``PRODUCTS``.
        args: of the call.
        second: the second operand.
    """
    if packet is _ATEN.convolution:
        return (1,), (0,) if args[6] else tuple(range(1, second.dim()))
    if packet is _ATEN.linear or second.dim() == 1:
        return (-1,), (-1,)
    return ((0, -1), (0, -2)) if packet is _ATEN.addbmm else ((-1,), (-2,))


def flops_of(packet: Any, args: Any, first: Tensor, second: Tensor, result: Tensor) -> int:
    """Return 2 x multiplications.

    Args:
        packet: an operator of ``PRODUCTS``.
        args: of the call.
        first: the first operand.
        second: the second operand.
        result: of the call.
    """
    if packet is _ATEN.convolution:  # per output, or per input where it is transposed
        places = first if args[6] else result
        return 2 * places.numel() * (second.numel() // second.shape[0])
    if first.is_nested or second.is_nested:
        return 2 * result.numel() * (second if first.is_nested else first).shape[-1]
    batches = first.shape[0] if packet is _ATEN.addbmm else 1
    return 2 * result.numel() * first.shape[-1] * batches

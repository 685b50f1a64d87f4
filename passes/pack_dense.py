"""Lay the frozen weights of dense products out once: BLAS does so in every call.

    before   y = addmm(bias, x, weight.t())
    after    y = block_linear(x, tiles(weight), zeros) + bias
    or       y = packed_linear(x, packed_weight(weight, 32), bias)

A dense weight is a layer of blocks that leaves none out: one block of all inputs for 64, 32 or 16
outputs. The kernel of blocks is as fast as any (``padst bench cpu --structures unstructured``), in
16-bit numbers too, and what follows is computed on its tiles. Other numbers of outputs, and CPUs
without AVX2, are left to oneDNN. What is laid out depends on frozen numbers only and is done before
the first call. Left alone: what ``gains`` says gains nothing, and what needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from padst_compiler.compat import size_hint
from padst_compiler.cpu_products import HALF, products_of
from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.insertion import constant, inline
from padst_compiler.packed_ops import PACKED_LINEAR, PACKED_WEIGHT, gains, packs
from padst_compiler.rewrite import ATEN, Facts, Report
from padst_compiler.structures import Block, Shape

__all__ = ["PackDense"]

SIDES = (64, 32, 16)  # outputs of a tile
MEASURED = ("AVX512", "AVX2")  # elsewhere (NEON, Apple's matrix units) BLAS may well be faster


@dataclass(frozen=True)
class PackDense:
    """Replace products with frozen matrices where one that is laid out is faster.

    Attributes:
        kernels: formulations of a layer of blocks that may run a dense one.
    """

    kernels: Sequence[Formulation] = field(default=(), repr=False)
    name: str = "pack_dense"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Rewrite ``mm`` and ``addmm`` whose second matrix is frozen."""
        laid_out: dict[object, fx.Node] = {}
        first: dict[int, fx.Node] = {}  # by the number of tiles: all read the first block of inputs
        for node in list(graph.nodes):
            found = _product(node)
            if found is None or not facts.is_frozen(found[1]) or facts.is_frozen(found[0]):
                continue
            x, weight, bias = found
            tokens, matrix = size_hint(x.meta["val"].shape[0]), weight.meta["val"]
            device, dtype = matrix.device.type, matrix.dtype
            if not gains(matrix.numel(), dtype, device):
                continue
            way = self._tiled(tokens, matrix)
            if way is None and not packs(tokens, dtype, device):
                continue
            key = (weight, tokens if way is None else way)
            if key not in laid_out:
                lay_out = _packed if way is None else _tiles(way[1])
                laid_out[key] = inline(graph, node, lay_out, [weight, tokens], facts.table)
            operands: list[fx.Node | int | None] = [x, laid_out[key], bias]
            run: Callable[..., Tensor] = _packed_product
            if way is not None:
                form, side = way
                tiles = matrix.shape[1] // side
                if tiles not in first:
                    zeros = torch.zeros(tiles, 1, dtype=torch.int32, device=matrix.device)
                    first[tiles] = constant(graph, "first", zeros)
                run, operands = form.run, [x, laid_out[key], first[tiles], bias, tiles * side]
            new = inline(graph, node, run, operands, facts.table)
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, ())

    def _tiled(self, tokens: int, matrix: Tensor) -> tuple[Formulation, int] | None:
        """Return the kernel for this matrix, and how many outputs its tiles have."""
        inputs, outputs = matrix.shape
        side = next((n for n in SIDES if outputs % n == 0), 0)
        if not side or torch.backends.cpu.get_cpu_capability() not in MEASURED:
            return None
        if inputs % 2 and matrix.dtype in HALF and products_of(matrix.dtype):
            return None  # no pairs, and BLAS multiplies what our kernel would widen
        one, shape = Block(side, inputs), Shape(outputs, inputs)
        geometry = Geometry(one, shape, 1, tokens, matrix.dtype, matrix.device.type, True)
        costs = [(form.cost(geometry), form) for form in self.kernels]
        known = [(cost, form) for cost, form in costs if cost is not None]
        return (min(known, key=lambda way: way[0])[1], side) if known else None


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return x, the matrix and the bias of a plain product of matrices."""
    if node.target is ATEN.mm.default:
        x, weight = node.args
        bias = None
    elif node.target is ATEN.addmm.default and not node.kwargs and len(node.args) == 3:
        bias, x, weight = node.args
    else:
        return None
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if bias is not None:
        assert isinstance(bias, fx.Node) and isinstance(bias.meta["val"], Tensor)
        if bias.meta["val"].shape != weight.meta["val"].shape[1:]:
            return None  # one for each token
    return x, weight, bias


def _packed(weight: Tensor, tokens: int) -> Tensor:
    packed: Tensor = PACKED_WEIGHT(weight.t(), tokens)
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = PACKED_LINEAR(x, packed, bias)
    return y


def _tiles(side: int) -> Callable[[Tensor, int], Tensor]:
    """Return what makes blocks ``(outputs / side, 1, inputs, side)`` of a matrix."""

    def lay_out(weight: Tensor, tokens: int) -> Tensor:
        del tokens
        tiles: Tensor = weight.unflatten(1, (-1, side)).transpose(0, 1)
        return tiles.unsqueeze(1).contiguous()

    return lay_out

"""Turn the maps that remain into ATen movements, which Inductor fuses with their neighbours.

    before   y = padst.permute(x, p)
    after    y = index_select(x, -1, p)
    or       y = views, rolls and flips of x, where a formula says p: no table is loaded
    or       no node: a kernel of ours that reads y, or computes x, does so through the map

Every map that is lowered here is reported as left: it costs a movement.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.compat import size_hint
from padst_compiler.gpu_cost import moves_in_kernel
from padst_compiler.index_map import invert
from padst_compiler.insertion import inline
from padst_compiler.kernel_ops import IN_MAP, MAPPED
from padst_compiler.ops import LINEAR
from padst_compiler.rewrite import ATEN, Facts, Refusal, Report
from padst_compiler.symbolic import recognise

__all__ = ["LowerMaps"]

PERMUTE = torch.ops.padst.permute.default
NORMS = frozenset({ATEN.native_layer_norm.default, ATEN._fused_rms_norm.default})


@dataclass(frozen=True)
class LowerMaps:
    """Lower ``padst::permute`` and ``padst::invert``."""

    name: str = "lower_maps"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Lower every map of the graph."""
        left = []
        lowered: dict[Any, Callable[..., Tensor]] = {
            PERMUTE: _gather,
            torch.ops.padst.invert.default: invert,
        }
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in lowered:
                continue
            owner = facts.owner(node)
            if _is_for_kernels(node) and (
                _read_through(graph, node) or _write_through(graph, node)
            ):
                left.append(Refusal(owner, "a gather remains, in a kernel of ours"))
                continue
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            lower = lowered[node.target]
            if len(operands) == 2:
                known = facts.map_of(operands[1])
                symbolic = None if known is None else recognise(known)
                what = "a gather remains"
                if symbolic is not None:
                    facts.rely_on(operands.pop())
                    lower, what = symbolic.laid_out, f"a movement by {symbolic.formula} remains"
                if not facts.is_frozen(node):  # else it moves once, before the first call
                    left.append(Refusal(owner, f"{what}, fused with its neighbours"))
            new = inline(graph, node, lower, operands, facts.table)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, (), tuple(left))


def _is_for_kernels(node: fx.Node) -> bool:
    """Whether a kernel should move features itself, if it can.

    On a CPU always. On a GPU not where many numbers are moved, nor where a pointwise operator or a
    norm stands before: that reads what it needs in another order, for nothing.
    """
    value, moved = node.meta["val"], node.args[0]
    if value.device.type != "cuda" or not isinstance(moved, fx.Node):
        return True
    source = moved.args[0] if moved.target is operator.getitem else moved
    target = source.target if isinstance(source, fx.Node) else None
    tags = getattr(target, "tags", ())
    free = torch.Tag.pointwise in tags or target in NORMS
    return not free and moves_in_kernel(math.prod(size_hint(n) for n in value.shape))


def _read_through(graph: fx.Graph, node: fx.Node) -> bool:
    """Give a map to the kernels of ours, if they alone read what it moves."""
    if node.target is not PERMUTE or not node.users:
        return False
    readers = {user: _Kernel.of(user) for user in node.users}
    if not all(kernel and kernel.is_free(node) for kernel in readers.values()):
        return False
    for user, kernel in readers.items():
        assert kernel is not None
        kernel.arguments[0], kernel.arguments[kernel.in_map] = node.args
        kernel.replace(graph, user)
    graph.erase_node(node)
    return True


def _write_through(graph: fx.Graph, node: fx.Node) -> bool:
    """Give a map to the kernel of ours that computes what it moves, if nothing else reads that."""
    writer = node.args[0]
    assert isinstance(writer, fx.Node)
    kernel = _Kernel.of(writer) if node.target is PERMUTE else None
    if kernel is None or kernel.arguments[kernel.in_map + 1] is not None or len(writer.users) > 1:
        return False
    kernel.arguments[kernel.in_map + 1] = node.args[1]
    kernel.replace(graph, node)
    graph.erase_node(writer)
    return True


@dataclass
class _Kernel:
    """A call of an operator that has room for maps."""

    operator: torch._ops.OpOverload
    arguments: list[Any]

    @staticmethod
    def of(node: fx.Node) -> _Kernel | None:
        """Return what a node calls, or what with maps it can be replaced by."""
        target, args = node.target, list(node.args)
        if target in MAPPED and (target not in LINEAR.values() or args[3] is None):
            return _Kernel(MAPPED[target], [*args[:3], args[-1], None, None])
        return _Kernel(target, args) if target in IN_MAP else None

    @property
    def in_map(self) -> int:
        return IN_MAP[self.operator]

    def is_free(self, x: fx.Node) -> bool:
        """Whether it reads ``x``, and not through a map."""
        return self.arguments[0] is x and self.arguments[self.in_map] is None

    def replace(self, graph: fx.Graph, node: fx.Node) -> None:
        """Take the place of a node."""
        with graph.inserting_before(node):
            new = graph.call_function(self.operator, tuple(self.arguments))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _gather(x: Tensor, perm: Tensor) -> Tensor:
    return x.index_select(-1, perm)

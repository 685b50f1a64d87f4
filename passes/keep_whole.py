"""Keep whole what others read in parts, more than once or through a table.

    before   y = add(block_linear(x, ...), bias);  q, k, v = unbind(view(y))
    after    y = force_stride_order(add(...), strides);  q, k, v = unbind(view(y))

Inductor computes a pointwise result again for each part that is read, in a loop that copies the
part: the bias of a packed projection was added there, and a residual sum in each of its readers.
Whole, it is computed where the kernel's tiles are, and parts are views.

    before   h = gelu(y);  index(view(h), table)
    after    h = force_stride_order(gelu(y), strides);  index(view(h), table)

The same with what is read through a table: such loops compute it one by one, and once a reader (a
GELU 12 times as slow). Left alone: results of other operators, symbolic strides.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from padst_compiler.compat import force_strides
from padst_compiler.kernel_ops import IN_MAP, MAPPED
from padst_compiler.rewrite import ATEN, Facts, Report

__all__ = ["KeepWhole"]

_KERNELS = frozenset({*IN_MAP, *MAPPED})
_PARTS = frozenset(
    {ATEN.unbind.int, ATEN.split.Tensor, ATEN.split_with_sizes.default, ATEN.select.int}
    | {ATEN.slice.Tensor, ATEN.chunk.default}
)
_GATHERS = frozenset({ATEN.index_select.default, ATEN.index.Tensor})
_VIEWS = frozenset(
    {ATEN.view.default, ATEN.permute.default, ATEN.transpose.int, ATEN._unsafe_view.default}
    | {ATEN.unsqueeze.default, ATEN.squeeze.dim, ATEN.reshape.default}
)


@dataclass(frozen=True)
class KeepWhole:
    """Fix the strides of results that Inductor would compute again where they are read."""

    name: str = "keep_whole"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Put a copy in front of the readers, which costs nothing: it is written at once."""
        del facts
        for node in list(graph.nodes):
            shared = len(node.users) > 1 or _is_read_in_parts(node)
            if (shared and _follows_a_kernel(node)) or _is_gathered(node):
                readers, strides = list(node.users), [*node.meta["val"].stride()]
                if not all(isinstance(stride, int) for stride in strides):
                    continue
                with graph.inserting_after(node):
                    whole = graph.call_function(force_strides(), (node, strides))
                whole.meta.update(node.meta)
                for reader in readers:
                    reader.replace_input_with(node, whole)
        return Report(self.name, ())


def _follows_a_kernel(node: fx.Node) -> bool:
    """Whether a node is the pointwise end of what is computed on a kernel's tiles."""
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if at.target in _KERNELS:
            return at is not node
        if _is_pointwise(at):
            waiting += [n for n in at.all_input_nodes if len(n.users) == 1]
    return False


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _is_gathered(node: fx.Node) -> bool:
    """Whether a computed result is read through a table: such loops compute it once a reader."""
    computed = _is_pointwise(node) or node.target is operator.getitem
    computed = computed and isinstance(node.meta.get("val"), torch.Tensor)
    return computed and any(user.target in _GATHERS for user in _readers(node))


def _is_read_in_parts(node: fx.Node) -> bool:
    return any(user.target in _PARTS for user in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what reads a node, through views too."""
    waiting = list(node.users)
    while waiting:
        reader = waiting.pop()
        yield reader
        waiting += list(reader.users) if reader.target in _VIEWS else []

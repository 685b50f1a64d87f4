"""Lay the frozen weights of dense products out once: BLAS does so in every call.

    before   y = addmm(bias, x, weight.t())
    after    y = packed_linear(x, packed_weight(weight, 32), bias)

What is packed depends on frozen numbers only and is done before the first call. From 3 to 512
tokens that is faster (``padst bench cpu --structures unstructured``: the graph against F.linear);
with one the product reads a weight once anyway, with more BLAS is as fast. Left alone: weights of
less than 2^18 numbers, other types than fp32, and what needs gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from padst_compiler.compat import size_hint
from padst_compiler.packed_ops import PACKED_LINEAR, PACKED_WEIGHT, pays
from padst_compiler.rewrite import ATEN, Facts, Report

__all__ = ["PackDense"]


@dataclass(frozen=True)
class PackDense:
    """Replace products with frozen matrices where a packed one is faster."""

    name: str = "pack_dense"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Rewrite ``mm`` and ``addmm`` whose second matrix is frozen."""
        packed: dict[tuple[fx.Node, int], fx.Node] = {}
        for node in list(graph.nodes):
            found = _product(node)
            if found is None or not facts.is_frozen(found[1]) or facts.is_frozen(found[0]):
                continue
            x, weight, bias = found
            tokens, matrix = size_hint(x.meta["val"].shape[0]), weight.meta["val"]
            if not pays(tokens, matrix.numel(), matrix.dtype, matrix.device.type):
                continue
            with graph.inserting_before(node):
                if (weight, tokens) not in packed:
                    turned = graph.call_function(ATEN.permute.default, (weight, [1, 0]))
                    turned.meta["val"] = matrix.t()
                    whole = graph.call_function(PACKED_WEIGHT, (turned, tokens))
                    whole.meta["val"] = PACKED_WEIGHT(turned.meta["val"], tokens)
                    packed[weight, tokens] = whole
                new = graph.call_function(PACKED_LINEAR, (x, packed[weight, tokens], bias))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, ())


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

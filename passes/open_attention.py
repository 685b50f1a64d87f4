"""Take fused attention apart where one of its weights is sparse, so that products are products.

    before   y, w = _native_multi_head_attention(x, x, x, d, h, unpack(...), b, W, c, mask, ...)
    after    q, k, v = linear(x, unpack(...), b).chunk(3) ...; y = linear(attention, W, c)

These are what ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` run in eval mode without
gradients. With dense weights only they stay whole, and where they say nothing of their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from padst_compiler.dense_operand import find_operand
from padst_compiler.insertion import inline
from padst_compiler.rewrite import ATEN, Facts, Report, Rule
from padst_compiler.unpacking import UNPACK

__all__ = ["OpenAttention", "attention", "encoder_layer"]

_MASKED_SOFTMAX = ATEN._masked_softmax.default


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what ``aten::_native_multi_head_attention`` does, from products: batch first."""
    if key is query and value is query:
        parts = F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    else:
        pairs = zip(qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        parts = tuple(
            F.linear(x, *pair) for x, pair in zip((query, key, value), pairs, strict=True)
        )
    heads = [part.unflatten(-1, (num_head, -1)).transpose(1, 2) for part in parts]
    scores = (heads[0] / (embed_dim // num_head) ** 0.5) @ heads[1].mT
    mask = None if mask is None else mask.bool()  # 0 and -inf count as False and True there
    weights = scores.softmax(-1) if mask is None else _MASKED_SOFTMAX(scores, mask, 3, mask_type)
    mixed = (weights @ heads[2]).transpose(1, 2).flatten(2)
    if not need_weights:
        said = query.new_empty(0)
    else:
        said = weights.mean(1) if average_attn_weights else weights
    return F.linear(mixed, proj_weight, proj_bias), said


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """Return what ``aten::_transformer_encoder_layer_fwd`` does, from products."""

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return attention(x, x, x, embed_dim, num_heads, *weights, mask, False, True, mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        x = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(x) if use_gelu else x.relu(), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    one, two = (norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2)
    if norm_first:
        src = src + attend(norm(src, *one))
        return src + feed(norm(src, *two))
    src = norm(src + attend(src), *one)
    return norm(src + feed(src), *two)


_OPEN: dict[Any, Any] = {
    ATEN._native_multi_head_attention.default: attention,
    ATEN._transformer_encoder_layer_fwd.default: encoder_layer,
}


@dataclass(frozen=True)
class OpenAttention:
    """Write fused attention with sparse weights as products."""

    name: str = "open_attention"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Take apart every such node of the graph."""
        fired = []
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _OPEN]:
            base = next(filter(None, map(_unpacked, node.args)), None)
            if base is None or node.kwargs:
                continue
            nodes = list(dict.fromkeys(n for n in node.all_input_nodes))
            run = _with_constants(_OPEN[node.target], node.args, nodes)
            made = inline(graph, node, run, nodes, facts.table)
            if isinstance(made, fx.Node):
                node.replace_all_uses_with(made)
            else:
                for part in list(node.users):
                    part.replace_all_uses_with(made[part.args[1]])
                    graph.erase_node(part)
            graph.erase_node(node)
            owner = base.args[1]
            assert isinstance(owner, fx.Node)
            fired.append(Rule(facts.owner(owner), f"{node.name} is made of products"))
        return Report(self.name, tuple(fired))


def _with_constants(function: Any, arguments: tuple[Any, ...], nodes: list[fx.Node]) -> Any:
    """Return ``function`` of the tensors alone; the same node stays the same tensor."""

    def run(*tensors: Tensor) -> Any:
        held = dict(zip(nodes, tensors, strict=True))
        return function(*(held[a] if isinstance(a, fx.Node) else a for a in arguments))

    return run


def _unpacked(argument: object) -> fx.Node | None:
    """Return the ``unpack`` behind an argument, if there is one."""
    operand = find_operand(argument) if isinstance(argument, fx.Node) else None
    return operand.base if operand is not None and operand.base.target is UNPACK else None

"""Attention as one operator: its scores do not see the order of features, its result does."""

from __future__ import annotations

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, Side, unknown
from padst_compiler.passes.folding.factors import Factor, renewed
from padst_compiler.rewrite import ATEN

__all__ = ["RULES"]

CONTRACTED = "the operands of a product come in other orders"
WHOLE = ATEN.scaled_dot_product_attention.default


def attention(analysis: Analysis, node: fx.Node) -> None:
    """Scaled dot product attention: q and k agree, the result has the order of v."""
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    mask = node.kwargs.get("attn_mask")
    mask = mask if mask is not None else (node.args[3] if _takes_mask(node) else None)
    live = all(analysis.is_live(t) for t in (q, k, v))
    plain = live and len({len(analysis.shape(t)) for t in (q, k, v)}) == 1
    last = len(analysis.shape(q)) - 1 if plain else 0
    if last < 2 or len({analysis.shape(t)[: last - 1] for t in (q, k, v)}) > 1 or _drops(node):
        unknown(analysis, node)  # grouped heads, and what is dropped at random
        return
    dq, dk, dv = analysis.dims(q), renewed(analysis.dims(k)), renewed(analysis.dims(v))
    sides: list[tuple[Side, Side]] = []
    for at in range(last - 1):  # batch and heads
        sides.append(((dq[at], None, at), (dk[at], None, at)))
        sides.append(((dq[at], None, at), (dv[at], None, at)))
    sides.append(((dq[last], _only(node, q), last), (dk[last], _only(node, k), last)))
    tokens = last - 1
    sides.append(((dk[tokens], _only(node, k), tokens), (dv[tokens], _only(node, v), tokens)))
    analysis.align([pair for pair in sides if pair[0][0] or pair[1][0]], node, CONTRACTED)
    for dims in (dq, dk, dv):
        analysis.checked(dims[:last])
    if isinstance(mask, fx.Node):
        if analysis.is_live(mask):
            analysis.fix(mask, node, "a mask comes in its own order")
        scores = (*dq[:last], dk[tokens])
        shape = analysis.shape(mask)
        for at, size in enumerate(shape):
            if size != 1:
                analysis.pin(scores[len(scores) - len(shape) + at], "a mask comes in its own order")
    if bool(node.kwargs.get("is_causal")) or _is_causal(node):
        for dims in (dq, dk):
            analysis.pin(dims[tokens], "attention is causal")
    out = (*dv[:tokens], dq[tokens], dv[last])
    if node.target is WHOLE:
        analysis.keep(node, out)
        return
    sums: tuple[tuple[Factor, ...], ...] = (*dv[:tokens], dq[tokens])
    analysis.table[node] = [analysis.checked(out), analysis.checked(sums)]


def _only(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """Return an operand that is given once, else None: it cannot be moved for one use only."""
    return operand if sum(argument is operand for argument in node.args) == 1 else None


def _takes_mask(node: fx.Node) -> bool:
    return node.target is WHOLE and len(node.args) > 3


def _drops(node: fx.Node) -> bool:
    at = 4 if node.target is WHOLE else 3
    given = node.args[at] if len(node.args) > at else node.kwargs.get("dropout_p", 0.0)
    return not (isinstance(given, float | int) and given == 0)


def _is_causal(node: fx.Node) -> bool:
    return any(argument is True for argument in node.args[3:])


RULES: dict[object, Rule] = dict.fromkeys(
    (WHOLE, ATEN._scaled_dot_product_flash_attention_for_cpu.default), attention
)

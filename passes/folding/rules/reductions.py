"""Reductions do not see the order of what they reduce; some operators see one dimension only."""

from __future__ import annotations

from typing import Any

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live, unknown
from padst_compiler.passes.folding.factors import Dims, fresh
from padst_compiler.rewrite import ATEN

__all__ = ["RULES"]


def reduction(analysis: Analysis, node: fx.Node) -> None:
    """Reduced dimensions go, the others stay; which, the shapes and arguments say."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if not analysis.is_live(x) or len(node.all_input_nodes) > 1:
        unknown(analysis, node)
        return
    dims = analysis.dims(x)
    place = 2 if node.target is ATEN.linalg_vector_norm.default else 1  # behind the order of a norm
    given = node.args[place] if len(node.args) > place else None
    if given is None or given == []:
        gone = set(range(len(dims)))
    else:
        listed = given if isinstance(given, list | tuple) else [given]
        numbers = [d for d in listed if isinstance(d, int)]
        if len(numbers) != len(listed):
            unknown(analysis, node)
            return
        gone = {d % max(1, len(dims)) for d in numbers}
    kept = len(analysis.shape(node)) == len(dims)
    rest: list[Any] = [
        () if at in gone else factors for at, factors in enumerate(dims) if kept or at not in gone
    ]
    if len(rest) != len(analysis.shape(node)):
        unknown(analysis, node)
        return
    analysis.keep(node, tuple(rest))


def softmax(analysis: Analysis, node: fx.Node) -> None:
    """Every result stands where its operand stood, in any order."""
    x, dim = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    dims = analysis.dims(x)
    at = dim % max(1, len(dims))
    analysis.checked(tuple(f for place, f in enumerate(dims) if place != at))
    analysis.keep(node, dims)


def along(argument: int = 1) -> Rule:
    """Return the rule of an operator that sees the order along its argument's dimensions only."""

    def rule(analysis: Analysis, node: fx.Node) -> None:
        x = node.args[0]
        others = [n for n in node.all_input_nodes if n is not x]
        given: Any = node.args[argument] if len(node.args) > argument else None
        listed = given if isinstance(given, list | tuple) else [given]
        single = isinstance(node.meta.get("val"), type(getattr(x, "meta", {}).get("val")))
        if not analysis.is_live(x) or others or None in listed or not single:
            unknown(analysis, node)
            return
        assert isinstance(x, fx.Node)
        dims, name = analysis.dims(x), str(getattr(node.target, "__name__", node.target))
        if len(dims) != len(analysis.shape(node)):
            unknown(analysis, node)
            return
        seen = {int(d) % len(dims) for d in listed}
        why = f"{name} is not proved to move with a permutation"
        analysis.fix(x, node, why, sorted(seen))
        out: list[Any] = list(dims)
        for at in seen:
            (out[at],) = fresh([analysis.shape(node)[at]])
            analysis.pin(out[at], why)
        settled: Dims = tuple(out)
        analysis.keep(node, settled)

    return rule


RULES: dict[object, Rule] = (
    dict.fromkeys(
        (
            *(ATEN.sum.dim_IntList, ATEN.mean.dim, ATEN.amax.default, ATEN.amin.default),
            *(ATEN.sum.default, ATEN.mean.default, ATEN.logsumexp.default, ATEN.prod.dim_int),
            *(ATEN.linalg_vector_norm.default, ATEN.any.dim, ATEN.all.dim),
            *(ATEN.var.correction, ATEN.std.correction),
        ),
        reduction,
    )
    | dict.fromkeys(
        (ATEN._softmax.default, ATEN._log_softmax.default, ATEN._safe_softmax.default),
        on_live(softmax),
    )
    | {
        ATEN.cumsum.default: along(1),
        ATEN.cumprod.default: along(1),
        ATEN.flip.default: along(1),
        ATEN.roll.default: along(2),
    }
)

"""Operators that write, repeat or pair up regions of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live, unknown
from padst_compiler.passes.folding.factors import Factor, fresh, regroup
from padst_compiler.passes.folding.rules.parts import run_of
from padst_compiler.passes.folding.rules.pointwise import WHY, follow
from padst_compiler.passes.folding.spaces import unify
from padst_compiler.rewrite import ATEN

__all__ = ["RULES"]


def glu(analysis: Analysis, node: fx.Node) -> None:
    """Two halves of a dimension meet element by element: they keep one order."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = analysis.shape(x)
    given = node.args[1] if len(node.args) > 1 else -1
    assert isinstance(given, int)
    dim = given % len(shape)
    size = shape[dim]
    if not isinstance(size, int):
        unknown(analysis, node)
        return
    one = run_of(analysis, x, dim, 0, size // 2)
    two = run_of(analysis, x, dim, size // 2, size)
    if one is None or two is None:
        unknown(analysis, node)
        return
    if one[dim] and not unify(one[dim][0].field.axis, two[dim][0].field.axis):
        unknown(analysis, node)
        return
    analysis.keep(node, one)


def repeat(analysis: Analysis, node: fx.Node) -> None:
    """Copies stand one after the other: which copy is read is a digit of its own, in any order."""
    x, times = node.args
    assert isinstance(x, fx.Node) and isinstance(times, list | tuple)
    if not all(isinstance(n, int) and n > 0 for n in times):
        unknown(analysis, node)
        return
    counts: list[Any] = list(times)
    own = analysis.dims(x)
    padded = ((),) * (len(counts) - len(own)) + own
    pairs = zip(fresh(counts), padded, strict=True)
    analysis.keep(node, tuple((*new, *factors) for new, factors in pairs))


def written(analysis: Analysis, node: fx.Node) -> None:
    """A run or a position of one dimension is written; the other dimensions keep one order."""
    x, source, given = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else 0
    assert isinstance(x, fx.Node) and isinstance(source, fx.Node) and isinstance(given, int)
    shape = analysis.shape(node)
    dim, why = given % len(shape), f"{node.target} writes a part of the axis"
    same_rank = len(analysis.shape(source)) == len(shape)
    kept = [at for at in range(len(shape)) if at != dim]
    place = {at: at if same_rank else at - (at > dim) for at in kept}
    both = analysis.is_live(x) and analysis.is_live(source)
    lead = x if analysis.is_live(x) else source
    if not analysis.is_live(lead):
        unknown(analysis, node)
        return
    out: list[tuple[Factor, ...]] = list(fresh(shape))
    for at in kept:
        out[at] = analysis.dims(lead)[at if lead is x else place[at]] or out[at]
    if both and x is not source:
        theirs = analysis.dims(source)
        found = [(out[at], theirs[place[at]], at) for at in kept if theirs[place[at]]]
        analysis.align([((f, None, at), (g, source, place[at])) for f, g, at in found], node, WHY)
    elif both:
        analysis.fix(x, node, why)
    analysis.pin(out[dim], why)
    analysis.fix(x, node, why, [dim])
    if same_rank:
        analysis.fix(source, node, why, [dim])
    rest = (*out[:dim], (), *out[dim + 1 :])
    if not analysis.is_live(x):
        follow(analysis, node, x, rest)
    if not analysis.is_live(source):
        follow(analysis, node, source, rest if same_rank else tuple(out[at] for at in kept))
    analysis.keep(node, tuple(out))


def pixel_shuffle(analysis: Analysis, node: fx.Node) -> None:
    """Digits of the channels become digits of space."""
    x, factor = node.args
    assert isinstance(x, fx.Node) and isinstance(factor, int)
    dims, shape = analysis.dims(x), analysis.shape(x)
    channels = analysis.shape(node)[-3]
    divided = regroup(dims, (*shape[:-3], channels, factor, factor, *shape[-2:]))
    if divided is None or not isinstance(channels, int):
        unknown(analysis, node)
        return
    *batch, first, down, right, height, width = divided
    analysis.keep(node, (*batch, first, (*height, *down), (*width, *right)))


def channel_shuffle(analysis: Analysis, node: fx.Node) -> None:
    """Two digits of the channels change places."""
    x, groups = node.args
    assert isinstance(x, fx.Node) and isinstance(groups, int)
    shape = analysis.shape(x)
    each = shape[1] // groups if isinstance(shape[1], int) else 0
    divided = regroup(analysis.dims(x), (shape[0], groups, each, *shape[2:])) if each else None
    if divided is None:
        unknown(analysis, node)
        return
    batch, first, second, *rest = divided
    analysis.keep(node, (batch, (*second, *first), *rest))


def read_at(analysis: Analysis, node: fx.Node) -> None:
    """The last dimensions are read at listed positions, as upsampling does; the others pass."""
    x, places = node.args
    assert isinstance(x, fx.Node) and isinstance(places, list | tuple)
    first = sum(place is None for place in places)
    given = [place for place in places[first:] if isinstance(place, fx.Node)]
    rank, shape = len(analysis.shape(x)), analysis.shape(node)
    numbers = all(not n.meta["val"].is_floating_point() for n in given)
    numbers = numbers and all(n.meta["val"].dtype is not torch.bool for n in given)
    if len(given) + first < rank or None in places[first:] or not given or not numbers:
        unknown(analysis, node)
        return
    why = "positions are read in their own order"
    for place in given:
        analysis.fix(place, node, why)
    analysis.fix(x, node, why, range(first, rank))
    taken = fresh(shape[first:])
    for factors in taken:
        analysis.pin(factors, why)
    analysis.keep(node, (*analysis.dims(x)[:first], *taken))


def blank(analysis: Analysis, node: fx.Node) -> None:
    """A tensor of one number is the same in every order."""
    analysis.keep(node, fresh(analysis.shape(node)))


_RULES: dict[object, Rule] = {
    ATEN.channel_shuffle.default: channel_shuffle,
    ATEN.native_channel_shuffle.default: channel_shuffle,
    ATEN.index.Tensor: read_at,
    ATEN._unsafe_index.Tensor: read_at,
    ATEN.new_zeros.default: blank,
    ATEN.new_ones.default: blank,
    ATEN.zeros_like.default: blank,
    ATEN.ones_like.default: blank,
    ATEN.glu.default: glu,
    ATEN.repeat.default: repeat,
    ATEN.pixel_shuffle.default: pixel_shuffle,
}
RULES = {target: on_live(rule) for target, rule in _RULES.items()} | dict.fromkeys(
    (ATEN.slice_scatter.default, ATEN.select_scatter.default), written
)

"""Convolutions, embeddings, norms and pooling: what their weights follow along the channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live, unknown
from padst_compiler.passes.folding.factors import Dims, Field, fresh
from padst_compiler.passes.folding.problem import Endpoint, apart
from padst_compiler.passes.folding.rules.pointwise import follow, reordered
from padst_compiler.passes.folding.spaces import Size, Space, size_of
from padst_compiler.rewrite import ATEN, shape_of

__all__ = ["RULES"]


def layer_norm(analysis: Analysis, node: fx.Node) -> None:
    """Statistics do not see the order; weight and bias follow it."""
    x, shape, weight, bias = node.args[:4]
    assert isinstance(x, fx.Node) and isinstance(shape, list | tuple)
    vectors = [v for v in (weight, bias) if isinstance(v, fx.Node)]
    if not analysis.is_live(x) or any(analysis.is_live(v) for v in vectors):
        unknown(analysis, node)
        return
    dims = analysis.dims(x)
    for vector in vectors:
        follow(analysis, node, vector, dims, "a norm's weight")
    rest = (*dims[: len(dims) - len(shape)], *[()] * len(shape))
    analysis.table[node] = [analysis.checked(dims), analysis.checked(rest), analysis.checked(rest)]


def batch_norm(analysis: Analysis, node: fx.Node) -> None:
    """Frozen statistics and affine numbers follow the order of the channels."""
    x, *vectors = node.args[:5]
    assert isinstance(x, fx.Node)
    given = [v for v in vectors if isinstance(v, fx.Node)]
    training = any(a is True for a in node.args[5:6])
    dims = analysis.dims(x) if analysis.is_live(x) else ()
    if len(dims) < 2 or training or any(analysis.is_live(v) for v in given):
        unknown(analysis, node)
        return
    for vector in given:
        follow(analysis, node, vector, dims[:2], "a norm's weight")
    analysis.table[node] = [analysis.checked(dims)]


def group_norm(analysis: Analysis, node: fx.Node) -> None:
    """Channels may move within their group, and whole groups."""
    x, weight, bias, _, channels, _, groups = node.args[:7]
    assert isinstance(x, fx.Node)
    vectors = [v for v in (weight, bias) if isinstance(v, fx.Node)]
    sized = isinstance(channels, int) and isinstance(groups, int)
    dims = analysis.dims(x) if analysis.is_live(x) else ()
    plain = len(dims) > 1 and len(dims[1]) == 1 and dims[1][0].is_whole
    if not sized or not plain or any(analysis.is_live(v) for v in vectors):
        unknown(analysis, node)
        return
    assert isinstance(channels, int) and isinstance(groups, int)
    allows = apart((groups, channels // groups), (0,), "any")
    axis = dims[1][0].field.axis
    why = "the map mixes the groups of a norm"
    analysis.problem.endpoints.append(Endpoint(axis, why, allows))
    analysis.checked((dims[0],))  # statistics of one sample
    for vector in vectors:
        follow(analysis, node, vector, dims[:2], "a norm's weight")
    analysis.table[node] = [analysis.checked(dims)]


def convolution(analysis: Analysis, node: fx.Node) -> None:
    """Input channels are read, output channels written; depthwise, both are one."""
    x, weight, bias, *_, transposed, _, groups = node.args[:9]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    live = any(analysis.is_live(v) for v in (weight, bias))
    dims = analysis.dims(x) if analysis.is_live(x) else ()
    plain = len(dims) > 2 and len(dims[1]) == 1 and dims[1][0].is_whole
    outputs, inputs = analysis.shape(weight)[:2]
    depthwise = groups != 1 and inputs == 1 and outputs == groups
    depthwise &= not transposed
    if live or not plain or (groups != 1 and (transposed or not depthwise)):
        unknown(analysis, node)
        return
    reads, writes = 1, 0
    if transposed:
        (inputs, outputs), (reads, writes) = (outputs, inputs), (0, 1)
    name = f"{analysis.facts.owner(weight)} (convolution)"
    space = list(range(2, len(dims)))
    analysis.fix(x, node, "a convolution reads neighbours", space)
    channels = dims[1]
    if depthwise:
        edit = reordered(node, weight, 0)
    else:
        edit = reordered(node, weight, reads)
        analysis.free(channels[0].field.axis, "", edit, f"columns of {name}")
        field = Field((Space(outputs),), (outputs,))
        channels, edit = (field.whole,), reordered(node, weight, writes)
    if analysis.shape(node)[1] == 1:
        channels = ()
    else:
        analysis.free(channels[0].field.axis, "", edit, f"rows of {name}")
        if isinstance(bias, fx.Node):
            analysis.free(channels[0].field.axis, "", reordered(node, bias, 0))
    analysis.keep(node, (dims[0], channels, *_pinned(analysis, node, space)))


def embedding(analysis: Analysis, node: fx.Node) -> None:
    """Rows of a constant table are written in any order of their features."""
    table, index = node.args[:2]
    assert isinstance(table, fx.Node) and isinstance(index, fx.Node)
    if analysis.is_live(table):
        unknown(analysis, node)
        return
    shape = analysis.shape(node)
    rest = (
        analysis.dims(index) if analysis.is_live(index) else _constant(analysis, node, shape[:-1])
    )
    if shape[-1] == 1:
        analysis.keep(node, (*rest, ()))
        return
    field = Field((Space(shape[-1]),), (shape[-1],))
    name = analysis.facts.owner(table)
    analysis.free(field.axis, "", reordered(node, table, 1), f"columns of {name} (embedding)")
    analysis.keep(node, (*rest, (field.whole,)))


def pooling(analysis: Analysis, node: fx.Node) -> None:
    """Batch and channels pass; space is pooled."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dims = analysis.dims(x)
    space = [len(dims) - 2, len(dims) - 1]
    if len(dims) < 3:
        unknown(analysis, node)
        return
    analysis.fix(x, node, "pooling reads neighbours", space)
    first = node if shape_of(node) is not None else None
    if first is not None:
        analysis.keep(node, (*dims[:-2], *_pinned(analysis, node, space)))
        return
    # Results and positions, of one shape.
    values = node.meta["val"]
    results: list[Dims | None] = []
    for value in values:
        sizes = [size_of(n) for n in value.shape[-2:]]
        pooled = fresh(sizes)
        for factors in pooled:
            analysis.pin(factors, "pooling reads neighbours")
        results.append(analysis.checked((*dims[:-2], *pooled)))
    analysis.table[node] = results


def _pinned(analysis: Analysis, node: fx.Node, space: Sequence[int]) -> Dims:
    made = fresh([analysis.shape(node)[at] for at in space])
    for factors in made:
        analysis.pin(factors, "it lies along space")
    return made


def _constant(analysis: Analysis, node: fx.Node, shape: Sequence[Size]) -> Dims:
    del node
    made = fresh(shape)
    for factors in made:
        analysis.pin(factors, "an index comes in its own order")
    return made


RULES: dict[object, Rule] = {
    ATEN.native_layer_norm.default: layer_norm,
    ATEN._native_batch_norm_legit_no_training.default: batch_norm,
    ATEN.native_batch_norm.default: batch_norm,
    ATEN.native_group_norm.default: group_norm,
    ATEN.convolution.default: convolution,
    ATEN.embedding.default: embedding,
} | dict.fromkeys(
    (
        ATEN.max_pool2d_with_indices.default,
        ATEN.avg_pool2d.default,
        ATEN._adaptive_avg_pool2d.default,
        ATEN.adaptive_max_pool2d.default,
        ATEN.upsample_nearest2d.default,
        ATEN.upsample_nearest2d.vec,
        ATEN.upsample_bilinear2d.default,
        ATEN.upsample_bilinear2d.vec,
    ),
    on_live(pooling),
)

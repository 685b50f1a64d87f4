"""Element kernels in Triton: fan-in, N:M and diagonals for few tokens, every weight read once.

A program holds a tile of tokens, outputs and terms; a term is a weight times the one number of
``x`` that it reads. What costs is to read the weights: no matrix unit helps where no two outputs
read the same inputs, so for many tokens a dense product is faster. Sums are fp32.

===========  =======================================================================================
linear       outputs and the terms of each; fan-in is N:M of one group as wide as the layer. Of
             diagonals steps are left out in which none meets the tile: sorted, they lie together
dx           fan-in, N:M: the weights of every column, listed by ``by_column``; of diagonals linear
dw           a tile of weights over tokens: ``SPLIT`` parts of them are summed apart and then
             together, in one order, so that results repeat
===========  =======================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import indent
from typing import Any

import torch
from torch import Tensor

from padst_compiler.kernels.triton_block import by_column, power, weights
from padst_compiler.triton_text import Kernel, Launch, mapped

__all__ = ["DW", "DX", "LINEAR"]

PROGRAMS = 512  # of a launch, at least: a few for each of 132 multiprocessors
THREADS = 128  # of a program


# -- sums: y[t, n] = sum over j of w(n, j) * x[t, feature(n, j)] -----------------------------------

BEGIN = """
    M, INPUTS = {{size("X", 0)}}, {{size("X", 1)}}
    tile, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    rm = tile.to(INDEX_DTYPE) * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = part * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (rm < M)[:, None, None]
    row = X + rm[:, None, None] * INPUTS
    n = rn[{{"None, :, None" if AXIS == 2 else "None, None, :"}}]
"""
LOOP = """
    shape: tl.constexpr = (BLOCK_M, {{"BLOCK_N, BLOCK_J" if AXIS == 2 else "BLOCK_J, BLOCK_N"}})
    parts = tl.zeros(shape, tl.float32)
    for start in range(0, terms, BLOCK_J):
        j = (start + tl.arange(0, BLOCK_J))[{{"None, None, :" if AXIS == 2 else "None, :, None"}}]
"""
TERM = """
{%- if BLOCK_M > 1 %}
        place = tl.max_contiguous(place, (1, 1, 1))  # as x lies: else x goes through shared memory
{%- endif %}
        w = tl.load(W + place, mask=live, other=0.0)
{%- if IN_MAP %}
        feature = tl.load(FROM + feature, mask=live, other=0)
{%- endif %}
        x = tl.load(row + feature, mask=token & live, other=0.0)
        parts += w.to(tl.float32) * x.to(tl.float32)
"""
STORE = """
    acc = tl.sum(parts, AXIS)
    column = rn
{%- if OUT_MAP %}
    column = tl.load(INTO + rn, mask=rn < WIDE, other=0)
{%- endif %}
    idx_m = rm[:, None]
    idx_n = column[None, :]
    live = (rm < M)[:, None] & (rn < WIDE)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "live", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""

GATHERED = Kernel(
    "padst_gathered",
    ("X", "W", "INDICES"),
    f"""{BEGIN}
    terms = KEPT
{LOOP}
        live = (n < WIDE) & (j < KEPT)
        place = n * KEPT + j
        feature = tl.load(INDICES + place, mask=live, other=0).to(tl.int32)
{{%- if GROUPS > 1 %}}
        feature += j // (KEPT // GROUPS) * GROUP
{{%- endif %}}
{TERM}{STORE}""",
)
LISTED = Kernel(
    "padst_listed",
    ("X", "W", "ORDER", "STARTS"),
    f"""{BEGIN}
    first = tl.load(STARTS + n, mask=n < WIDE, other=0)
    last = tl.load(STARTS + n + 1, mask=n < WIDE, other=0)
    terms = tl.max(last - first)
{LOOP}
        live = first + j < last
        place = tl.load(ORDER + first + j, mask=live, other=0)
        feature = place // KEPT
{TERM}{STORE}""",
)
DIAGONAL = Kernel(
    "padst_diagonal",
    ("X", "W", "INDICES"),
    f"""{BEGIN}
    terms = KEPT
{LOOP}
        live = (n < WIDE) & (j < KEPT)
        offset = tl.load(INDICES + j, mask=j < KEPT, other=0)
{{%- if WRAPS %}}
        if True:  # every diagonal meets every output
            feature = n + offset
            feature = tl.where(feature < AROUND, feature, feature - AROUND)
            place = j * ALONG + n
{{%- else %}}
        first = part * BLOCK_N - offset
        first = tl.where(first < 0, first + AROUND, first)
        meets = ((first < ALONG) | (first > AROUND - BLOCK_N)) & (j < KEPT)
        if tl.max(meets.to(tl.int32)) > 0:
            feature = n - offset
            feature = tl.where(feature < 0, feature + AROUND, feature)
            live = live & (feature < ALONG)
            place = j * ALONG + feature
{{%- endif %}}
{indent(TERM, "    ")}{STORE}""",
)

# -- gradients: dw(a, b) = sum over t of g[t, output(a, b)] * x[t, feature(a, b)], as w is stored --

TILE = """
    M, INPUTS, OUTPUTS = {{size("X", 0)}}, {{size("X", 1)}}, {{size("G", 1)}}
    split, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    ra = (part // PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    rb = (part % PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = tl.minimum(ra, ROWS - 1)[None, :, None]
    b = tl.minimum(rb, WIDE - 1)[None, None, :]
"""
OVER_TOKENS = """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    span = tl.cdiv(tl.cdiv(M, SPLIT), BLOCK_T) * BLOCK_T
    for start in range(split * span, tl.minimum(M, split * span + span), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(INDEX_DTYPE)[:, None, None]
        g = tl.load(G + t * OUTPUTS + output, mask=t < M, other=0.0)
        x = tl.load(X + t * INPUTS + feature, mask=t < M, other=0.0)
        acc += tl.sum(g.to(tl.float32) * x.to(tl.float32), 0)
    idx_m = (split * ROWS + ra)[:, None]
    idx_n = rb[None, :]
    live = (ra < ROWS)[:, None] & (rb < WIDE)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "live", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""

GATHERED_DW = Kernel(
    "padst_gathered_dw",
    ("X", "G", "INDICES"),
    f"""{TILE}
    output, feature = a, tl.load(INDICES + a * WIDE + b)
{{%- if GROUPS > 1 %}}
    feature += b // (WIDE // GROUPS) * GROUP
{{%- endif %}}
{OVER_TOKENS}""",
)
DIAGONAL_DW = Kernel(
    "padst_diagonal_dw",
    ("X", "G", "INDICES"),
    f"""{TILE}
    around = b + tl.load(INDICES + a)
    around = tl.where(around < AROUND, around, around - AROUND)
    output, feature = {{{{"b, around" if WRAPS else "around, b"}}}}
{OVER_TOKENS}""",
)


# -- programs --------------------------------------------------------------------------------------


def sums(outputs: int, terms: int, tokens: int, more: Mapping[str, Any], side: int = 1) -> Launch:
    """Return the programs of a sum; ``side`` outputs or more of a tile lie side by side.

    Where it is 1 the terms do. Sizes are of one token; ``more`` are constants.
    """
    m = min(16, power(tokens))
    room = THREADS * min(16, 32 // m)  # weights of a tile: a thread keeps at most 32 sums
    n = min(room // (32 if side == 1 else 8), max(side, power(outputs // PROGRAMS + 1) // 2))
    most = 32 if m > 1 else 128 if side == 1 else 64  # not 128 offsets: addresses would move lanes
    j = min(room // n, most, power(terms))
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_J": j, "TILES": -(-outputs // n), "WIDE": outputs}
    return Launch({**sizes, "AXIS": 2 if side == 1 else 1, **more}, tiles=sizes["TILES"])


@functools.lru_cache(maxsize=4096)
def gathered_sums(values: Sequence[int], inputs: int, tokens: int) -> Launch:
    """Return the programs of ``GATHERED``, for values ``(o, k)`` or ``(o, i/m, n)``."""
    kept = math.prod(values[1:])
    return sums(values[0], kept, tokens, {"KEPT": kept, **groups(values, inputs)})


@functools.lru_cache(maxsize=4096)
def listed_sums(values: Sequence[int], inputs: int, tokens: int) -> Launch:
    """Return the programs of ``LISTED``, for values ``(o, k)`` or ``(o, i/m, n)``."""
    kept = math.prod(values[1:])
    return sums(inputs, values[0] * kept // inputs, tokens, {"KEPT": kept})


@functools.lru_cache(maxsize=4096)
def diagonal_sums(
    values: Sequence[int], inputs: int, outputs: int, tokens: int, *, dx: bool = False
) -> Launch:
    """Return the programs of ``DIAGONAL``: ``inputs`` are what it reads, of ``dx`` the gradient.

    Diagonals wrap around the larger side; around the rows where the weight is square.
    """
    wraps = outputs < inputs or (dx and outputs == inputs)
    sizes = {"KEPT": values[1], "ALONG": values[2], "AROUND": max(inputs, outputs), "WRAPS": wraps}
    return sums(outputs, values[1], tokens, sizes, side=16)


def gradients(rows: int, wide: int, tokens: int, more: Mapping[str, Any]) -> Launch:
    """Return the programs of a gradient: tokens are split until there are enough programs."""
    t = min(8, power(tokens))
    n = min(128, power(wide))
    m = min(4 * THREADS // n, power(rows))
    parts = -(-wide // n)
    programs = -(-rows // m) * parts
    split = max(1, min(PROGRAMS // programs, -(-tokens // (4 * t))))
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_T": t, "ROWS": rows, "WIDE": wide}
    sizes |= {"TILES": programs, "PARTS": parts, "SPLIT": split}
    return Launch({**sizes, **more}, programs=programs * split)


@functools.lru_cache(maxsize=4096)
def gathered_gradient(values: Sequence[int], inputs: int, tokens: int) -> Launch:
    """Return the programs of ``GATHERED_DW``, for values ``(o, k)`` or ``(o, i/m, n)``."""
    return gradients(values[0], math.prod(values[1:]), tokens, groups(values, inputs))


@functools.lru_cache(maxsize=4096)
def diagonal_gradient(values: Sequence[int], inputs: int, outputs: int, tokens: int) -> Launch:
    """Return the programs of ``DIAGONAL_DW``, for values ``(1, K, n)``."""
    sides = {"AROUND": max(inputs, outputs), "WRAPS": outputs < inputs}
    return gradients(values[1], values[2], tokens, sides)


def groups(values: Sequence[int], inputs: int) -> dict[str, int]:
    """Return how many groups of inputs an output has, and how many inputs each: fan-in has one."""
    many = math.prod(values[1:-1])
    return {"GROUPS": many, "GROUP": inputs // many}


# -- launches --------------------------------------------------------------------------------------


def gathered_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``x[..., in_map] S^T + bias``; feature n of the product is stored at ``into[n]``."""
    flat = x.reshape(-1, x.shape[-1])
    how = gathered_sums(values.shape, read(x, in_map), flat.shape[0])
    given = {"X": flat, "W": values, "INDICES": indices}
    y = mapped(GATHERED, given, out_features, how, in_map, into, bias)
    return y.view(*x.shape[:-1], out_features)


def gathered_dx(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    in_features: int,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``grad[..., in_map] S``; feature n of the product is stored at ``into[n]``."""
    flat = grad.reshape(-1, grad.shape[-1])
    how = listed_sums(values.shape, in_features, flat.shape[0])
    order, starts = by_column(columns(indices, in_features), in_features)
    given = {"X": flat, "W": values, "ORDER": order, "STARTS": starts}
    y = mapped(LISTED, given, in_features, how, in_map, into)
    return y.view(*grad.shape[:-1], in_features)


def gathered_dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept weights."""
    how = gathered_gradient(indices.shape, x.shape[-1], x[..., 0].numel())
    sizes = (indices.shape[0], math.prod(indices.shape[1:]))
    return weights(GATHERED_DW, grad, x, indices, how, sizes).view(*indices.shape, *unit)


def diagonal_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``x[..., in_map] S^T + bias``; feature n of the product is stored at ``into[n]``."""
    flat, inputs = x.reshape(-1, x.shape[-1]), read(x, in_map)
    how = diagonal_sums(values.shape, inputs, out_features, flat.shape[0])
    given = {"X": flat, "W": values, "INDICES": indices}
    y = mapped(DIAGONAL, given, out_features, how, in_map, into, bias)
    return y.view(*x.shape[:-1], out_features)


def diagonal_dx(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    in_features: int,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``grad[..., in_map] S``; feature n of the product is stored at ``into[n]``."""
    flat, outputs = grad.reshape(-1, grad.shape[-1]), read(grad, in_map)
    how = diagonal_sums(values.shape, outputs, in_features, flat.shape[0], dx=True)
    given = {"X": flat, "W": values, "INDICES": indices}
    y = mapped(DIAGONAL, given, in_features, how, in_map, into)
    return y.view(*grad.shape[:-1], in_features)


def diagonal_dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept diagonals."""
    sizes = (*indices.shape, *unit)
    how = diagonal_gradient(sizes, x.shape[-1], grad.shape[-1], x[..., 0].numel())
    return weights(DIAGONAL_DW, grad, x, indices, how, sizes[1:]).view(sizes)


def columns(indices: Tensor, in_features: int) -> Tensor:
    """Return the column of every weight of fan-in or N:M."""
    if indices.dim() == 2:
        return indices
    first = torch.arange(0, in_features, in_features // indices.shape[1], device=indices.device)
    return indices + first[:, None].to(indices.dtype)


def read(x: Tensor, in_map: Tensor | None) -> int:
    """Return how many features a product reads."""
    return x.shape[-1] if in_map is None else in_map.shape[0]


Runs = dict[str, Callable[..., Tensor]]
LINEAR: Runs = {"fan_in": gathered_linear, "nm": gathered_linear, "diagonal": diagonal_linear}
DX: Runs = {"fan_in": gathered_dx, "nm": gathered_dx, "diagonal": diagonal_dx}
DW: Runs = {"fan_in": gathered_dw, "nm": gathered_dw, "diagonal": diagonal_dw}

"""Block kernels in Triton: every program does one dense product over the kept blocks of its tile.

A row of blocks keeps as many blocks as any other, so the columns that it reads, side by side, are
one dense operand of ``kept * c``, read where they lie: nothing is gathered, no program has more to
do than another. The same text is Inductor's template and an eager launch (``triton_text.py``).

========  ==========================================================================================
linear    a tile of tokens and a row of blocks: ``(tokens, kept * c) @ (kept * c, r)``
dx        a tile of tokens and a block column: the blocks of the column, listed by ``by_column``
dw        the kept columns of a row of blocks and its outputs, over tokens: ``SPLIT`` parts of them
          are summed apart and then together, in one order, so that results repeat
========  ==========================================================================================

Sums are fp32. ``ALIGNED`` inputs lie side by side in a block and in a tile, which the hints say.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from padst_compiler.triton_text import Kernel, Launch, launch, mapped

__all__ = [
    "DW",
    "DX",
    "LINEAR",
    "STORE",
    "TILE",
    "Sizes",
    "by_column",
    "dw",
    "dx",
    "gradient",
    "linear",
    "power",
    "sizes_of",
    "sums",
    "variants",
    "weights",
]

Sizes = tuple[int, int, int, int]
"""Of the weights of blocks: ``(o/r, k, c, r)``."""

PROGRAMS = 512  # of a gradient, at least: a few for each of 132 multiprocessors
FEW = 32  # rows of a tile that are bound by reading weights
READING = 264  # programs that read weights, at least: two for each multiprocessor
AHEAD = (3, 5)  # stages: one step ahead, and two

TILE = """
    M = {{size("X", 0)}}
    tile, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    group = part // PARTS
    rm = tile.to(INDEX_DTYPE) * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = (part % PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    idx_m = rm[:, None]
    token = idx_m < M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
"""
STORE = """
    column = group * WIDE + rn
{%- if OUT_MAP %}
    column = tl.load(INTO + column, mask=rn < WIDE, other=0)
{%- endif %}
    idx_n = column[None, :]
    live = token & (rn < WIDE)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "live", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""
READ = """
        feature = tl.max_contiguous(tl.multiple_of(feature, ALIGNED), ALIGNED)
{%- if IN_MAP %}
        feature = tl.load(FROM + feature, mask=inside, other=0)
{%- endif %}
        idx_k = feature[None, :]
        there = token & inside[None, :]
        {{load_input("X", "a", ("idx_m", "idx_k"), mask="there", indent_width=8, index_shape=("BLOCK_M", "BLOCK_K"))}}
"""  # noqa: E501 - one of the hooks

LINEAR = Kernel(
    "padst_block",
    ("X", "W", "INDICES"),
    f"""{TILE}
    for start in range(0, KEPT * C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < KEPT * C
        feature = tl.load(INDICES + group * KEPT + k // C, mask=inside, other=0) * C + k % C
{READ}
        place = (group * KEPT * C + k)[:, None] * WIDE + rn[None, :]
        b = tl.load(W + place, mask=inside[:, None] & (rn < WIDE)[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
{STORE}""",
)
DX = Kernel(
    "padst_block_dx",
    ("X", "W", "ORDER", "STARTS"),
    f"""{TILE}
    last = tl.load(STARTS + group + 1) * C
    for start in range(tl.load(STARTS + group) * C, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < last
        block = tl.load(ORDER + k // C, mask=inside, other=0)
        feature = block // KEPT * C + k % C
{READ}
        place = (block * WIDE * C + k % C)[:, None] + rn[None, :] * C
        b = tl.load(W + place, mask=inside[:, None] & (rn < WIDE)[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
{STORE}""",
)
DW = Kernel(
    "padst_block_dw",
    ("X", "G", "INDICES"),
    """
    M = {{size("X", 0)}}
    split, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    group, part = part // (PARTS * CHUNKS), part % (PARTS * CHUNKS)
    k = (part // PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = (part % PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = k < KEPT * C
    feature = tl.load(INDICES + group * KEPT + k // C, mask=inside, other=0) * C + k % C
    feature = tl.max_contiguous(tl.multiple_of(feature, ALIGNED), ALIGNED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    span = tl.cdiv(tl.cdiv(M, SPLIT), BLOCK_K) * BLOCK_K
    for start in range(split * span, tl.minimum(M, split * span + span), BLOCK_K):
        t = (start + tl.arange(0, BLOCK_K)).to(INDEX_DTYPE)
        token = (t < M)[:, None]
        at = t[:, None] * INPUTS + feature[None, :]
        a = tl.load(X + at, mask=token & inside[None, :], other=0.0)
        at = t[:, None] * OUTPUTS + (group * WIDE + rn)[None, :]
        b = tl.load(G + at, mask=token & (rn < WIDE)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a).to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    idx_m = ((split * GROUPS + group) * KEPT * C + k)[:, None]
    idx_n = rn[None, :]
    live = inside[:, None] & (rn < WIDE)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "live", val_shape=("BLOCK_M", "BLOCK_N"))}}
""",
)


# -- programs --------------------------------------------------------------------------------------


def sizes_of(values: Tensor) -> Sizes:
    """Return the sizes of weights."""
    rows, kept, c, r = values.shape
    return rows, kept, c, r


def power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (max(1, number) - 1).bit_length()


def tiles(groups: int, wide: int, inner: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the tiles of products ``(rows, inner) @ (inner, wide)``, one for each group.

    Hopper's matrix units want 64 rows for 4 warps; fewer rows take the least that a product may
    have, 16, and are bound by reading weights.
    """
    n = min(128, max(16, power(wide)))
    m = min(128 if n <= 64 else 64, max(16, power(rows)))
    k = min(64 if dtype.itemsize == 2 else 32, max(16, power(inner)))
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PARTS": -(-wide // n), "WIDE": wide}
    return {**sizes, "TILES": groups * sizes["PARTS"]}


def narrowed(values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Return what changes where a tile has ``n`` outputs.

    Example:
        >>> narrowed({"WIDE": 64, "PARTS": 1, "TILES": 172}, 16)
        {'BLOCK_N': 16, 'PARTS': 4, 'TILES': 688}
    """
    groups, parts = values["TILES"] // values["PARTS"], -(-values["WIDE"] // n)
    return {"BLOCK_N": n, "PARTS": parts, "TILES": groups * parts}


@functools.lru_cache(maxsize=4096)
def sums(
    values: Sizes,
    groups: int,
    inner: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    gathered: bool = False,
) -> Launch:
    """Return the programs of ``LINEAR`` and ``DX``.

    Args:
        values: the sizes of the weights, ``(o/r, k, c, r)``.
        groups: tiles of the output that blocks write: rows of blocks, or block columns.
        inner: the side of a block that is summed.
        tokens: about how many.
        dtype: of the inputs.
        gathered: whether inputs are read through a map, each at an address of its own.
    """
    _, kept, c, r = values
    wide = c * r // inner
    shared = tiles(groups, wide, kept * inner, tokens, dtype)
    if shared["BLOCK_M"] <= FEW:
        shared["BLOCK_K"] = min(256 // dtype.itemsize, max(16, power(kept * inner)))
        while shared["TILES"] < READING and shared["BLOCK_N"] > 16:
            shared |= narrowed(shared, shared["BLOCK_N"] // 2)
    if gathered and dtype is torch.float32:  # more addresses than registers, on sm_80
        shared["BLOCK_K"] = 16
    aligned = min(inner & -inner, shared["BLOCK_K"])
    shared |= {"KEPT": kept, "C": inner, "ALIGNED": aligned, "IN_MAP": gathered}
    # Loads wait for the places of blocks, so that two stages are one step ahead.
    long = not gathered and kept * inner >= 4 * shared["BLOCK_K"]
    stages = AHEAD[1] if long else AHEAD[0]
    return Launch(shared, tiles=shared["TILES"], warps=warps(shared), stages=stages)


@functools.lru_cache(maxsize=4096)
def gradient(values: Sizes, tokens: int, inputs: int, dtype: torch.dtype) -> Launch:
    """Return the programs of ``DW``: tokens are split until there are enough programs."""
    groups, kept, c, r = values
    shared = tiles(groups, r, tokens, kept * c, dtype)
    if dtype is torch.float32:  # more spill, on sm_80
        shared["BLOCK_M"] = min(64, shared["BLOCK_M"])
    chunks = -(-kept * c // shared["BLOCK_M"])
    programs = shared["TILES"] * chunks
    split = max(1, min(PROGRAMS // programs, -(-tokens // (4 * shared["BLOCK_K"]))))
    sizes = {
        "KEPT": kept,
        "C": c,
        "ALIGNED": min(c & -c, shared["BLOCK_M"]),
        "CHUNKS": chunks,
        "GROUPS": groups,
    }
    sizes |= {"SPLIT": split, "TILES": programs, "INPUTS": inputs, "OUTPUTS": groups * r}
    return Launch(shared | sizes, programs=programs * split)


def warps(values: Mapping[str, Any]) -> int:
    """Return the warps of a program: 4 spill where a tile has 4096 sums and reads through maps.

    So they do where it has 8192 addresses, on sm_100.
    """
    m, n, k = values["BLOCK_M"], values["BLOCK_N"], values["BLOCK_K"]
    return 8 if m * n >= 4096 or (values["IN_MAP"] and m * k >= 8192) else 4


def variants(how: Launch, dtype: torch.dtype) -> list[Launch]:
    """Return the programs, and what Inductor times against them where it tunes.

    Taller tiles spill: of fp32, and where they read through maps, as more stages there do. With
    fewer than 64 rows 16-bit products would not run on the matrix units of Hopper and Blackwell.
    """
    m, n, k = (int(how.values[f"BLOCK_{axis}"]) for axis in "MNK")
    half = dtype.itemsize == 2
    least, most = (64, 128 if how.values["IN_MAP"] else 256) if half else (32, 128)
    rows = [r for r in (32, 64, 128, 256) if least <= r <= most] if m >= 64 else [m]
    steps = [32, 64] if half and k >= 32 else [k]
    widths = [n]
    if m <= FEW:
        steps = [k // 2, k] if k >= 64 else [k]
        widths = [w for w in (16, 32, 64) if w <= max(n, power(how.values["WIDE"]))]
    tried = [how]
    for m, n, k in itertools.product(rows, widths, steps):
        aligned = min(int(how.values["C"]) & -int(how.values["C"]), k)
        values = {**how.values, "BLOCK_M": m, "BLOCK_K": k, "ALIGNED": aligned}
        values |= narrowed(values, n)
        told = replace(how, values=values, tiles=values["TILES"], warps=warps(values))
        tried += [replace(told, stages=s) for s in ((3, 4) if values["IN_MAP"] else AHEAD)]
    return [one for at, one in enumerate(tried) if one not in tried[:at]]


def by_column(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the places of blocks by block column, and where each column begins among them.

    Nothing waits for the GPU: sizes are those of ``indices`` whatever is in it.

    Example:
        >>> order, starts = by_column(torch.tensor([[0, 2], [2, 3]]), 4)
        >>> order.tolist(), starts.tolist()
        ([0, 1, 2, 3], [0, 1, 1, 3, 4])
    """
    ordered, order = torch.sort(indices.flatten(), stable=True)
    edges = torch.arange(columns + 1, dtype=ordered.dtype, device=ordered.device)
    return order.int(), torch.searchsorted(ordered, edges, out_int32=True)


# -- launches --------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``x[..., in_map] S^T + bias``; feature n of the product is stored at ``into[n]``."""
    flat, (rows, _, c, _) = x.reshape(-1, x.shape[-1]), values.shape
    about = flat.shape[0], x.dtype
    how = sums(sizes_of(values), rows, c, *about, gathered=in_map is not None)
    given = {"X": flat, "W": values, "INDICES": indices}
    y = mapped(LINEAR, given, out_features, how, in_map, into, bias)
    return y.view(*x.shape[:-1], out_features)


def dx(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    in_features: int,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``grad[..., in_map] S``; feature n of the product is stored at ``into[n]``."""
    flat, (_, _, c, r) = grad.reshape(-1, grad.shape[-1]), values.shape
    about = flat.shape[0], grad.dtype
    how = sums(sizes_of(values), in_features // c, r, *about, gathered=in_map is not None)
    order, starts = by_column(indices, in_features // c)
    given = {"X": flat, "W": values, "ORDER": order, "STARTS": starts}
    result = mapped(DX, given, in_features, how, in_map, into)
    return result.view(*grad.shape[:-1], in_features)


def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept blocks."""
    sizes = (*indices.shape, *unit)
    how = gradient(sizes, x[..., 0].numel(), x.shape[-1], x.dtype)
    return weights(DW, grad, x, indices, how, sizes)


def weights(
    kernel: Kernel, grad: Tensor, x: Tensor, indices: Tensor, how: Launch, sizes: Sequence[int]
) -> Tensor:
    """Return a gradient of weights of these sizes; its parts are added in one order."""
    flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    split, rows = how.values["SPLIT"], math.prod(sizes[:-1])
    dtype = torch.float32 if split > 1 else x.dtype
    given = {"X": flat, "G": g, "INDICES": indices}
    parts = launch(kernel, given, (split * rows, sizes[-1]), how, dtype=dtype)
    return parts.view(split, *sizes).sum(0).to(x.dtype) if split > 1 else parts.view(*sizes)

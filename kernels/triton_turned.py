"""Fan-in for a few tokens in Triton: ``x`` is turned, a feature's tokens lie together.

A weight then brings in the numbers of all tokens by one wide load, where ``triton_sums.py``, which
reads ``x`` as it lies, asks for each of them by itself. What the next step needs of a weight is
asked for before a step is computed, for it comes from memory and ``x`` from the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.gpu_cost import APART, seconds, turned_seconds
from padst_compiler.kernels.triton_block import power
from padst_compiler.kernels.triton_sums import gathered_linear, read
from padst_compiler.triton_text import Kernel, Launch, launch

__all__ = ["GATHERED", "fan_in_linear", "gathered", "linear", "pays", "turned"]

MOST = 32  # tokens of a tile: 64 bytes of a feature
PRODUCTS = 8192  # of a step of a program: 64 a thread
TOKENS = 256  # at most

GATHERED = Kernel(
    "padst_gathered_turned",
    ("XT", "W", "INDICES"),
    """
    M = {{size(None, 0)}}
    tile, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = part * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.max_contiguous(tl.multiple_of(rm, BLOCK_M), BLOCK_M)[None, None, :]
    n, j = rn[:, None], tl.arange(0, BLOCK_J)[None, :]
    live = (n < WIDE) & (j < KEPT)
    place = n * KEPT + j
    w = tl.load(W + place, mask=live, other=0.0)
    feature = tl.load(INDICES + place, mask=live, other=0)
    parts = tl.zeros((BLOCK_N, BLOCK_J, BLOCK_M), tl.float32)
    for start in range(0, KEPT, BLOCK_J):
        soon = (n < WIDE) & (start + BLOCK_J + j < KEPT)
        next_w = tl.load(W + place + start + BLOCK_J, mask=soon, other=0.0)
        next_feature = tl.load(INDICES + place + start + BLOCK_J, mask=soon, other=0)
        at = feature.to(tl.int32) * ROWS
        x = tl.load(XT + at[:, :, None] + token, mask=live[:, :, None], other=0.0)
        parts += w.to(tl.float32)[:, :, None] * x.to(tl.float32)
        w, feature, live = next_w, next_feature, soon
    acc = tl.trans(tl.sum(parts, 1))
    column = rn
{%- if OUT_MAP %}
    column = tl.load(INTO + rn, mask=rn < WIDE, other=0)
{%- endif %}
    idx_m = rm[:, None]
    idx_n = column[None, :]
    live = (idx_m < M) & (rn < WIDE)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "live", val_shape=("BLOCK_M", "BLOCK_N"))}}
""",
)


# -- programs --------------------------------------------------------------------------------------


def pays(
    values: Sequence[int], inputs: int, tokens: int, dtype: torch.dtype, index: int = 4
) -> bool:
    """Whether this is predicted to be faster than sums, with the copy that turns ``x``.

    Args:
        values: sizes, ``(o, k)``.
        inputs: of the layer.
        tokens: about how many.
        dtype: of the inputs.
        index: bytes of a place.

    Example:
        >>> [pays((11008, 410), 4096, tokens, torch.bfloat16) for tokens in (1, 8, 32, 6304)]
        [False, True, True, False]
    """
    if len(values) != 2 or not 2 <= tokens <= TOKENS:
        return False
    nnz = math.prod(values)
    moved = nnz * (dtype.itemsize + index) + tokens * (inputs + values[0]) * dtype.itemsize
    return turned_seconds(inputs, nnz, tokens, dtype, moved) < seconds(
        2.0 * tokens * nnz, APART, moved
    )


@functools.lru_cache(maxsize=4096)
def gathered(values: Sequence[int], tokens: int) -> Launch:
    """Return the programs of ``GATHERED``, for values ``(o, k)``; ``ROWS`` are the tokens of XT."""
    outputs, kept = values
    m = min(MOST, max(2, power(tokens)))
    j = min(PRODUCTS // m // 16, 32, power(kept))
    n = min(PRODUCTS // m // j, max(16, power(outputs)))
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_J": j, "TILES": -(-outputs // n), "WIDE": outputs}
    return Launch(
        {**sizes, "ROWS": -(-tokens // m) * m, "KEPT": kept},
        tiles=sizes["TILES"],
    )


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
    flat = x.reshape(-1, x.shape[-1])
    how = gathered(values.shape, flat.shape[0])
    given = {"XT": turned(flat, how.values["ROWS"], in_map), "W": values, "INDICES": indices}
    kernel = GATHERED
    if into is not None:
        kernel, given = kernel.reading("INTO"), {**given, "INTO": into}
    how = replace(how, values={**how.values, "OUT_MAP": into is not None})
    y = launch(kernel, given, (flat.shape[0], out_features), how, bias=bias)
    return y.view(*x.shape[:-1], out_features)


def turned(x: Tensor, rows: int, in_map: Tensor | None = None) -> Tensor:
    """Return ``x (T, i)`` as ``(i, rows)``, features taken through a map, 0 for no token."""
    taken = x if in_map is None else x.index_select(1, in_map)
    return F.pad(taken, (0, 0, 0, rows - x.shape[0])).t().contiguous()


def fan_in_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    *maps: Tensor | None,
) -> Tensor:
    """Return what ``linear`` does, by it or by sums; ``maps`` are its last two arguments."""
    about = values.shape, read(x, maps[0] if maps else None), math.prod(x.shape[:-1]), x.dtype
    how = linear if pays(*about, indices.element_size()) else gathered_linear
    return how(x, values, indices, bias, out_features, *maps)

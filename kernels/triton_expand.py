"""N:M for tens of tokens in Triton: few bytes are loaded, a dense tile is multiplied.

A tile of a weight is read as it is stored, a few numbers and places for every group, and is laid
out in registers, a group in the next power of two; matrix units multiply it. So weights cost what
they take in memory, while products cost what dense ones do: between one token, for which
``triton_sums.py`` is cheaper, and the many for which a dense product is no longer bound by reading
its weight (load as sparse, compute as dense: Flash-LLM, arXiv 2309.10285).

A thread owns whole groups, so nothing moves between threads: every cell of a group is chosen by
itself, and the cells are joined in order. Numbers are of 16 bits, and chosen in pairs, as words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from padst_compiler.gpu_cost import APART, expanded_seconds, seconds
from padst_compiler.kernels.triton_block import power
from padst_compiler.kernels.triton_sums import gathered_linear, read
from padst_compiler.triton_text import Kernel, Launch, mapped

__all__ = ["EXPANDED", "expanded", "linear", "nm_linear", "pays"]

PROGRAMS = 264  # of a launch, at least: two for each of 132 multiprocessors
WIDEST = 64  # inputs of a group; wider ones would be a tile of one or two groups
CHOSEN = 256  # at most, of a group: a line of the text for every cell and number

EXPANDED = Kernel(
    "padst_expanded",
    ("X", "W", "INDICES"),
    """
    M, INPUTS = {{size("X", 0)}}, {{size("X", 1)}}
    tile, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    rm = tile.to(INDEX_DTYPE) * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = part * BLOCK_N + tl.arange(0, BLOCK_N)
    idx_m = rm[:, None]
    token = idx_m < M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_G * PADDED)
    for start in range(0, GROUPS, BLOCK_G):
        group = start + k // PADDED
        inside = (group < GROUPS) & (k % PADDED < GROUP)
        feature = tl.multiple_of(group * GROUP, ALIGNED) + k % PADDED
        feature = tl.max_contiguous(feature, ALIGNED)
{%- if IN_MAP %}
        feature = tl.load(FROM + feature, mask=inside, other=0)
{%- endif %}
        a = tl.load(X + idx_m * INPUTS + feature[None, :], mask=token & inside[None, :], other=0.0)
{%- if KEPT == 2 %}
        pair = start * 2 + tl.arange(0, BLOCK_G * 2)
        live = (rn < WIDE)[:, None] & (pair < GROUPS * 2)[None, :]
        place = rn[:, None] * (GROUPS * 2) + pair[None, :]
        both = tl.load(W + place, mask=live, other=0.0)
        w0, w1 = tl.split(tl.reshape(both, (BLOCK_N, BLOCK_G, 2)))
        both = tl.load(INDICES + place, mask=live, other=0)
        i0, i1 = tl.split(tl.reshape(both, (BLOCK_N, BLOCK_G, 2)))
{%- else %}
        g = start + tl.arange(0, BLOCK_G)
        live = (rn < WIDE)[:, None] & (g < GROUPS)[None, :]
        place = (rn[:, None] * GROUPS + g[None, :]) * KEPT
{%- for n in range(KEPT) %}
        w{{n}} = tl.load(W + place + {{n}}, mask=live, other=0.0)
        i{{n}} = tl.load(INDICES + place + {{n}}, mask=live, other=0)
{%- endfor %}
{%- endif %}
{%- for n in range(KEPT) %}
        i{{n}} = i{{n}}.to(tl.int32)
        half = ((i{{n}} & 1) * 16).to(tl.uint32)
        w{{n}} = w{{n}}.to(tl.uint16, bitcast=True).to(tl.uint32) << half
        i{{n}} = i{{n}} >> 1
{%- endfor %}
{%- for at in range(PADDED // 2) %}
        c{{at}} = tl.where(i0 == {{at}}, w0, 0)
{%- for n in range(1, KEPT) %}
        c{{at}} |= tl.where(i{{n}} == {{at}}, w{{n}}, 0)
{%- endfor %}
{%- endfor %}
{%- for level in (32, 16, 8, 4, 2, 1) if level < PADDED // 2 %}
{%- for at in range(level) %}
        c{{at}} = tl.join(c{{at}}, c{{at + level}})
{%- endfor %}
{%- endfor %}
        c0 = tl.reshape(c0, (BLOCK_N, BLOCK_G * PADDED // 2))
        low = (c0 & 0xffff).to(tl.uint16).to(W.dtype.element_ty, bitcast=True)
        high = (c0 >> 16).to(tl.uint16).to(W.dtype.element_ty, bitcast=True)
        b = tl.trans(tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_G * PADDED)))
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    column = rn
{%- if OUT_MAP %}
    column = tl.load(INTO + rn, mask=rn < WIDE, other=0)
{%- endif %}
    idx_n = column[None, :]
    live = token & (rn < WIDE)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "live", val_shape=("BLOCK_M", "BLOCK_N"))}}
""",
)


def pays(values: Sequence[int], inputs: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether this is predicted to be faster than sums, for values ``(o, i/m, n)``.

    Example:
        >>> [pays((11008, 256, 2), 4096, tokens, torch.bfloat16) for tokens in (1, 16, 64)]
        [False, True, True]
        >>> pays((11008, 1, 410), 4096, 16, torch.bfloat16)
        False
    """
    if len(values) != 3 or dtype.itemsize != 2:
        return False
    shape, nnz, group = (values[0], inputs), math.prod(values), inputs // values[1]
    if not 2 <= group <= WIDEST or power(group) * values[2] > CHOSEN:
        return False
    return expanded_seconds(shape, group, tokens, dtype, 0.0) < seconds(
        2.0 * tokens * nnz, APART, 0.0
    )


@functools.lru_cache(maxsize=4096)
def expanded(values: Sequence[int], inputs: int, tokens: int) -> Launch:
    """Return the programs of ``EXPANDED``, for values ``(o, i/m, n)``.

    Fewer outputs a program keep all multiprocessors reading where there are few tokens.
    """
    outputs, groups, kept = values
    group = inputs // groups
    padded = power(group)
    m = min(128, max(16, power(tokens)))
    n = min(64, max(16, power(outputs)))
    while n > 16 and -(-outputs // n) * -(-tokens // m) < PROGRAMS:
        n //= 2
    k = 128 if m <= 64 else 64
    g = min(power(groups), max(16, padded, k) // padded)
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_G": g, "TILES": -(-outputs // n), "WIDE": outputs}
    sizes |= {"GROUPS": groups, "GROUP": group, "PADDED": padded, "KEPT": kept}
    sizes |= {"ALIGNED": group & -group}
    return Launch(sizes, tiles=sizes["TILES"], warps=8 if m * n >= 4096 else 4)


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
    flat, inputs = x.reshape(-1, x.shape[-1]), read(x, in_map)
    how = expanded(values.shape, inputs, flat.shape[0])
    given = {"X": flat, "W": values, "INDICES": indices}
    y = mapped(EXPANDED, given, out_features, how, in_map, into, bias)
    return y.view(*x.shape[:-1], out_features)


def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    *maps: Tensor | None,
) -> Tensor:
    """Return what ``linear`` does, by it or by sums; ``maps`` are its last two arguments."""
    inputs, tokens = read(x, maps[0] if maps else None), math.prod(x.shape[:-1])
    how = linear if pays(values.shape, inputs, tokens, x.dtype) else gathered_linear
    return how(x, values, indices, bias, out_features, *maps)

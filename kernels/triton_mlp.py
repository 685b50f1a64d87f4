"""Two layers of blocks as one Triton kernel: hidden features are never stored.

A program computes a tile of tokens and a row of blocks of the second layer. At high sparsity such a
row reads few hidden blocks, so the program computes these itself, one after another, and multiplies
each at once. Programs of other rows compute some of them again: ``repeats`` says how often, and it
is low where blocks are large (for a ViT-B at 90 %: 1.3 times at blocks of 64, 5 times at 16).

    h   = act(x[..., in_map] S1^T + b1)     one hidden block, fp32, rounded to the type of x
    y  += h W2                              fp32, the next hidden block of the row

The text is Inductor's template and an eager launch, as in ``triton_block.py``; bias and activation
between the layers are constants of it. Where ``fits`` says no, two kernels run as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from padst_compiler.kernels.triton_block import (
    STORE,
    TILE,
    Sizes,
    power,
    sizes_of,
)
from padst_compiler.triton_text import Kernel, Launch, mapped

__all__ = ["MLP", "WRITTEN", "fits", "mlp", "programs", "repeats", "tiles"]


WIDEST = 128  # of a tile of outputs; a row of blocks that is wider is several
SHARED = 112 * 1024  # bytes a program may take where two are to run on a multiprocessor

WRITTEN: Mapping[str, str] = {
    "relu": "tl.where(h < 0.0, 0.0, h)",  # a maximum would drop NaN
    "gelu": "0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))",
    # 1 + tanh(u) is 2 sigmoid(2 u), and a sigmoid is safe where exponentials overflow
    "gelu_tanh": "h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))",
    "silu": "h * tl.sigmoid(h)",
    "quick_gelu": "h * tl.sigmoid(1.702 * h)",
}
"""Activations of ``h`` in Triton, by their names."""

ACTIVATE = "".join(
    f"""
{{%- if ACTIVATION == "{name!r}" %}}
        h = {text}
{{%- endif %}}"""
    for name, text in WRITTEN.items()
)

MLP = Kernel(
    "padst_block_mlp",
    ("X", "W1", "I1", "W2", "I2"),
    f"""{TILE}
    for place in range(0, KEPT2 * C2, BLOCK_H):
        block = tl.load(I2 + group * KEPT2 + place // C2)
        rh = place % C2 + tl.arange(0, BLOCK_H)
        h = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for start in {{{{"tl.static_range" if UNROLLED else "range"}}}}(0, KEPT1 * C1, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < KEPT1 * C1
            feature = tl.load(I1 + block * KEPT1 + k // C1, mask=inside, other=0) * C1 + k % C1
            feature = tl.max_contiguous(tl.multiple_of(feature, ALIGNED), ALIGNED)
{{%- if IN_MAP %}}
            feature = tl.load(FROM + feature, mask=inside, other=0)
{{%- endif %}}
            at = idx_m * {{{{size("X", 1)}}}} + feature[None, :]
            a = tl.load(X + at, mask=token & inside[None, :], other=0.0)
            at = (block * KEPT1 * C1 + k)[:, None] * C2 + rh[None, :]
            b = tl.load(W1 + at, mask=inside[:, None], other=0.0)
            h = tl.dot(a.to(DOT), b.to(DOT), h, input_precision=PRECISION)
{{%- if BIASED %}}
        h += tl.load(B1 + block * C2 + rh).to(tl.float32)[None, :]
{{%- endif %}}
{ACTIVATE}
        h = h.to(X.dtype.element_ty)  # as a tensor between two layers would be
        at = (group * KEPT2 * C2 + place + tl.arange(0, BLOCK_H))[:, None] * WIDE + rn[None, :]
        b = tl.load(W2 + at, mask=(rn < WIDE)[None, :], other=0.0)
        acc = tl.dot(h.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
{STORE}""",
)


# -- sizes -----------------------------------------------------------------------------------------


def fits(first: Sizes, second: Sizes) -> bool:
    """Whether the kernel computes two layers of such weights, ``(o/r, k, c, r)`` each."""
    return first[3] == second[2] and second[2] % 16 == 0


def repeats(first: Sizes, second: Sizes) -> float:
    """Return how often a hidden feature is computed, on average.

    Example:
        >>> repeats((48, 1, 64, 64), (12, 5, 64, 64))
        1.25
    """
    rows, kept, _, wide = second
    return rows * -(-wide // WIDEST) * kept / first[0]


def tiles(
    first: Sizes, second: Sizes, tokens: int, dtype: torch.dtype, gathered: bool
) -> dict[str, int]:
    """Return the tiles of both products: what registers hold without spilling.

    16-bit products run on matrix units of 64 rows for 4 warps. Inputs read through a map are
    addressed one by one: half as many. In fp32 a thread sums 8 outputs of its own.
    """
    inner, (_, _, c2, wide) = first[1] * first[2], second
    h = min(64, c2 & -c2)
    n = min(WIDEST, max(16, power(wide)))
    if dtype.itemsize == 2:
        m = 64 if gathered or n > 64 else 128
        k = 32 if 0 < inner % 64 <= 32 else 64  # the last step would be half empty
    else:
        m, k = 2048 // max(h, n), 32
    m, k = min(m, max(16, power(tokens))), min(k, max(16, power(inner)))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_H": h}


@functools.lru_cache(maxsize=4096)
def programs(
    first: Sizes,
    second: Sizes,
    tokens: int,
    dtype: torch.dtype,
    activation: str,
    *,
    biased: bool,
    gathered: bool = False,
) -> Launch:
    """Return the programs of ``MLP``.

    Args:
        first: sizes of the first layer's weights, ``(o/r, k, c, r)``.
        second: those of the second layer's.
        tokens: about how many.
        dtype: of the inputs.
        activation: a name of ``WRITTEN``.
        biased: whether the first layer has a bias, ``B1``.
        gathered: whether inputs are read through a map.

    Raises:
        ValueError: the kernel does not compute these layers.
    """
    if not fits(first, second):
        raise ValueError(
            f"Expected blocks of the first layer with as many rows as those of the second have "
            f"columns, a multiple of 16. Got {first[3]} and {second[2]}. Run two kernels."
        )
    (_, kept1, c1, _), (rows, kept2, c2, r2) = first, second
    sizes = tiles(first, second, tokens, dtype, gathered)
    m, n, k, h = sizes.values()
    steps, parts = -(-kept1 * c1 // k), -(-r2 // WIDEST)
    # Loads of the next hidden block run ahead where one loop is left and two blocks' loads fit.
    ahead = 2 * dtype.itemsize * (steps * k * (m + h) + h * n)
    blocks = {"C1": c1, "KEPT1": kept1, "C2": c2, "KEPT2": kept2, "WIDE": r2, "PARTS": parts}
    blocks |= {"TILES": rows * parts, "ALIGNED": min(c1 & -c1, k)}
    text: dict[str, Any] = {"ACTIVATION": repr(activation)}
    text |= {"BIASED": biased, "UNROLLED": ahead <= SHARED}
    wide = max(h, n)
    many = (m, wide) == (128, 64) if dtype.itemsize == 2 else m * wide == 2048
    return Launch(sizes | blocks | text, tiles=rows * parts, warps=8 if many else 4)


# -- launch ----------------------------------------------------------------------------------------


def mlp(
    x: Tensor,
    values1: Tensor,
    indices1: Tensor,
    bias1: Tensor | None,
    values2: Tensor,
    indices2: Tensor,
    hidden: int,
    width: int,
    activation: str,
    in_map: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return two layers of ``x[..., in_map]``; feature n of the second is stored at ``into[n]``."""
    del hidden  # rows of ``values1``
    flat, first, second = x.reshape(-1, x.shape[-1]), sizes_of(values1), sizes_of(values2)
    how = programs(
        first,
        second,
        flat.shape[0],
        x.dtype,
        activation,
        biased=bias1 is not None,
        gathered=in_map is not None,
    )
    kernel, given = MLP, {"X": flat, "W1": values1, "I1": indices1, "W2": values2, "I2": indices2}
    if bias1 is not None:
        kernel, given["B1"] = kernel.reading("B1"), bias1
    return mapped(kernel, given, width, how, in_map, into).view(*x.shape[:-1], width)

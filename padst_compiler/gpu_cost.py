"""What a kernel is predicted to cost on a GPU: the slower of its products and its memory traffic.

Rates are those of an H200: 4.3 TB/s copied and 790 TFLOP/s multiplied in bf16 by dense products
(both measured by others), tf32 half of that; all else is derived. None of ours was timed there yet.
Other GPUs have other rates in about the same proportion, which is what decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from padst_compiler.formulation import LAUNCH, Geometry

__all__ = [
    "APART",
    "dense_seconds",
    "expanded_seconds",
    "feed",
    "is_gpu",
    "launches",
    "mlp_pays",
    "priced",
    "products",
    "seconds",
    "turned_seconds",
]

TRAFFIC = 4.3e12 * 0.85  # bytes a second
START = 2.0e-6  # seconds from one kernel to the next
UNIT = LAUNCH / 3.0e-6  # costs are operations of a dense product, at this many a second


MOVED = 2**18  # 197 tokens of 768: 2.6 us through the L2 cache by 48 rows of blocks, 2.2 apart

# Share of a dense product's rate by the side of a block that is a matrix unit's narrow side: what
# feeding it from shared memory allows, times 0.7 for Triton against cuBLAS.
FEED = {16: 0.28, 32: 0.45, 64: 0.65, 128: 0.7}

# Operations a second of sums: each needs a number of x of its own from the L1 cache, and of what
# lies apart a request brings few; of x turned it brings those of many tokens. Numbers a second of
# N:M laid out in registers. The last two by the instructions of the compiled kernels, 4.2 for a
# weight and a token, and 7 for a number. Derived, not timed.
APART, TURNED, LAID = 3.0e12, 13.0e12, 4.0e12
LAID_FOR = 128  # tokens: more lay a weight out again
NEAR = 192 * 2**10  # bytes of x that the L1 cache has room for; others take twice as long


def is_gpu(g: Geometry) -> bool:
    """Whether the call runs on a GPU, in a type that kernels multiply."""
    return g.device == "cuda" and g.dtype in (torch.float32, torch.float16, torch.bfloat16)


def products(dtype: torch.dtype) -> float:
    """Return the operations that dense products do in a second."""
    if dtype is not torch.float32:
        return 790e12
    return 395e12 if torch.backends.cuda.matmul.allow_tf32 else 55e12


def seconds(flops: float, rate: float, moved: float) -> float:
    """Return the seconds of one kernel.

    Args:
        flops: that it computes.
        rate: how many a second.
        moved: bytes that it reads and writes.
    """
    return max(flops / rate, moved / TRAFFIC) + START


def launches(count: int) -> float:
    """Return the seconds of so many kernels that have next to nothing to do."""
    return count * START


def dense_seconds(g: Geometry) -> float:
    """Return the seconds of a dense product of this layer, forward or either gradient."""
    numbers = g.tokens * (g.shape.in_features + g.shape.out_features) + g.shape.numel
    flops = 2.0 * g.tokens * g.shape.numel
    return seconds(flops, 0.85 * products(g.dtype), numbers * g.item)


def expanded_seconds(
    shape: Sequence[int], group: int, tokens: int, dtype: torch.dtype, moved: float
) -> float:
    """Return the seconds of an N:M weight that is laid out in registers and multiplied as dense.

    Args:
        shape: of the weight, ``(o, i)``.
        group: inputs of a group, which takes the next power of two.
        tokens: about how many.
        dtype: of the inputs.
        moved: bytes that are read and written.
    """
    numbers = math.prod(shape) * (1 << (group - 1).bit_length()) / group
    laid = numbers * -(-tokens // LAID_FOR) / LAID
    flops = 2.0 * max(tokens, 16) * numbers
    rate = FEED[64] * products(dtype)
    return max(laid, seconds(flops, rate, moved) - START) + START


def turned_seconds(
    inputs: int, weights: int, tokens: int, dtype: torch.dtype, moved: float
) -> float:
    """Return the seconds of sums of single weights over x turned, and of the copy that turns it.

    Args:
        inputs: of the layer.
        weights: that are kept.
        tokens: about how many; a power of two is computed.
        dtype: of the inputs.
        moved: bytes that sums read and write.
    """
    computed = 1 << (tokens - 1).bit_length()
    turned = inputs * computed * dtype.itemsize
    rate = TURNED if turned <= NEAR else TURNED / 2.0
    return seconds(2.0 * computed * weights, rate, moved) + seconds(0.0, 1.0, 2.0 * turned)


def priced(taken: float) -> float:
    """Return seconds as a cost."""
    return UNIT * taken


def mlp_pays(tokens: int, first: Sequence[int], second: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether one kernel of two layers of blocks is predicted to be faster than one for each.

    A row of blocks of the second layer computes the hidden blocks that it reads, so that some are
    computed more than once, and none is written to memory and read again.

    Args:
        tokens: about how many.
        first: sizes of the weights, ``(o/r, k, c, r)``.
        second: of the second layer.
        dtype: of the tokens.

    Example:
        >>> mlp_pays(6304, (48, 1, 64, 64), (12, 5, 64, 64), torch.bfloat16)
        True
        >>> mlp_pays(6304, (192, 5, 16, 16), (48, 19, 16, 16), torch.bfloat16)
        False
    """
    rows, kept, _, wide = second
    repeats = rows * kept / first[0]
    flops = [2.0 * tokens * math.prod(sizes) for sizes in (first, second)]
    rate = feed(min(first[3], wide)) * products(dtype)
    hidden, weights = tokens * first[0] * first[3], math.prod(first) + math.prod(second)
    ends = tokens * rows * wide  # inputs are about as wide as outputs
    item = dtype.itemsize
    apart = sum(seconds(work, rate, (hidden + ends + weights / 2) * item) for work in flops)
    together = seconds(flops[0] * repeats + flops[1], rate, (2 * ends + weights) * item)
    return together < apart


def moves_in_kernel(numbers: int) -> bool:
    """Whether a kernel should move features itself, rather than another before or after it.

    Every number then comes alone in 32 bytes, and for as many rows of blocks as read it; another
    kernel costs its start, and reads and writes each number once.

    Args:
        numbers: that are moved.
    """
    return numbers <= MOVED


def feed(narrow: int) -> float:
    """Return the share of a dense product's rate for blocks with a side of ``narrow``.

    Example:
        >>> feed(16), feed(48), feed(256)
        (0.28, 0.65, 0.7)
    """
    return next((rate for side, rate in FEED.items() if narrow <= side), FEED[128])

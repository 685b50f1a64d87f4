"""Dense products with a weight that is laid out for the machine once, by oneDNN.

================================================  ===============================================
``packed_weight(weight, tokens)``                 ``weight (o, i)`` as oneDNN reads it for so many
                                                  tokens: an opaque tensor of the same shape
``packed_linear(x, packed, bias)``                ``x (t, i) W^T + bias``, any number of tokens
================================================  ===============================================

BLAS brings the weight into its own order in every call, which takes longer than the product of a
few tokens. ``passes/pack_dense.py`` puts these in. What oneDNN does not take (float64, for
``verify``) is a plain product; none has a gradient.

Example:
    >>> packed = torch.ops.padst.packed_weight(torch.ones(3, 2), 5)
    >>> torch.ops.padst.packed_linear(torch.ones(5, 2), packed, None).tolist()[0]
    [2.0, 2.0, 2.0]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.cpp_templates import opaque_strides, takes_opaque_inputs
from padst_compiler.cpu_products import HALF, products_of

__all__ = ["PACKED_LINEAR", "PACKED_WEIGHT", "SMALLEST", "gains", "packs"]

FEWEST, MOST = 3, 512  # tokens: oneDNN gains by more than two; for more than 512 BLAS is as fast
SMALLEST = 1 << 18  # numbers of a weight


def gains(numbers: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a product with a frozen weight of so many numbers gains by a layout of its own.

    Of what a CPU multiplies in 16 bits our kernels use AVX-512 BF16 only; without any, BLAS takes
    four times as long for such numbers as for fp32.
    """
    if device != "cpu" or numbers < SMALLEST or dtype not in (torch.float32, *HALF):
        return False
    units = () if dtype is torch.float32 else products_of(dtype)
    return not units or (dtype is torch.bfloat16 and units == ("avx512",))


def packs(tokens: int, dtype: torch.dtype, device: str) -> bool:
    """Whether oneDNN lays weights out for so many tokens."""
    return FEWEST <= tokens <= MOST and _is_there(dtype, device)


def _is_there(dtype: torch.dtype, device: str) -> bool:
    return device == "cpu" and dtype is torch.float32 and takes_opaque_inputs()


def _packed_weight(weight: Tensor, tokens: int) -> Tensor:
    if not _is_there(weight.dtype, weight.device.type):
        return weight.clone()
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), tokens)
    return packed


def _packed_fake(weight: Tensor, tokens: int) -> Tensor:
    del tokens
    if not _is_there(weight.dtype, weight.device.type):
        return torch.empty_like(weight)
    return weight.new_empty_strided(weight.shape, opaque_strides(weight.dim()))


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    if not packed.is_mkldnn:
        return F.linear(x, packed, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    name = schema.split("(")[0]
    torch.library.define(f"padst::{name}", schema.removeprefix(name))
    # Whatever the layout of the tensors: an opaque one has a dispatch key of its own.
    torch.library.impl(f"padst::{name}", "default")(run)
    torch.library.register_fake(f"padst::{name}")(fake)
    op: torch._ops.OpOverload = getattr(torch.ops.padst, name).default
    return op


PACKED_WEIGHT = _register(
    "packed_weight(Tensor weight, int tokens) -> Tensor",
    _packed_weight,
    _packed_fake,
)
PACKED_LINEAR = _register(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor",
    _packed_linear,
    lambda x, packed, bias: x.new_empty((*x.shape[:-1], packed.shape[0])),
)

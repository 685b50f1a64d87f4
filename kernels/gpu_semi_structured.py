"""N:M on the sparse tensor cores of a GPU, by cuSPARSELt: at most two of four numbers are kept.

================================================  ===============================================
``semi_structured_weight(values, indices,         an N:M weight ``(o, i)`` as cuSPARSELt reads a
in_features)``                                    2:4 one: ``o`` rows of the library's own, with
                                                  half of the numbers and two bits for their places
``semi_structured_linear(x, packed, bias)``       ``x (..., i) W^T + bias``, any number of tokens
================================================  ===============================================

The weight is frozen and stored once. Published gains over dense on Hopper are 1.0 to 1.25 for large
products, and less than 1 for small ones, so no prediction chooses it over dense:
``kernels="timed"`` does, where it was timed faster and gave the right numbers. No GPU has run it
yet. torch's other way, CUTLASS, refuses Hopper. Neither operator has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.gpu_cost import dense_seconds, is_gpu, priced
from padst_compiler.structures import NM, Shape

__all__ = ["NM_FORM", "is_two_four"]

SIDE = 16  # divides both sides of a weight of 16-bit numbers
TOKENS = 8  # come in multiples of it: others are padded
TILE = 128  # sides of the weight that the library may round up to
ABOVE = 1.01  # of dense's price: what is not timed stays dense


# -- operators -------------------------------------------------------------------------------------


def _room(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return zeros where a packed weight fits: how long one is, only a GPU could tell."""
    rows = indices.shape[0]
    tiled = -(-rows // TILE) * -(-in_features // TILE) * TILE**2
    return values.new_zeros(rows, -(-9 * tiled // 16 // rows))


def _weight(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    shape = Shape(indices.shape[0], in_features)
    weight = NM.of_storage(indices, shape, ()).unpack(values, indices, shape)
    packed = torch._cslt_compress(weight.contiguous()).flatten()
    room = _room(values, indices, in_features)
    if packed.numel() > room.numel():
        raise RuntimeError(
            f"Expected at most {room.numel()} numbers of cuSPARSELt for {shape}. "
            f"Got {packed.numel()}. Compile without options={{'kernels': 'sparse'}}."
        )
    room.view(-1)[: packed.numel()] = packed
    return room


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    # The library looks at no strides: what is not contiguous would be read as if it were.
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = flat.shape[0]
    more = max(TOKENS - tokens, -tokens % TOKENS)
    padded = F.pad(flat, (0, 0, 0, more)) if more else flat
    shift = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch._cslt_sparse_mm(packed, padded.t(), bias=shift, transpose_result=True)
    return y[:tokens].view(*x.shape[:-1], packed.shape[0])


torch.library.custom_op(
    "padst::semi_structured_weight",
    _weight,
    mutates_args=(),
    schema="(Tensor values, Tensor indices, int in_features) -> Tensor",
).register_fake(_room)
torch.library.custom_op(
    "padst::semi_structured_linear",
    _linear,
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor? bias) -> Tensor",
).register_fake(lambda x, packed, bias: x.new_empty((*x.shape[:-1], packed.shape[0])))

WEIGHT = torch.ops.padst.semi_structured_weight.default
PRODUCT = torch.ops.padst.semi_structured_linear.default


# -- formulation -----------------------------------------------------------------------------------


def is_two_four(n: int, m: int) -> bool:
    """Whether n of every m consecutive numbers are at most two of every aligned four.

    Four numbers meet two groups of one at most; groups of two must not begin within them.

    Example:
        >>> [is_two_four(n, m) for n, m in ((2, 4), (1, 10), (2, 16), (2, 6), (3, 8))]
        [True, True, True, False, False]
    """
    return m >= 2 if n == 1 else n == 2 and m % 4 == 0


def _nm(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    del out_features
    y: Tensor = PRODUCT(x, WEIGHT(values, indices, int(x.shape[-1])), bias)
    return y


def _cost(g: Geometry) -> float | None:
    if not (isinstance(g.structure, NM) and g.frozen and is_gpu(g) and _is_there()):
        return None
    sides = g.shape.out_features % SIDE == 0 and g.shape.in_features % SIDE == 0
    fits = sides and g.item == 2 and is_two_four(g.kept, g.structure.m)
    return priced(ABOVE * dense_seconds(g)) if fits else None


def _is_there() -> bool:
    """Whether torch was built with cuSPARSELt and the GPU, where there is one, is one of its."""
    if not torch.backends.cusparselt.is_available():
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


NM_FORM = Formulation("semi_structured", _nm, _cost)

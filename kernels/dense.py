"""Dense formulations of every structured operator: the candidate that is never much slower.

With frozen weights the materialised weight is made once, so this is exactly the dense layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from padst_compiler.cpu_products import HALF, products_of
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.gpu_cost import dense_seconds, is_gpu, priced, seconds
from padst_compiler.packed_ops import SMALLEST, gains
from padst_compiler.structures import Shape, Structure, unit_of

__all__ = ["dense"]


def dense(kind: type[Structure]) -> tuple[Formulation, Formulation, Formulation]:
    """Return the dense formulations of a structure's linear, dx and dw."""

    def linear(
        x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        shape = Shape(out_features, x.shape[-1])
        weight = kind.of_storage(indices, shape, unit_of(values, indices)).unpack(
            values, indices, shape
        )
        return F.linear(x, weight, bias)

    def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        shape = Shape(grad.shape[-1], in_features)
        return grad @ kind.of_storage(indices, shape, unit_of(values, indices)).unpack(
            values, indices, shape
        )

    def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
        shape = Shape(grad.shape[-1], x.shape[-1])
        full = grad.reshape(-1, shape.out_features).t() @ x.reshape(-1, shape.in_features)
        return kind.of_storage(indices, shape, unit).pack(full, indices).contiguous()

    return (
        Formulation("dense", linear, _with_weight),
        Formulation("dense", dx, _with_weight),
        Formulation("dense", dw, _with_gradient),
    )


# Of a dense product: what laying out a weight takes BLAS in each call (768-3072, 1 thread), and the
# share of the rest. Where it is laid out for our kernel, only that share is left.
LAID_OUT, REST = 50.0, 0.85
ONE_BY_ONE = 4  # bytes that putting a weight in its place counts for: no less in 16 bits


def _with_weight(g: Geometry) -> float:
    if is_gpu(g):
        made = seconds(0.0, 1.0, (g.shape.numel + 2.0 * g.nnz) * g.item + 8.0 * g.nnz)
        return priced(dense_seconds(g) + (0.0 if g.frozen else made))
    numbers, product = g.shape.numel, gemm(g.tokens, g.shape.in_features, g.shape.out_features)
    if g.frozen and gains(numbers, g.dtype, g.device):
        widened = g.dtype in HALF and not products_of(g.dtype)  # as fast as fp32: see `widening`
        return REST * product * (0.5 if widened else 1.0)
    if g.tokens > 2 and numbers >= SMALLEST:  # smaller ones were not timed
        product = max(product, REST * product + LAID_OUT * numbers)
    return product if g.frozen else product + moved(1.5 * g.shape.numel, ONE_BY_ONE)


def _with_gradient(g: Geometry) -> float:
    if is_gpu(g):
        packed = seconds(0.0, 1.0, 2.0 * g.nnz * g.item + 8.0 * g.nnz)
        return priced(dense_seconds(g) + packed)
    product = gemm(g.shape.out_features, g.tokens, g.shape.in_features)
    return product + moved(0.5 * g.shape.numel + g.nnz, ONE_BY_ONE)

"""How one sparsity asked for is spread over layers: the total of kept weights stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from padst_compiler.structures import Shape

__all__ = ["DISTRIBUTIONS", "erk", "uniform"]


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Return the same sparsity for every layer.

    Args:
        shapes: the layers' weights.
        sparsity: of all layers together.

    Example:
        >>> uniform([Shape(4, 4), Shape(8, 2)], 0.5)
        [0.5, 0.5]
    """
    return [sparsity] * len(shapes)


def erk(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Return Erdos-Renyi sparsities: a layer keeps weights in proportion to inputs plus outputs.

    ``1 - s_l = eps (o + i) / (o i)`` with eps such that all layers together reach ``sparsity``; of
    a convolution ``eps (o + i + kh + kw) / (o i kh kw)``. Layers that would keep more than all of
    their weights become dense and eps is computed again (RigL, arXiv 1911.11134).

    Args:
        shapes: the layers' weights.
        sparsity: of all layers together, weighted by their sizes.

    Example:
        >>> [round(s, 3) for s in erk([Shape(64, 64), Shape(64, 256)], 0.5)]
        [0.286, 0.554]
    """
    budget = (1.0 - sparsity) * sum(shape.numel for shape in shapes)
    perimeter = [shape.perimeter for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        open_ = [n for n in range(len(shapes)) if n not in dense]
        left = budget - sum(shapes[n].numel for n in dense)
        eps = left / sum(perimeter[n] for n in open_)
        full = {n for n in open_ if eps * perimeter[n] >= shapes[n].numel}
        if not full:
            return [
                0.0 if n in dense else 1.0 - eps * perimeter[n] / shapes[n].numel
                for n in range(len(shapes))
            ]
        # Capping a layer frees budget and raises eps, so every layer in ``full`` stays full.
        dense |= full
    return [0.0] * len(shapes)


DISTRIBUTIONS: dict[str, Callable[[Sequence[Shape], float], list[float]]] = {
    "uniform": uniform,
    "erk": erk,
}

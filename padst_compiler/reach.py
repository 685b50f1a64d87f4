"""Which directions of its input a deep structured network can cut: ranks, measured in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_compiler.span_budget import span
from padst_compiler.structures import Shape, Structure

__all__ = ["MODES", "reachable_ranks"]

MODES = ("general", "tied", "free")


def reachable_ranks(
    structure: Structure,
    width: int,
    sparsity: float,
    depth: int,
    *,
    permutation: str = "random",
    mode: str = "general",
    seed: int = 0,
) -> list[int]:
    """Return the rank of all directions that layers 1 to l cut, for every depth l.

    The network is a residual stream, ``h += U relu(S_l P_l h)`` with random U and a random half of
    the neurons on. Its layer l cuts along the rows of ``S_l P_l J``, J the stream's Jacobian; these
    rows are stacked over the layers. What the rows of S_l may be is the ``mode``:

    * "general": combinations of the same r random directions, the theory's assumption. With random
      permutations the rank is ``min(d_0, l r)`` as ``span_budget`` says; without, it stays at r.
    * "tied": combinations of the r inputs that one neuron of a random mask reads. Permuted sets of
      inputs overlap, so the rank is ``d_0 (1 - (1 - r / d_0)^l)`` in the mean: with permutations
      drawn at random ``ceil(d_0 / r)`` layers are too few.
    * "free": a random mask of the structure, as layers here have it, whose neurons read different
      inputs. One layer may span everything.

    Args:
        structure: the family of masks.
        width: d_0, of every layer.
        sparsity: of the masks.
        depth: number of layers.
        permutation: "random", a new one per layer, or "identity".
        mode: as above.
        seed: of a private generator.

    Raises:
        ValueError: an unknown permutation or mode, or a structure that does not tile the width.

    Example:
        >>> from padst_compiler.structures import Block
        >>> reachable_ranks(Block(16), 64, 0.75, 5)
        [16, 32, 48, 64, 64]
        >>> reachable_ranks(Block(16), 64, 0.75, 5, permutation="identity")
        [16, 16, 16, 16, 16]
    """
    shape = Shape(width, width)
    for what, given, known in (
        ("permutation", permutation, ("random", "identity")),
        ("mode", mode, MODES),
    ):
        if given not in known:
            raise ValueError(f"Expected {what} {' or '.join(known)}. Got {given!r}. Use one.")
    if refusal := structure.refusal(shape):
        raise ValueError(refusal)
    generator = torch.Generator().manual_seed(seed)
    spans = _directions(structure, shape, sparsity, mode, generator)
    stream = torch.eye(width, dtype=torch.float64)
    found = torch.zeros(0, width, dtype=torch.float64)
    ranks = []
    for _ in range(depth):
        read = stream
        if permutation == "random":
            read = stream[torch.randperm(width, generator=generator)]
        if spans is None:
            rows = _normal(width, width, generator) * _mask(structure, shape, sparsity, generator)
        else:
            rows = _normal(width, len(spans), generator) @ spans
        cut = rows @ read
        found = _basis(torch.cat([found, cut]))
        ranks.append(len(found))
        on = torch.randperm(width, generator=generator) < (width + 1) // 2
        stream = stream + _normal(width, width, generator) @ (cut * on[:, None]) / width
    return ranks


def _directions(
    structure: Structure, shape: Shape, sparsity: float, mode: str, generator: torch.Generator
) -> Tensor | None:
    """Return the directions that every layer combines, ``(r, d_0)``; None where masks are free."""
    if mode == "free":
        return None
    r = int(span(structure, shape, structure.kept(shape, sparsity)))
    if mode == "general":
        return _normal(r, shape.in_features, generator)
    if structure.name == "unstructured":
        return torch.eye(shape.in_features, dtype=torch.float64)
    read = _mask(structure, shape, sparsity, generator)[0].nonzero()[:r, 0]
    return torch.eye(shape.in_features, dtype=torch.float64)[read]


def _mask(
    structure: Structure, shape: Shape, sparsity: float, generator: torch.Generator
) -> Tensor:
    scores = torch.rand(shape.out_features, shape.in_features, generator=generator)
    indices = structure.select(scores, structure.kept(shape, sparsity))
    return structure.mask(indices, shape)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _basis(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of ``rows``; directions below 1e-9 are rounding."""
    _, sizes, right = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    kept: Tensor = right[sizes > 1e-9 * sizes[0]]
    return kept

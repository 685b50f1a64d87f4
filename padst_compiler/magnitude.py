"""One-shot selection from a trained dense layer: which units stay, and behind which permutation.

A permutation in front of a structure decides which weights it can keep together. It is found so
that the kept magnitude ``sum of squares of what S keeps`` is greatest: with the mask fixed, the
best permutation is a linear assignment (column j of S may take any input; each pair has its gain);
with the permutation fixed, the best mask is the structure's own selection. Each step can only add,
so alternating ends; it ends in a local optimum, so it starts several times. Under N:M a fixed mask
holds the columns where they are; there, one column of every group is dealt anew at a time, a linear
assignment too, whose gains know that each group chooses again.

This is the paper's open question of fine-tuning from dense to sparse (arXiv 2510.14812); the
alternation is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap, invert
from padst_compiler.structures import NM, Shape, Structure

__all__ = ["Found", "find_permutation", "select", "undo"]


class Found(NamedTuple):
    """A mask, the permutation in front of it, and the share of the squared weights they keep."""

    indices: Tensor
    index_map: IndexMap
    share: float


def select(structure: Structure, weight: Tensor, kept: int) -> tuple[Tensor, float]:
    """Return the largest units, and the share of the squared weights that they keep.

    Args:
        structure: the family of masks.
        weight: ``(o, i)``.
        kept: units that each group keeps.

    Example:
        >>> from padst_compiler.structures import FanIn
        >>> select(FanIn(), torch.tensor([[3.0, 0.0, 4.0]]), 1)[0].tolist()
        [[2]]
    """
    exact = weight.detach().double()
    indices = structure.select(exact, kept)
    share = structure.pack(exact, indices).square().sum() / exact.square().sum()
    return indices, float(share) if bool(share.isfinite()) else 1.0


def undo(weight: Tensor, perm: Tensor, side: str) -> Tensor:
    """Return S of ``weight = S P`` (``side`` "input") or ``P S`` ("output").

    Example:
        >>> undo(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2, 0, 1]), "input").tolist()
        [[3.0, 1.0, 2.0]]
    """
    if side == "input":
        return weight.index_select(1, perm)
    return weight.index_select(0, invert(perm))


def find_permutation(
    structure: Structure,
    weight: Tensor,
    kept: int,
    side: str,
    generator: torch.Generator,
    *,
    starts: int = 4,
) -> Found:
    """Find the permutation and the mask that keep most of ``weight = S P`` (or ``P S``).

    Args:
        structure: the family of masks.
        weight: ``(o, i)``, finite.
        kept: units that each group keeps.
        side: "input" for ``S P``, "output" for ``P S``.
        generator: of the random starts after the first, which is the identity; on the CPU.
        starts: how many.

    Raises:
        ValueError: the weight is not finite.

    Example:
        >>> from padst_compiler.structures import NM
        >>> weight = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
        >>> found = find_permutation(NM(m=2), weight, 1, "input", torch.Generator())
        >>> found.share
        1.0
    """
    exact = weight.detach().double().cpu()
    if not bool(exact.isfinite().all()):
        raise ValueError(
            "Expected finite weights for init='magnitude'. Got NaN or infinity. "
            "Load the weights of a trained model first."
        )
    axis = 1 if side == "input" else 0
    best: Found | None = None
    for start in range(max(1, starts)):
        order = torch.arange(exact.shape[axis])
        if start:
            order = torch.randperm(exact.shape[axis], generator=generator)
        if isinstance(structure, NM) and axis == 1:
            order = _deal(exact.square(), order, structure.m, kept, generator)
        found = _alternate(structure, exact, kept, axis, order)
        if best is None or found[1] > best.share:
            perm = found[0] if side == "input" else invert(found[0])
            best = Found(found[2], IndexMap.of(perm), found[1])
    assert best is not None
    return best._replace(indices=best.indices.to(weight.device))


def _alternate(
    structure: Structure, exact: Tensor, kept: int, axis: int, order: Tensor
) -> tuple[Tensor, float, Tensor]:
    """Return the order, the share and the mask where neither step improves any more.

    ``S = exact`` with its columns (rows) in ``order``: place j of S holds ``exact[order[j]]``.
    """
    from scipy.optimize import linear_sum_assignment  # here: it is slow to import

    squares = exact.square()
    indices, share = select(structure, exact.index_select(axis, order), kept)
    while True:
        mask = structure.mask(indices, Shape(*exact.shape)).double()
        gain = mask.t() @ squares if axis == 1 else mask @ squares.t()
        new = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
        chosen, reached = select(structure, exact.index_select(axis, new), kept)
        if reached <= share * (1.0 + 1e-12):
            return order, share, indices
        order, share, indices = new, reached, chosen


def _deal(squares: Tensor, order: Tensor, m: int, kept: int, generator: torch.Generator) -> Tensor:
    """Return an order in which N:M groups keep at least as much: deal columns between groups.

    Args:
        squares: ``(o, i)``, of the weight.
        order: ``(i,)``, which column stands at each place.
        m: size of a group.
        kept: n.
        generator: picks the column that each group gives away, ``8 m`` times.
    """
    from scipy.optimize import linear_sum_assignment  # here: it is slow to import

    order, groups = order.clone(), order.numel() // m
    for _ in range(8 * m):
        given = torch.randint(m, (groups,), generator=generator) + m * torch.arange(groups)
        columns, rest = squares[:, order[given]], squares[:, order]
        rest[:, given] = 0.0
        # A column adds what it has above the weakest that its group would keep without it.
        least = rest.view(-1, groups, m).topk(kept, dim=2).values[..., -1]
        gain = torch.stack([(columns - least[:, g, None]).relu().sum(0) for g in range(groups)])
        order[given] = order[given][torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1])]
    return order

"""What a stored topology may be: kernels read where it points, so it is checked where it is loaded.

Units lie inside the weight, whole, and each once in its group; neurons that are left are neurons.
"""

from __future__ import annotations

from torch import Tensor

from padst_compiler.structures import NM, Shape, Structure

__all__ = ["fault", "width_of"]


def width_of(structure: Structure, numbers: int, active: Shape) -> int:
    """Return k', how many units each group keeps when ``active.out_features`` neurons are left.

    N:M with N given keeps N, which is what hardware reads.

    Args:
        structure: whose units are single weights.
        numbers: what the layer may store.
        active: the layer without its ablated neurons.

    Example:
        >>> from padst_compiler.structures import FanIn
        >>> width_of(FanIn(), 12, Shape(5, 8))
        2
    """
    if isinstance(structure, NM) and structure.n is not None:
        return structure.n
    groups, candidates = structure.table(active)
    return min(candidates, numbers // groups)


def fault(structure: Structure, shape: Shape, indices: Tensor, rows: Tensor | None) -> str | None:
    """Return what is wrong with a topology, ``Expected X. Got Y.``; None where it is sound.

    Args:
        structure: the family of masks.
        shape: of the whole weight.
        indices: in the structure's layout, any integer type.
        rows: the neurons that are left; None for all.

    Example:
        >>> import torch
        >>> from padst_compiler.structures import FanIn
        >>> fault(FanIn(), Shape(2, 8), torch.tensor([[3, 1], [8, 0]]), None)
        'Expected unique indices below 8. Got 0 to 8.'
        >>> fault(FanIn(), Shape(2, 8), torch.tensor([[3, 1], [7, 7]]), None)
        'Expected unique indices below 8. Got some twice.'
    """
    if rows is not None:
        fine = rows.dim() == 1 and rows.numel() > 0 and structure.name in ("fan_in", "nm")
        fine = fine and not rows.is_floating_point() and bool((rows.diff() > 0).all())
        if not fine or int(rows[0]) < 0 or int(rows[-1]) >= shape.out_features:
            return f"Expected ascending rows below {shape.out_features}. Got others."
        shape = Shape(rows.numel(), shape.in_features)
        used = structure.table(shape)[0] * width_of(structure, indices.numel(), shape)
        indices = indices.reshape(-1)[:used]
    units, candidates = structure.slots(indices.contiguous(), shape), structure.table(shape)[1]
    need, low, high = f"Expected unique indices below {candidates}.", units.min(), units.max()
    if not 0 <= low.item() <= high.item() < candidates:
        return f"{need} Got {low.item()} to {high.item()}."
    if not bool((structure.indices_of(units, shape).view(-1) == indices.reshape(-1)).all()):
        return f"{need} Got parts of units of {structure}."
    ordered = units.sort(dim=1).values
    return f"{need} Got some twice." if bool((ordered.diff(dim=1) == 0).any()) else None

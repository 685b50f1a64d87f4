"""What a sparse model can express: ``expressivity(model)``, and the ranks that its theory predicts.

Formulas and their source are in ``span_budget``, the numerical check in ``reach``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from padst_compiler.config import describe
from padst_compiler.control import some_sparse
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.reach import reachable_ranks
from padst_compiler.span_budget import budgets, log2_regions, overhead, span
from padst_compiler.text import table

__all__ = [
    "Expressivity",
    "LayerBudget",
    "budgets",
    "expressivity",
    "log2_regions",
    "overhead",
    "reachable_ranks",
    "span",
]


@dataclass(frozen=True)
class LayerBudget:
    """One layer; ``k`` and the regions follow from ``u``.

    Args:
        name: qualified.
        structure: as ``SparseConfig`` spells it.
        shape: ``out x in``.
        span: r.
        mixes: whether it reads its inputs in a new order: a permutation that is not absorbed.
        u: as the model is.
        u_mixed: with one permutation per layer.
        u_plain: without any.
        k: ``min(n, u)``, rounded down.
        log2_regions: of this layer's factor, as the model is.
        overhead: layers like this one until dense factors return.
    """

    name: str
    structure: str
    shape: str
    span: float
    mixes: bool
    u: float
    u_mixed: float
    u_plain: float
    k: int
    log2_regions: float
    overhead: int


@dataclass(frozen=True)
class Expressivity:
    """The budget of a model's sparse layers, taken as one chain; ``str`` gives a table.

    Args:
        inputs: d_0.
        layers: in the order of the model.
        dense_at: the first layer, from 1, with ``u = d_0`` as the model is; None if none has it.
        dense_at_mixed: the same with one permutation per layer.
        dense_at_plain: the same without permutations.
        log2_regions: of the lower bound, as the model is.
        log2_regions_dense: of the dense model.
    """

    inputs: int
    layers: tuple[LayerBudget, ...]
    dense_at: int | None
    dense_at_mixed: int | None
    dense_at_plain: int | None
    log2_regions: float
    log2_regions_dense: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and text, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        titles = ["layer", "structure", "shape", "r", "mixes", "u", "u mixed", "u plain", "k"]
        body = [
            [m.name, m.structure, m.shape, f"{m.span:g}", "yes" if m.mixes else "no"]
            + [f"{u:g}" for u in (m.u, m.u_mixed, m.u_plain)]
            + [m.k, f"{m.log2_regions:.1f}", m.overhead]
            for m in self.layers
        ]
        depths = (self.dense_at, self.dense_at_mixed, self.dense_at_plain)
        said = ["never" if depth is None else f"from layer {depth}" for depth in depths]
        return "\n".join(
            [
                table([*titles, "log2 regions", "L overhead"], body),
                f"dense factors: {said[0]}; with one permutation per layer {said[1]}; "
                f"without any {said[2]}",
                f"log2 of the regions, at least: {self.log2_regions:.1f}; "
                f"dense {self.log2_regions_dense:.1f}",
            ]
        )


def expressivity(model: nn.Module, inputs: int | None = None) -> Expressivity:
    """Return the span budget of ``model``'s sparse layers, as one chain in the order of the model.

    A model with branches is no chain: name d_0 and read the numbers of single layers. ReLU and
    directions in general position are assumed.

    Args:
        model: holds sparse layers.
        inputs: d_0; by default the inputs of the first sparse layer.

    Raises:
        ValueError: there is no sparse layer.

    Example:
        >>> import padst_compiler as padst
        >>> model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
        >>> config = padst.SparseConfig("block:16", sparsity=0.75, permutation="random")
        >>> found = expressivity(padst.sparsify(model, config, filter_fn=lambda site: True))
        >>> [layer.u for layer in found.layers], found.dense_at, found.layers[0].overhead
        ([16.0, 32.0, 48.0, 64.0, 64.0], 4, 4)
    """
    layers = some_sparse(model)
    first = next(iter(layers.values())).shape
    inputs = first.in_features if inputs is None else inputs
    spans = [min(Fraction(inputs), _span(m, inputs)) for m in layers.values()]
    mixes, free = _mixing(list(layers.values()))
    found = [budgets(inputs, spans, how) for how in (mixes, [True] * len(spans), free)]
    rows = []
    for n, (name, layer) in enumerate(layers.items()):
        u, neurons = found[0][n], layer.shape.out_features - layer.ablated
        rows.append(
            LayerBudget(
                name=name,
                structure=describe(layer.structure),
                shape=str(layer.shape),
                span=float(spans[n]),
                mixes=mixes[n],
                u=float(u),
                u_mixed=float(found[1][n]),
                u_plain=float(found[2][n]),
                k=min(neurons, int(u)),
                log2_regions=log2_regions(neurons, min(neurons, int(u))),
                overhead=overhead(inputs, spans[n]),
            )
        )
    depths = [next((n + 1 for n, u in enumerate(us) if u == inputs), None) for us in found]
    dense = [log2_regions(m.shape.out_features, inputs) for m in layers.values()]
    total = sum(row.log2_regions for row in rows)
    return Expressivity(
        inputs=inputs,
        layers=tuple(rows),
        dense_at=depths[0],
        dense_at_mixed=depths[1],
        dense_at_plain=depths[2],
        log2_regions=total,
        log2_regions_dense=sum(dense),
    )


def _span(layer: SparseLayer, inputs: int) -> Fraction:
    return span(layer.structure, layer.packed().shape, layer.kept, inputs)


def _mixing(layers: Sequence[SparseLayer]) -> tuple[list[bool], list[bool]]:
    """Return which layers read their inputs in a new order: as they are, and without permutations.

    What a structure absorbs on its inputs is no new order, except that one which absorbs all of
    them reads any inputs by itself. An output permutation is a new order for the next layer.
    """
    free = ["input" in layer.structure.vacuous_sides for layer in layers]
    mixes = list(free)
    for n, layer in enumerate(layers):
        reader = n if layer.side == "input" else n + 1
        if layer.permutation is not None and reader < len(layers):
            mixes[reader] = mixes[reader] or _reorders(layer.permutation, layers[reader])
    return mixes, free


def _reorders(permutation: Permutation, layer: SparseLayer) -> bool:
    """Whether ``layer`` reads ``permutation`` as a new order; while soft it is one."""
    if permutation.size != layer.shape.in_features:
        return False
    if not isinstance(permutation, FixedPermutation):
        return True
    perm = IndexMap.of(permutation.perm)
    return not (perm.is_identity or layer.structure.absorbs_columns(perm, layer.shape))

"""One table about the sparse layers of a model: what is kept, what is permuted, what moved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padst_compiler.config import describe
from padst_compiler.control import some_sparse
from padst_compiler.distance import moved, moved_modulo
from padst_compiler.exploration import Exploration
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import FixedPermutation
from padst_compiler.text import table
from padst_compiler.training import DynamicSparsity, Event

__all__ = ["LayerReport", "Report", "report"]


@dataclass(frozen=True)
class LayerReport:
    """One sparse layer; None stands for what does not apply or is not known.

    Args:
        name: qualified, "" for a model that is one layer.
        structure: as ``SparseConfig`` spells it.
        shape: ``out x in``.
        requested: the sparsity asked for, after a distribution; None for a layer made by hand.
        sparsity: the actual fraction of zeros, ablated neurons counted as zeros.
        nnz: weights in use.
        permutation: "none", "soft" or "hard".
        side: on which side it acts; None without one.
        distance: the share of features that it moves; of a soft one, what it decodes to.
        distance_modulo: the smallest such share beyond what the structure absorbs.
        penalty: P(M) / (2 N), the mean ``l1 - l2``; 0 where hard.
        gap: ``1 - l2 / l1`` of the worst row or column; 0 where hard.
        churn: the share of units that the last update changed.
        explored: the in-time over-parameterisation rate: units ever active / all units.
        ablated: neurons that are out.
        soft_share: the share of the steps so far that were spent with a soft permutation.
    """

    name: str
    structure: str
    shape: str
    requested: float | None
    sparsity: float
    nnz: int
    permutation: str
    side: str | None
    distance: float | None
    distance_modulo: float | None
    penalty: float | None
    gap: float | None
    churn: float | None
    explored: float | None
    ablated: int
    soft_share: float | None


_TITLES = {
    "name": "layer",
    "requested": "asked",
    "permutation": "perm",
    "distance": "moved",
    "distance_modulo": "beyond",
    "penalty": "P/2N",
    "explored": "ITOP",
    "soft_share": "soft",
}


@dataclass(frozen=True)
class Report:
    """All sparse layers of a model at one step; ``str`` gives a table.

    Args:
        layers: by name, in the order of the model.
        step: optimiser steps taken; None without a training.
        history: the training's events.
    """

    layers: Mapping[str, LayerReport]
    step: int | None
    history: tuple[Event, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the history as plain numbers and text, ready for JSON."""
        return {
            "step": self.step,
            "nnz": sum(layer.nnz for layer in self.layers.values()),
            "layers": [asdict(layer) for layer in self.layers.values()],
        }

    def numbers(self) -> dict[str, float]:
        """Return every number that is known by ``layer/field``, as a logger wants them."""
        found = {
            f"{name or 'model'}/{field}": value
            for name, layer in self.layers.items()
            for field, value in asdict(layer).items()
            if isinstance(value, (int, float))
        }
        return found | {"nnz": sum(layer.nnz for layer in self.layers.values())}

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw distances, sparsities, and the history of gaps and churn; return the path.

        Args:
            path: the picture, ``.png`` or ``.svg``.

        Raises:
            ImportError: the ``[plot]`` extra is not installed.
        """
        from padst_compiler.plots import report_picture

        return report_picture(self, Path(path))

    def __str__(self) -> str:
        names = [field.name for field in fields(LayerReport)]
        body = [[_cell(getattr(layer, n)) for n in names] for layer in self.layers.values()]
        return table([_TITLES.get(name, name) for name in names], body)


def report(
    model: nn.Module,
    training: DynamicSparsity | None = None,
    explored: Exploration | None = None,
) -> Report:
    """Describe every sparse layer of ``model``.

    Nothing changes, and nothing is kept. A soft permutation is decoded for its distances, which is
    a linear assignment: seconds from 4096 features on.

    Args:
        model: holds sparse layers.
        training: adds churn, the share of steps spent soft, and the history for pictures.
        explored: adds the in-time over-parameterisation rate. Made after ``training``.

    Raises:
        ValueError: there is no sparse layer, or a soft permutation is not finite.

    Example:
        >>> import padst_compiler as padst
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> config = padst.SparseConfig("block:16", sparsity=0.75, permutation="none")
        >>> result = report(padst.sparsify(model, config))
        >>> layer = result.layers["0"]
        >>> layer.structure, layer.sparsity, layer.nnz, layer.permutation
        ('block:16', 0.75, 1024, 'none')
    """
    return describe_layers(some_sparse(model), training, explored)


@torch.no_grad()
def describe_layers(
    layers: Mapping[str, SparseLayer],
    training: DynamicSparsity | None,
    explored: Exploration | None,
) -> Report:
    """Return the report on ``layers``, by name."""
    churn, soft, rates = _churn(training), {}, {}
    if training is not None:
        soft = training.soft_fraction()
    if explored is not None:
        rates = explored.rates()
    decoded: dict[int, IndexMap] = {}  # permutations may be shared, and decoding may be slow
    found = {}
    for name, layer in layers.items():
        learns = layer.permutation is not None
        found[name] = LayerReport(
            name=name,
            structure=describe(layer.structure),
            shape=str(layer.shape),
            requested=None if layer.config is None else layer.config.sparsity,
            sparsity=layer.sparsity,
            nnz=layer.packed().values.numel(),
            **_permutation(layer, decoded),
            churn=churn.get(name),
            explored=rates.get(name),
            ablated=layer.ablated,
            soft_share=soft.get(name) if learns else None,
        )
    if training is None:
        return Report(found, None, ())
    return Report(found, training.step_count, tuple(e.copy() for e in training.history))


def _permutation(layer: SparseLayer, decoded: dict[int, IndexMap]) -> dict[str, Any]:
    """Return the fields that are about the permutation."""
    permutation = layer.permutation
    if permutation is None:
        empty = dict.fromkeys(["side", "distance", "distance_modulo", "penalty", "gap"])
        return {"permutation": "none"} | empty
    gap = penalty = 0.0
    key = id(permutation)
    if (soft := layer.soft_permutation) is not None:
        l1, l2 = soft.norms()
        gap, penalty = float((1.0 - l2 / l1).max()), float((l1 - l2).mean())
        if key not in decoded:
            decoded[key] = soft.harden()
    elif isinstance(permutation, FixedPermutation):
        decoded[key] = IndexMap.of(permutation.perm)
    perm = decoded[key]
    return {
        "permutation": "hard" if soft is None else "soft",
        "side": layer.side,
        "distance": moved(perm),
        "distance_modulo": moved_modulo(perm, layer.structure, layer.shape, layer.side),
        "penalty": penalty,
        "gap": gap,
    }


def _churn(training: DynamicSparsity | None) -> dict[str, float]:
    """Return by layer the churn of its last update; looks at permutations are no updates."""
    if training is None:
        return {}
    return {
        event["layer"]: event["churn"]
        for event in training.history
        if training.method.updates_at(event["step"], training.schedule)
    }


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

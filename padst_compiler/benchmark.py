"""Compare a sparse model with its dense twin, both compiled, in one run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from padst_compiler.densify import to_dense
from padst_compiler.explanation import explain
from padst_compiler.inputs import bind
from padst_compiler.layers import sparse_layers
from padst_compiler.measure import machine, paired, ratio
from padst_compiler.text import table

__all__ = ["compare_with_dense"]


def compare_with_dense(model: nn.Module, example_inputs: Any, *, rounds: int = 11) -> str:
    """Time compiled inference of ``model`` against the dense model compiled by Inductor.

    Args:
        model: with sparse layers, hardened, in eval mode.
        example_inputs: as for ``explain``.
        rounds: paired rounds of measurement.

    Returns:
        A table: what ran, milliseconds, times faster than dense, difference to eager; then the
        kernels chosen and the machine.
    """
    args, kwargs = bind(model, example_inputs)
    dense = to_dense(model)
    contestants = {
        "dense, Inductor": torch.compile(dense),
        "sparse, padst": torch.compile(model, backend="padst"),
    }
    rows = []
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
        calls = {name: partial(c, *args, **kwargs) for name, c in contestants.items()}
        results = {n: torch.utils._pytree.tree_leaves(call()) for n, call in calls.items()}
        times = paired(calls, rounds=rounds)
    for name in contestants:
        middle, low, high = ratio(times["dense, Inductor"], times[name])
        difference = max(
            float((a - b).abs().max())
            for a, b in zip(expected, results[name], strict=True)
            if isinstance(a, torch.Tensor) and a.numel()
        )
        milliseconds = f"{1e3 * times[name].median:.3f}"
        rows.append(
            (name, milliseconds, f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{difference:.0e}")
        )
    layers = sparse_layers(model)
    zeros = sum(layer.values.numel() for layer in layers.values())
    dense_size = sum(layer.shape.numel for layer in layers.values())
    kernels = table(("site", "kernel", "why"), explain(model, example_inputs).kernels)
    return "\n".join(
        [
            table(("", "ms", "x dense [95 %]", "difference"), rows),
            "",
            kernels,
            "",
            f"{len(layers)} sparse layers, density {zeros / dense_size:.4f}",
            machine(),
        ]
    )

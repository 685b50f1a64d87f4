"""Whole models on this CPU: ViT-B/16 and GPT-2 small, dense and sparse, all compiled, in one run.

Weights are random, and so are the permutations; every linear layer of the blocks is sparse. All
contestants take turns; the ratio is to the fastest dense one of the case.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.bench_models import Size, make, size_of
from padst_compiler.config import SparseConfig
from padst_compiler.layer_contestants import in_onnxruntime
from padst_compiler.layers import sparse_layers
from padst_compiler.measure import machine, paired, ratio, rows_of
from padst_compiler.sparsify import sparsify
from padst_compiler.text import table

__all__ = ["HEADERS", "Case", "cases", "measure", "report"]

DENSE = ("eager", "Inductor", "onnxruntime")
HEADERS = (
    "model",
    "structure",
    "density",
    "batch",
    "threads",
    "mode",
    "unit",
    "padst",
    *DENSE,
    "x best dense",
    "low",
    "high",
    "difference",
)


@dataclass(frozen=True)
class Case:
    """One row: what is timed."""

    name: str
    size: Size
    structure: str
    sparsity: float
    batch: int
    threads: int
    train: bool = False


def cases(
    names: Iterable[str],
    structures: Iterable[str],
    sparsities: Iterable[float],
    batches: Iterable[int],
    threads: Iterable[int],
    train: Iterable[bool],
) -> Iterator[Case]:
    """Yield all combinations.

    Raises:
        ValueError: an unknown model.
    """
    for name, core, batch, part, kind, each in itertools.product(
        names, threads, batches, sparsities, structures, train
    ):
        yield Case(name, size_of(name), kind, part, batch, core, each)


def measure(
    case: Case, *, rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> list[str]:
    """Return the row of a case; sets the number of threads and leaves it so.

    Args:
        case: what is timed.
        rounds: paired rounds.
        clock: in seconds; ``time.thread_time`` for one thread of a machine that others use too.

    Raises:
        ValueError: the structure does not fit the layers.
    """
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    dense, x, classes = make(case.size, case.batch)
    sparse, _, _ = make(case.size, case.batch)
    absorbs = case.structure in ("fan_in", "unstructured")  # every permutation: none is there
    config = SparseConfig(
        case.structure, sparsity=case.sparsity, permutation="none" if absorbs else "random"
    )
    sparsify(sparse, config, filter_fn=lambda site: site.layers[0].startswith("blocks."))
    layers = sparse_layers(sparse).values()
    density = sum(s.values.numel() for s in layers) / sum(s.shape.numel for s in layers)
    for model in (dense, sparse):
        model.train(case.train)
    run = _trained if case.train else _inferred
    calls, difference = run(dense, sparse, x, classes)
    settle = 0.1 if case.threads > 1 else 0.0
    times = paired(calls, rounds=rounds, settle=settle, clock=clock)
    best = min((times[name] for name in DENSE if name in times), key=lambda time: time.median)
    items = case.batch * case.size.items
    speeds = [times.get(name) for name in ("padst", *DENSE)]
    return [
        case.name,
        case.structure,
        f"{density:.3f}",
        str(case.batch),
        str(case.threads),
        "training" if case.train else "inference",
        "tokens/s" if case.size.text else "images/s",
        *("-" if time is None else f"{items / time.median:.4g}" for time in speeds),
        *(f"{number:.2f}" for number in ratio(best, times["padst"])),
        f"{difference:.0e}",
    ]


def report(
    selected: Sequence[Case],
    *,
    rounds: int = 7,
    path: Path | None = None,
    picture: Path | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Time the cases one by one and return their table; arguments as for single layers."""
    rows = rows_of(HEADERS, selected, partial(measure, rounds=rounds), path, say)
    if picture is not None and rows:
        from padst_compiler.bench_plots import models_picture

        models_picture([dict(zip(HEADERS, row, strict=True)) for row in rows], picture)
    return f"{table(HEADERS, rows)}\n\nfp32, random weights; {machine()}"


def _inferred(
    dense: nn.Module, sparse: nn.Module, x: Tensor, _: Tensor
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return a forward pass of every contestant, and how far ours is from the eager sparse one."""
    # Ours freezes weights: so does its strongest peer.
    models: dict[str, Callable[..., Any]] = {
        "padst": torch.compile(sparse, backend="padst"),
        "eager": dense,
        "Inductor": torch.compile(dense, options={"freezing": True}),
    }
    calls: dict[str, Callable[[], Any]] = {
        name: torch.no_grad()(partial(model, x)) for name, model in models.items()
    }
    with torch.no_grad():
        difference = float((calls["padst"]() - sparse(x)).abs().max())
        ort = in_onnxruntime(dense, x)
    return calls if ort is None else {**calls, "onnxruntime": ort}, difference


def _trained(
    dense: nn.Module, sparse: nn.Module, x: Tensor, classes: Tensor
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return a step of SGD of every contestant, and how far the first loss is from eager."""
    with torch.no_grad():
        expected = F.cross_entropy(sparse(x), classes)
    calls = {
        "padst": _step(sparse, torch.compile(sparse, backend="padst"), x, classes),
        "eager": _step(dense, dense, x, classes),
        "Inductor": _step(dense, torch.compile(dense), x, classes),
    }
    return calls, float((calls["padst"]() - expected).abs())


def _step(
    model: nn.Module, run: Callable[..., Tensor], x: Tensor, classes: Tensor
) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        loss = F.cross_entropy(run(x), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step

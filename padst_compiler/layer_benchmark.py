"""Single layers on this CPU: every structure against every dense and unstructured peer, in one run.

A case is a layer, forward or with its gradients, tokens, a type, threads, and weights that are hot
(in the cache from the call before) or cold (the caches are swept before each call). All contestants
take turns; the ratio is to the fastest dense one of the case, with the 95 % interval of its median.
Losing rows stay in. "graph" is ours without what ``torch.compile`` does around each call, which no
peer but Inductor pays. The peak is what this machine's dense product reaches in fp32.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from padst_compiler.config import SparseConfig
from padst_compiler.explanation import explain
from padst_compiler.layer_contestants import DENSE, OTHERS, inferred, trained
from padst_compiler.layers import sparse_layers
from padst_compiler.measure import Timing, cold, machine, paired, ratio, rows_of
from padst_compiler.sparsify import sparsify
from padst_compiler.text import table

__all__ = ["DTYPES", "HEADERS", "Case", "cases", "measure", "report"]

STRUCTURES = ("block:16", "block:32", "block:64", "diagonal", "nm:16", "fan_in", "unstructured")
LAYERS = ((768, 3072), (3072, 768), (768, 768), (1024, 4096), (4096, 11008))
TOKENS = (1, 8, 32, 197, 1576)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADERS = (
    "layer",
    "structure",
    "asked",
    "density",
    "map",
    "tokens",
    "threads",
    "dtype",
    "mode",
    "weights",
    "kernel",
    "padst ms",
    "graph ms",
    *(f"{name} ms" for name in (*DENSE, *OTHERS)),
    "x best dense",
    "low",
    "high",
    "% of peak",
)


@dataclass(frozen=True)
class Case:
    """One row: what is timed."""

    layer: tuple[int, int]
    structure: str
    sparsity: float
    tokens: int
    threads: int
    cold: bool = False
    dtype: str = "fp32"
    train: bool = False
    permutation: str = "random"
    others: bool = True


def cases(
    layers: Iterable[tuple[int, int]],
    structures: Iterable[str],
    sparsities: Iterable[float],
    tokens: Iterable[int],
    threads: Iterable[int],
    *,
    cold: Iterable[bool] = (False,),
    dtypes: Iterable[str] = ("fp32",),
    train: Iterable[bool] = (False,),
    permutation: str = "random",
    others: bool = True,
) -> Iterator[Case]:
    """Yield all combinations."""
    for layer, core, count, dtype, step, part, kind, each in itertools.product(
        layers, threads, tokens, dtypes, train, sparsities, structures, cold
    ):
        # Fan-in and unstructured weights absorb every permutation: none is there.
        chosen = "none" if kind.split(":")[0] in ("fan_in", "unstructured") else permutation
        yield Case(layer, kind, part, count, core, each, dtype, step, chosen, others)


def measure(case: Case, *, rounds: int = 9) -> list[str]:
    """Return the row of a case; sets the number of threads and leaves it so.

    Raises:
        ValueError: the structure does not fit the layer.
    """
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    inputs, outputs = case.layer
    dtype = DTYPES[case.dtype]
    dense = nn.Linear(inputs, outputs)
    sparse = nn.Sequential(nn.Linear(inputs, outputs))
    config = SparseConfig(case.structure, sparsity=case.sparsity, permutation=case.permutation)
    sparsify(sparse, config, filter_fn=lambda site: True)
    for model in (dense, sparse):
        model.to(dtype).train(case.train)
    x = torch.randn(case.tokens, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    (layer,) = sparse_layers(sparse).values()
    density = layer.values.numel() / layer.shape.numel
    with torch.set_grad_enabled(case.train):
        if case.train:
            calls = trained(sparse, dense, x)
        else:
            calls = inferred(sparse, dense, x, others=case.others)
        for call in calls.values():
            call()
        settle = 0.1 if case.threads > 1 else 0.0
        timed = cold if case.cold else partial(paired, settle=settle)
        times = timed(calls, rounds=rounds)
        kernels = [] if case.train else explain(sparse, x, options={"verify": False}).kernels
    best = min((times[name] for name in DENSE if name in times), key=lambda time: time.median)
    flops = (6.0 if case.train else 2.0) * layer.values.numel() * case.tokens
    return [
        f"{inputs}-{outputs}",
        case.structure,
        f"{case.sparsity:.2f}",
        f"{density:.3f}",
        case.permutation,
        str(case.tokens),
        str(case.threads),
        case.dtype,
        "training" if case.train else "inference",
        "cold" if case.cold else "hot",
        kernels[0][1] if kernels else "-",
        *(_milliseconds(times.get(name)) for name in ("padst", "graph", *DENSE, *OTHERS)),
        *(f"{number:.2f}" for number in ratio(best, times["padst"])),
        f"{100 * flops / times['padst'].median / _peak():.0f}",
    ]


def report(
    selected: Sequence[Case],
    *,
    rounds: int = 9,
    path: Path | None = None,
    picture: Path | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Time the cases one by one and return their table.

    Args:
        selected: see ``cases``.
        rounds: paired rounds a case.
        path: a CSV file, written row by row.
        picture: a file for the ratios, drawn with the ``[plot]`` extra.
        say: gets a line a case, as they end.
    """
    rows = rows_of(HEADERS, selected, partial(measure, rounds=rounds), path, say)
    if picture is not None and rows:
        from padst_compiler.bench_plots import layers_picture

        layers_picture([dict(zip(HEADERS, row, strict=True)) for row in rows], picture)
    lost = sum(float(row[HEADERS.index("x best dense")]) < 0.97 for row in rows)
    return "\n".join(
        [
            table(HEADERS, rows),
            "",
            f"{lost} of {len(rows)} rows below 0.97 of the best dense peer; {machine()}",
        ]
    )


def _peak() -> float:
    """Return what this machine's dense product reaches, in floating-point operations a second."""
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2.0 * 1024**3 / statistics.median(sorted(seconds)[:3])


def _milliseconds(time: Timing | None) -> str:
    return "-" if time is None else f"{1e3 * time.median:.3f}"

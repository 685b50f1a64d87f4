"""Single layers on this CPU: every structure against every dense and unstructured peer, in one run.

A case is a layer with a random permutation, a number of tokens, threads, and weights that are hot
(in the cache from the call before) or cold (the caches are swept before each call). All contestants
take turns; the ratio is to the fastest dense one of the case. Losing rows stay in.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.config import SparseConfig
from padst_compiler.explanation import explain
from padst_compiler.layers import sparse_layers
from padst_compiler.measure import Timing, cold, machine, paired, ratio, rows_of
from padst_compiler.sparsify import sparsify
from padst_compiler.text import table

__all__ = ["HEADERS", "Case", "cases", "in_onnxruntime", "measure", "report"]

STRUCTURES = ("block:16", "block:32", "block:64", "diagonal", "nm:16", "fan_in", "unstructured")
LAYERS = ((768, 3072), (3072, 768), (768, 768), (1024, 4096), (4096, 11008))
TOKENS = (1, 8, 32, 197, 1576)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DENSE = ("F.linear", "Inductor", "onnxruntime")
OTHERS = ("masked dense", "torch CSR", "torch BSR", "scipy CSR")
HEADERS = (
    "layer",
    "structure",
    "asked",
    "density",
    "tokens",
    "threads",
    "weights",
    "kernel",
    "padst ms",
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


def cases(
    layers: Iterable[tuple[int, int]],
    structures: Iterable[str],
    sparsities: Iterable[float],
    tokens: Iterable[int],
    threads: Iterable[int],
    cold: Iterable[bool],
) -> Iterator[Case]:
    """Yield all combinations."""
    for layer, core, count, part, kind, each in itertools.product(
        layers, threads, tokens, sparsities, structures, cold
    ):
        yield Case(layer, kind, part, count, core, each)


def measure(case: Case, *, rounds: int = 9) -> list[str]:
    """Return the row of a case; sets the number of threads and leaves it so.

    Raises:
        ValueError: the structure does not fit the layer.
    """
    torch.set_num_threads(case.threads)
    torch.compiler.reset()
    inputs, outputs = case.layer
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(inputs, outputs).eval()
    sparse = nn.Sequential(nn.Linear(inputs, outputs)).eval()
    # Fan-in and unstructured weights absorb every permutation: none is there.
    absorbs = case.structure in ("fan_in", "unstructured")
    config = SparseConfig(
        case.structure, sparsity=case.sparsity, permutation="none" if absorbs else "random"
    )
    sparsify(sparse, config, filter_fn=lambda site: True)
    x = torch.randn(case.tokens, inputs, generator=generator)
    (layer,) = sparse_layers(sparse).values()
    density = layer.values.numel() / layer.shape.numel
    with torch.no_grad():
        calls = _contestants(sparse, dense, x, case)
        kernels = explain(sparse, x, options={"verify": False}).kernels
        for call in calls.values():
            call()
        times = (cold if case.cold else paired)(calls, rounds=rounds)
        peak = _peak()
    best = min((times[name] for name in DENSE if name in times), key=lambda time: time.median)
    middle, low, high = ratio(best, times["padst"])
    flops = 2.0 * layer.values.numel() * case.tokens / times["padst"].median
    return [
        f"{inputs}-{outputs}",
        case.structure,
        f"{case.sparsity:.2f}",
        f"{density:.3f}",
        str(case.tokens),
        str(case.threads),
        "cold" if case.cold else "hot",
        kernels[0][1] if kernels else "dense",
        _milliseconds(times["padst"]),
        *(_milliseconds(times.get(name)) for name in (*DENSE, *OTHERS)),
        f"{middle:.2f}",
        f"{low:.2f}",
        f"{high:.2f}",
        f"{100 * flops / peak:.0f}",
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
            f"fp32; {lost} of {len(rows)} rows below 0.97 of the best dense peer; {machine()}",
        ]
    )


def _contestants(
    sparse: nn.Module, dense: nn.Linear, x: Tensor, case: Case
) -> dict[str, Callable[[], Any]]:
    compiled = torch.compile(sparse, backend="padst")
    inductor = torch.compile(dense, mode="max-autotune-no-cudagraphs")
    (layer,) = sparse_layers(sparse).values()
    weight = layer.structure.unpack(layer.values, layer.indices, layer.shape).detach()
    mask, bias = (weight != 0).float(), dense.bias
    calls: dict[str, Callable[[], Any]] = {
        "padst": lambda: compiled(x),
        "F.linear": lambda: F.linear(x, dense.weight, bias),
        "Inductor": lambda: inductor(x),
        "masked dense": lambda: F.linear(x, dense.weight * mask, bias),
    }
    rows = weight.to_sparse_csr()
    calls["torch CSR"] = lambda: (rows @ x.t()).t() + bias
    if case.structure.startswith("block"):
        size = int(case.structure.split(":")[1])
        blocks = weight.to_sparse_bsr((size, size))
        calls["torch BSR"] = lambda: F.linear(x, blocks) + bias
    compressed, columns = scipy.sparse.csr_matrix(weight.numpy()), x.numpy().T
    added = bias.detach().numpy()
    calls["scipy CSR"] = lambda: (compressed @ columns).T + added
    ort = in_onnxruntime(dense, x)
    return calls if ort is None else {**calls, "onnxruntime": ort}


def in_onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Any] | None:
    """Return a call of a dense model in onnxruntime, or None without it."""
    try:
        import onnxruntime
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


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

"""The parts of the GPU benchmark that are about layers: each turns a case into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padst_compiler.gpu_cases import Case
from padst_compiler.gpu_check import (
    checked_rows,
    error,
    expected_of,
    is_right,
    largest,
    weight_gradient,
    worst_of,
)
from padst_compiler.gpu_contestants import Guard, gradients, inferred, mapped, mlp, trained
from padst_compiler.gpu_layers import (
    DTYPES,
    Layers,
    only,
    precision,
    product,
    way,
)
from padst_compiler.gpu_measure import Call, Clock, captured, in_graphs, on_gpu
from padst_compiler.gpu_rows import Row, filled, roofline
from padst_compiler.index_map import invert
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.measure import Timing, ratio

__all__ = ["LAYER_PARTS", "Bench", "measure", "timed"]

INFERENCE, TRAINING = ("graphs", "hot", "cold"), ("graphs", "hot")
COMPILED = ("graph", "call", "kernel")  # in a CUDA graph what surrounds a graph is not there
CALLED = ("call", "graph", "kernel")


@dataclass
class Bench:
    """What all cases of a run share.

    Attributes:
        layers: on their device.
        guard: of the contestants.
        clock: of the device.
        rounds: paired rounds of each measurement.
        seconds: of one measurement.
    """

    layers: Layers
    guard: Guard
    clock: Clock
    rounds: int
    seconds: float


def measure(case: Case, bench: Bench) -> list[Row]:
    """Return the rows of a case.

    Raises:
        ValueError: the structure does not fit the layer.
    """
    with precision(case.dtype):
        return LAYER_PARTS[case.part](case, bench)


def timed(
    calls: Mapping[str, Call], bench: Bench, modes: Sequence[str], live: Sequence[Tensor] = ()
) -> Iterator[tuple[str, dict[str, Timing]]]:
    """Yield how the calls were timed, and their times."""
    rounds, seconds, clock = bench.rounds, bench.seconds, bench.clock
    for mode in modes:
        if mode == "graphs":
            tell = bench.guard.tell
            yield mode, in_graphs(calls, rounds=rounds, seconds=seconds, say=tell, clock=clock)
            continue
        told: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "clock": clock}
        if mode == "cold":  # Python would take longer than the sweep that is to hide it
            calls = captured(calls, {}, say=bench.guard.tell, clock=clock)
        yield mode, on_gpu(calls, cold=mode == "cold", live=live, **told)


@torch.no_grad()
def _correctness(case: Case, bench: Bench) -> list[Row]:
    """Compare kernels with float64: forward, both gradients, and with maps on both sides."""
    _, x = bench.layers.dense(case)
    layer = only(bench.layers.sparse(case))
    seeded = torch.Generator().manual_seed(4)
    grad = bench.layers.drawn(case, case.layer[1], 3)
    in_map, into = (torch.randperm(n, generator=seeded).to(x.device) for n in case.layer)
    rows = checked_rows(x)
    expected = expected_of(layer, x[rows])
    moved = expected_of(layer, x[rows][:, in_map], bias=False)[:, invert(into)]
    dx, dw = gradients(layer, x, grad)
    errors = {
        "forward": error(product(layer, x, bias=layer.bias)[rows], expected),
        "maps": error(product(layer, x, in_map, into)[rows], moved),
        "dX": error(dx[rows], grad[rows].double() @ layer.weight.double()),
        "dW": error(dw, weight_gradient(layer, x, grad)),
    }
    told = _told(case, layer)
    return [
        filled({**told, "which": name, "error": f"{e:.0e}"}, {}, (), right=is_right(e, case))
        for name, e in errors.items()
    ]


@torch.no_grad()
def _layers(case: Case, bench: Bench) -> list[Row]:
    sparse = bench.layers.sparse(case)
    calls = inferred(case, bench.layers, sparse, bench.guard)
    _, x = bench.layers.dense(case)
    layer = only(sparse)
    worst = worst_of(calls, CALLED, expected_of(layer, x[checked_rows(x)]), checked_rows(x))
    chosen = way(sparse, x) if bench.guard.compiles else "-"
    told = _told(case, layer) | {"map": "none", "way": chosen, "error": f"{worst:.0e}"}
    return _rows(told, calls, bench, case, worst, x, _limit(case, layer))


@torch.no_grad()
def _mlp(case: Case, bench: Bench) -> list[Row]:
    sparse, x, calls = mlp(case, bench.layers, bench.guard)
    first, second = sparse_layers(sparse).values()
    rows = checked_rows(x)
    hidden = torch.nn.functional.gelu(expected_of(first, x[rows]))
    expected = hidden @ second.weight.double().t()
    errors = [worst_of(calls, ("kernel",), expected, rows)]
    if second.bias is not None:
        expected = expected + second.bias.double()
    errors.append(worst_of(calls, (*CALLED[:2], "two kernels"), expected, rows))
    worst = largest(errors)
    chosen = way(sparse, x) if bench.guard.compiles else "-"
    inputs, outputs = case.layer
    kept = first.values.numel() + second.values.numel()
    told = _told(case, first) | {"case": f"{inputs}-{outputs}-{inputs}", "way": chosen}
    told |= {"map": "none", "error": f"{worst:.0e}"}
    limit = roofline(case.tokens, 2 * inputs, kept, DTYPES[case.dtype])
    return _rows(told, calls, bench, case, worst, x, limit)


@torch.no_grad()
def _maps(case: Case, bench: Bench) -> list[Row]:
    sparse = bench.layers.sparse(case)
    calls, perm, into = mapped(case, bench.layers, sparse, bench.guard)
    layer, (_, x) = only(sparse), bench.layers.dense(case)
    rows = checked_rows(x)
    plain, through = expected_of(layer, x[rows]), expected_of(layer, x[rows][:, perm])
    bias = 0.0 if layer.bias is None else layer.bias.double()
    stored = (plain - bias)[:, invert(into)] + bias
    wanted = {"none": plain, "unfolded": plain, "fused output": stored}
    if "folded" in calls:
        folded = bench.layers.sparse(case, "random", "output")
        wanted["folded"] = expected_of(only(folded), x[rows])
    errors = {
        name: worst_of(calls, (name,), wanted.get(name, through), rows)
        for name in calls
        if name != "cuBLAS"
    }
    found = []
    for mode, times in timed(calls, bench, INFERENCE[:2]):
        for name in (name for name in times if name != "cuBLAS"):
            told = _told(case, layer) | {"map": name, "mode": mode, "error": f"{errors[name]:.0e}"}
            mine = "graph" if name in ("folded", "unfolded") else "kernel"
            named = {mine: times[name]}
            named |= {"cuBLAS": times["cuBLAS"]} if "cuBLAS" in times else {}
            right = is_right(errors[name], case)
            row = filled(told, named, (mine,), right=right, limit=_limit(case, layer))
            base = "unfolded" if mine == "graph" else "none"
            if base in times and right:
                row["x unmapped"] = f"{ratio(times[base], times[name])[0]:.2f}"
            found.append(row)
    return found


def _training(case: Case, bench: Bench) -> list[Row]:
    sparse = bench.layers.sparse(case)
    calls, grad = trained(case, bench.layers, sparse, bench.guard)
    _, x = bench.layers.dense(case)
    layer, rows, errors = only(sparse), checked_rows(x), []
    with torch.no_grad():
        dx = grad[rows].double() @ layer.weight.double()
        dw = weight_gradient(layer, x, grad)
    for name in (name for name in ("call", "eager", "kernel") if name in calls):
        back = calls[name]()
        at = 1 if name == "kernel" else 0  # the kernels' call returns what it computes forward too
        errors += [error(back[at].detach()[rows], dx), error(back[at + 1].detach(), dw)]
    worst = largest(errors)
    told = _told(case, layer) | {"map": "none", "which": "forward, dX, dW"}
    told["error"] = f"{worst:.0e}"
    limit = _limit(case, layer, 3)
    right, order = is_right(worst, case), ("call", "eager", "kernel")
    return [
        filled({**told, "mode": mode}, times, order, right=right, limit=limit)
        for mode, times in timed(calls, bench, TRAINING)
    ]


LAYER_PARTS: dict[str, Callable[[Case, Bench], list[Row]]] = {
    "correctness": _correctness,
    "layers": _layers,
    "mlp": _mlp,
    "maps": _maps,
    "training": _training,
}
"""What measures a case, by its part."""


def _rows(
    told: Mapping[str, object],
    calls: Mapping[str, Call],
    bench: Bench,
    case: Case,
    worst: float,
    x: Tensor,
    limit: float,
) -> list[Row]:
    found = []
    for mode, times in timed(calls, bench, INFERENCE, (x,)):
        order = CALLED if mode == "hot" else COMPILED
        right = is_right(worst, case)
        found.append(filled({**told, "mode": mode}, times, order, right=right, limit=limit))
    return found


def _told(case: Case, layer: SparseLayer) -> dict[str, object]:
    inputs, outputs = case.layer
    return {
        "part": case.part,
        "case": f"{inputs}-{outputs}",
        "tokens": case.tokens,
        "dtype": case.dtype,
        "structure": case.structure,
        "asked": f"{case.sparsity:.2f}",
        "density": f"{layer.values.numel() / layer.shape.numel:.3f}",
    }


def _limit(case: Case, layer: SparseLayer, layers: int = 1) -> float:
    kept, dtype = layer.values.numel(), DTYPES[case.dtype]
    return roofline(case.tokens, sum(case.layer), kept, dtype, layers)

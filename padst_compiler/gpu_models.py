"""Whole models on a GPU: ViT-B/16 and GPT-2, dense and sparse, in bf16, inference and training.

Weights are random; there are no permutations between layers, as after folding. "all, MLPs fused" is
compiled as it comes; in "all" the second layer of each MLP has blocks half as wide, so that its two
layers stay two kernels. A training step is forward, backward and SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.bench_models import make
from padst_compiler.config import SparseConfig
from padst_compiler.gpu_cases import ModelCase
from padst_compiler.gpu_layers import way
from padst_compiler.gpu_measure import Call
from padst_compiler.gpu_parts import Bench, timed
from padst_compiler.gpu_rows import Row, filled
from padst_compiler.layers import sparse_layers
from padst_compiler.sites import Site
from padst_compiler.sparsify import sparsify

__all__ = ["measure_model", "sparse_twin"]

DTYPE = torch.bfloat16
TOLERANCE = 0.05  # of logits, to those of eager execution: dozens of layers in bf16


def measure_model(case: ModelCase, bench: Bench) -> list[Row]:
    """Return the rows of a model; what differs from eager execution beyond rounding is WRONG.

    Raises:
        ValueError: the structure does not fit the layers.
    """
    device, guard = bench.layers.device, bench.guard
    bench.layers.kept.clear()
    bench.layers.models.clear()
    dense, x, classes = make(case.size, case.batch)
    sparse = sparse_twin(dense, case)
    for model in (dense, sparse):
        model.to(device, DTYPE).train(case.train)
    x, classes = x.to(device), classes.to(device)
    x = x.to(DTYPE) if x.is_floating_point() else x
    runs: dict[str, tuple[nn.Module, Callable[[], Callable[..., Tensor]]]] = {
        "eager": (sparse, lambda: sparse),
        "cuBLAS": (dense, lambda: dense),
    }
    if guard.compiles:
        runs["call"] = sparse, lambda: torch.compile(sparse, backend="padst", dynamic=False)
        runs["Inductor"] = dense, lambda: torch.compile(dense, dynamic=False)
    owners = {name: owner for name, (owner, _) in runs.items()}
    if case.train:
        made = {name: _step(owner, run, x, classes) for name, (owner, run) in runs.items()}
    else:
        made = {name: _forward(run, x) for name, (_, run) in runs.items()}
    with torch.no_grad():
        expected = sparse(x)
        if case.train:
            expected = F.cross_entropy(expected.float(), classes)
    calls = guard.those_that_run(case, made)
    worst = _difference(calls["call" if "call" in calls else "eager"](), expected)
    chosen = way(sparse, x) if guard.compiles and not case.train else "-"
    layers = sparse_layers(sparse).values()
    items, side = case.batch * case.size.items, case.size.side
    tokens = side if case.size.text else (side // 16) ** 2 + 1
    told: dict[str, object] = {
        "part": "models",
        "case": f"{case.name} batch {case.batch}",
        "tokens": case.batch * tokens,
        "dtype": "bf16",
        "structure": case.structure,
        "asked": f"{case.sparsity:.2f}",
        "density": f"{sum(s.values.numel() for s in layers) / _whole(sparse):.3f}",
        "map": "none",
        "which": case.which,
        "way": chosen,
        "error": f"{worst:.0e}",
        "unit": "tokens/s" if case.size.text else "images/s",
    }
    found = []
    modes = ("hot",) if case.train or case.batch > 1 else ("hot", "graphs")
    for mode, times in timed(calls, bench, modes):
        spoken = "training" if case.train else "inference" if mode == "hot" else mode
        right = worst <= TOLERANCE
        row = filled({**told, "mode": spoken}, times, ("call", "eager"), right=right)
        best = min((n for n in ("cuBLAS", "Inductor") if n in times), key=lambda n: times[n].median)
        row["speed"] = f"{items / times[row['ours']].median:.4g}"
        row["dense speed"] = f"{items / times[best].median:.4g}"
        for name, cell in ((row["ours"], "peak MB"), (best, "dense peak MB")):
            row[cell] = _peak(calls[name], owners[name], device)
        found.append(row)
    return found


def sparse_twin(dense: nn.Module, case: ModelCase) -> nn.Module:
    """Return a copy with the case's layers sparse.

    Raises:
        ValueError: the structure does not fit the layers.
    """
    sparse = copy.deepcopy(dense)
    structures = {"": case.structure}
    if case.which == "all":
        kind, _, side = case.structure.partition(":")
        structures = {"": case.structure, "fc2": f"{kind}:{side}:{int(side) // 2}"}
    for last, structure in structures.items():
        config = SparseConfig(structure, sparsity=case.sparsity, permutation="none")

        def asked(site: Site, last: str = last) -> bool:
            name = site.layers[0]
            end = name.rpartition(".")[2]
            if not name.startswith("blocks.") or (end in structures) != bool(last):
                return False
            return case.which != "MLPs" or end in ("fc1", "fc2")

        sparsify(sparse, config, filter_fn=asked)
    return sparse


def _forward(run: Callable[[], Callable[..., Tensor]], x: Tensor) -> Callable[[], Call]:
    def make() -> Call:
        model = run()

        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return call

    return make


def _step(
    owner: nn.Module, run: Callable[[], Callable[..., Tensor]], x: Tensor, classes: Tensor
) -> Callable[[], Call]:
    def make() -> Call:
        model = run()
        optimizer = torch.optim.SGD([p for p in owner.parameters() if p.requires_grad], lr=1e-6)

        def call() -> Tensor:
            loss = F.cross_entropy(model(x).float(), classes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return call

    return make


def _difference(got: Tensor, expected: Tensor) -> float:
    largest = expected.float().abs().max().clamp(min=1e-30)
    return float((got.float() - expected.float()).abs().max() / largest)


def _whole(model: nn.Module) -> int:
    return sum(layer.shape.numel for layer in sparse_layers(model).values())


def _peak(call: Call, owner: nn.Module, device: str) -> str:
    """Return the megabytes of a model and of what a call of it needs beside, at most."""
    if device != "cuda":
        return "-"
    own: list[Any] = [*owner.parameters(), *owner.buffers()]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before
    return f"{(sum(t.numel() * t.element_size() for t in own) + beside) / 2**20:.0f}"

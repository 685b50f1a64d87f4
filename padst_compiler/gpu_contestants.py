"""Who takes part when a layer is timed on a GPU: ours, dense peers, sparse peers.

Each is a callable without arguments that has run once. A peer that fails on a shape is left out,
and why is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.backend import gpu_eager
from padst_compiler.gpu_cases import Case
from padst_compiler.gpu_layers import Layers, compiled, only, product
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.ops import LINEAR_DW, LINEAR_DX
from padst_compiler.structures import Block, unit_of

__all__ = ["Guard", "gradients", "inferred", "mapped", "mlp", "trained"]

PEERS = ("cuBLAS", "Inductor", "masked", "CSR", "BSR", "2:4")
AUTOTUNED = "max-autotune-no-cudagraphs"

Call = Callable[[], Any]
Calls = dict[str, Call]


@dataclass
class Guard:
    """Runs contestants for the first time, and leaves out those that fail.

    Attributes:
        say: gets a line for each reason, once.
        compiles: whether contestants that must be compiled take part.
        wait: returns when the device is done.
        broken: what failed that is no peer but ours, which is a bug.
    """

    say: Callable[[str], None]
    compiles: bool
    wait: Callable[[], None]
    broken: list[str] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    def those_that_run(self, what: object, made: Mapping[str, Callable[[], Call]]) -> Calls:
        """Return the contestants of a case that run, of those that are made here one by one."""
        calls: Calls = {}
        for name, make in made.items():
            try:
                call = make()
                call()
                self.wait()
            except Exception as failure:  # any peer may refuse any shape, each in its own way
                text = f"{name} is left out: {_first_line(failure)}"
                self.tell(text)
                self.broken += [] if name in PEERS else [f"{what}: {text}"]
                continue
            calls[name] = call
        return calls

    def tell(self, text: str) -> None:
        """Say a reason that was not said before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def inferred(case: Case, layers: Layers, sparse: nn.Module, guard: Guard) -> Calls:
    """Return a forward pass of every contestant. BSR and CSR go without their bias: for them."""
    dense, x = layers.dense(case)
    layer = only(sparse)
    weight, bias = layer.weight.detach(), dense.bias.detach()
    mask = (weight != 0).to(weight.dtype)
    makers: dict[str, Callable[[], Call]] = {
        "kernel": lambda: lambda: product(layer, x, bias=layer.bias),
        "cuBLAS": lambda: lambda: F.linear(x, dense.weight, bias),
        "masked": lambda: lambda: F.linear(x, dense.weight * mask, bias),
    }
    if case.full and guard.compiles:
        makers |= _ours(sparse, x)
        makers["Inductor"] = lambda: layers.once("Inductor", lambda: _autotuned(dense, x))
    if case.full and isinstance(layer.structure, Block):
        makers["BSR"] = lambda: _linear_of(x, weight.to_sparse_bsr(layer.structure.sides))  # type: ignore[attr-defined]
    if case.full:
        makers["CSR"] = lambda: _sparse_product(x, weight.to_sparse_csr())
        makers["2:4"] = lambda: layers.once("2:4", lambda: _semi_structured(dense, x))
    return guard.those_that_run(case, makers)


def mlp(case: Case, layers: Layers, guard: Guard) -> tuple[nn.Sequential, Tensor, Calls]:
    """Return a sparse MLP, its input, and a forward pass of every contestant.

    "kernel" is the fused one without the second layer's bias; "two kernels" are two graphs, one of
    the first layer and its activation, one of the second.
    """
    dense, sparse = layers.mlps(case)
    _, x = layers.dense(case)
    first, second = sparse_layers(sparse).values()
    hidden, width = first.shape.out_features, second.shape.out_features

    def fused() -> Tensor:
        given = (x, first.values, first.indices, first.bias, second.values, second.indices)
        return gpu_eager.launch(BLOCK_MLP, *given, hidden, width, "gelu")

    def apart() -> Call:
        one, _ = compiled(sparse[:2], x, kernels="sparse")
        two, _ = compiled(sparse[2:], one(x), kernels="sparse")
        return lambda: two(one(x))

    makers: dict[str, Callable[[], Call]] = {
        "kernel": lambda: fused,
        "cuBLAS": lambda: lambda: dense(x),
        "eager": lambda: lambda: sparse(x),
    }
    if guard.compiles:
        makers |= {"two kernels": apart, **_ours(sparse, x)}
        makers["Inductor"] = lambda: layers.once("Inductor MLP", lambda: _autotuned(dense, x))
    return sparse, x, guard.those_that_run(case, makers)


def mapped(
    case: Case, layers: Layers, sparse: nn.Module, guard: Guard
) -> tuple[Calls, Tensor, Tensor]:
    """Return a forward pass with every kind of permutation, the map and where outputs go.

    Where the structure absorbs a permutation of outputs, "folded" is the compiled graph of a layer
    that has one, and "unfolded" that of a layer that has none.
    """
    dense, x = layers.dense(case)
    layer, (inputs, outputs) = only(sparse), case.layer
    seeded = torch.Generator().manual_seed(2)
    perm = torch.randperm(inputs, generator=seeded).to(x.device)
    into = torch.randperm(outputs, generator=seeded).to(x.device)
    matrix = torch.eye(inputs, dtype=x.dtype, device=x.device)[perm].t().contiguous()

    def graph(permutation: str) -> Callable[[], Call]:
        return lambda: compiled(layers.sparse(case, permutation, "output"), x, kernels="sparse")[1]

    makers: dict[str, Callable[[], Call]] = {
        "none": lambda: lambda: product(layer, x, bias=layer.bias),
        "fused input": lambda: lambda: product(layer, x, perm, None, bias=layer.bias),
        "fused output": lambda: lambda: product(layer, x, None, into, bias=layer.bias),
        "gather": lambda: lambda: product(layer, x.index_select(-1, perm), bias=layer.bias),
        "matmul": lambda: lambda: product(layer, x @ matrix, bias=layer.bias),
        "cuBLAS": lambda: lambda: F.linear(x, dense.weight, dense.bias),
    }
    if guard.compiles and "output" in layer.structure.vacuous_sides:
        makers |= {"unfolded": graph("none"), "folded": graph("random")}
    return guard.those_that_run(case, makers), perm, into


def trained(case: Case, layers: Layers, sparse: nn.Module, guard: Guard) -> tuple[Calls, Tensor]:
    """Return a forward pass with the gradients of all, of every contestant, and what comes back."""
    dense, x = layers.dense(case)
    layer = only(sparse)
    mask = (layer.weight != 0).to(x.dtype)
    grad, leaf = layers.drawn(case, case.layer[1], 3), x.clone().requires_grad_()

    def step(model: Callable[[Tensor], Tensor], owner: nn.Module) -> Call:
        leaves = [leaf, *(p for p in owner.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(model(leaf), leaves, grad)

    def masked(x: Tensor) -> Tensor:
        return F.linear(x, dense.weight * mask, dense.bias)

    makers: dict[str, Callable[[], Call]] = {
        "kernel": lambda: lambda: (product(layer, x, bias=layer.bias), *gradients(layer, x, grad)),
        "eager": lambda: step(sparse, sparse),
        "cuBLAS": lambda: step(dense, dense),
        "masked": lambda: step(masked, dense),
    }
    if guard.compiles:
        makers["call"] = lambda: step(torch.compile(sparse, backend="padst", dynamic=False), sparse)
        tuned = torch.compile(dense, mode=AUTOTUNED, dynamic=False)
        makers["Inductor"] = lambda: step(tuned, dense)
    return guard.those_that_run(case, makers), grad


def gradients(layer: SparseLayer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernels of dX and dW."""
    name, values, indices = layer.structure.name, layer.values, layer.indices
    dx, dw = (partial(gpu_eager.launch, ops[name]) for ops in (LINEAR_DX, LINEAR_DW))
    unit = unit_of(values, indices)
    return dx(grad, values, indices, x.shape[-1]), dw(grad, x, indices, unit)


def _ours(sparse: nn.Module, x: Tensor) -> dict[str, Callable[[], Call]]:
    both: list[Call] = []

    def call() -> Call:
        ours, graph = compiled(sparse, x)
        both.append(graph)
        return lambda: ours(x)

    return {"call": call, "graph": lambda: both[0]}


def _autotuned(dense: nn.Module, x: Tensor) -> Call:
    tuned = torch.compile(dense, mode=AUTOTUNED, dynamic=False)
    tuned(x)
    return lambda: tuned(x)


def _linear_of(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _sparse_product(x: Tensor, weight: Tensor) -> Call:
    return lambda: (weight @ x.t()).t()


def _semi_structured(dense: nn.Linear, x: Tensor) -> Call:
    groups = dense.weight.detach().view(-1, 4)
    largest = groups.abs().topk(2, dim=1).indices
    kept = torch.zeros_like(groups).scatter(1, largest, groups.gather(1, largest))
    weight = torch.sparse.to_sparse_semi_structured(kept.view_as(dense.weight))
    F.linear(x, weight, dense.bias)
    return lambda: F.linear(x, weight, dense.bias)


def _first_line(failure: Exception) -> str:
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]

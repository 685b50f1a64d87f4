"""Who takes part when one layer is timed: ours, dense peers, unstructured peers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import scipy.sparse
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from padst_compiler.backend import padst
from padst_compiler.layers import sparse_layers
from padst_compiler.structures.block import Block

__all__ = ["DENSE", "OTHERS", "compiled", "in_onnxruntime", "inferred", "trained"]

DENSE = ("F.linear", "Inductor", "onnxruntime")
OTHERS = ("masked dense", "torch CSR", "torch BSR", "scipy CSR")
AUTOTUNED = "max-autotune-no-cudagraphs"

Calls = dict[str, Callable[[], Any]]


def inferred(sparse: nn.Module, dense: nn.Linear, x: Tensor, *, others: bool = True) -> Calls:
    """Return a forward pass of every contestant; sparse peers and onnxruntime in fp32 only.

    "graph" is ours without what ``torch.compile`` does around it in each call (guards).

    Args:
        sparse: holds one sparse layer, of the shape of ``dense``; both in eval mode.
        dense: the layer whose peers are timed.
        x: ``[tokens, inputs]``, of the type of the weights.
        others: sparse peers too, which take seconds for many tokens.
    """
    weight, bias = _effective(sparse), dense.bias.detach()
    mask = (weight != 0).to(weight.dtype)
    ours, graph = compiled(sparse, x)
    inductor = torch.compile(dense, mode=AUTOTUNED)
    calls: Calls = {
        "padst": lambda: ours(x),
        "graph": graph,
        "F.linear": lambda: F.linear(x, dense.weight, bias),
        "Inductor": lambda: inductor(x),
    }
    if x.dtype is torch.float32 and (ort := in_onnxruntime(dense, x)) is not None:
        calls["onnxruntime"] = ort
    if not others:
        return calls
    calls["masked dense"] = lambda: F.linear(x, dense.weight * mask, bias)
    if x.dtype is not torch.float32:
        return calls
    (layer,) = sparse_layers(sparse).values()
    rows = weight.to_sparse_csr()
    calls["torch CSR"] = lambda: (rows @ x.t()).t() + bias
    if isinstance(layer.structure, Block) and layer.structure.columns is None:  # MKL: squares only
        blocks = weight.to_sparse_bsr(layer.structure.sides)
        calls["torch BSR"] = lambda: F.linear(x, blocks) + bias
    compressed, columns = scipy.sparse.csr_matrix(weight.numpy()), x.numpy().T
    added = bias.numpy()
    calls["scipy CSR"] = lambda: (compressed @ columns).T + added
    return calls


def trained(sparse: nn.Module, dense: nn.Linear, x: Tensor) -> Calls:
    """Return a forward pass, and the gradients of inputs, weights and bias, of every contestant.

    Args:
        sparse: holds one sparse layer, of the shape of ``dense``; both in training mode.
        dense: the layer whose peers are timed.
        x: ``[tokens, inputs]``, of the type of the weights.
    """
    mask = (_effective(sparse) != 0).to(x.dtype)
    x = x.clone().requires_grad_()
    grad = torch.randn(x.shape[0], dense.out_features, dtype=x.dtype)
    ours, inductor = torch.compile(sparse, backend="padst"), torch.compile(dense, mode=AUTOTUNED)

    def step(model: Callable[[Tensor], Tensor], owner: nn.Module) -> Callable[[], Any]:
        leaves = [x, *(p for p in owner.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(model(x), leaves, grad)

    return {
        "padst": step(ours, sparse),
        "F.linear": step(dense, dense),
        "Inductor": step(inductor, dense),
        "masked dense": step(lambda x: F.linear(x, dense.weight * mask, dense.bias), dense),
    }


def compiled(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[], Any]]:
    """Return a model that runs through ``padst``, and a call of its compiled graph on ``x`` alone.

    Args:
        model: one graph.
        x: its input; the model runs on it once.
    """
    graphs: list[Callable[[], Any]] = []

    def backend(graph: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
        run = padst(graph, arguments)
        graphs.append(lambda: run(*arguments))
        return run

    ours = torch.compile(model, backend=backend)
    ours(x)
    return ours, graphs[-1]


def _effective(sparse: nn.Module) -> Tensor:
    (layer,) = sparse_layers(sparse).values()
    return layer.structure.unpack(layer.values, layer.indices, layer.shape).detach()


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

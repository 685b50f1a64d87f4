"""Whole architectures under every structure: compiled equals eager, forwards and in training.

The ordinary suite takes some small ones, each with another structure; some more are slow, all else
exhaustive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import padst_compiler
from padst_compiler.backend import padst

from .small import ALL
from .test_coverage import STRUCTURES
from .test_zoo import reported

OPTIONS = {"verify": "strict", "kernels": "sparse", "codegen": "off"}
FLOAT32 = {  # what computes in float32 whatever it is given; ``verify`` sees it in float64
    "llama": "RMSNorm, rotary tables, softmax",
    "mistral": "RMSNorm, rotary tables, softmax",
    "qwen2": "RMSNorm, rotary tables, softmax",
    "gemma": "RMSNorm, rotary tables, softmax",
    "mixtral": "RMSNorm, rotary tables, softmax, the router",
    "t5": "the variance of RMSNorm",
    "mamba": "the recurrence",
    "bloom": "softmax",
}
DROPOUTS = ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_prob", "layerdrop")


def cases(*ordinary: str, every: int = 1) -> list[Any]:
    """Return all pairs; of those not named, one of each ``every``-th architecture is slow."""
    found, count = [], len(STRUCTURES)
    for turn, name in enumerate(ALL):
        for at, structure in enumerate(STRUCTURES):
            text = f"{name}-{structure}"
            slow = at == turn % count and turn % every == 0
            mark = pytest.mark.slow if slow else pytest.mark.exhaustive
            marks = () if text in ordinary else (mark,)
            found.append(pytest.param(name, structure, marks=marks, id=text))
    assert set(ordinary) <= {str(case.id) for case in found}
    return found


def sparse(name: str, structure: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in eval mode and float64 with hard random permutations, and inputs."""
    model, inputs = ALL[name]()
    padst_compiler.sparsify(
        model, structure=structure, sparsity=0.5, permutation="random", example_inputs=inputs
    )
    return padst_compiler.harden(model), inputs


def tensors(result: Any) -> list[Tensor]:
    """Return every floating-point tensor of a result."""
    leaves = tree_leaves(list(result.values()) if isinstance(result, dict) else result)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def tolerance(name: str) -> float:
    """Return the largest error allowed, as a share of a tensor's largest number."""
    return 1e-6 if name in FLOAT32 else 1e-9


def assert_close(ours: list[Tensor], theirs: list[Tensor], error: float) -> None:
    """Compare by the largest number of each tensor."""
    assert theirs and len(ours) == len(theirs)
    for y, expected in zip(ours, theirs, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(y, expected, rtol=0.0, atol=error * max(scale, 1e-3))


def narrow(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs in float32."""
    wide = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return inputs | {name: value.float() for name, value in wide.items()}


def breaks() -> set[str]:
    """Return why Dynamo has broken graphs since its last reset; how often depends on the data."""
    return set(counters["graph_break"])


@functools.cache
def breaks_of_the_dense_model(name: str) -> set[str]:
    """Return why Dynamo breaks the model that nobody made sparse."""
    model, inputs = ALL[name]()
    counters.clear()
    with torch.no_grad():
        torch.compile(model, backend=lambda module, _: module.forward)(**inputs)
    torch._dynamo.reset()
    return breaks()


def ours(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    return padst(module, examples, options=OPTIONS)


@pytest.mark.parametrize(
    ("name", "structure"),
    cases("mixer-diagonal", every=3),
)
def test_compiled_equals_eager_and_the_report_is_right(name: str, structure: str) -> None:
    model, inputs = sparse(name, structure)
    allowed = breaks_of_the_dense_model(name)
    counters.clear()
    with torch.no_grad(), reported() as said:
        expected = tensors(model(**inputs))
        fast = torch.compile(model, backend=ours, fullgraph=not allowed)
        assert_close(tensors(fast(**inputs)), expected, tolerance(name))
    assert breaks() <= allowed
    verdicts = [str(row[0]) for row in said if len(row) == 1]
    report = padst_compiler.explain(model, inputs, options=OPTIONS)
    assert report.gathers == sum(row[2] for row in said if row[0] == "lower_maps")
    assert verdicts
    for verdict in (*verdicts, *report.verdicts):
        assert verdict.startswith("verified in float64")
    torch._dynamo.reset()
    inputs = narrow(inputs)
    with torch.no_grad():
        expected = tensors(model.float()(**inputs))
        assert_close(tensors(torch.compile(model, backend=ours)(**inputs)), expected, 1e-4)


def still(model: nn.Module) -> None:
    """Switch dropout off: eager and compiled code draw other random numbers."""
    for module in model.modules():
        for attribute in DROPOUTS:
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def step(model: nn.Module, call: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Return the outputs and the gradients of all parameters."""
    torch.manual_seed(1)
    outputs = tensors(call(**inputs))
    loss = sum(t.square().mean() for t in outputs if t.requires_grad)
    assert isinstance(loss, Tensor)
    used = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, used, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if g is None else g for g in gradients)]


@pytest.mark.parametrize(("name", "structure"), cases("vit-nm:4:16", "mixer-fan_in", every=6))
def test_a_training_step(name: str, structure: str) -> None:
    model, inputs = sparse(name, structure)
    still(model.train())
    expected = step(model, model, inputs)
    found = step(model, torch.compile(model, backend=ours), inputs)
    assert_close(found, expected, tolerance(name))

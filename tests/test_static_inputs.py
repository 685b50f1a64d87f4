"""Weights of a folded graph stay where they are when CUDA graphs replay it."""

from typing import Any

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.static_inputs import mark, told


def tensors(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size) for size in sizes]


def compiled(how: dict[str, Any], inputs: list[Any], examples: list[Any]) -> Any:
    return told(lambda graph, inputs, **how: how.get("static_input_idxs"), examples)(
        None, inputs, **how
    )


def test_marked_inputs_are_told_behind_the_constants() -> None:
    examples = tensors(2, 3, 4)
    mark(examples[1:])
    assert compiled({}, examples, examples) == [1, 2]
    constants = tensors(7)
    given = {"static_input_idxs": [0]}
    assert compiled(given, [*constants, *examples], examples) == [0, 2, 3]


def test_nothing_is_told_of_inputs_that_changed_places() -> None:
    examples = tensors(2, 3, 4)
    mark(examples[:1])
    for inputs in (examples[1:], tensors(2, 4, 3), [3, *examples[1:]]):
        assert compiled({"static_input_idxs": [5]}, inputs, examples) == [5]


def test_a_backward_graph_has_other_inputs() -> None:
    examples = tensors(2)
    mark(examples)
    assert compiled({"is_backward": True}, examples, examples) is None


def test_inductor_itself_compiles_where_nothing_is_marked() -> None:
    def inner() -> None: ...

    assert told(inner, tensors(2)) is inner


def test_every_weight_of_a_compiled_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen: list[tuple[int, list[int]]] = []
    inner = compile_fx.compile_fx_inner

    def record(graph: Any, inputs: Any, **how: Any) -> Any:
        seen.append((len(inputs), list(how.get("static_input_idxs", ()))))
        return inner(graph, inputs, **how)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", record)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    padst.sparsify(model, structure="block:16", sparsity=0.5, permutation="random")
    padst.harden(model)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend="padst")(torch.randn(4, 64))
    ((inputs, static),) = seen
    assert len(static) == inputs - 1  # all but the tokens

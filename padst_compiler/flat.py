"""A model as one flat function of its inputs, Parameters and buffers, through ``torch.export``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

__all__ = ["exported"]


def exported(
    model: torch.nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool
) -> tuple[Callable[..., Any], list[Any], list[Any], dict[int, str]]:
    """Export ``model`` to one graph of flat inputs, Parameters and buffers among them.

    Returns:
        The function, the fake inputs, the real inputs, and the positions of Parameters, buffers and
        constants with the module that owns each.

    Raises:
        ValueError: the model fixes the batch size.
    """
    shapes = None
    if dynamic_batch:
        inputs = tuple(t if t.shape[0] > 1 else t.repeat(2, *[1] * (t.dim() - 1)) for t in inputs)
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple({0: batch} for _ in inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(model, inputs, dynamic_shapes=_named(model, shapes))
    except torch._dynamo.exc.UserError as error:
        raise ValueError(
            f"Expected a model whose first input axis may be any batch size. Got: {error}. "
            "Pass dynamic_batch=False."
        ) from error
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    feed = iter(inputs)
    reals: list[Any] = []
    state: dict[int, str] = {}
    for position, spec in enumerate(program.graph_signature.input_specs):
        if spec.kind is InputKind.USER_INPUT:
            reals.append(next(feed))
            continue
        assert spec.target is not None
        tensors = program.constants if spec.target in program.constants else program.state_dict
        reals.append(tensors[spec.target])
        state[position] = spec.target.rpartition(".")[0]
    results = len(program.graph_signature.user_outputs)
    mutations = len(program.graph_signature.output_specs) - results

    def function(*arguments: Any) -> Any:
        return tuple(program.graph_module(*arguments))[mutations:]

    return function, [n.meta["val"] for n in holders], reals, state


def _named(model: torch.nn.Module, shapes: tuple[Any, ...] | None) -> Any:
    """Return dynamic shapes as torch.export wants them where ``forward`` takes ``*args``."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return (shapes,) if shapes is not None and variadic else shapes

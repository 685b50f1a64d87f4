"""Run a model and leave it as it was: state, attributes, random state and the inputs given."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from padst_compiler.inputs import bind

__all__ = ["call_arguments", "eager", "left_as_it_was"]


@contextmanager
def left_as_it_was(
    model: nn.Module, written: Mapping[int, tuple[Tensor, Tensor]] | None = None
) -> Iterator[None]:
    """Undo what runs inside do to ``model`` and to the global generators, also when they fail.

    Buffers, attributes, children and modes come back. Numbers that only ``forward`` knows of, such
    as items of a list, are out of reach.

    Args:
        model: any module.
        written: parameters with what they were; filled while running, by who sees the writes.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with left_as_it_was(norm):
        ...     _ = norm(torch.ones(4, 2))
        >>> int(norm.num_batches_tracked)
        0
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    # Forward may rebind attributes and create children, buffers and caches.
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for m in modules
        for table in (m.__dict__, m._parameters, m._buffers, m._modules)
    ]
    # Batch norm's schema hides that it writes, so buffers are copied whatever happens.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for table, before in tables:
            _restore(table, before)
        with torch.no_grad():
            for tensor, numbers in (*buffers, *(written or {}).values()):
                if not torch.equal(tensor, numbers):
                    tensor.copy_(numbers)


def _restore(table: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in table if key not in before]:
        del table[key]
    for key, value in before.items():
        if key not in table or table[key] is not value:
            table[key] = value


def eager() -> AbstractContextManager[Any]:
    """Let compiled parts run as Python; without Dynamo there are none, and it loads slowly.

    Example:
        >>> with eager():
        ...     nn.Identity()(torch.ones(1))
        tensor([1.])
    """
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def call_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for ``model``, with copies of all tensors.

    Args:
        model: says where the inputs must lie.
        example_inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: a tensor lies on a device where the model has nothing.

    Example:
        >>> args, kwargs = call_arguments(nn.Identity(), (torch.ones(2), 3))
        >>> len(args), kwargs
        (2, {})
    """
    copies: dict[int, Tensor] = {}  # the same tensor twice stays the same tensor twice

    def copy(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    args, kwargs = bind(model, example_inputs)
    copied: tuple[tuple[Any, ...], dict[str, Any]]
    copied = pytree.tree_map_only(Tensor, copy, (args, kwargs))
    return copied

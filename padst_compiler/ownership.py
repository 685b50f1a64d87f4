"""The class of a module whose Parameters became sparse: reading one computes it.

The class stays a subclass of what it was, with its name, so that hooks, ``isinstance``, attributes,
``copy.deepcopy`` and ``pickle`` go on. It has a property for each sparse Parameter, and one forward
pass of the module computes each at most once.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["SUFFIX", "can_own", "child_name", "own", "owned", "release"]

SUFFIX = "_sparse"
"""What the name of a sparse layer has behind that of the Parameter whose place it takes."""

_MARK = "_padst_owned"
_NEW = vars(copyreg)["__newobj__"]  # what pickle calls for a class without a reduction of its own


def child_name(attribute: str) -> str:
    """Return under which name an owner holds the sparse layer of a Parameter.

    Example:
        >>> child_name("in_proj_weight")
        'in_proj_weight_sparse'
    """
    return f"{attribute}{SUFFIX}"


def owned(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the Parameters of ``module`` that are sparse."""
    names: tuple[str, ...] = vars(type(module)).get(_MARK, ())
    return names


def can_own(owner: nn.Module, attribute: str) -> str:
    """Return why a Parameter cannot be computed when it is read; empty where it can.

    Args:
        owner: whose Parameter it is.
        attribute: its name there.

    Example:
        >>> can_own(nn.Linear(2, 2), "weight"), can_own(nn.GRU(2, 2), "weight_ih_l0")
        ('', 'GRU keeps its weights in a list of its own')
    """
    kind = type(owner).__name__
    if isinstance(owner, nn.RNNBase):
        return f"{kind} keeps its weights in a list of its own"
    if isinstance(owner, torch.jit.ScriptModule):
        return f"{kind} is a script, whose code cannot change"
    lists = nn.Sequential | nn.ModuleList | nn.ModuleDict
    if isinstance(owner, lists) and not isinstance(owner, parametrize.ParametrizationList):
        return f"{kind} runs its children, and would run the sparse weight with them"
    if hasattr(type(owner), attribute):
        return f"{kind} computes {attribute} itself"
    if hasattr(owner, child_name(attribute)):
        return f"{kind} has a {child_name(attribute)} already"
    return ""


def own(owner: nn.Module, attribute: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of a Parameter: ``owner.<attribute>`` is ``layer()`` from now on.

    Args:
        owner: holds a Parameter of that name.
        attribute: the name.
        layer: a module whose call without arguments gives the tensor.

    Example:
        >>> class Twice(nn.Module):
        ...     def __init__(self, stored):
        ...         super().__init__()
        ...         self.stored, self.readers = stored, 0
        ...     def forward(self):
        ...         return 2 * self.stored
        >>> linear = nn.Linear(3, 2)
        >>> own(linear, "weight", Twice(linear.weight))
        >>> linear.weight.shape, [name for name, _ in linear.named_parameters()]
        (torch.Size([2, 3]), ['bias', 'weight_sparse.stored'])
    """
    names = owned(owner)
    base = type(owner).__bases__[0] if names else type(owner)
    del owner._parameters[attribute]
    children = list(owner._modules.items())
    children.insert(len(names), (child_name(attribute), layer))  # where parameters stood: first
    owner._modules.clear()
    owner._modules.update(children)
    owner.__class__ = _reading(base, (*names, attribute))


def release(owner: nn.Module, attribute: str) -> nn.Module:
    """Undo ``own`` but for the Parameter, which is gone; return the layer."""
    base, names = type(owner).__bases__[0], owned(owner)
    left = tuple(name for name in names if name != attribute)
    owner.__class__ = _reading(base, left) if left else base
    layer = owner._modules.pop(child_name(attribute))
    assert layer is not None
    return layer


def _reading(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class of ``base`` modules with these Parameters sparse; one for all of a kind."""
    for known in base.__subclasses__():
        if vars(known).get(_MARK) == names:
            return known
    namespace: dict[str, Any] = {name: _property(name) for name in names}
    namespace |= {
        _MARK: names,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": functools.partialmethod(_reduce, base, names),
        "register_parameter": functools.partialmethod(_register, base, names),
        "_load_from_state_dict": functools.partialmethod(_load, base, names),
        "forward": _forward(base, names),
    }
    metaclass: Any = type(base)
    kind: type[nn.Module] = metaclass(base.__name__, (base,), namespace)
    return kind


def _property(name: str) -> property:
    child = child_name(name)

    def read(self: nn.Module) -> Tensor:
        tensor: Tensor = getattr(self, child)()
        return tensor

    return property(read, lambda self, value: _refuse(self, name, value))


def _refuse(self: nn.Module, name: str, value: object) -> None:
    raise AttributeError(
        f"Expected {name!r} to be read only: it is sparse. Got an assignment of "
        f"{type(value).__name__} in {type(self).__name__}. Write to {child_name(name)}.values, or "
        "call padst.to_dense(model) first."
    )


def _register(
    self: nn.Module, base: type[nn.Module], names: tuple[str, ...], name: str, param: Any
) -> None:
    """Refuse a Parameter in the place of a sparse one; ``setattr`` asks here before a property."""
    if name in names:
        _refuse(self, name, param)
    base.register_parameter(self, name, param)


def _forward(base: type[nn.Module], names: tuple[str, ...]) -> Any:
    """Return ``base.forward``, during which each sparse Parameter is computed at most once."""
    children = [child_name(name) for name in names]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler merges what is computed twice
            return base.forward(self, *args, **kwargs)
        with _held([getattr(self, child) for child in children]):
            return base.forward(self, *args, **kwargs)

    return forward


@contextmanager
def _held(layers: list[Any]) -> Iterator[None]:
    for layer in layers:
        layer.readers += 1
    try:
        yield
    finally:
        for layer in layers:
            layer.readers -= 1


def _reduce(self: Any, base: type[nn.Module], names: tuple[str, ...], protocol: Any) -> Any:
    """Pickle by the original class: this one has no place in a module to be found at."""
    reduced = base.__reduce_ex__(self, max(2, int(protocol)))
    if isinstance(reduced, tuple) and reduced[0] is _NEW:
        return (_anew, (base, names), *reduced[2:])
    return reduced


def _anew(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _reading(base, names)
    return kind.__new__(kind)


def _load(
    self: nn.Module,
    base: type[nn.Module],
    names: tuple[str, ...],
    state_dict: dict[str, Any],
    prefix: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Hand a dense checkpoint's Parameter to the sparse layer, which packs it."""
    for name in names:
        if f"{prefix}{name}" in state_dict:  # in place: torch hands each module a copy of its own
            dense = state_dict.pop(f"{prefix}{name}")
            state_dict.setdefault(f"{prefix}{child_name(name)}.weight", dense)
    base._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

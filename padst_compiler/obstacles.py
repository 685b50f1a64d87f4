"""Where a linear module keeps its weight, how that becomes sparse, and what stands in the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from padst_compiler.ownership import can_own
from padst_compiler.structures import Shape
from padst_compiler.tensors import is_plain

__all__ = ["Found", "find_weight", "obstacle"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What keeps the zeros of the parameter that it computes a weight from, and that one's name.
_SCALED = {"_WeightNorm": "original1", "_SpectralNorm": "original"}
_HOOKED = ("weight_v", "weight_orig")  # of the old weight_norm; of spectral_norm and prune


@dataclass(frozen=True)
class Found:
    """A weight: of which kind, in which module, under which name below the site's own.

    ``columns`` says that the code which reads it stays; they are the axes that are inputs.
    """

    kind: str
    module: nn.Module
    below: str
    columns: tuple[int, ...] = ()
    shape: Shape | None = None
    note: str = ""
    obstacle: str = ""


def find_weight(module: nn.Module, read: bool = False) -> Found | None:
    """Return the weight of a linear module; None where the module is none.

    Args:
        module: any.
        read: others read its weight without calling it.

    Example:
        >>> find_weight(nn.Conv2d(8, 8, 3, stride=2)).kind
        'conv2d'
        >>> find_weight(nn.Conv2d(8, 8, 3, groups=2)).kind
        'conv'
    """
    found = _as_its_kind(module)
    if found is None:
        return None
    if parametrize.is_parametrized(module, "weight"):
        lists: Any = module.parametrizations
        below = lists["weight"]
        kinds = [type(step).__name__ for step in below]
        name = _SCALED.get(kinds[0]) if len(kinds) == 1 else None
        if name is None:
            cure = "parametrize.remove_parametrizations first"
            return replace(found, obstacle=f"its weight is computed by {', '.join(kinds)}: {cure}")
        note = f"below {kinds[0].lstrip('_')}"
        path = f"parametrizations.weight.{name}"
        return _stays(replace(found, module=below, below=path, note=note))
    if module._parameters.get("weight") is None:
        name = next((n for n in _HOOKED if module._parameters.get(n) is not None), None)
        if name is None:
            return replace(found, obstacle="its weight is computed before each call")
        return _stays(replace(found, below=name, note=f"below what computes weight from {name}"))
    if why := _own_way(module, found.kind):
        return _stays(replace(found, note=why))
    if read:
        return _stays(replace(found, note="nn.MultiheadAttention reads it without calling it"))
    return found


def obstacle(module: nn.Module | None, kind: str, attribute: str) -> str:
    """Return why the parameter of a site cannot be made sparse; empty where it can.

    Args:
        module: that holds it.
        kind: by the words of ``Site.kind``.
        attribute: its name in the module.

    Example:
        >>> import torch
        >>> obstacle(nn.Linear(2, 2, device="meta"), "linear", "weight")
        'its weight is on the meta device: load or initialise it first'
    """
    if kind == "sparse":
        return "sparse already"
    weight = None if module is None else module._parameters.get(attribute)
    if module is None or weight is None:
        return "its weight is computed"
    if kind in ("mha", "conv", "functional") and (why := can_own(module, attribute)):
        return why
    if not is_plain(weight) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the meta device: load or initialise it first"
    return "" if weight.numel() else "it has no weights"


def _as_its_kind(module: nn.Module) -> Found | None:
    """Return what a module is by its class and sizes."""
    if isinstance(module, nn.Linear):
        return Found("linear", module, "weight", (), Shape(module.out_features, module.in_features))
    weight = module._parameters.get("weight")
    # Known by name, so that transformers need not be installed.
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        inputs, outputs = weight.shape
        if getattr(module, "nf", None) == outputs and getattr(module, "nx", inputs) == inputs:
            return Found("conv1d", module, "weight", (), Shape(outputs, inputs))
    if isinstance(module, _CONVOLUTIONS):
        point, kernel = set(module.kernel_size) == {1}, module.kernel_size
        patch = module.in_channels // module.groups * math.prod(kernel)
        plane = "conv2d" if isinstance(module, nn.Conv2d) else "conv"
        shape = Shape(module.out_channels, patch, kernel)
        found = Found("conv1x1" if point else plane, module, "weight", (), shape)
        return _stays(found) if plane == "conv" and not point else found
    if isinstance(module, _TRANSPOSED):
        rows = module.out_channels // module.groups * math.prod(module.kernel_size)
        found = Found("conv", module, "weight", (0,), Shape(rows, module.in_channels))
        mixed = f"transposed convolution in {module.groups} groups: its inputs are apart"
        return found if module.groups == 1 else replace(found, obstacle=mixed)
    return None


def _stays(found: Found) -> Found:
    """Return the same weight for code that stays: as a parameter, not as a module."""
    if found.columns:
        return found
    convolution = isinstance(found.module, _CONVOLUTIONS) or found.kind in ("conv1x1", "conv2d")
    if convolution or found.kind == "conv":
        assert found.shape is not None
        dims = len(found.shape.kernel)
        return replace(found, kind="conv", columns=tuple(range(1, 2 + dims)))
    return replace(found, kind="functional", columns=(0,) if found.kind == "conv1d" else (1,))


def _own_way(module: nn.Module, kind: str) -> str:
    """Return in which way a module computes otherwise than our sparse layer of its kind."""
    if not _calls_its_kind(module, kind):
        return f"{type(module).__qualname__} computes forward in its own way"
    if parametrize.is_parametrized(module):
        return "another of its parameters is computed"
    if isinstance(module, _CONVOLUTIONS) and kind != "conv":
        if module.groups != 1:
            return f"in {module.groups} groups"
        if kind == "conv1x1" and (
            module.padding_mode != "zeros"
            or any(p not in (0, "same", "valid") for p in _pads(module))
        ):
            return f"padding {module.padding} ({module.padding_mode})"
    return ""


def _pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int | str, ...]:
    return (module.padding,) if isinstance(module.padding, str) else tuple(module.padding)


def _calls_its_kind(module: nn.Module, kind: str) -> bool:
    """Whether calling the module runs its kind's own forward, not a subclass's or a wrapper's."""
    if kind == "conv1d":
        return "forward" not in vars(module)
    bases = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
    base = next(base for base in bases if isinstance(module, base))
    methods = [name for name in ("__call__", "forward", "_conv_forward") if hasattr(base, name)]
    return not any(
        name in vars(module) or getattr(type(module), name) is not getattr(base, name)
        for name in methods
    )

"""What stands in the way of a module becoming sparse."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from padst_compiler.tensors import is_plain

__all__ = ["obstacle"]


def obstacle(module: nn.Module, kind: str) -> str:
    """Return why a module of a known kind cannot be converted; empty where it can.

    Args:
        module: linear, of the kind.
        kind: by the words of ``Site.kind``.

    Example:
        >>> obstacle(nn.Conv2d(8, 8, 3, groups=2), "conv2d")
        'k x k convolution in 2 groups'
        >>> obstacle(nn.Conv2d(8, 8, 3, stride=2), "conv2d")
        ''
    """
    if kind == "sparse":
        return "sparse already"
    if parametrize.is_parametrized(module):
        return "its parameters are computed: parametrize.remove_parametrizations first"
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is computed before each call (weight_norm, prune); make it permanent first"
        )
    if not _calls_its_kind(module, kind):
        return f"{type(module).__qualname__} computes forward in its own way"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups != 1:
            size = "1x1" if kind == "conv1x1" else "k x k"
            return f"{size} convolution in {module.groups} groups"
        if kind == "conv1x1" and (
            module.padding_mode != "zeros"
            or any(p not in (0, "same", "valid") for p in _pads(module))
        ):
            return f"1x1 convolution with padding {module.padding} ({module.padding_mode})"
    if not is_plain(weight) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the meta device: load or initialise it first"
    return "" if weight.numel() else "it has no weights"


def _pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int | str, ...]:
    return (module.padding,) if isinstance(module.padding, str) else tuple(module.padding)


def _calls_its_kind(module: nn.Module, kind: str) -> bool:
    """Whether calling the module runs its kind's own forward, not a subclass's or a wrapper's."""
    if kind == "conv1d":
        return "forward" not in vars(module)
    bases = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    base = next(base for base in bases if isinstance(module, base))
    methods = [name for name in ("__call__", "forward", "_conv_forward") if hasattr(base, name)]
    return not any(
        name in vars(module) or getattr(type(module), name) is not getattr(base, name)
        for name in methods
    )

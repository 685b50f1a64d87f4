"""Hand an optimizer over from dense weights to the values and logits of sparse layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

__all__ = ["check_optimizer", "hand_over", "unchanged_on_error"]


def check_optimizer(optimizer: Any, weights: Sequence[Tensor]) -> None:
    """Refuse an optimizer that cannot take over.

    Args:
        optimizer: what the caller passed.
        weights: the dense weights that are about to go.

    Raises:
        TypeError: it is no torch optimizer.
        ValueError: it holds none of the weights, or has room for one group only.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected a torch.optim.Optimizer. Got {type(optimizer).__name__}. "
            "Leave optimizer out and build one from model.parameters() afterwards."
        )
    if isinstance(optimizer, LBFGS):  # it keeps a flat copy of its parameters' sizes
        raise ValueError(
            "Expected an optimizer with parameter groups. Got LBFGS. "
            "Leave optimizer out and build it from model.parameters() afterwards."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if weights and held.isdisjoint(map(id, weights)):
        raise ValueError(
            f"Expected an optimizer of this model. Got {type(optimizer).__name__} without any of "
            f"the {len(weights)} weights that become sparse. Pass the one built from "
            "model.parameters()."
        )


def hand_over(
    optimizer: Optimizer,
    old: Mapping[str, nn.Parameter],
    new: Mapping[str, Mapping[str, nn.Parameter]],
) -> None:
    """Put each layer's new parameters where its old weight was; the old weight's state is dropped.

    The first new parameter takes the weight's place. Others (logits) join its group; where that
    group decays weights, they get a group of their own after it, the same but without decay:
    pulling logits to zero would blur the permutation.

    Args:
        optimizer: as ``check_optimizer`` accepts it.
        old: the dense weight of each layer, by the layer's name.
        new: the parameters that replace it, by layer and name within the layer.

    Example:
        >>> import torch
        >>> dense, values = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([dense], lr=0.1)
        >>> hand_over(sgd, {"fc": dense}, {"fc": {"values": values}})
        >>> sgd.param_groups[0]["params"][0] is values
        True
    """
    layer_of = {id(weight): layer for layer, weight in old.items()}
    for group in list(optimizer.param_groups):
        extra: dict[str, nn.Parameter] = {}
        for at, parameter in enumerate(group["params"]):
            layer = layer_of.get(id(parameter))
            if layer is None:
                continue
            optimizer.state.pop(parameter, None)
            (name, values), *others = new[layer].items()
            group["params"][at] = values
            if "param_names" in group:
                group["param_names"][at] = _join(layer, name)
            extra |= {_join(layer, other): logits for other, logits in others}
        if extra:
            _append(optimizer, group, extra)


def _append(optimizer: Optimizer, group: dict[str, Any], extra: Mapping[str, nn.Parameter]) -> None:
    if not group.get("weight_decay"):
        group["params"].extend(extra.values())
        if "param_names" in group:
            group["param_names"].extend(extra)
        return
    named = "param_names" in group
    copied = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    params = list(extra.items()) if named else list(extra.values())
    optimizer.add_param_group(copied | {"params": params, "weight_decay": 0.0})


@contextmanager
def unchanged_on_error(optimizer: Optimizer | None) -> Iterator[None]:
    """Restore groups and state of ``optimizer`` if what runs inside fails.

    Args:
        optimizer: any optimizer, or None for nothing to restore.
    """
    if optimizer is None:
        yield
        return
    groups = list(optimizer.param_groups)
    lists = [(g[k], list(g[k])) for g in groups for k in ("params", "param_names") if k in g]
    state = dict(optimizer.state)
    try:
        yield
    except BaseException:
        optimizer.param_groups[:] = groups
        for live, before in lists:
            live[:] = before
        optimizer.state.clear()
        optimizer.state.update(state)
        raise


def _join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name

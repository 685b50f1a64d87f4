"""Make a model sparse in place: plan, prepare everything, then change it all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from padst_compiler.config import ConfigMap
from padst_compiler.handover import check_optimizer, hand_over, unchanged_on_error
from padst_compiler.layers import SparseLayer
from padst_compiler.plan import Plan, plan
from padst_compiler.selection import SoftSelection
from padst_compiler.sites import Site
from padst_compiler.starts import Start, adopt, prepare, weight_of
from padst_compiler.structures import Structure

__all__ = ["sparsify"]


def sparsify(
    model: nn.Module,
    config: ConfigMap | None = None,
    *,
    structure: Structure | str = "block",
    sparsity: float = 0.9,
    permutation: str = "learned",
    filter_fn: Callable[..., bool] | None = None,
    example_inputs: Any = None,
    optimizer: Optimizer | None = None,
    strict: bool = False,
) -> nn.Module:
    """Make the linear layers of ``model`` sparse, in place.

    ``plan`` shows beforehand what will happen to each. On any error the model and the optimizer
    stay as they were. Schedulers count parameter groups: build them afterwards.

    Args:
        model: any module with ``nn.Linear``, transformers' ``Conv1D`` or ungrouped convolutions.
        config: a config for all layers, or a mapping from names or "re:..." to configs or None.
        structure: instead of ``config``: "block", "nm:2:4", "diagonal", "fan_in", "dynadiag", ...
        sparsity: instead of ``config``: the fraction of zeros.
        permutation: instead of ``config``: "none", "random", "learned", "low_rank", ...
        filter_fn: ``filter_fn(site)`` or ``filter_fn(module, name)``, True for what to convert.
        example_inputs: a tensor, tuple or dict to run the model on once while planning.
        optimizer: gets the new parameters in the place of the old ones, without their state.
        strict: raise where a requested layer has to stay dense, instead of warning.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an argument is of another type.
        ValueError: nothing can become sparse, or an argument has a value that it cannot have.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        >>> sparsify(net, structure="block:16", sparsity=0.75)[0].values.shape
        torch.Size([8, 1, 16, 16])
    """
    chosen = plan(
        model,
        example_inputs,
        config,
        structure=structure,
        sparsity=sparsity,
        permutation=permutation,
        filter_fn=filter_fn,
        strict=strict,
    )
    _refuse(model, chosen, by_default=not isinstance(config, Mapping) and filter_fn is None)
    weights = {site.layers[0]: weight_of(site) for site in chosen.sparse}
    if optimizer is not None:
        check_optimizer(optimizer, [w for w in weights.values() if w.requires_grad])
    prepared = prepare(chosen.sparse)
    modules = [site.module for site in chosen.sparse if site.module is not None]
    with _unchanged_on_error(modules), unchanged_on_error(optimizer):
        layers = {site.layers[0]: _adopt(site, start) for site, start in prepared}
        if optimizer is not None:
            hand_over(optimizer, weights, _parameters_of(layers))
    if refused := [site for site in chosen.sites if site.refused]:
        said = f"{len(refused)} requested sites stay dense: {_reasons(refused)}"
        warnings.warn(said, stacklevel=2)
    return model


def _refuse(model: nn.Module, chosen: Plan, by_default: bool) -> None:
    """Raise where nothing would come of it, or where it would break what stands."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"Expected a model before DistributedDataParallel. Got it at {name or '(root)'!r}: "
                "it holds on to the dense weights. Call sparsify first, then wrap the model."
            )
    again = [s for s in chosen.sites if s.kind == "sparse" and s.requested]
    if again:
        raise ValueError(
            f"Expected dense layers. Got {again[0].label!r}, which is sparse already. "
            "Call to_dense(model) first, or name only the dense layers in a config."
        )
    if not chosen.sites:
        raise ValueError(
            f"Expected a model with linear layers. Got {type(model).__name__} without any. Use "
            "nn.Linear, transformers' Conv1D or convolutions."
        )
    asked = [s for s in chosen.sites if s.requested]
    if not chosen.sparse and (any(s.refused for s in asked) or (by_default and not asked)):
        raise ValueError(
            f"Expected at least one site to become sparse. Got {len(chosen.sites)}, all dense: "
            f"{_reasons([s for s in asked if s.refused] or chosen.sites)} "
            "Choose another structure, or name the layers in a config or with filter_fn."
        )


def _reasons(sites: Sequence[Site]) -> str:
    first = "; ".join(f"{site.label}: {site.reason.rstrip('.')}" for site in sites[:3])
    more = f"; and {len(sites) - 3} more" if len(sites) > 3 else ""
    return f"{first}{more}. plan(model) lists them all."


def _adopt(site: Site, start: Start) -> SparseLayer:
    assert site.structure is not None and site.config is not None
    indices, permutation, values = start
    layer = adopt(site, site.structure, indices, permutation, site.side, values)
    if site.config.soft:
        layer.selection = SoftSelection(layer.kept, site.kept, layer.values.device)
        layer.selection.alpha.requires_grad_(layer.values.requires_grad)
    layer.config = replace(
        site.config, sparsity=site.sparsity, permutation=site.permutation, side=site.side
    )
    return layer


def _parameters_of(layers: Mapping[str, SparseLayer]) -> dict[str, dict[str, nn.Parameter]]:
    """Return ``values`` first, then what chooses and permutes; not the bias, which stays.

    What several layers learn together belongs to the first of them.
    """
    parts = ("permutation.", "selection.")
    found: dict[str, dict[str, nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, layer in layers.items():
        own = {n: p for n, p in layer.named_parameters() if n.startswith(parts)}
        found[name] = {"values": layer.values} | {n: p for n, p in own.items() if p not in seen}
        seen |= set(own.values())
    return found


@contextmanager
def _unchanged_on_error(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore classes, parameters, buffers and attributes if what runs inside fails."""
    tables: list[tuple[dict[str, Any], ...]] = [
        (m.__dict__, m._parameters, m._buffers, m._modules) for m in modules
    ]
    before = [
        (type(m), [dict(table) for table in held]) for m, held in zip(modules, tables, strict=True)
    ]
    try:
        yield
    except BaseException:
        for module, held, (kind, copies) in zip(modules, tables, before, strict=True):
            module.__class__ = kind
            for table, copy in zip(held, copies, strict=True):
                table.clear()
                table.update(copy)
        raise

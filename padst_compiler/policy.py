"""Which sites are asked to become sparse: by default, by a filter, or by names in a mapping."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from padst_compiler.config import ConfigMap, SparseConfig
from padst_compiler.sites import Site
from padst_compiler.text import suggest

__all__ = ["check_names", "choose", "default_exceptions", "find_config"]

# Whole components of a name. Some words also name inner layers (GPT-J's fc_out, a list of attention
# heads), so those count at the top of a model only.
_HEAD = re.compile(
    r"(^|\.)(lm_head|head|classifier|score|logits|output_projection|pooler)(\.|$)"
    r"|^(heads|fc_out|output|cls)(\.|$)"
)


def choose(
    model: nn.Module,
    sites: Sequence[Site],
    config: ConfigMap,
    filter_fn: Callable[..., bool] | None = None,
) -> None:
    """Set ``requested``, ``config`` and, where a site is left alone, the ``reason``.

    Args:
        model: whose sites these are.
        sites: as discovered.
        config: one config: the default exceptions apply. A mapping: only what it names.
        filter_fn: ``filter_fn(site)`` or ``filter_fn(module, name)``; replaces the default
            exceptions, narrows a mapping. Not called for sites that are no modules.

    Raises:
        TypeError: the mapping holds something else than configs.
        ValueError: a key of the mapping matches no site.
    """
    mapping = None if isinstance(config, SparseConfig) else config
    if mapping is not None:
        check_names(mapping, [site.names for site in sites])
    wanted = None if filter_fn is None else _as_site_filter(filter_fn)
    kept = default_exceptions(model, sites) if mapping is None and wanted is None else {}
    for site in sites:
        found = ("", config) if mapping is None else find_config(mapping, site.names)
        if found is None:
            site.reason = "not in config"
        elif found[1] is None:
            site.reason = f"config says dense ({found[0]!r})"
        elif site.name in kept:
            site.reason, site.exempt = site.obstacle or kept[site.name], True
        elif wanted is not None and site.module is None:
            site.reason = site.obstacle
        elif wanted is not None and not wanted(site):
            site.reason = "filter_fn leaves it out"
        elif mapping is None and wanted is None and site.obstacle and site.kind != "sparse":
            site.reason = site.obstacle
        else:
            assert isinstance(found[1], SparseConfig)
            site.requested, site.config = True, found[1]


def default_exceptions(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Return the sites that stay dense unless they are asked for, with the reason.

    Output heads by name, or tied to an embedding; else the last linear layer, if nobody reads
    features of its width; a first convolution; and depthwise ones. Embeddings and norms are no
    sites to begin with.

    Args:
        model: whose sites these are.
        sites: as discovered.

    Example:
        >>> from padst_compiler.sites import discover
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> default_exceptions(net, discover(net))
        {'2': 'output head: no layer reads its 10 features'}
    """
    named = {s.name: f"output head by name ({s.name})" for s in sites if _HEAD.search(s.name)}
    rows = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tied = [s for s in sites if s.module is not None and not rows.isdisjoint(s.shared_with)]
    named |= {s.name: "output head: its weight is an embedding's" for s in tied}
    known = [s for s in sites if s.kind not in ("sparse", "functional") or not s.obstacle]
    linear = [s for s in known if s.kind != "sparse" and s.name]
    matrices = sum(p.dim() >= 2 for p in model.parameters())
    if linear and matrices > 1 and not any("pooler" not in name for name in named):
        widths: set[Any] = {s.shape.in_features for s in sites if s.shape is not None}
        widths |= {getattr(module, "in_channels", None) for module in model.modules()}
        last = linear[-1]
        if last.shape is not None and last.shape.out_features not in widths:
            outputs = last.shape.out_features
            named[last.name] = f"output head: no layer reads its {outputs} features"
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    stems = [s for s in linear if s.module is first]
    named |= {s.name: "first convolution: it reads the input" for s in stems}
    grouped = ((s.name, s.module) for s in linear if isinstance(s.module, kinds))
    deep = [name for name, conv in grouped if 1 < conv.groups == conv.in_channels]
    return named | dict.fromkeys(deep, "depthwise convolution: no features meet")


def find_config(
    config: Mapping[str, SparseConfig | None], names: Sequence[str]
) -> tuple[str, SparseConfig | None] | None:
    """Return the key that decides for a site, and its value; None where no key matches.

    An exact name wins; then the nearest module around it; then the first "re:" to match in full.

    Args:
        config: from names, modules' names or "re:<regex>" to a config, or None to leave dense.
        names: all names of the site.

    Example:
        >>> find_config({"re:.*fc": None, "mlp": SparseConfig()}, ["mlp.fc"])[0]
        'mlp'
    """
    keys = [name for name in names if name in config]
    for name in names:
        around = [name[:at] for at in range(len(name)) if name[at] == "."]
        keys += [parent for parent in reversed(around) if parent in config]
    keys += [key for key in config if any(_matches(key, name) for name in names)]
    return (keys[0], config[keys[0]]) if keys else None


def check_names(config: Mapping[str, Any], sites: Sequence[Sequence[str]]) -> None:
    """Refuse keys that match no site and values that are no configs.

    Args:
        config: the mapping.
        sites: the names of every site.

    Raises:
        TypeError: a value is neither a config nor None.
        ValueError: a key matches nothing, or is no regular expression after "re:".
    """
    names = [name for aliases in sites for name in aliases]
    for key, value in config.items():
        if value is not None and not isinstance(value, SparseConfig):
            raise TypeError(
                f"Expected a SparseConfig or None for {key!r}. Got {value!r}. "
                "Write SparseConfig(structure=..., sparsity=...)."
            )
        exact = any(key == name or name.startswith(f"{key}.") for name in names)
        if not exact and not any(_matches(key, name) for name in names):
            raise ValueError(
                f"Expected names of sites as keys. Got {key!r}, which matches none. "
                f"{suggest(key, names)} plan(model) lists all names."
            )


def _matches(key: str, name: str) -> bool:
    if not key.startswith("re:"):
        return False
    try:
        return re.fullmatch(key[3:], name) is not None
    except re.error as error:
        raise ValueError(
            f"Expected a regular expression after 're:'. Got {key!r}: {error}. "
            "Write for instance 're:.*mlp.*'."
        ) from error


def _as_site_filter(filter_fn: Callable[..., bool]) -> Callable[[Site], bool]:
    """Return ``filter_fn`` as a function of a site, however many arguments it takes."""
    if not callable(filter_fn):
        raise TypeError(
            f"Expected a function as filter_fn. Got {filter_fn!r}. "
            "Write filter_fn=lambda module, name: ..."
        )
    try:
        parameters = inspect.signature(filter_fn).parameters.values()
    except ValueError:  # a builtin that does not say
        parameters = ()  # type: ignore[assignment]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    anything = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if len(needed) > 2:
        raise TypeError(
            f"Expected filter_fn(site) or filter_fn(module, name). Got one that needs "
            f"{len(needed)} arguments. Leave out the others."
        )
    if len(needed) == 2 or (anything and len(needed) != 1):
        return lambda site: bool(filter_fn(site.module, site.name))
    return lambda site: bool(filter_fn(site))

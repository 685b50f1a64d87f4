"""How a file and a model that is sparse already were configured otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from padst_compiler.config import SparseConfig, describe
from padst_compiler.layers import SparseLayer
from padst_compiler.sites import Site

__all__ = ["differences"]


def differences(sites: Mapping[str, Site], fields: Mapping[str, Any]) -> list[str]:
    """Return how a layer that is sparse already was configured otherwise than the one of a file.

    Args:
        sites: by name, of the model.
        fields: from ``to_description``, perhaps damaged.

    Example:
        >>> import torch, padst_compiler as padst
        >>> from padst_compiler.sites import discover
        >>> model = padst.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8)), structure="nm:2:4")
        >>> fields = {"names": ["0"], "structure": "nm:4:8", "config": None}
        >>> differences({site.name: site for site in discover(model)}, fields)
        ["'0' with structure nm:4:8, here nm:2:4"]
    """
    name = next(iter(fields["names"]), "")
    layer = sites[name].module if name in sites else None
    if not isinstance(layer, SparseLayer):
        return []
    ours, theirs = {"structure": describe(layer.structure)}, {"structure": fields["structure"]}
    if isinstance(layer.config, SparseConfig) and isinstance(fields["config"], Mapping):
        keys = ("sparsity", "permutation", "side")
        ours |= {key: getattr(layer.config, key) for key in keys}
        theirs |= {key: fields["config"].get(key) for key in keys}
    differ = [f"{key} {theirs[key]}, here {own}" for key, own in ours.items() if own != theirs[key]]
    return [f"{name!r} with {'; '.join(differ)}"] if differ else []

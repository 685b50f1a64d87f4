"""What a layer starts from when it becomes sparse: its mask, its permutation, its values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from padst_compiler.convolution import SparseConv2d
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseConv1D, SparseLayer, SparseLinear, SparsePointwiseConv
from padst_compiler.magnitude import find_permutation, select, undo
from padst_compiler.parameter import SparseParameter, as_matrix
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.relaxations.spelling import make
from padst_compiler.sites import Site
from padst_compiler.structures import Structure

__all__ = ["KINDS", "Start", "adopt", "prepare", "random_topology", "weight_of"]

KINDS: dict[str, type[SparseLayer]] = {
    "linear": SparseLinear,
    "conv1d": SparseConv1D,
    "conv1x1": SparsePointwiseConv,
    "conv2d": SparseConv2d,
    "mha": SparseParameter,
    "conv": SparseParameter,
    "functional": SparseParameter,
}
"""The sparse layer of each kind of site."""


class Start(NamedTuple):
    """What a layer starts from; without values it takes the dense weights, rescaled."""

    indices: Tensor
    permutation: Permutation | None
    values: Tensor | None


def prepare(sites: Sequence[Site]) -> list[tuple[Site, Start]]:
    """Return the start of every site; siblings that share a permutation get the same module.

    Args:
        sites: those that become sparse; one that shares names another of them.
    """
    owners = {
        site.name: _start_of(site, _permutation_of(site)) for site in sites if not site.shares
    }
    starts = []
    for site in sites:
        start = owners.get(site.name) or _start_of(site, owners[site.shares].permutation)
        if start.permutation is not None and weight_of(site).requires_grad:
            start.permutation.requires_grad_(True)  # one that trains is enough
        starts.append((site, start))
    return starts


def random_topology(
    structure: Structure, kept: int, site: Site, generator: torch.Generator
) -> Tensor:
    """Return the indices of ``kept`` units per group, drawn evenly, ascending.

    Args:
        structure: the family of masks.
        kept: units that each group keeps.
        site: whose shape it is.
        generator: on the CPU, so that a seed gives one mask on every device.
    """
    assert site.shape is not None
    scores = torch.rand(structure.table(site.shape), generator=generator)
    return structure.indices_of(scores.topk(kept, dim=1).indices.sort(dim=1).values, site.shape)


def weight_of(site: Site) -> nn.Parameter:
    """Return a site's dense weight."""
    assert site.module is not None
    weight = site.module._parameters[site.attribute]
    assert isinstance(weight, nn.Parameter)
    return weight


def adopt(
    site: Site,
    structure: Structure,
    indices: Tensor,
    permutation: Permutation | None,
    side: str,
    values: Tensor | None = None,
) -> SparseLayer:
    """Make a site sparse: its module, or its parameter alone where the code around it stays.

    Args:
        site: a dense one that can.
        structure: the family of masks.
        indices: the kept units, in the structure's layout.
        permutation: of inputs or outputs, by ``side``; None for none.
        side: "input" or "output".
        values: start values; by default the dense weights under the mask, rescaled.
    """
    assert site.module is not None
    if not site.columns:
        kind = KINDS[site.kind]
        return kind.adopt(site.module, structure, indices, permutation, side, values)
    return SparseParameter.of(
        site.module, site.attribute, site.columns, structure, indices, permutation, side, values
    )


def _matrix_of(site: Site) -> Tensor:
    if site.columns:
        return as_matrix(weight_of(site).detach(), site.columns)
    assert site.module is not None
    return KINDS[site.kind].matrix_of(site.module)


def _generator(site: Site, purpose: str) -> torch.Generator:
    """Return a private generator: the config's seed, the site's name and the purpose decide it."""
    assert site.config is not None
    text = f"{site.config.seed}:{site.name}:{purpose}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def _start_of(site: Site, permutation: Permutation | None) -> Start:
    config, structure, shape = site.config, site.structure, site.shape
    assert config is not None and structure is not None and shape is not None
    if config.init == "magnitude":
        return _largest_of(site, structure, permutation)
    kept = site.kept
    if config.soft or config.start_sparsity is not None:
        kept = structure.kept(shape, min(config.start_sparsity or 0.0, site.sparsity))
    indices = random_topology(structure, kept, site, _generator(site, "topology"))
    return Start(indices, permutation, None)


def _largest_of(site: Site, structure: Structure, permutation: Permutation | None) -> Start:
    """Keep the largest units of the dense weight behind a hard permutation."""
    weight = _matrix_of(site)
    if isinstance(permutation, FixedPermutation):
        weight = undo(weight, permutation.perm, site.side)
    indices, _ = select(structure, weight, site.kept)
    return Start(indices, permutation, structure.pack(weight, indices))


def _permutation_of(site: Site) -> Permutation | None:
    """Return the permutation of a site that does not take another's."""
    config = site.config
    if site.permutation == "none" or config is None or site.structure is None:
        return None
    weight, generator = weight_of(site), _generator(site, "permutation")
    if site.permutation == "random":
        perm = torch.randperm(site.permuted_size, generator=generator)
        return FixedPermutation(IndexMap.of(perm), weight.device)
    if config.init == "magnitude" and site.permutation in ("learned", "magnitude"):
        found = find_permutation(site.structure, _matrix_of(site), site.kept, site.side, generator)
        return FixedPermutation(found.index_map, weight.device)
    soft = make(site.permutation, site.permuted_size, generator, weight.device)
    return soft.requires_grad_(weight.requires_grad)  # a frozen layer stays frozen

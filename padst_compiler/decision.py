"""What becomes of each site: does the structure fit, what is kept, what is permuted where."""

from __future__ import annotations

from collections.abc import Sequence

from padst_compiler.config import SparseConfig
from padst_compiler.distribution import DISTRIBUTIONS
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import FixedPermutation
from padst_compiler.relaxations.spelling import is_learned, resolve
from padst_compiler.sites import Site
from padst_compiler.structures import Shape, Structure

__all__ = ["as_refusal", "decide"]


def decide(sites: Sequence[Site]) -> None:
    """Fill in the decision on every site; a distribution runs over the sites with one config.

    Args:
        sites: as ``policy.choose`` leaves them.

    Example:
        >>> site = Site("fc", "linear", 4096, Shape(64, 64), config=SparseConfig("fan_in"))
        >>> decide([site])
        >>> site.decision, site.kept, site.permutation
        ('sparse', 6, 'none')
    """
    groups: dict[SparseConfig, list[tuple[Site, Shape]]] = {}
    for site in sites:
        if isinstance(site.module, SparseLayer):
            _describe_sparse(site, site.module)
        elif site.config is not None and site.config.sparsity == 0.0:
            site.reason = "sparsity 0: nothing to remove"
        elif site.config is not None:
            site.reason = site.obstacle or _refusal(site, site.config.family)
            site.refused = bool(site.reason)
            if site.shape is not None and not site.refused:
                groups.setdefault(site.config, []).append((site, site.shape))
    for config, members in groups.items():
        shares = DISTRIBUTIONS[config.distribution]([s for _, s in members], config.sparsity)
        for (site, shape), sparsity in zip(members, shares, strict=True):
            _decide(site, shape, config, sparsity)
    _share(sites)


def as_refusal(site: Site) -> str:
    """Return a site's reason as an error message, without the cure where it has none.

    Args:
        site: a refused one.

    Example:
        >>> as_refusal(Site("fc", "linear", 16, reason="its weight is also e.weight"))
        'Expected a site that can become sparse. Got one that cannot: its weight is also e.weight.'
    """
    if site.reason.startswith("Expected"):
        return site.reason
    reason = site.reason.rstrip(".")
    return f"Expected a site that can become sparse. Got one that cannot: {reason}."


def _refusal(site: Site, structure: Structure) -> str:
    return "" if site.shape is None else structure.refusal(site.shape) or ""


def _decide(site: Site, shape: Shape, config: SparseConfig, sparsity: float) -> None:
    structure = config.family
    if sparsity <= 0.0:
        site.reason = f"{config.distribution} leaves it dense"
        return
    kept, candidates = structure.kept(shape, sparsity), structure.table(shape)[1]
    if kept >= candidates:
        site.refused = config.distribution == "uniform"  # erk may ask for next to nothing
        site.reason = (
            f"sparsity {sparsity:.3g} keeps {kept} of {candidates} candidates: all of them"
        )
        return
    permutation, side, missing = _permute(config, structure, shape)
    if refusal := _cannot_permute(permutation, side, shape):
        site.refused, site.reason = True, refusal
        return
    site.structure, site.sparsity, site.kept = structure, sparsity, kept
    site.actual_sparsity = structure.actual_sparsity(shape, kept)
    site.decision, site.permutation, site.side = "sparse", permutation, side
    site.reason = "; ".join(filter(None, [missing, site.note]))


def _permute(config: SparseConfig, structure: Structure, shape: Shape) -> tuple[str, str, str]:
    """Return permutation, side, and why there is none where one was asked for."""
    vacuous = structure.vacuous_sides
    side = config.side
    if side == "auto":
        narrow, wide = "input", "output"
        if shape.out_features < shape.in_features:
            narrow, wide = wide, narrow
        side = wide if narrow in vacuous and wide not in vacuous else narrow
    looked_for = is_learned(config.permutation) or config.permutation == "magnitude"
    if looked_for and side in vacuous and not config.force_permutation:
        return "none", side, f"{structure.name} absorbs every {side} permutation: nothing to learn"
    return config.permutation, side, ""


def _cannot_permute(permutation: str, side: str, shape: Shape) -> str | None:
    if not is_learned(permutation):
        return None
    size = shape.in_features if side == "input" else shape.out_features
    kind, option = resolve(permutation, size)
    return kind.refusal(size, option)


def _share(sites: Sequence[Site]) -> None:
    """Let sites of one config that read the same tensor permute it together."""
    leaders: dict[tuple[object, ...], str] = {}
    for site in sites:
        if site.config is None or not site.config.share or site.decision != "sparse":
            continue
        if site.kind == "sparse" or site.permutation == "none":
            continue
        if site.side == "input" and site.reads:
            key = (site.config, site.permutation, site.permuted_size, site.reads)
            leader = leaders.setdefault(key, site.name)
            site.shares = "" if leader == site.name else leader


def _describe_sparse(site: Site, layer: SparseLayer) -> None:
    hard = isinstance(layer.permutation, FixedPermutation)
    site.decision, site.reason = "sparse", "sparse already"
    site.structure, site.side = layer.structure, layer.side
    site.kept = layer.kept
    site.sparsity = site.actual_sparsity = layer.sparsity
    if layer.permutation is not None:
        site.permutation = "hard" if hard else "soft"

"""The plan: which sites become sparse, how, and why the others do not. It touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from padst_compiler.config import ConfigMap, SparseConfig, describe
from padst_compiler.decision import as_refusal, decide
from padst_compiler.policy import choose
from padst_compiler.relaxations.spelling import is_learned, resolve
from padst_compiler.sites import Site, discover
from padst_compiler.structures import Structure
from padst_compiler.text import table
from padst_compiler.tracer import trace

__all__ = ["Plan", "plan"]

_HEADERS = (
    "site",
    "kind",
    "shape",
    "tokens",
    "decision",
    "structure",
    "sparsity",
    "permutation",
    "why",
)


@dataclass(repr=False)
class Plan:
    """The sites of a model with the decision on each; prints as a table."""

    sites: list[Site]
    linear_flops: int | None = None  # of one run on the example inputs, convolutions included

    @property
    def coverage(self) -> float | None:
        """The share of the linear FLOPs that sparse sites have; None without example inputs.

        What is dense by default (output heads, a first convolution) does not count.
        """
        exempt = sum(s.flops for s in self.sites if s.exempt)
        whole = (self.linear_flops or 0) - exempt
        if whole <= 0:
            return None
        return sum(s.flops for s in self.sites if s.decision == "sparse" and not s.exempt) / whole

    @property
    def sparse(self) -> list[Site]:
        """The sites that are to become sparse."""
        return [s for s in self.sites if s.decision == "sparse" and s.kind != "sparse"]

    def print(self) -> None:
        """Print the table."""
        print(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON."""
        sites = [
            {
                "name": s.name,
                "names": list(s.names),
                "kind": s.kind,
                "shape": None if s.shape is None else [s.shape.out_features, s.shape.in_features],
                "weights": s.weights,
                "uses": s.uses,
                "tokens": s.tokens,
                "flops": s.flops,
                "shared_with": list(s.shared_with),
                "decision": s.decision,
                "reason": s.reason,
                "structure": None if s.structure is None else describe(s.structure),
                "kept": s.kept,
                "sparsity": s.sparsity,
                "actual_sparsity": s.actual_sparsity,
                "permutation": s.permutation,
                "side": s.side,
                "shares": s.shares,
            }
            for s in self.sites
        ]
        flops = {"linear_flops": self.linear_flops, "coverage": self.coverage}
        return {"version": 1, "sites": sites} | flops

    def __str__(self) -> str:
        """Return the table and a line of totals."""
        headers = [h for h in _HEADERS if h != "tokens" or self.linear_flops is not None]
        rows = [[_cells(site)[header] for header in headers] for site in self.sites]
        return f"{table(headers, rows)}\n{self._totals()}"

    __repr__ = __str__

    def _totals(self) -> str:
        sparse = [s for s in self.sites if s.decision == "sparse"]
        covered, weights = (sum(s.weights for s in part) for part in (sparse, self.sites))
        zeros = sum(s.weights * s.actual_sparsity for s in sparse)
        text = f"{len(sparse)} of {len(self.sites)} sites sparse"
        if weights:
            text += (
                f": {covered:,} of {weights:,} linear weights ({covered / weights:.1%}), "
                f"{zeros / weights:.1%} of all are zero"
            )
        logits = sum(_learned_numbers(site) for site in self.sparse)
        if logits:
            text += f"; {logits:,} more numbers while permutations are soft"
        if self.linear_flops:
            share = sum(s.flops for s in sparse) / self.linear_flops
            text += f"; {share:.1%} of {self.linear_flops:,} linear FLOPs"
        if self.coverage is not None and any(s.exempt for s in self.sites):
            text += f", {self.coverage:.1%} without what is dense by default"
        return f"{text}."


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    config: ConfigMap | None = None,
    *,
    structure: Structure | str = "block",
    sparsity: float = 0.9,
    permutation: str = "learned",
    filter_fn: Callable[..., bool] | None = None,
    strict: bool = False,
) -> Plan:
    """Return what ``sparsify`` would do to each linear weight of ``model``, and why.

    Args:
        model: any module; it stays as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments to run the
            model on once; adds token counts, FLOPs and linear operations outside known modules.
        config: a config for all sites, or a mapping from names or "re:..." to configs or None.
        structure: instead of ``config``: the family of masks.
        sparsity: instead of ``config``: the fraction of zeros.
        permutation: instead of ``config``: "none", "random", "learned", "low_rank", ...
        filter_fn: ``filter_fn(site)`` or ``filter_fn(module, name)``, True for what to convert.
        strict: raise where a requested site has to stay dense.

    Raises:
        TypeError: ``model`` is no module, or the config is none.
        ValueError: the model has no parameters, the config cannot be, or a site is refused.

    Example:
        >>> plan(nn.Sequential(nn.Linear(64, 64)), structure="block:16", sparsity=0.5).sites[0].kept
        2
    """
    config = _one_config(config, structure, sparsity, permutation)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected a torch.nn.Module. Got {type(model).__name__}. Pass the model itself."
        )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"Expected a model with parameters. Got an empty {type(model).__name__}. "
            "Build its layers first."
        )
    sites = discover(model)  # before the run: it refuses what cannot run
    traced = None if example_inputs is None else trace(model, example_inputs)
    sites = sites if traced is None else discover(model, traced)
    choose(model, sites, config, filter_fn)
    if traced is None and any(site.config and site.config.share for site in sites):
        raise ValueError(
            "Expected example_inputs: share=True asks which layers read the same tensor, and only "
            "a run can tell. Got none. Pass example_inputs, or share=False."
        )
    decide(sites)
    for site in sites:
        if strict and site.refused:
            raise ValueError(
                f"Site {site.label!r}. {as_refusal(site)} "
                "Leave it out of the config, or use strict=False to keep it dense."
            )
        if traced and site.module and not site.uses and site.kind != "sparse":
            site.reason = "; ".join(filter(None, [site.reason, "not run by example_inputs"]))
    return Plan(sites, traced.linear_flops if traced else None)


def _one_config(
    config: ConfigMap | None, structure: Structure | str, sparsity: float, permutation: str
) -> ConfigMap:
    short = SparseConfig(structure, sparsity, permutation)
    if config is None:
        return short
    if short != SparseConfig():
        raise ValueError(
            "Expected either a config or structure, sparsity and permutation. Got both. "
            "Write them into the config."
        )
    if not isinstance(config, (SparseConfig, Mapping)):
        raise TypeError(
            f"Expected a SparseConfig or a mapping from names to configs. Got {config!r}. "
            "Write SparseConfig(structure=..., sparsity=...)."
        )
    return config


def _cells(site: Site) -> dict[str, str]:
    sparse = site.decision == "sparse"
    return {
        "site": site.label,
        "kind": site.kind,
        "shape": "" if site.shape is None else str(site.shape),
        "tokens": f"{site.tokens:,}" if site.uses else "",
        "decision": site.decision,
        "structure": describe(site.structure) if sparse and site.structure else "",
        "sparsity": f"{site.sparsity:.3f} -> {site.actual_sparsity:.3f}" if sparse else "",
        "permutation": _permutation_cell(site) if sparse else "",
        "why": site.reason,
    }


def _permutation_cell(site: Site) -> str:
    shared = f", that of {site.shares}" if site.shares else ""
    return "none" if site.permutation == "none" else f"{site.permutation} ({site.side}{shared})"


def _learned_numbers(site: Site) -> int:
    if not is_learned(site.permutation) or site.shares:
        return 0
    kind, option = resolve(site.permutation, site.permuted_size)
    return kind.count(site.permuted_size, option)

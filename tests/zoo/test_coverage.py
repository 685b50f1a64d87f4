"""What ``plan`` finds in whole architectures; eager results of what it makes stay right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import padst_compiler as padst
from padst_compiler.sites import Site

from .architectures import ARCHITECTURES, build

STRUCTURES = ["block:16", "nm:4:16", "diagonal", "fan_in", "unstructured"]


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return every floating-point tensor of a run."""
    with torch.no_grad():
        result = model(**inputs)
    found = tree_leaves(list(result.values()) if isinstance(result, dict) else result)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def assert_close(model: nn.Module, other: nn.Module, inputs: dict[str, Any]) -> None:
    """Compare two models by the largest number of each output."""
    ours, theirs = outputs(model, inputs), outputs(other, inputs)
    assert ours and len(ours) == len(theirs)
    for y, expected in zip(ours, theirs, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(y, expected, rtol=0.0, atol=1e-9 * max(scale, 1e-3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_flops_are_covered_and_eager_results_stay_right(name: str) -> None:
    model, inputs = build(name)
    dense = outputs(model, inputs)
    options: dict[str, Any] = {"sparsity": 0.5, "permutation": "random"}
    structure = STRUCTURES[list(ARCHITECTURES).index(name) % len(STRUCTURES)]
    plan = padst.plan(model, inputs, structure=structure, **options)
    assert plan.coverage is not None and plan.coverage >= 0.95, str(plan)
    found = sum(site.flops for site in plan.sites)
    assert abs(found - (plan.linear_flops or 0)) <= len(plan.sites)  # shares are rounded
    assert all(site.reason for site in plan.sites if site.decision != "sparse")
    padst.sparsify(model, structure=structure, example_inputs=inputs, **options)
    assert_close(model, padst.to_dense(model), inputs)
    assert not torch.equal(dense[0], outputs(model, inputs)[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_heads_and_first_convolutions_stay_dense(name: str) -> None:
    model, inputs = build(name)
    plan = padst.plan(model, inputs, structure="fan_in", sparsity=0.5)
    left = [site for site in plan.sites if site.decision != "sparse"]
    assert all(site.exempt for site in left), str(plan)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_stacked_experts_are_found_however_they_are_multiplied(experts: str) -> None:
    model, inputs = build("mixtral")
    config: Any = model.config
    config._experts_implementation = experts
    model.float()
    plan = padst.plan(model, inputs, structure="fan_in", sparsity=0.5, permutation="random")
    found: dict[str, Site] = {site.name: site for site in plan.sites}
    for layer in range(2):
        for name, shape in (("gate_up_proj", "512x32"), ("down_proj", "128x64")):
            site = found[f"model.layers.{layer}.mlp.experts.{name}"]
            assert (site.decision, str(site.shape), site.columns) == ("sparse", shape, (2,))
    assert plan.coverage == 1.0

"""Planted permutations (method.md 8B): recovered from a uniform start, lost from the identity."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["planted"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_the_teacher_is_what_it_says(planted: ModuleType) -> None:
    teacher = planted.plant(64, 8, 0)
    assert planted.refitted(teacher, teacher.perm) == pytest.approx(0.0, abs=1e-6)
    assert 0.75 < planted.refitted(teacher, torch.arange(64)) < 0.98
    assert 0.75 < planted.refitted(teacher, torch.randperm(64)) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("form", "most"), [("full (sinkhorn)", 0.03), ("low_rank m=12", 0.05)])
def test_the_hidden_permutation_is_found(planted: ModuleType, form: str, most: float) -> None:
    soft = planted.FORMS[form](64, torch.Generator().manual_seed(200))
    if form.startswith("low_rank"):
        assert sum(p.numel() for p in soft.parameters()) <= 1536
    found = planted.learn(planted.plant(64, 8, 0), soft, planted.Run(steps=1200), 0)
    assert found.error <= most and found.fixed < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("logit", [4.0, 8.0])
def test_an_identity_start_collapses_and_the_fixed_threshold_fires_at_once(
    planted: ModuleType, logit: float
) -> None:
    soft = planted.near_identity(64, torch.Generator().manual_seed(200), logit)
    run = planted.Run(steps=500, penalty=0.3, ramp=False, cosine=False)
    found = planted.learn(planted.plant(64, 8, 0), soft, run, 0)
    assert found.error > 0.7 and found.fixed > 0.8
    assert found.fired is not None and found.fired <= 40
    assert found.decided is None or found.decided > 40

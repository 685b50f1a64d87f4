from __future__ import annotations

from dataclasses import replace

import pytest

from padst_compiler.gpu_cases import PARTS, Case, cases, models

LAYERS = [part for part in PARTS if part != "models"]


@pytest.mark.parametrize("part", LAYERS)
def test_no_case_comes_twice_and_the_most_important_come_first(part: str) -> None:
    found = cases(part)
    assert len(found) == len(set(found)) == len({replace(case, full=True) for case in found})
    assert all(case.part == part for case in found) and found[0].full and found[0].dtype == "bf16"
    compiled = [case.full for case in found]
    assert compiled == sorted(compiled, reverse=True)
    assert {replace(case, full=True) for case in found} == set(cases(part, full=True))
    assert 1 <= len(cases(part, tiny=True)) <= 10


def test_layers_are_those_of_the_goals_and_of_the_sweep() -> None:
    found = cases("layers")
    for kind in ("block:64", "block:32", "block:16"):
        assert Case("layers", (768, 3072), 6304, kind) in found[:12]
        assert Case("layers", (4096, 11008), 8192, kind) in found[:12]
    shapes = {(case.layer, case.tokens) for case in found}
    assert {((768, 3072), n) for n in (197, 1576, 6304, 50432)} <= shapes
    assert {((3072, 768), n) for n in (197, 1576, 6304, 50432)} <= shapes
    assert {((4096, 11008), n) for n in (1, 8, 16, 64, 8192)} <= shapes
    assert {case.sparsity for case in found} == {0.8, 0.9, 0.95}
    assert {case.dtype for case in found} == {"bf16", "fp16", "fp32", "tf32"}


def test_models_are_timed_at_both_ends_of_the_batch() -> None:
    found = models()
    assert len(found) == len(set(found))
    assert {case.name for case in found} == {"vit_b16", "gpt2", "gpt2_medium"}
    assert {case.batch for case in found} >= {1, 32, 256} and any(case.train for case in found)
    assert {case.which for case in found} == {"MLPs", "all", "all, MLPs fused"}
    assert str(found[0]) == "vit_b16 batch 256 inference all, MLPs fused block:64"

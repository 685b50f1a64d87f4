"""Code that Inductor generates for a GPU, with our templates in it, run in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from padst_compiler.triton_text import is_interpreted

from .generate import AHEAD, CASES, KINDS, given
from .interpreted import calls_of, kernels_of, run

ROOT = Path(__file__).parents[2]
KEYS = [f"{case}-{kind}" for case in CASES for kind in KINDS]
SORTED = ("dx", "fan_in_dx", "nm_dx")  # weights are listed by column first: a sort, and a search


def interpretable(key: str) -> bool:
    """Whether it can run here: tokens of two inputs are one symbol in whole graphs only."""
    case, _, kind = key.split("-")
    tokens = {"x", "three", "grad", "residual"} & {*CASES[case].needs}
    return kind != "dynamic" or len(tokens) == 1


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    call = [sys.executable, "-m", "tests.kernels.generate"]
    made = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0, made.stderr[-4000:]
    found: dict[str, Any] = json.loads(made.stdout)
    return found


@pytest.fixture(scope="module")
def generated(answer: dict[str, Any]) -> dict[str, str]:
    codes: dict[str, str] = answer["code"]
    return codes


@pytest.mark.xdist_group("generated-on-gpu")
@pytest.mark.parametrize("key", KEYS)
def test_every_operator_is_one_kernel_with_what_surrounds_it(
    generated: dict[str, str], key: str
) -> None:
    kernels = kernels_of(generated[key])
    case, dtype, size = key.split("-")
    assert sum(name.startswith("triton_tem_fused_") for name in kernels) == 1
    alone = case not in SORTED and not case.endswith("dw")  # parts of a gradient are added apart
    if case.startswith("turned") and size == "static":  # a copy of x, of as many tokens as known
        assert len(kernels) == 2 and "XT" in generated[key]
        alone = False
    rounds = case == "prologue" and dtype == "bfloat16"  # Inductor fuses none to fewer bits
    assert len(kernels) == 1 or rounds or not alone
    assert "= torch.ops.padst." not in calls_of(generated[key])


@pytest.mark.xdist_group("generated-on-gpu")
@pytest.mark.parametrize("key", [key for key in KEYS if interpretable(key)])
def test_it_computes_what_the_reference_does(generated: dict[str, str], key: str) -> None:
    assert is_interpreted()
    case, name, kind = key.split("-")
    dtype, needs = getattr(torch, name), CASES[case].needs
    made = given(needs, dtype)
    if kind == "dynamic":  # another number of tokens than it was generated for
        made[needs[0]] = torch.cat([made[needs[0]], made[needs[0]][:5]])
    (got,) = run(generated[key], [made[need].clone() for need in needs])
    expected = CASES[case].expected(
        {key: t.double() if t.is_floating_point() else t for key, t in made.items()}
    )
    bound = {torch.float32: 5e-6, torch.bfloat16: 2**-6}[dtype]
    assert got.dtype is dtype and got.shape == expected.shape
    assert float((got.double() - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.xdist_group("generated-on-gpu")
def test_maps_move_where_data_move_anyway(generated: dict[str, str]) -> None:
    """Many tokens: the norm, attention and the residual sum read in another order."""
    without, with_maps = (generated[f"{kind}-64"] for kind in ("none", "random"))
    templates = [name for name in kernels_of(with_maps) if name.startswith("triton_tem")]
    assert len(templates) == 3  # two layers are one kernel
    # What follows the last layer was part of it: the residual sum now reads through the map.
    assert len(kernels_of(with_maps)) <= len(kernels_of(without)) + 1
    assert "FROM" not in with_maps and "INTO" not in with_maps


@pytest.mark.xdist_group("generated-on-gpu")
def test_few_numbers_are_moved_by_the_kernels_that_store_them(generated: dict[str, str]) -> None:
    without, with_maps = (generated[f"{kind}-1"] for kind in ("none", "random"))
    assert len(kernels_of(with_maps)) == len(kernels_of(without))
    assert "arg_INTO" in with_maps


@pytest.mark.xdist_group("generated-on-gpu")
def test_what_is_generated_compiles_for_hopper_without_spills(answer: dict[str, Any]) -> None:
    ahead = answer["ahead"]
    assert set(ahead) == set(AHEAD)
    for key, takes in ahead.items():
        assert takes["stack"] == 0 and takes["shared"] <= 227 * 1024, (key, takes)
    assert ahead["three-bfloat16-static"]["matrix"]  # 63 tokens are a tile of 64

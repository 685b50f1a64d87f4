"""``max-autotune`` on a GPU: whichever tile is the fastest, its code is generated, and is right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.kernels import triton_block
from padst_compiler.triton_text import Launch

from .generate import CASES, INPUTS, OUTPUTS, TUNED, given
from .interpreted import Interpreted, calls_of, kernels_of, run

ROOT = Path(__file__).parents[2]
KEYS = list(TUNED)
EXACT = [key for key in KEYS if "-float32" in key]
STATIC = [key for key in EXACT if not key.endswith("dynamic")]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    call = [sys.executable, "-m", "tests.kernels.generate", "--tuned"]
    made = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0, made.stderr[-4000:]
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def inputs(key: str) -> dict[str, Tensor]:
    case, dtype, *_ = key.split("-")
    return given(CASES[case].needs, getattr(torch, dtype), TUNED[key])


def choices(key: str) -> list[Launch]:
    """Return what is offered, from the sizes alone."""
    made, case = inputs(key), key.split("-")[0]
    dtype, (rows, kept, c, r) = made["x"].dtype, made["v.block"].shape
    groups, inner = (INPUTS // c, r) if case == "dx" else (rows, c)
    how = triton_block.sums(
        (rows, kept, c, r), groups, inner, TUNED[key], dtype, gathered=case == "maps"
    )
    return triton_block.variants(how, dtype)


def constants(source: str) -> dict[str, str]:
    """Return the constants of a kernel, and the means of a program."""
    return dict(
        re.findall(r"^ +(\w+) : tl\.constexpr = (.+)$", source, re.MULTILINE)
        + re.findall(r"^(num_\w+)=(\d+),$", source, re.MULTILINE)
    )


def expected(key: str, made: dict[str, Tensor]) -> Tensor:
    exact = {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
    return CASES[key.split("-")[0]].expected(exact)


@pytest.mark.xdist_group("tuned-on-gpu")
@pytest.mark.parametrize("key", KEYS)
def test_the_code_is_that_of_the_choice_that_is_the_fastest(
    answer: dict[str, Any], key: str
) -> None:
    offered, codes = choices(key), answer[key]["code"]
    assert len(codes) == len(offered) > 1
    assert len({how.values["BLOCK_M"] for how in offered}) > 1 or key.endswith("few")
    for how, code, grid in zip(offered, codes, answer[key]["grid"], strict=True):
        ((name, source),) = [kernel for kernel in kernels_of(code).items() if "_tem_" in kernel[0]]
        told = {**how.values, "num_warps": how.warps, "num_stages": how.stages}
        assert {name: constants(source)[name] for name in told} == {
            name: str(value) for name, value in told.items()
        }
        assert how.grid(TUNED[key]) == grid
        programs = r".*s\d+.*" if key.endswith("dynamic") else grid
        assert re.search(rf"{name}\.run\(.*, {programs}, 1, 1, stream", calls_of(code))


@pytest.mark.xdist_group("tuned-on-gpu")
@pytest.mark.parametrize("key", KEYS)
def test_what_follows_is_fused_whatever_is_chosen(answer: dict[str, Any], key: str) -> None:
    for code in answer[key]["code"]:
        templates = [name for name in kernels_of(code) if "_tem_" in name]
        assert len(templates) == 1
        assert len(kernels_of(code)) == (3 if key.startswith("dx") else 1)  # a sort, and a search


@pytest.mark.xdist_group("tuned-on-gpu")
@pytest.mark.parametrize("key", EXACT)
def test_every_choice_computes_what_the_reference_does(answer: dict[str, Any], key: str) -> None:
    made = inputs(key)
    if key.endswith("dynamic"):  # another number of tokens than it was generated for
        made["x"] = torch.cat([made["x"], made["x"]])
    right = expected(key, made)
    for code in answer[key]["code"]:
        (got,) = run(code, [made[need].clone() for need in CASES[key.split("-")[0]].needs])
        assert float((got.double() - right).abs().max()) <= 5e-6 * float(right.abs().max())


@pytest.mark.xdist_group("tuned-on-gpu")
@pytest.mark.parametrize("key", STATIC)
def test_what_is_timed_is_the_whole_product(answer: dict[str, Any], key: str) -> None:
    """A kernel as it is timed, which is before anything is fused into it."""
    made, case = inputs(key), key.split("-")[0]
    maps = [made["in_map"], made["into"]] if case == "maps" else []
    lists: list[Tensor] = [made["i.block"]]
    if case == "dx":
        lists = list(triton_block.by_column(made["i.block"], INPUTS // 16))
    x, weight = made["grad" if case == "dx" else "x"], made["w.block"].double()
    right = x.double() @ weight if case == "dx" else x.double() @ weight.t()
    if maps:
        right = torch.empty(len(x), OUTPUTS, dtype=torch.float64)
        right[:, made["into"]] = x[:, made["in_map"]].double() @ weight.t()
    found = answer[key]
    for source, grid in zip(found["sources"], found["grid"], strict=True):
        out = torch.full(right.shape, torch.nan)
        kernel = Interpreted(found["name"], source)
        kernel.run(x, made["v.block"], *lists, *maps, out, grid, 1, 1, stream=0)
        assert float((out.double() - right).abs().max()) <= 5e-6 * float(right.abs().max())


@pytest.mark.xdist_group("tuned-on-gpu")
@pytest.mark.parametrize("key", KEYS)
def test_kernels_are_timed_with_lists_that_a_layer_may_have(
    answer: dict[str, Any], key: str
) -> None:
    """Inductor's own are zeros: no column has a block, and every block is the first."""
    lists = {name: torch.tensor(made) for name, made in answer[key]["lists"].items()}
    indices = inputs(key)["i.block"]
    if key.startswith("dx"):
        assert lists.keys() == {"ORDER", "STARTS"}
        assert lists["ORDER"].sort().values.tolist() == list(range(indices.numel()))
        assert lists["STARTS"].tolist() == [0, 3, 6, 9, 12]  # 12 blocks in 4 columns
        return
    assert lists.keys() == {"INDICES"} | ({"FROM", "INTO"} if key.startswith("maps") else set())
    assert lists["INDICES"].shape == indices.shape
    assert bool((lists["INDICES"].diff(dim=1) > 0).all()) and int(lists["INDICES"].min()) >= 0
    assert int(lists["INDICES"].max()) < INPUTS // 16
    assert len(lists["INDICES"].unique()) == INPUTS // 16
    for name, count in (("FROM", INPUTS), ("INTO", OUTPUTS)):
        if name in lists:
            assert lists[name].sort().values.tolist() == list(range(count))


@pytest.mark.xdist_group("tuned-on-gpu")
@pytest.mark.parametrize("key", KEYS)
def test_the_largest_tile_compiles_for_hopper_without_spills(
    answer: dict[str, Any], key: str
) -> None:
    takes = answer[key]["takes"]
    assert takes["stack"] == 0 and takes["shared"] <= 227 * 1024, takes

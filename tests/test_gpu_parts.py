from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from padst_compiler import gpu_layers, gpu_parts
from padst_compiler.compat import many_graphs
from padst_compiler.gpu_cases import PARTS, Case
from padst_compiler.gpu_contestants import Guard
from padst_compiler.gpu_layers import Layers
from padst_compiler.gpu_measure import cpu_clock
from padst_compiler.gpu_parts import LAYER_PARTS, Bench, measure, timed
from padst_compiler.gpu_rows import HEADERS


def bench(*, compiles: bool = False) -> Bench:
    clock = cpu_clock()
    guard = Guard(lambda text: None, compiles=compiles, wait=clock.wait)
    return Bench(Layers("cpu"), guard, clock, rounds=1, seconds=1e-5)


def test_there_is_a_measure_for_every_part_but_models() -> None:
    assert tuple(LAYER_PARTS) == PARTS[:-1]


@pytest.mark.parametrize("kind", ["block:16", "diagonal"])
def test_correctness_compares_the_forward_both_gradients_and_maps(kind: str) -> None:
    rows = measure(Case("correctness", (32, 64), 5, kind, 0.5, "fp32"), bench())
    assert [row["which"] for row in rows] == ["forward", "maps", "dX", "dW"]
    assert {row["right"] for row in rows} == {"yes"} and set(rows[0]) == set(HEADERS)
    assert all(float(row["error"]) < 2e-5 for row in rows)


def test_a_kernel_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., torch.Tensor] = gpu_layers.product

    def off_by_a_little(*args: Any, **how: Any) -> torch.Tensor:
        return real(*args, **how) * 1.001

    monkeypatch.setattr(gpu_parts, "product", off_by_a_little)
    rows = measure(Case("correctness", (32, 64), 5, "block:16", 0.5, "fp32"), bench())
    assert [row["right"] for row in rows] == ["WRONG", "WRONG", "yes", "yes"]


def test_every_way_of_timing_has_the_same_contestants() -> None:
    found = dict(timed({"a": lambda: None}, bench(), ("graphs", "hot", "cold")))
    assert list(found) == ["graphs", "hot", "cold"]
    assert all(list(times) == ["a"] for times in found.values())


def test_a_row_a_way_of_timing() -> None:
    rows = measure(Case("layers", (32, 64), 5, "block:16", 0.5, "fp32", full=False), bench())
    assert [row["mode"] for row in rows] == ["graphs", "hot", "cold"]
    assert {(row["ours"], row["right"], row["density"]) for row in rows} == {
        ("kernel", "yes", "0.500")
    }
    assert all(row["cuBLAS us"] != "-" and row["Inductor us"] == "-" for row in rows)


def test_maps_are_compared_with_none() -> None:
    rows = measure(Case("maps", (32, 64), 5, "block:16", 0.5, "fp32"), bench())
    maps = {row["map"]: row for row in rows if row["mode"] == "graphs"}
    assert set(maps) == {"none", "fused input", "fused output", "gather", "matmul"}
    assert maps["none"]["x unmapped"] == "1.00" and {r["right"] for r in rows} == {"yes"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["layers", "mlp", "maps", "training"])
def test_what_is_compiled_takes_part_where_it_can_be(part: str) -> None:
    kind = "nm:8" if part == "maps" else "block:16"
    used = bench(compiles=True)
    with many_graphs():
        rows = measure(Case(part, (32, 64), 5, kind, 0.5, "fp32"), used)
    assert {row["right"] for row in rows} == {"yes"} and not used.guard.broken
    if part == "maps":
        assert {"folded", "unfolded"} <= {row["map"] for row in rows}
        return
    names = {"layers": ["call", "graph"], "mlp": ["graph", "two kernels"], "training": ["call"]}
    for row in rows:
        assert all(row[f"{name} us"] != "-" for name in [*names[part], "Inductor"])
        assert row["ours"] in ("call", "graph")

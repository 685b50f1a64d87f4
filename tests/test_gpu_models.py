from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from padst_compiler.bench_models import make
from padst_compiler.compat import many_graphs
from padst_compiler.gpu_cases import ModelCase, models
from padst_compiler.gpu_contestants import Guard
from padst_compiler.gpu_layers import Layers
from padst_compiler.gpu_measure import cpu_clock
from padst_compiler.gpu_models import measure_model, sparse_twin
from padst_compiler.gpu_parts import Bench
from padst_compiler.layers import sparse_layers

VIT, STEP, GPT = models(tiny=True)


def bench(*, compiles: bool = False) -> Bench:
    clock = cpu_clock()
    guard = Guard(lambda text: None, compiles=compiles, wait=clock.wait)
    return Bench(Layers("cpu"), guard, clock, rounds=1, seconds=1e-5)


@pytest.mark.parametrize(
    ("which", "names"),
    [("MLPs", {"fc1", "fc2"}), ("all", {"qkv", "proj", "fc1", "fc2"})],
)
def test_the_layers_that_are_asked_for_are_sparse(which: str, names: set[str]) -> None:
    dense, x, _ = make(VIT.size, 2)
    layers = sparse_layers(sparse_twin(dense, replace(VIT, which=which)))
    assert {name.rpartition(".")[2] for name in layers} == names
    assert not sparse_layers(dense) and torch.isfinite(dense(x)).all()


def test_the_two_layers_of_an_mlp_fit_each_other_only_where_they_are_to_be_fused() -> None:
    dense, _, _ = make(VIT.size, 2)
    for which, side in (("all, MLPs fused", 16), ("all", 8), ("MLPs", 16)):
        layers = sparse_layers(sparse_twin(dense, replace(VIT, which=which)))
        assert layers["blocks.0.fc1"].values.shape[3] == 16
        assert layers["blocks.0.fc2"].values.shape[2] == side


@pytest.mark.parametrize("case", [VIT, STEP, GPT], ids=str)
def test_a_model_is_timed_in_items_a_second(case: ModelCase) -> None:
    rows = measure_model(case, bench())
    assert rows[0]["mode"] == ("training" if case.train else "inference")
    assert len(rows) == (2 if case.batch == 1 and not case.train else 1)
    for row in rows:
        assert row["right"] == "yes" and row["ours"] == "eager" and row["which"] == case.which
        assert float(row["speed"]) > 0.0 and float(row["dense speed"]) > 0.0
        assert row["unit"] == ("tokens/s" if case.size.text else "images/s")
        assert row["peak MB"] == "-"  # of a GPU


@pytest.mark.slow
@pytest.mark.parametrize("case", [VIT, STEP], ids=str)
def test_a_compiled_model_is_compared_with_the_best_dense_one(case: ModelCase) -> None:
    used = bench(compiles=True)
    with many_graphs():
        (row,) = measure_model(case, used)
    assert row["right"] == "yes" and row["ours"] == "call" and not used.guard.broken
    assert row["Inductor us"] != "-" and float(row["low"]) <= float(row["high"])

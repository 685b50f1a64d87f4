from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from padst_compiler.gpu_cases import Case
from padst_compiler.gpu_check import error, expected_of, weight_gradient
from padst_compiler.gpu_contestants import Guard, gradients, inferred, mapped, mlp, trained
from padst_compiler.gpu_layers import Layers, only

CASE = Case("layers", (32, 64), 5, "block:16", 0.5, "fp32", full=False)


def guard(said: list[str]) -> Guard:
    return Guard(said.append, compiles=False, wait=lambda: None)


def test_a_peer_that_fails_is_left_out_and_said_once_and_ours_is_a_bug() -> None:
    def fails() -> Callable[[], Any]:
        def call() -> None:
            raise RuntimeError("\nnot on this shape\nstack")

        return call

    said: list[str] = []
    guarded = guard(said)
    for _ in range(2):
        calls = guarded.those_that_run(CASE, {"BSR": fails, "cuBLAS": lambda: lambda: 1})
        assert list(calls) == ["cuBLAS"]
    assert said == ["BSR is left out: RuntimeError: not on this shape"] and not guarded.broken
    guarded.those_that_run(CASE, {"kernel": fails})
    assert guarded.broken == [
        f"{CASE}: kernel is left out: RuntimeError: not on this shape"
    ] and said[1].startswith("kernel")


def test_all_contestants_of_a_layer_compute_it() -> None:
    layers, said = Layers("cpu"), list[str]()
    sparse, (dense, x) = layers.sparse(CASE), layers.dense(CASE)
    with torch.no_grad():
        calls = inferred(replace(CASE, full=True), layers, sparse, guard(said))
        assert set(calls) == {"kernel", "cuBLAS", "masked", "BSR", "CSR"}
        expected = expected_of(only(sparse), x)
        bias = only(sparse).bias
        assert bias is not None and error(calls["kernel"](), expected) < 1e-6
        for name in ("BSR", "CSR"):  # without the bias
            assert error(calls[name]() + bias, expected) < 1e-6
        assert error(calls["cuBLAS"](), dense(x)) < 1e-6
    assert len(said) == 1 and said[0].startswith("2:4 is left out")


def test_a_layer_that_is_not_compiled_has_few_contestants() -> None:
    layers = Layers("cpu")
    with torch.no_grad():
        calls = inferred(CASE, layers, layers.sparse(CASE), guard([]))
    assert set(calls) == {"kernel", "cuBLAS", "masked"}


def test_explicit_permutations_compute_what_the_fused_one_does() -> None:
    layers = Layers("cpu")
    with torch.no_grad():
        calls, perm, into = mapped(CASE, layers, layers.sparse(CASE), guard([]))
        fused = calls["fused input"]().double()
        for name in ("gather", "matmul"):
            assert error(calls[name](), fused) < 1e-6
    assert set(calls) == {"none", "fused input", "fused output", "gather", "matmul", "cuBLAS"}
    assert perm.shape == (32,) and into.shape == (64,)


def test_the_mlp_s_kernel_is_its_eager_form_without_the_last_bias() -> None:
    layers = Layers("cpu")
    with torch.no_grad():
        sparse, x, calls = mlp(CASE, layers, guard([]))
        last = sparse[2].bias
        assert isinstance(last, torch.Tensor)
        assert error(calls["kernel"]() + last, calls["eager"]().double()) < 1e-5
    assert set(calls) == {"kernel", "eager", "cuBLAS"} and x.shape == (5, 32)


def test_a_training_step_gives_the_gradients_of_inputs_and_weights() -> None:
    layers = Layers("cpu")
    sparse, (_, x) = layers.sparse(CASE), layers.dense(CASE)
    calls, grad = trained(CASE, layers, sparse, guard([]))
    layer = only(sparse)
    with torch.no_grad():
        expected = grad.double() @ layer.weight.double(), weight_gradient(layer, x, grad)
    for found in (gradients(layer, x, grad), calls["eager"](), calls["kernel"]()[1:]):
        for got, wanted in zip(found, expected, strict=False):
            assert error(got.detach(), wanted) < 1e-5
    assert set(calls) == {"kernel", "eager", "cuBLAS", "masked"}

"""What is predicted on a GPU: orders of ways to run a layer, not seconds."""

from dataclasses import replace

import pytest
import torch

from padst_compiler.formulation import Geometry
from padst_compiler.gpu_cost import (
    dense_seconds,
    feed,
    is_gpu,
    launches,
    mlp_pays,
    priced,
    products,
    seconds,
)
from padst_compiler.structures import Block, Shape

LAYER = Geometry(Block(64), Shape(3072, 768), 1, 6304, torch.bfloat16, "cuda", frozen=True)


def test_a_kernel_takes_the_longer_of_its_products_and_its_traffic() -> None:
    start = launches(1)
    assert seconds(0.0, 1.0, 0.0) == pytest.approx(start)
    assert seconds(2e12, 1e12, 0.0) == pytest.approx(2.0 + start)
    assert seconds(0.0, 1e12, 2e13) > seconds(2e12, 1e12, 1e9)
    assert priced(2.0) == pytest.approx(2.0 * priced(1.0))


def test_few_tokens_wait_for_weights_and_many_for_products() -> None:
    few, many = replace(LAYER, tokens=1), replace(LAYER, tokens=100_000)
    weights = LAYER.shape.numel * 2
    assert dense_seconds(few) < weights / 1e12 + 2 * launches(1)
    assert dense_seconds(many) == pytest.approx(
        2.0 * many.tokens * many.shape.numel / (0.85 * products(torch.bfloat16)), rel=0.05
    )


def test_types_without_kernels_are_none_of_a_gpus() -> None:
    assert is_gpu(LAYER)
    assert not is_gpu(replace(LAYER, device="cpu"))
    assert not is_gpu(replace(LAYER, dtype=torch.float64))


def test_fp32_is_multiplied_as_torch_was_told() -> None:
    settings = torch.backends.cuda.matmul
    before, rates = settings.allow_tf32, []
    try:
        for allowed in (False, True):
            settings.allow_tf32 = allowed
            rates.append(products(torch.float32))
    finally:
        settings.allow_tf32 = before
    assert rates[0] < rates[1] < products(torch.float16)


def test_narrow_blocks_feed_matrix_units_worse() -> None:
    rates = [feed(side) for side in (8, 16, 32, 64, 128, 512)]
    assert rates == sorted(rates) and 0 < rates[0] < rates[-1] < 1


SIZES = {16: ((192, 5, 16, 16), (48, 19, 16, 16)), 64: ((48, 1, 64, 64), (12, 5, 64, 64))}


@pytest.mark.parametrize("tokens", [1, 197, 6304, 50432])
def test_two_layers_are_one_kernel_where_little_is_computed_twice(tokens: int) -> None:
    assert mlp_pays(tokens, *SIZES[64], torch.bfloat16)


def test_two_layers_stay_apart_where_much_is_computed_twice() -> None:
    assert not mlp_pays(6304, *SIZES[16], torch.bfloat16)

"""What element kernels are predicted to cost; the code that runs them is in test_gpu_block.py."""

from dataclasses import replace

import pytest
import torch

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels import triton_sums
from padst_compiler.kernels.dense import dense
from padst_compiler.kernels.gpu_sums import (
    DW_FORMS,
    DX_FORMS,
    FROZEN_FORMS,
    LINEAR_FORMS,
    SORTED_FORM,
)
from padst_compiler.structures import NM, Diagonal, FanIn, Shape, Structure

from .stored import weights

WIDE = Shape(11008, 4096)
STRUCTURES: list[Structure] = [FanIn(), NM(16), Diagonal()]
OF_EACH = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


def layer(structure: Structure, tokens: int) -> Geometry:
    kept = structure.kept(WIDE, 0.9)
    return Geometry(structure, WIDE, kept, tokens, torch.bfloat16, "cuda", frozen=False)


def price(form: Formulation, geometry: Geometry) -> float:
    cost = form.cost(geometry)
    assert cost is not None
    return cost


@OF_EACH
def test_one_token_is_for_the_kernel_and_many_are_for_the_dense_product(
    structure: Structure,
) -> None:
    form, otherwise = LINEAR_FORMS[structure.name], dense(type(structure))[0]
    one, many = layer(structure, 1), layer(structure, 2048)
    assert price(form, one) < price(otherwise, one)
    assert price(form, many) > price(otherwise, many)


@OF_EACH
def test_lists_by_column_cost_more_than_the_sums(structure: Structure) -> None:
    one, name = layer(structure, 1), structure.name
    forward, backward = price(LINEAR_FORMS[name], one), price(DX_FORMS[name], one)
    if name == "diagonal":  # there are no lists; forward, most diagonals miss a tile of outputs
        assert backward < forward
        forward = backward
    else:
        assert backward > 2 * forward
    assert price(DW_FORMS[name], one) > forward


@OF_EACH
def test_a_cpu_and_float64_have_none(structure: Structure) -> None:
    for forms in (LINEAR_FORMS, DX_FORMS, DW_FORMS):
        form, one = forms[structure.name], layer(structure, 1)
        assert form.cost(replace(one, device="cpu")) is None
        assert form.cost(replace(one, dtype=torch.float64)) is None


@pytest.mark.parametrize("structure", [FanIn(), NM(16), NM(512, 64)], ids=str)
def test_frozen_indices_are_read_in_fewer_bytes(structure: Structure) -> None:
    form, plain = FROZEN_FORMS[structure.name], LINEAR_FORMS[structure.name]
    one = layer(structure, 1)
    assert form.cost(one) is None  # narrowing in every call would read them all first
    frozen = replace(one, frozen=True)
    assert price(form, frozen) < price(plain, frozen)
    wide = replace(frozen, shape=Shape(64, 2**16))
    assert (form.cost(wide) is None) is (structure.name == "fan_in")


@pytest.mark.parametrize("structure", [FanIn(), NM(16)], ids=str)
@pytest.mark.parametrize("inputs", [128, 512])
def test_narrow_indices_say_the_same(structure: Structure, inputs: int) -> None:
    values, indices, weight = weights(structure, Shape(24, inputs))
    x, bias = torch.randn(3, inputs), torch.randn(24)
    expected = x.double() @ weight.t() + bias.double()
    y = FROZEN_FORMS[structure.name].run(x, values, indices, bias, 24)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for kind in (torch.int16, *([torch.uint8] if inputs <= 256 or structure.name == "nm" else [])):
        y = triton_sums.LINEAR[structure.name](x, values, indices.to(kind), bias, 24)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_sorted_diagonals_are_the_same_layer_and_miss_tiles_together() -> None:
    form, plain = SORTED_FORM, LINEAR_FORMS["diagonal"]
    frozen = replace(layer(Diagonal(), 1), frozen=True)
    assert form.cost(layer(Diagonal(), 1)) is None  # sorted in every call it would not pay
    assert price(form, frozen) < price(plain, frozen)
    narrow = replace(frozen, shape=Shape(4096, 11008))
    assert form.cost(narrow) is None  # every diagonal meets every output
    assert price(plain, narrow) == price(form, frozen)


@pytest.mark.parametrize("shape", [Shape(150, 40), Shape(48, 20), Shape(19, 19)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_diagonals_in_any_order_say_the_same(shape: Shape, tokens: int) -> None:
    values, indices, weight = weights(Diagonal(), shape, sparsity=0.6)
    mixed = torch.randperm(indices.shape[1])
    x, bias = torch.randn(tokens, shape.in_features), torch.randn(shape.out_features)
    expected = x.double() @ weight.t() + bias.double()
    given = (x, values[:, mixed], indices[:, mixed], bias, shape.out_features)
    y = SORTED_FORM.run(*given)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for order in (mixed, mixed.sort().values):  # the kernel leaves steps out where none is met
        y = triton_sums.LINEAR["diagonal"](
            x, values[:, order], indices[:, order], bias, shape.out_features
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)

"""What element kernels are predicted to cost; the code that runs them is in test_gpu_block.py."""

from dataclasses import replace

import pytest
import torch

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels import triton_sums
from padst_compiler.kernels.dense import dense
from padst_compiler.kernels.gpu_sums import DW_FORMS, DX_FORMS, LINEAR_FORMS, NARROW_FORMS
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
    assert backward == forward if name == "diagonal" else backward > 2 * forward
    assert price(DW_FORMS[name], one) > forward


@OF_EACH
def test_a_cpu_and_float64_have_none(structure: Structure) -> None:
    for forms in (LINEAR_FORMS, DX_FORMS, DW_FORMS):
        form, one = forms[structure.name], layer(structure, 1)
        assert form.cost(replace(one, device="cpu")) is None
        assert form.cost(replace(one, dtype=torch.float64)) is None


@pytest.mark.parametrize("structure", [FanIn(), NM(16), NM(512, 64)], ids=str)
def test_frozen_indices_are_read_in_fewer_bytes(structure: Structure) -> None:
    form, plain = NARROW_FORMS[structure.name], LINEAR_FORMS[structure.name]
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
    y = NARROW_FORMS[structure.name].run(x, values, indices, bias, 24)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for kind in (torch.int16, *([torch.uint8] if inputs <= 256 or structure.name == "nm" else [])):
        y = triton_sums.LINEAR[structure.name](x, values, indices.to(kind), bias, 24)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)

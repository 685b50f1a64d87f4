"""What element kernels are predicted to cost; the code that runs them is in test_gpu_block.py."""

from dataclasses import replace

import pytest
import torch

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels.dense import dense
from padst_compiler.kernels.gpu_sums import DW_FORMS, DX_FORMS, LINEAR_FORMS
from padst_compiler.structures import NM, Diagonal, FanIn, Shape, Structure

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

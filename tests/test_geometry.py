from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from padst_compiler.geometry import geometry_of
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, unit_of

SHAPE = Shape(24, 16)
SOME: list[Structure] = [Block(8), Block(4, 8), NM(4, 1), Diagonal(), FanIn(3)]


def arguments(structure: Structure) -> dict[Any, tuple[Any, ...]]:
    dense = torch.randn(24, 16)
    indices = structure.select(dense, structure.kept(SHAPE, 0.5))
    values, x, grad = structure.pack(dense, indices), torch.zeros(2, 5, 16), torch.zeros(2, 5, 24)
    return {
        LINEAR[structure.name]: (x, values, indices, None, 24),
        LINEAR_DX[structure.name]: (grad, values, indices, 16),
        LINEAR_DW[structure.name]: (grad, x, indices, unit_of(values, indices)),
    }


@pytest.mark.parametrize("structure", SOME, ids=str)
def test_every_operator_tells_the_same_layer(structure: Structure) -> None:
    for op, args in arguments(structure).items():
        geometry = geometry_of(op, args, frozen=True)
        assert (geometry.shape, geometry.tokens, geometry.frozen) == (SHAPE, 10, True)
        assert geometry.nnz == args[2].numel() * (16 if structure.name == "diagonal" else 1) * (
            structure.unit(SHAPE)[0] * structure.unit(SHAPE)[1] if structure.name == "block" else 1
        )
        assert (geometry.dtype, geometry.device) == (torch.float32, "cpu")


def test_fake_tensors_tell_it_too() -> None:
    mode = FakeTensorMode()
    for op, args in arguments(Block(8)).items():
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        assert geometry_of(op, fakes) == geometry_of(op, args)

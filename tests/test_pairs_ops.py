import pytest
import torch
from torch import Tensor

from padst_compiler.pairs_ops import BLOCK_PAIRS, BLOCK_PAIRS_DW, BLOCK_PAIRS_DX
from padst_compiler.structures import Block, Shape

STRUCTURE, SHAPE = Block(8, 4), Shape(16, 12)
Types = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
Maps = pytest.mark.parametrize("moved", [(True, True), (True, False), (False, False)], ids=str)


def stored(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, indices and the matrix that they stand for."""
    weight = torch.randn(16, 12)
    indices = STRUCTURE.select(weight, 2)
    values = STRUCTURE.pack(weight, indices).to(dtype)
    return values, indices, STRUCTURE.unpack(values.double(), indices, SHAPE)


def close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums are of fp32 where numbers are of 16 bits."""
    assert y.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@Types
@Maps
@pytest.mark.parametrize("paired", [True, False])
def test_a_layer_whose_inputs_may_lie_two_by_two(
    dtype: torch.dtype, moved: tuple[bool, bool], paired: bool
) -> None:
    values, indices, dense = stored(dtype)
    if paired:
        values = torch.stack([values[..., 0::2, :], values[..., 1::2, :]], dim=-1)
    x, p, q = torch.randn(2, 5, 12).to(dtype), torch.randperm(12), torch.randperm(16)
    maps = (p if moved[0] else None, q if moved[1] else None)
    y = BLOCK_PAIRS(x, values, indices, 16, *maps)
    expected = (x[..., p] if moved[0] else x).double() @ dense.t()
    close(y, expected[..., q] if moved[1] else expected, dtype)
    check = (x, values, indices, 16, *maps)
    torch.library.opcheck(BLOCK_PAIRS, check, test_utils="test_faketensor")


@Types
@Maps
def test_the_gradient_of_x(dtype: torch.dtype, moved: tuple[bool, bool]) -> None:
    values, indices, dense = stored(dtype)
    grad, p, q = torch.randn(2, 5, 16).to(dtype), torch.randperm(16), torch.randperm(12)
    maps = (p if moved[0] else None, q if moved[1] else None)
    y = BLOCK_PAIRS_DX(grad, values, indices, 12, *maps)
    expected = (grad[..., p] if moved[0] else grad).double() @ dense
    close(y, expected[..., q] if moved[1] else expected, dtype)
    check = (grad, values, indices, 12, *maps)
    torch.library.opcheck(BLOCK_PAIRS_DX, check, test_utils="test_faketensor")


@Types
def test_the_gradient_of_the_weights(dtype: torch.dtype) -> None:
    _, indices, _ = stored(dtype)
    grad, x = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 12).to(dtype)
    y = BLOCK_PAIRS_DW(grad, x, indices, [4, 8])
    whole = grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    close(y, STRUCTURE.pack(whole, indices), dtype)
    torch.library.opcheck(BLOCK_PAIRS_DW, (grad, x, indices, [4, 8]), test_utils="test_faketensor")

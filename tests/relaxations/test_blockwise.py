"""Block-wise permutations move features within their blocks alone."""

import pytest
import torch

from padst_compiler.relaxations.blockwise import BlockwisePermutation
from padst_compiler.relaxations.spelling import make


def test_the_matrix_is_block_diagonal_with_sinkhorns_blocks() -> None:
    soft = BlockwisePermutation(12, torch.Generator().manual_seed(0), block=4)
    wanted = torch.zeros(12, 12, dtype=torch.float64)
    for at in range(3):
        part = (soft.logits[0][at].detach().double() / soft.temperature.double()).exp()
        for _ in range(5):
            part = part / part.sum(dim=0, keepdim=True)
            part = part / part.sum(dim=1, keepdim=True)
        wanted[4 * at : 4 * at + 4, 4 * at : 4 * at + 4] = part
    torch.testing.assert_close(soft.soft().double(), wanted, rtol=1e-5, atol=1e-6)


def test_no_feature_leaves_its_block() -> None:
    soft = BlockwisePermutation(128, torch.Generator().manual_seed(0))
    perm = soft.harden().perm
    assert torch.equal(perm // 64, torch.arange(128) // 64)
    assert not torch.equal(perm, torch.arange(128))


def test_permllms_numbers() -> None:
    soft = BlockwisePermutation(4096, torch.Generator().manual_seed(0))
    assert (soft.block, soft.iterations, soft.annealing) == (64, 5, 10.0)
    assert sum(p.numel() for p in soft.parameters()) == 4096 * 64


@pytest.mark.parametrize(("size", "block"), [(32, 32), (96, 48), (130, 26), (13, 13), (127, 1)])
def test_the_default_is_the_largest_divisor_up_to_64(size: int, block: int) -> None:
    assert BlockwisePermutation(size, torch.Generator()).block == block


def test_a_block_that_does_not_divide_is_refused() -> None:
    said = r"Expected a block that divides 100\. Got 64\. Use blockwise:50"
    with pytest.raises(ValueError, match=said):
        make("blockwise:64", 100, torch.Generator())

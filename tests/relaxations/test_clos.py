"""Clos factors against explicit matrices, and what three of them reach."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from padst_compiler.relaxations.clos import ClosPermutation
from padst_compiler.relaxations.spelling import make


def shuffle(groups: int, width: int) -> Tensor:
    """K: feature ``i width + j`` goes to ``j groups + i``."""
    matrix = torch.zeros(groups * width, groups * width)
    for i in range(groups):
        for j in range(width):
            matrix[j * groups + i, i * width + j] = 1.0
    return matrix


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("size", [6, 16, 24, 35])
def test_the_product_of_its_factors(size: int, factors: int) -> None:
    soft = ClosPermutation(size, torch.Generator().manual_seed(0), factors=factors)
    stride = shuffle(size // soft.block, soft.block)
    wanted = torch.eye(size)
    for at, blocks in enumerate(soft.blocks()):
        factor = torch.block_diag(*blocks)
        wanted = (stride.t() @ factor @ stride if at % 2 else factor) @ wanted
    torch.testing.assert_close(soft.soft(), wanted, rtol=1e-5, atol=1e-6)


def hard_blocks(soft: ClosPermutation, choice: list[list[tuple[int, ...]]]) -> None:
    with torch.no_grad():
        for logits, orders in zip(soft.logits, choice, strict=True):
            for block, order in zip(logits, orders, strict=True):
                block.copy_(torch.eye(len(order))[list(order)] * 50 * soft.temperature)


def test_three_factors_reach_every_permutation_of_four_and_two_do_not() -> None:
    swaps = list(permutations(range(2)))
    for factors, count in ((3, 24), (2, 16)):
        soft, seen = ClosPermutation(4, torch.Generator(), factors=factors), set()
        for code in range(4**factors):
            bits = [code >> at & 1 for at in range(2 * factors)]
            choice = [[swaps[bits[2 * f]], swaps[bits[2 * f + 1]]] for f in range(factors)]
            hard_blocks(soft, choice)
            perm = soft.harden().perm
            assert torch.equal(soft.soft().argmax(dim=1), perm)
            seen.add(tuple(perm.tolist()))
        assert len(seen) == count


def test_sizes_of_blocks_and_parameters() -> None:
    soft = ClosPermutation(4096, torch.Generator().manual_seed(0))
    assert soft.block == 64
    assert sum(p.numel() for p in soft.parameters()) == 3 * 4096 * 64  # 4.7 % of the full form
    assert ClosPermutation(24, torch.Generator()).block in (4, 6)


@pytest.mark.parametrize(
    ("form", "size", "said"),
    [
        ("clos", 13, "Expected a width with divisors for clos. Got 13. Use low_rank there."),
        ("clos:4", 16, "Expected clos:2 or clos:3. Got 4 factors."),
        ("clos:1", 16, "Expected clos:2 or clos:3. Got 1 factors."),
    ],
)
def test_what_does_not_factor_is_refused(form: str, size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(form, size, torch.Generator())

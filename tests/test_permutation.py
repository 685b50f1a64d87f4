import copy
import math
import pickle
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap
from padst_compiler.permutation import (
    GAP_LIMIT,
    FixedPermutation,
    decode,
    gaps,
    penalty,
    sinkhorn,
)
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation


def matrix_of(order: list[int] | Tensor) -> Tensor:
    return torch.eye(len(order), dtype=torch.float64)[torch.as_tensor(order)]


def near_permutations(
    count: int, size: int = 32, strongest: float = 8.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield doubly stochastic matrices between uniform and a permutation, and that permutation."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        order = torch.randperm(size, generator=generator)
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        share = torch.rand((), generator=generator, dtype=torch.float64)
        yield sinkhorn(noise + (1.0 + (strongest - 1.0) * share) * matrix_of(order), 30), order


def soft_from(matrix: Tensor) -> SinkhornPermutation:
    soft = SinkhornPermutation(len(matrix), torch.Generator())
    with torch.no_grad():
        soft.logits.copy_(matrix.clamp_min(1e-9).log() * soft.temperature)
    return soft


# -- method.md, 2.1 and 8A -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"), [(64, 112.0), (768, 1480.6), (1024, 1984.0), (4096, 8064.0)]
)
def test_penalty_of_the_uniform_matrix(size: int, wanted: float) -> None:
    found = penalty(torch.full((size, size), 1 / size)).item()
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found == pytest.approx(2 * size * (1 - 1 / math.sqrt(size)), rel=1e-4)


def test_penalty_is_zero_exactly_at_permutations() -> None:
    assert all(penalty(matrix_of(list(order))).item() == 0.0 for order in permutations(range(4)))
    assert all(float(penalty(m)) > 1e-3 for m, _ in near_permutations(20, 8))


def test_the_limit_is_one_minus_one_over_root_two() -> None:
    assert round(GAP_LIMIT, 4) == 0.2929


def test_the_largest_entry_is_at_least_the_square_of_one_minus_the_gap() -> None:
    for matrix, _ in near_permutations(50):
        # Shares of their row or column: Sinkhorn's columns sum to 1 up to its convergence only.
        rows, columns = matrix / matrix.sum(1, keepdim=True), matrix / matrix.sum(0, keepdim=True)
        largest = torch.cat([rows.max(dim=1).values, columns.max(dim=0).values])
        assert (largest >= (1 - gaps(matrix)).square() - 1e-12).all()


def test_argmax_is_a_permutation_wherever_the_worst_gap_is_below_the_limit() -> None:
    below = 0
    for matrix, _ in near_permutations(300):
        if float(gaps(matrix).max()) < GAP_LIMIT:
            below += 1
            best = matrix.argmax(dim=1)
            assert best.unique().numel() == best.numel()
            assert torch.equal(decode(matrix).perm, best)
            assert torch.equal(best, decode(matrix.t()).inverse.perm)  # and columns agree
    assert 50 < below < 250  # both sides of the limit were seen


def test_gaps_do_not_depend_on_scale() -> None:
    matrix = torch.rand(5, 5, dtype=torch.float64)
    torch.testing.assert_close(gaps(matrix), gaps(7.0 * matrix))
    assert gaps(torch.eye(3)).abs().max() == 0.0
    torch.testing.assert_close(gaps(torch.full((4, 4), 0.25)), torch.full((8,), 0.5))


# -- Sinkhorn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_marginals_are_one(scale: float) -> None:
    matrix = sinkhorn(scale * torch.randn(16, 16, dtype=torch.float64), 300)
    one = torch.ones(16, dtype=torch.float64)
    assert (matrix > 0).all()
    torch.testing.assert_close(matrix.sum(dim=1), one, rtol=0, atol=1e-12)  # rows come last
    torch.testing.assert_close(matrix.sum(dim=0), one, rtol=0, atol=1e-6)


def test_the_start_is_near_uniform_and_doubly_stochastic() -> None:
    soft = SinkhornPermutation(64, torch.Generator().manual_seed(0))
    matrix = soft.soft()
    assert matrix.dtype is torch.float32
    torch.testing.assert_close(matrix.sum(dim=0), torch.ones(64), rtol=0, atol=1e-3)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(64), rtol=0, atol=1e-5)
    assert soft.gap() > 2 * GAP_LIMIT  # far from any permutation, so far from the identity
    assert matrix.diagonal().mean().item() < 3 / 64
    assert matrix.max().item() < 0.5


def test_large_logits_do_not_overflow() -> None:
    soft = SinkhornPermutation(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        soft.logits.mul_(1e5)
    assert bool(soft.soft().isfinite().all())
    soft.penalty().backward()
    assert soft.logits.grad is not None and bool(soft.logits.grad.isfinite().all())


def test_the_generator_alone_decides_the_start() -> None:
    before = torch.get_rng_state()
    first = SinkhornPermutation(8, torch.Generator().manual_seed(3))
    second = SinkhornPermutation(8, torch.Generator().manual_seed(3))
    third = SinkhornPermutation(8, torch.Generator().manual_seed(4))
    assert torch.equal(first.logits, second.logits)
    assert not torch.equal(first.logits, third.logits)
    assert torch.equal(torch.get_rng_state(), before)


def test_soft_is_applied_along_the_last_axis_and_learns() -> None:
    soft, x = SinkhornPermutation(6, torch.Generator().manual_seed(0)), torch.randn(2, 3, 6)
    torch.testing.assert_close(soft(x), torch.einsum("ji,bti->btj", soft.matrix(), x))
    assert soft(x.bfloat16()).dtype is torch.bfloat16
    soft(x).square().sum().backward()
    assert soft.logits.grad is not None and float(soft.logits.grad.abs().max()) > 0


def test_the_penalty_drives_towards_a_permutation() -> None:
    soft = SinkhornPermutation(12, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(soft.parameters(), lr=2e-2)
    start = soft.gap()
    for _ in range(300):
        optimizer.zero_grad()
        soft.penalty().backward()
        optimizer.step()
    assert start > GAP_LIMIT > soft.gap()
    assert not soft.harden().is_identity


# -- decoding --------------------------------------------------------------------------------------


def test_decode_is_the_best_assignment_where_argmax_is_none() -> None:
    tied = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.1, 0.2], [0.0, 0.5, 0.5]])
    assert tied.argmax(dim=1).unique().numel() < 3
    assert decode(tied).perm.tolist() == [1, 0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_decode_finds_the_largest_sum_over_all_permutations(seed: int) -> None:
    matrix = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sums = {p: sum(float(matrix[i, j]) for i, j in enumerate(p)) for p in permutations(range(5))}
    found = tuple(decode(matrix).perm.tolist())
    if matrix.argmax(dim=1).unique().numel() < 5:
        assert sums[found] == pytest.approx(max(sums.values()))
    else:
        assert found == tuple(matrix.argmax(dim=1).tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = bad
    with pytest.raises(ValueError, match=r"Expected a finite soft permutation.*learning rate"):
        decode(matrix)
    soft = SinkhornPermutation(3, torch.Generator())
    with torch.no_grad():
        soft.logits[0, 0] = math.nan
    with pytest.raises(ValueError, match="Expected a finite soft permutation"):
        soft.harden()


def test_decode_reads_any_dtype_and_a_matrix_with_gradients() -> None:
    order = [2, 0, 1]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert decode(matrix_of(order).to(dtype).requires_grad_()).perm.tolist() == order


def in_log_space(logits: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    return logits.exp()


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_scaling_by_vectors_is_scaling_in_log_space(scale: float, iterations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, 24, 24, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 24, 24, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    found, wanted = sinkhorn(logits, iterations), in_log_space(logits, iterations)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad((m * weight).sum(), logits)[0] for m in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_autocast_leaves_the_scaling_in_full_precision() -> None:
    logits = 5.0 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn(logits, 10)
    assert torch.equal(found, sinkhorn(logits, 10))


def test_balance_tells_two_rows_on_one_column_apart() -> None:
    # Rows 0 and 1 want column 0; the column that is free is a chain of twelve moves away.
    soft = SinkhornPermutation(12, torch.Generator(), temperature=0.1)
    with torch.no_grad():
        soft.logits.copy_(torch.eye(12) * 4 + torch.eye(12).roll(-1, 1) * 5)
        soft.logits[0, 0], soft.logits[0, 11] = 5.0, 0.0
    assert soft.soft()[:, 0].sum() > 1.5
    before = sinkhorn(soft.logits.detach().double() / 0.1, 2000)
    soft.balance()
    after = sinkhorn(soft.logits.detach().double() / 0.1, 2000)
    torch.testing.assert_close(after, before, rtol=0.0, atol=2e-3)
    assert (soft.soft().sum(dim=0) - 1.0).abs().max() < 0.02


def test_sharpening_keeps_what_the_gap_decided() -> None:
    order = [6, 14, 11, 1, 5, 4, 10, 13, 2, 15, 9, 7, 3, 12, 0, 8]
    soft = soft_from(sinkhorn(matrix_of(order) * 4.0, 50))
    decided = soft.harden()
    assert 0.02 < soft.gap() < GAP_LIMIT and decided.perm.tolist() == order
    for _ in range(12):
        soft.sharpen(2.0)
        soft.balance()
    assert soft.gap() < 0.02
    assert torch.equal(soft.harden().perm, decided.perm)


# -- soft and hard ---------------------------------------------------------------------------------


def test_a_small_gap_changes_little_when_it_hardens() -> None:
    x, worst = torch.randn(256, 32), 0.0
    for matrix, _ in near_permutations(100, strongest=14.0):
        soft = soft_from(matrix)
        gap = soft.gap()
        hard = FixedPermutation(soft.harden())
        change = (soft(x) - hard(x)).square().mean().sqrt().item()  # of inputs of size 1
        # A row at distance |m - e|^2 = 1 + |m|^2 - 2 max(m) <= 1 - (1 - gap)^2 of its argmax.
        if gap < GAP_LIMIT:
            assert change <= 1.1 * math.sqrt(1 - (1 - gap) ** 2)
        if gap < 0.01:
            worst = max(worst, change)
    assert 0.0 < worst < 0.15


def test_hard_matrix_map_and_product_agree() -> None:
    order = [3, 1, 0, 2]
    hard = FixedPermutation(IndexMap.of(order))
    x = torch.randn(2, 3, 4)
    assert torch.equal(hard(x), x[..., order])
    torch.testing.assert_close(hard(x), x @ hard.matrix().t())
    assert (hard.is_soft, hard.size) == (False, 4)
    assert list(hard.state_dict()) == ["perm"] and not list(hard.parameters())


def test_a_fixed_permutation_keeps_its_own_copy() -> None:
    index_map = IndexMap.of([1, 0])
    hard = FixedPermutation(index_map)
    hard.perm.copy_(torch.tensor([0, 1]))
    assert index_map.perm.tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_copies_and_pickles(kind: str) -> None:
    soft = SinkhornPermutation(5, torch.Generator().manual_seed(0), temperature=0.3, iterations=7)
    module = soft if kind == "soft" else FixedPermutation(soft.harden())
    x = torch.randn(2, 5)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert repr(twin) == repr(module)
    assert ("soft, temperature=0.3, iterations=7" if kind == "soft" else "5, hard") in repr(module)

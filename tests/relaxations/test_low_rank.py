"""Low-rank logits: ranks of method.md 8A.8, Sinkhorn against divisions, memory of 8C.7."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from padst_compiler.relaxations.low_rank import LowRankPermutation, default_rank, kissing_rank
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.relaxations.spelling import make


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most that ``run`` held at once of what it allocated on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    results = seen.profiler.kineto_results
    moves = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(moves, key=lambda move: move[0]):
        live += size
        peak = max(peak, live)
    return peak


def soft_of(size: int, **settings: Any) -> LowRankPermutation:
    return LowRankPermutation(size, torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize(
    ("size", "rank"),
    [*zip((768, 1024, 3072, 4096, 8192, 11008, 14336), (12, 13, 16, 16, 19, 20, 20), strict=True)],
)
def test_kissing_ranks(size: int, rank: int) -> None:
    assert kissing_rank(size) == rank
    assert default_rank(size) == min(size, 16 if rank <= 16 else 32)


def test_kissing_ranks_at_the_ends_of_the_table() -> None:
    sizes = (1, 2, 3, 6, 7, 72, 73, 20000, 196560, 200000)
    assert [kissing_rank(n) for n in sizes] == [1, 1, 2, 2, 3, 6, 7, 21, 24, 25]


def test_it_is_sinkhorns_scaling_of_scaled_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        size, iterations = 2 + case % 7, 1 + case % 5
        soft = LowRankPermutation(
            size, generator, rank=2 + case % 4, scale=1.0, iterations=iterations, chunk=1 + case
        )
        rows, columns = (p.detach().double().requires_grad_() for p in (soft.rows, soft.columns))
        cosines = (rows / rows.norm(dim=1, keepdim=True)) @ F.normalize(columns, dim=1).t()
        matrix = (3.0 * cosines).exp()
        for _ in range(iterations):
            matrix = matrix / matrix.sum(dim=0, keepdim=True)
            matrix = matrix / matrix.sum(dim=1, keepdim=True)
        x, upstream = torch.randn(3, size), torch.randn(3, size)
        soft(x).backward(upstream)
        (x.double() @ matrix.t()).backward(upstream.double())
        torch.testing.assert_close(soft.soft().double(), matrix, rtol=1e-5, atol=1e-6)
        for ours, theirs in ((soft.rows, rows), (soft.columns, columns)):
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


def test_alpha_and_shift_are_saved_tensors_that_sharpening_multiplies() -> None:
    soft = soft_of(8)
    soft.balance()
    shift = soft.shift.clone()
    soft.sharpen(10.0)
    assert soft.alpha.item() == pytest.approx(30.0)
    torch.testing.assert_close(soft.shift, 10.0 * shift)
    assert {"alpha", "shift"} < set(soft.state_dict())


def test_balance_starts_sinkhorn_where_it_converged() -> None:
    soft = soft_of(64)
    soft.sharpen(20.0)
    loose = (soft.soft().detach().sum(dim=0) - 1.0).abs().max().item()
    soft.balance(1e-3, 2000)
    assert (soft.soft().detach().sum(dim=0) - 1.0).abs().max().item() < 0.01 < loose


def test_parameters_and_adams_state_are_2_percent_of_the_full_forms() -> None:
    def trained(soft: torch.nn.Module) -> int:
        optimizer = torch.optim.Adam(soft.parameters())
        for parameter in soft.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held = [t for state in optimizer.state.values() for t in state.values()]
        return sum(t.nbytes for t in [*soft.parameters(), *held])

    generator = torch.Generator().manual_seed(0)
    full = trained(SinkhornPermutation(4096, generator))
    assert trained(make("learned", 4096, generator)) <= 0.02 * full


def held_by_a_step(size: int, tokens: int, **settings: int) -> float:
    """Return the peak of forward, penalty and backward, in ``size x size`` float32 matrices.

    The product and the gradient of the tokens do not count: any linear layer has these.
    """
    soft = soft_of(size, **settings)
    x, upstream = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)

    def run() -> None:
        torch.autograd.backward([soft(x), soft.penalty()], [upstream, torch.ones(())])

    return (peak_bytes(run) - 2 * x.nbytes) / (4 * size * size)


def test_no_n_by_n_matrix_exists_in_a_step() -> None:
    assert held_by_a_step(1024, 64, chunk=2**15) < 0.6


@pytest.mark.slow
def test_at_4096_tokens_by_features_less_than_two_such_matrices_exist() -> None:
    assert held_by_a_step(4096, 4096) < 1.5


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a rank of at least 1\. Got 0"):
        soft_of(8, rank=0)

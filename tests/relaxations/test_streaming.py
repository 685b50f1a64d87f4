"""Streamed products and moments against whole matrices, in float64, and what they hold at once."""

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from padst_compiler.relaxations.streaming import moments, potential, product

Factors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


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


def factors(size: int, rank: int, generator: torch.Generator) -> Factors:
    sizes = [(size, rank), (size, rank), (size,), (size,)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    left, right, a, b = (one.requires_grad_() for one in made)
    return left, right, a, b


def whole(left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(left @ right.t() + a[:, None] + b[None, :])


def test_values_and_gradients_equal_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        size, chunk = 1 + case % 9, 1 + 7 * (case % 4)
        held = factors(size, 1 + case % 3, generator)
        left, right, _, b = held
        x = torch.randn(2, 3, size, generator=generator, dtype=torch.float64, requires_grad=True)
        matrix = whole(*held)
        sums = torch.cat([matrix.sum(dim=1), matrix.sum(dim=0)])
        squares = torch.cat([matrix.square().sum(dim=1), matrix.square().sum(dim=0)])
        shifted = -(left @ right.t() + b).logsumexp(dim=1)
        pairs = [
            (product(x, *held, chunk), x @ matrix.t()),
            (moments(*held, chunk)[0], sums),
            (moments(*held, chunk)[1], squares),
            (potential(left, right, b, chunk), shifted),
        ]
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted)
            upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
            ours = torch.autograd.grad(found, [x, *held], upstream, allow_unused=True)
            theirs = torch.autograd.grad(
                wanted, [x, *held], upstream, allow_unused=True, retain_graph=True
            )
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None)
                torch.testing.assert_close(one, other)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    held = factors(5, 2, generator)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x, left, right, a, b: product(x, left, right, a, b, 10), (x, *held))
    assert check(lambda left, right, a, b: moments(left, right, a, b, 10), held)
    assert check(lambda left, right, shift: potential(left, right, shift, 10), held[:3])


def test_second_derivatives_are_refused() -> None:
    held = factors(4, 2, torch.Generator().manual_seed(0))
    (first,) = torch.autograd.grad(potential(*held[:3]).square().sum(), held[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("chunk", [2**14, 2**16])
def test_only_some_rows_exist_at_once(chunk: int) -> None:
    size = 1024
    left, right, a, b = (t.detach().float() for t in factors(size, 8, torch.Generator()))
    for one in (left, right, a, b):
        one.requires_grad_()
    x = torch.randn(4, size)

    def run() -> None:
        squares = moments(left, right, a, b, chunk)[1]
        (product(x, left, right, a, b, chunk).sum() + squares.sum()).backward()

    assert peak_bytes(run) < 6 * 4 * chunk + 40 * 4 * 8 * size < 4 * size * size

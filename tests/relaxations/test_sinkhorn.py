"""Full logits: against Sinkhorn's divisions without log space, in float64."""

import pytest
import torch

from padst_compiler.relaxations.sinkhorn import SinkhornPermutation, balanced


def test_it_is_sinkhorns_scaling_of_logits_over_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        size, iterations = 2 + case % 7, 1 + case % 6
        soft = SinkhornPermutation(size, generator, temperature=0.3, iterations=iterations)
        logits = soft.logits.detach().double().requires_grad_()
        matrix = (logits / soft.temperature.double()).exp()
        for _ in range(iterations):
            matrix = matrix / matrix.sum(dim=0, keepdim=True)
            matrix = matrix / matrix.sum(dim=1, keepdim=True)
        found, upstream = soft.soft(), torch.randn(size, size, dtype=torch.float64)
        torch.testing.assert_close(found.double(), matrix, rtol=1e-5, atol=1e-6)
        found.backward(upstream.float())
        matrix.backward(upstream)
        assert soft.logits.grad is not None and logits.grad is not None
        torch.testing.assert_close(soft.logits.grad.double(), logits.grad, rtol=1e-3, atol=1e-5)


def test_the_temperature_is_a_saved_tensor_that_annealing_lowers() -> None:
    soft = SinkhornPermutation(4, torch.Generator(), temperature=0.5)
    logits = soft.logits.detach().clone()
    soft.anneal(2.0)
    assert soft.state_dict()["temperature"].item() == pytest.approx(0.25)
    assert torch.equal(soft.logits, logits)
    soft.sharpen(3.0)
    torch.testing.assert_close(soft.logits.detach(), 3.0 * logits)


def test_balanced_logits_of_a_batch() -> None:
    log = 4.0 * torch.randn(3, 5, 5)
    even = balanced(log, tolerance=1e-4, limit=2000).exp()
    torch.testing.assert_close(even.sum(dim=-2), torch.ones(3, 5), rtol=0, atol=1e-3)
    torch.testing.assert_close(even.sum(dim=-1), torch.ones(3, 5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("peak", [0.2, 0.4, 0.7])
def test_a_peaked_start_lies_near_a_random_permutation(size: int, peak: float) -> None:
    soft = SinkhornPermutation(size, torch.Generator().manual_seed(1), peak=peak)
    matrix = soft.soft().detach()
    strongest, perm = matrix.max(dim=1)
    assert abs(float(strongest.mean()) - peak) < 0.15
    if peak == 0.7:  # all entries stand out of the noise
        assert torch.equal(perm.sort().values, torch.arange(size))
        assert float((perm == torch.arange(size)).float().mean()) < 0.3  # not the identity


@pytest.mark.parametrize("peak", [-0.1, 1.0])
def test_a_peak_that_is_no_share_is_refused(peak: float) -> None:
    with pytest.raises(ValueError, match=r"Expected 0 <= peak < 1\. Got"):
        SinkhornPermutation(8, torch.Generator(), peak=peak)

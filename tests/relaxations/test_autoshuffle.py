"""AutoShuffleNet's form against its words, and its penalty."""

import torch

from padst_compiler.permutation import penalty
from padst_compiler.relaxations.autoshuffle import AutoShufflePermutation


def test_it_is_magnitudes_over_column_sums_then_row_sums_without_their_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        size = 2 + case % 6
        soft = AutoShufflePermutation(size, generator, noise=2.0)
        raw = soft.magnitudes.detach().double().requires_grad_()
        columns = [sum(abs(raw[i, j].item()) for i in range(size)) for j in range(size)]
        once = [[abs(raw[i, j].item()) / columns[j] for j in range(size)] for i in range(size)]
        scale = torch.tensor(
            [[1.0 / (columns[j] * sum(once[i])) for j in range(size)] for i in range(size)],
            dtype=torch.float64,
        )
        wanted = raw.abs() * scale  # the sums are numbers: nothing flows through them
        torch.testing.assert_close(soft.soft().double(), wanted, rtol=1e-5, atol=1e-6)
        soft.penalty().backward()
        penalty(wanted).backward()
        assert soft.magnitudes.grad is not None and raw.grad is not None
        torch.testing.assert_close(soft.magnitudes.grad.double(), raw.grad, rtol=1e-3, atol=1e-3)


def test_signs_do_not_matter_and_stay() -> None:
    soft = AutoShufflePermutation(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        soft.magnitudes[0, :3] *= -1.0
    signs, matrix = soft.magnitudes.detach().sign(), soft.soft().detach()
    soft.balance()
    assert torch.equal(soft.magnitudes.sign(), signs)
    torch.testing.assert_close(soft.soft().sum(dim=0), torch.ones(6), rtol=0, atol=0.02)
    assert (soft.soft() - matrix).abs().max() < 0.1


def test_sharpening_is_a_power_and_makes_the_parameters_larger() -> None:
    soft = AutoShufflePermutation(6, torch.Generator().manual_seed(0))
    before, mean = soft.soft().detach(), soft.magnitudes.detach().abs().mean()
    soft.sharpen(2.0)
    power = before.square() / before.square().sum(dim=1, keepdim=True)
    wanted = power / power.sum(dim=0, keepdim=True)
    wanted = wanted / wanted.sum(dim=1, keepdim=True)
    torch.testing.assert_close(soft.soft(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.magnitudes.detach().abs().mean(), 2.0 * mean)

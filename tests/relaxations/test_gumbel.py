"""Noise of its own generator, only while training, saved by two numbers."""

import math

import torch

from padst_compiler.relaxations.gumbel import GumbelPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation


def soft_of(seed: int = 0, size: int = 8) -> GumbelPermutation:
    return GumbelPermutation(size, torch.Generator().manual_seed(seed))


def test_noise_is_added_to_the_logits_in_training_mode_alone() -> None:
    soft = soft_of()
    plain = SinkhornPermutation(8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft.eval().soft(), plain.soft(), rtol=0, atol=0)
    soft.train()
    with torch.no_grad():
        plain.logits.add_(soft.strength * soft.noise * plain.temperature)
    torch.testing.assert_close(soft.soft(), plain.soft(), rtol=1e-5, atol=1e-6)


def test_the_noise_is_gumbels() -> None:
    noise = soft_of(size=300).noise.double()
    assert abs(float(noise.mean()) - 0.5772) < 0.02  # Euler's constant
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.02


def test_every_draw_is_new_and_follows_from_seed_and_count() -> None:
    before = torch.get_rng_state()
    soft, twin, other = soft_of(), soft_of(), soft_of(1)
    draws = [soft.noise.clone()]
    for _ in range(3):
        soft.resample()
        draws.append(soft.noise.clone())
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert not torch.equal(draws[0], other.noise)
    twin.load_state_dict(soft.state_dict())
    assert torch.equal(twin.noise, draws[-1])
    assert "noise" not in soft.state_dict()
    assert torch.equal(torch.get_rng_state(), before)


def test_gap_and_decoding_do_not_see_the_noise() -> None:
    soft = soft_of()
    gap, perm = soft.gap(), soft.harden().perm
    soft.resample()
    assert soft.gap() == gap and torch.equal(soft.harden().perm, perm) and soft.training

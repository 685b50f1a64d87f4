"""The soft top-K is the published formula."""

import math

import pytest
import torch

from padst_compiler.selection import SoftSelection


def test_weights_are_the_clamped_softmax() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        units = int(torch.randint(1, 20, (), generator=generator))
        kept = int(torch.randint(1, units + 1, (), generator=generator))
        soft = SoftSelection(units, kept)
        soft.alpha.data.copy_(torch.randn(units, generator=generator))
        soft.temperature.fill_(10 ** float(torch.rand((), generator=generator) * 2 - 1))
        exponents = [math.exp(float(a) / float(soft.temperature)) for a in soft.alpha.detach()]
        expected = [min(1.0, kept * e / sum(exponents)) for e in exponents]
        assert soft.weights().tolist() == pytest.approx(expected, rel=1e-4)
        best = sorted(sorted(range(units), key=lambda j: -exponents[j])[:kept])
        assert soft.hard().tolist() == best


def test_a_low_temperature_gives_the_hard_choice() -> None:
    soft = SoftSelection(6, 1)
    soft.alpha.data.copy_(torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 0.5]))
    soft.temperature.fill_(0.05)
    assert soft.weights().tolist() == pytest.approx([0, 1, 0, 0, 0, 0], abs=1e-6)
    assert soft.hard().tolist() == [1]


def test_ties_go_to_the_first() -> None:
    assert SoftSelection(5, 2).hard().tolist() == [0, 1]


def test_it_keeps_the_type_of_the_values() -> None:
    values = torch.ones(1, 4, 3, dtype=torch.bfloat16)
    assert SoftSelection(4, 2)(values).dtype == torch.bfloat16
    assert set(SoftSelection(4, 2).state_dict()) == {"alpha", "temperature"}

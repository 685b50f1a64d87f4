"""The augmented Lagrangian, against plain arithmetic of method.md 6.9."""

import pytest
import torch

from padst_compiler.multipliers import RHO, Multipliers


def test_penalty_and_update_in_plain_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        multipliers, held = Multipliers(), [0.0] * 6
        for _ in range(4):
            parts = torch.rand(6, generator=generator, dtype=torch.float64).requires_grad_()
            numbers = parts.tolist()
            terms = [lam * (d + RHO / 2 * d * d) for lam, d in zip(held, numbers, strict=True)]
            found = multipliers.weigh("fc", parts)
            assert found.item() == pytest.approx(sum(terms) / 6)
            (slope,) = torch.autograd.grad(found, parts)
            wanted = [lam * (1 + RHO * d) / 6 for lam, d in zip(held, numbers, strict=True)]
            assert slope.tolist() == pytest.approx(wanted)
            multipliers.update("fc", parts)
            held = [lam + RHO * (d + RHO / 2 * d * d) for lam, d in zip(held, numbers, strict=True)]
    assert RHO == 0.1


def test_it_goes_on_from_its_state() -> None:
    multipliers, other = Multipliers(), Multipliers()
    multipliers.update("a", torch.ones(3))
    state = multipliers.state_dict()
    multipliers.update("a", torch.ones(3))
    other.load_state_dict(state)
    other.update("a", torch.ones(3))
    assert torch.equal(other.weigh("a", torch.ones(3)), multipliers.weigh("a", torch.ones(3)))
    assert not torch.equal(state["a"], other.state_dict()["a"])

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from padst_compiler.flat import exported


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("scale", torch.tensor(2.0))
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x) * self.scale + self.constant + y, x.exp()


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_model_is_a_function_of_flat_inputs(dynamic: bool) -> None:
    model, inputs = Scaled(), (torch.randn(2, 3), torch.randn(2, 4))
    function, fakes, reals, state = exported(model, inputs, dynamic)
    assert len(fakes) == len(reals) == 6
    assert sorted(state.values()) == ["", "", "fc", "fc"]
    torch.testing.assert_close(function(*reals), model(*inputs))
    batch = {type(f.shape[0]) for i, f in enumerate(fakes) if i not in state}
    assert batch == ({torch.SymInt} if dynamic else {int})


def test_a_batch_of_one_is_no_constant() -> None:
    function, fakes, reals, state = exported(nn.Linear(3, 4), (torch.randn(1, 3),), True)
    (position,) = set(range(3)) - set(state)
    assert isinstance(fakes[position].shape[0], torch.SymInt)
    reals[position] = torch.randn(7, 3)
    assert function(*reals)[0].shape == (7, 4)


def test_a_model_of_any_number_of_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return torch.stack(inputs).sum(0)

    function, _, reals, _ = exported(Sum(), (torch.ones(2, 3), torch.ones(2, 3)), True)
    assert torch.equal(function(*reals)[0], torch.full((2, 3), 2.0))


def test_a_model_that_fixes_its_batch_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(4, 3)

    with pytest.raises(ValueError, match=r"(?s)any batch size.*Pass dynamic_batch=False"):
        exported(Fixed(), (torch.ones(4, 3),), True)
    function, _, reals, _ = exported(Fixed(), (torch.ones(4, 3),), False)
    assert torch.equal(function(*reals)[0], torch.full((4, 3), 2.0))


def test_an_exported_mutation_is_not_among_the_results() -> None:
    class Count(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x.exp()

    x = torch.randn(2, 3)
    function, _, reals, _ = exported(Count(), (x,), True)
    results = function(*reals)
    assert len(results) == 1
    torch.testing.assert_close(results[0], x.exp())

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from padst_compiler.untouched import call_arguments, eager, left_as_it_was


class Restless(nn.Module):
    """Changes everything that a forward can reach."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.tensor(0.0))
        self.register_buffer("mean", torch.zeros(2))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = self.mean + float("nan")
        self.last = x
        self.extra = nn.Linear(4, 4)
        self.register_buffer("cache", x)
        self.norm.eval()
        del self.norm.num_features
        y: Tensor = self.extra(self.norm.train()(x))
        return y * torch.rand(1) * random.random() * np.random.rand()


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_comes_back(fails: bool) -> None:
    model = Restless()
    model.norm.eval()
    before, attributes, mean = state_of(model), dict(model.__dict__), model.mean
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    with left_as_it_was(model) if not fails else pytest.raises(KeyError), left_as_it_was(model):
        model(torch.randn(3, 4))
        assert model.calls == 1
        if fails:
            raise KeyError
    assert state_of(model).keys() == before.keys()
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert model.__dict__ == attributes and model.mean is mean and model.last is None
    assert not model.norm.training and model.norm.num_features == 4
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])  # type: ignore[index]


def test_parameters_come_back_where_the_write_was_seen() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with left_as_it_was(model, {0: (model.weight, before)}):
        model.weight.data.zero_()
    assert torch.equal(model.weight, before)


def test_inputs_are_copied_and_equal_ones_stay_one() -> None:
    x = torch.ones(2, requires_grad=True)
    args, kwargs = call_arguments(nn.Linear(2, 2), (x, [x], 3))
    assert args[0] is args[1][0] and args[0] is not x and args[2] == 3 and kwargs == {}
    assert not args[0].requires_grad
    args, kwargs = call_arguments(nn.Linear(2, 2), {"x": x})
    assert args == () and torch.equal(kwargs["x"], x) and kwargs["x"] is not x


def test_inputs_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected .* on cpu.*Got meta.*\.to\('cpu'\)"):
        call_arguments(nn.Linear(2, 2), torch.ones(2, device="meta"))


def test_compiled_parts_run_as_python() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend=refuse)
    with eager():
        assert compiled(torch.ones(1, 2)).shape == (1, 2)


def refuse(*_: Any) -> Any:
    raise AssertionError("compiled")

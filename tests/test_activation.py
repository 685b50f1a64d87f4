import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.activation import ACTIVATIONS, recognise

SPELLED: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [lambda x: x.clamp(min=0), lambda x: x.maximum(torch.zeros(())), lambda x: x * (x > 0)],
    "gelu": [
        lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: x * torch.special.ndtr(x),
    ],
    "gelu_tanh": [
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    ],
    "silu": [lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x)],
}


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_is_recognised(name: str) -> None:
    assert [recognise(spelled) for spelled in SPELLED[name]] == [name] * len(SPELLED[name])


def test_every_activation_is_recognised_and_spelled_here() -> None:
    assert list(SPELLED) == list(ACTIVATIONS)
    for name, function in ACTIVATIONS.items():
        assert recognise(function) == name


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu6": F.relu6,
    "clamped far out": lambda x: F.relu(x).clamp(max=65504.0),
    "leaky": lambda x: F.leaky_relu(x, 1e-6),
    "mish": F.mish,
    "tanh": torch.tanh,
    "squared": lambda x: F.relu(x).square(),
    "another slope": lambda x: x * torch.sigmoid(1.7019 * x),
    "shifted": lambda x: F.gelu(x) + 1e-7,
    "nothing but nan": lambda x: x * math.nan,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_not(name: str) -> None:
    assert recognise(OTHERS[name]) is None

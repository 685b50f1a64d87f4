from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from padst_compiler.obstacles import find_weight, obstacle
from padst_compiler.structures import Shape


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        y: Tensor = super()._conv_forward(*args)
        return 2.0 * y


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def computed(*names: str) -> nn.Module:
    module = nn.Linear(8, 4)
    for name in names:
        parametrize.register_parametrization(module, name, Halved(), unsafe=True)
    return module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 3, "padding": "same"},
        {"padding": "valid", "bias": False},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_an_ungrouped_convolution_is_converted_itself(options: dict[str, Any]) -> None:
    module = nn.Conv2d(8, 4, 3, **options)
    found = find_weight(module)
    assert found is not None and (found.kind, found.columns, found.obstacle) == ("conv2d", (), "")
    assert obstacle(module, found.kind, found.below) == ""


STAYS: list[tuple[Callable[[], nn.Module], str, str, tuple[int, ...], Shape, str]] = [
    (lambda: nn.Conv2d(8, 8, 3, groups=8), "conv", "weight", (1, 2, 3), Shape(8, 9), "8 groups"),
    (lambda: nn.Conv2d(8, 8, 1, groups=2), "conv", "weight", (1, 2, 3), Shape(8, 4), "2 groups"),
    (lambda: nn.Conv2d(8, 8, 1, padding=1), "conv", "weight", (1, 2, 3), Shape(8, 8), "padding"),
    (lambda: Doubled(8, 8, 3), "conv", "weight", (1, 2, 3), Shape(8, 72), "in its own way"),
    (lambda: nn.Conv1d(8, 4, 3), "conv", "weight", (1, 2), Shape(4, 24), ""),
    (lambda: nn.Conv3d(8, 4, 3), "conv", "weight", (1, 2, 3, 4), Shape(4, 216), ""),
    (lambda: nn.ConvTranspose1d(8, 4, 3), "conv", "weight", (0,), Shape(12, 8), ""),
    (
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 4, 3)),
        "conv",
        "parametrizations.weight.original1",
        (1, 2, 3),
        Shape(4, 72),
        "below WeightNorm",
    ),
    (
        lambda: parametrizations.spectral_norm(nn.Linear(8, 4)),
        "functional",
        "parametrizations.weight.original",
        (1,),
        Shape(4, 8),
        "below SpectralNorm",
    ),
    (lambda: weight_norm(nn.Linear(8, 4)), "functional", "weight_v", (1,), Shape(4, 8), "weight_v"),
    (
        lambda: prune.identity(nn.Linear(8, 4), "weight"),
        "functional",
        "weight_orig",
        (1,),
        Shape(4, 8),
        "weight_orig",
    ),
    (lambda: computed("bias"), "functional", "weight", (1,), Shape(4, 8), "another of its param"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "kind", "below", "columns", "shape", "note"), STAYS)
def test_other_code_stays_and_its_parameter_becomes_sparse(
    build: Callable[[], nn.Module],
    kind: str,
    below: str,
    columns: tuple[int, ...],
    shape: Shape,
    note: str,
) -> None:
    module = build()
    found = find_weight(module)
    assert found is not None and (found.kind, found.below) == (kind, below)
    assert (found.columns, found.shape, found.obstacle) == (columns, shape, "")
    assert note in found.note
    path, _, attribute = below.rpartition(".")
    assert module.get_submodule(path) is found.module
    assert obstacle(found.module, kind, attribute) == ""


def test_who_reads_a_weight_without_calling_its_module_keeps_it() -> None:
    found = find_weight(nn.Linear(8, 4), read=True)
    assert found is not None and found.columns == (1,) and "without calling it" in found.note


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (computed("weight"), "computed by Halved: parametrize.remove_parametrizations first"),
        (parametrizations.orthogonal(nn.Linear(8, 4)), "computed by _Orthogonal"),
        (nn.ConvTranspose2d(8, 8, 3, groups=2), "transposed convolution in 2 groups"),
    ],
    ids=str,
)
def test_what_cannot_be_found_says_why(module: nn.Module, said: str) -> None:
    found = find_weight(module)
    assert found is not None and said in found.obstacle


def test_a_weight_that_is_gone_is_computed() -> None:
    module = nn.Linear(8, 4)
    del module.weight
    found = find_weight(module)
    assert found is not None and found.obstacle == "its weight is computed before each call"


@pytest.mark.parametrize(
    ("module", "kind", "attribute", "said"),
    [
        (nn.Conv2d(8, 8, 3, device="meta"), "conv2d", "weight", "meta device"),
        (nn.Linear(0, 4), "linear", "weight", "no weights"),
        (nn.Linear(4, 4, bias=False), "functional", "bias", "is computed"),
        (None, "linear", "weight", "is computed"),
        (nn.LSTM(4, 4), "functional", "weight_ih_l0", "LSTM keeps its weights in a list"),
        (nn.Linear(4, 4).to(torch.float64), "functional", "weight", ""),
        (nn.Linear(4, 4), "sparse", "weight", "sparse already"),
    ],
    ids=str,
)
def test_what_stands_in_the_way_is_said(
    module: nn.Module | None, kind: str, attribute: str, said: str
) -> None:
    why = obstacle(module, kind, attribute)
    assert said in why and bool(said) == bool(why)


@pytest.mark.parametrize("module", [nn.Embedding(8, 4), nn.LayerNorm(8), nn.ReLU()], ids=str)
def test_what_is_not_linear_has_no_weight(module: nn.Module) -> None:
    assert find_weight(module) is None

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from padst_compiler.obstacles import obstacle


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> torch.Tensor:
        y: torch.Tensor = super()._conv_forward(*args)
        return 2.0 * y


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
def test_nothing_stands_in_the_way_of_an_ungrouped_convolution(options: dict[str, Any]) -> None:
    assert obstacle(nn.Conv2d(8, 4, 3, **options), "conv2d") == ""


@pytest.mark.parametrize(
    ("module", "kind", "said"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "conv2d", "k x k convolution in 8 groups"),
        (nn.Conv2d(8, 8, 1, groups=2), "conv1x1", "1x1 convolution in 2 groups"),
        (nn.Conv2d(8, 8, 1, padding=1), "conv1x1", "1x1 convolution with padding (1, 1)"),
        (Doubled(8, 8, 3), "conv2d", "Doubled computes forward in its own way"),
        (nn.Conv2d(8, 8, 3, device="meta"), "conv2d", "meta device"),
        (parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "conv2d", "remove_parametrizations"),
    ],
    ids=str,
)
def test_what_stands_in_the_way_is_said(module: nn.Module, kind: str, said: str) -> None:
    assert said in obstacle(module, kind)

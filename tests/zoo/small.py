"""Our own MLP-Mixer and a small ResNet beside the architectures of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.mixer import Mixer

from .architectures import ARCHITECTURES, Built, build

__all__ = ["ALL", "ResNet"]


class _Residual(nn.Module):
    """Two convolutions with batch norms; a 1x1 convolution where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.short: nn.Module = nn.Identity()
        if (inner, stride) != (outer, 1):
            convolution = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.short = nn.Sequential(convolution, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """A stem, four residual blocks of 16 and 32 channels, a head."""

    def __init__(self) -> None:
        """Build the layers; batch norms get statistics that are not those of a new one."""
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            _Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 32, 1), _Residual(32, 32, 1)
        )
        self.head = nn.Linear(32, 10)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``x (n, 3, side, side)``: ``(n, 10)``."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        result: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result


def _own(make: Callable[[], nn.Module], *shape: int, name: str) -> Built:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
        return model, {name: torch.randn(shape, dtype=torch.float64)}


ALL: dict[str, Callable[[], Built]] = {
    **{name: functools.partial(build, name) for name in ARCHITECTURES},
    "mixer": functools.partial(
        _own, functools.partial(Mixer, side=8, patch=2, width=32), 2, 8, 8, name="images"
    ),
    "resnet": functools.partial(_own, ResNet, 2, 3, 8, 8, name="x"),
}
"""Every model by its name: built anew at each call, in eval mode and float64, with inputs."""

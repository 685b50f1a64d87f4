"""Maps over the channel axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import D, Each, Net, across, adopted


class _Channels(Net):
    shape: tuple[int, ...] = (2, D, 3, 3)

    def build(self) -> None:
        self.a, self.r = self.convolution(), self.convolution(shuffled=True)


class ConvolutionControl(_Channels):
    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class ChannelShuffle(_Channels):
    """A view, a transposition and a view are one map of the channels."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = y.view(-1, 4, D // 4, 3, 3).transpose(1, 2).reshape(-1, D, 3, 3)
        return self.r(y)


class ChannelShuffleBuiltIn(_Channels):
    def forward(self, x: Tensor) -> Any:
        return self.r(F.channel_shuffle(self.a(x), 4))


class PReluPerChannel(_Channels):
    def build(self) -> None:
        super().build()
        self.slope = nn.PReLU(D)
        nn.init.normal_(self.slope.weight)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.slope(self.a(x)))


class TwoConvolutionsJoined(_Channels):
    gathers, why = 1, "a random map mixes the parts"

    def build(self) -> None:
        self.a, self.b = self.convolution(), self.convolution()
        self.r = self.convolution(2 * D, D, shuffled=True)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cat(tensors=[self.a(x), self.b(x)], dim=1))


class DenseConvolutionWrites(_Channels):
    def build(self) -> None:
        super().build()
        self.a = nn.Conv2d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class TransposedConvolutionWrites(DenseConvolutionWrites):
    def build(self) -> None:
        super().build()
        self.a = nn.ConvTranspose2d(D, D, 2, stride=2)


class DepthwiseBetween(_Channels):
    def build(self) -> None:
        super().build()
        self.depth = nn.Conv2d(D, D, 3, padding=1, groups=D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.gelu(self.depth(self.a(x))))


class GroupedBetween(_Channels):
    gathers, why = 1, "a random map leaves the groups"

    def build(self) -> None:
        super().build()
        self.groups = nn.Conv2d(D, D, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.groups(self.a(x)))


class GroupedAcrossGroups(GroupedBetween):
    """Whole groups move: the writer's rows and the groups' rows move with them."""

    today = 1
    gathers, why = 0, ""

    def build(self) -> None:
        super().build()
        self.groups = nn.Conv2d(D, D, 3, padding=1, groups=8)
        self.r = self.convolution(shuffled=True, table=across(D, 2))


class BatchNormAndPooling(_Channels):
    shape = (2, D, 4, 4)

    def build(self) -> None:
        super().build()
        self.norm = nn.BatchNorm2d(D)
        nn.init.normal_(self.norm.weight)
        assert self.norm.running_mean is not None
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Any:
        return self.r(F.max_pool2d(F.relu(self.norm(self.a(x))), 2))


class AveragePoolAndUpsample(_Channels):
    shape = (2, D, 4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.interpolate(F.avg_pool2d(self.a(x), 2), scale_factor=2.0))


class PooledIntoALinear(_Channels):
    def build(self) -> None:
        self.a, self.r = self.convolution(), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.adaptive_avg_pool2d(self.a(x).relu(), 1).flatten(1))


class MeanOverSpace(PooledIntoALinear):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).relu().mean((2, 3)))


class FlattenedIntoALinear(_Channels):
    gathers = Each(block=1)  # so few tokens run dense elsewhere
    why = "a random map mixes channels and space"

    def build(self) -> None:
        self.a, self.r = self.convolution(D, 8), self.shuffled(72, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).flatten(1))


class SqueezeAndExcite(_Channels):
    def build(self) -> None:
        super().build()
        self.down, self.up = nn.Linear(D, 4), nn.Linear(4, D)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        gate = self.up(F.relu(self.down(y.mean((2, 3))))).sigmoid()
        return self.r(y * gate[:, :, None, None])


class PixelShuffle(_Channels):
    """A channel becomes 2 x 2 pixels: the map moves its four rows together."""

    def build(self) -> None:
        self.a, self.r = self.convolution(D, 4 * D), self.convolution(shuffled=True)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.pixel_shuffle(self.a(x), 2))


class PixelUnshuffle(_Channels):
    shape = (2, D, 4, 4)
    gathers, why = 1, "a random map mixes channels and pixels"

    def build(self) -> None:
        self.a, self.r = self.convolution(D, 4), self.convolution(shuffled=True)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.pixel_unshuffle(self.a(x), 2))


class KernelOfNine(_Channels):
    """A sparse k x k convolution: its map is folded into its weight, in eager mode too."""

    def build(self) -> None:
        self.a, conv = self.convolution(), nn.Conv2d(D, D, 3, padding=1)
        self.r = adopted(conv, self.structure, "input", torch.randperm(9 * D))

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class ResidualBlocks(_Channels):
    """As ResNet: BatchNorm, a stream, a strided shortcut."""

    gathers, why = 1, "two readers of the stream want two orders"
    shape = (2, D, 4, 4)

    def build(self) -> None:
        super().build()
        self.b, self.c, self.s = self.convolution(), self.convolution(), nn.Conv2d(D, D, 1, 2)
        self.r2, self.norm = self.convolution(shuffled=True), nn.BatchNorm2d(D)
        self.fc = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.a(x)).relu()
        h = h + self.b(self.r(h).relu())
        h = self.s(h) + self.c(F.max_pool2d(self.r2(h), 2))
        return self.fc(h.mean((2, 3)))


class ChannelsLast(ConvolutionControl):
    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(self.shape, dtype=dtype)
        return (x.to(memory_format=torch.channels_last),)


class NormOverChannels(_Channels):
    """As ConvNeXt: to the last axis, a norm, two linears, and back."""

    def build(self) -> None:
        self.a, self.norm = self.convolution(), nn.LayerNorm(D)
        self.r, self.b = self.shuffled(D, D), self.free(D, D)
        self.scale = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.a(x).permute(0, 2, 3, 1))
        return (self.scale * self.b(F.gelu(self.r(y)))).permute(0, 3, 1, 2)

"""Norms between writer and reader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import D, Net, across


class _Normed(Net):
    def build(self) -> None:
        super().build()
        self.norm = self.make()
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def make(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.r(self.norm(self.a(x)))


class LayerNormBetween(_Normed):
    def make(self) -> nn.Module:
        return nn.LayerNorm(D)


class LayerNormWithoutNumbers(_Normed):
    def make(self) -> nn.Module:
        return nn.LayerNorm(D, elementwise_affine=False)


class LayerNormWithoutBias(_Normed):
    def make(self) -> nn.Module:
        return nn.LayerNorm(D, bias=False)


class LayerNormOverTwoAxes(_Normed):
    shape = (2, 5, D)

    def make(self) -> nn.Module:
        return nn.LayerNorm((5, D))


class RmsNormBetween(_Normed):
    def make(self) -> nn.Module:
        return nn.RMSNorm(D)


class RmsNormByHand(Net):
    """As Llama's, with its cast to float32."""

    tolerance = 1e-4

    def build(self) -> None:
        super().build()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.r(self.weight * y.to(x.dtype))


class GemmaNorm(Net):
    """Scales by one plus its weight."""

    def build(self) -> None:
        super().build()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.r(y * (1.0 + self.weight))


class StandardisedByHand(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r((y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-3))


class BatchNormBetween(_Normed):
    def make(self) -> nn.Module:
        norm = nn.BatchNorm1d(D)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        return norm


class GroupNormBetween(_Normed):
    gathers, why = 1, "a random map leaves the groups"

    def make(self) -> nn.Module:
        return nn.GroupNorm(4, D)


class GroupNormAcrossGroups(_Normed):
    """Whole groups move, so the map factors."""

    def make(self) -> nn.Module:
        self.r = self.shuffled(D, D, table=across(D, 2))
        return nn.GroupNorm(8, D)


class GroupNormOfOneGroup(_Normed):
    def make(self) -> nn.Module:
        return nn.GroupNorm(1, D)


class InstanceNormOverTokens(_Normed):
    today = 1
    shape = (2, 5, D)

    def make(self) -> nn.Module:
        return nn.InstanceNorm1d(D, affine=True)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.norm(self.a(x).transpose(1, 2)).transpose(1, 2))


class LocalResponseNormBetween(_Normed):
    gathers, why = 1, "neighbours on the axis are averaged"
    shape = (2, 5, D)

    def make(self) -> nn.Module:
        return nn.LocalResponseNorm(3)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.norm(self.a(x).transpose(1, 2)).transpose(1, 2))


class NormReadByThree(Net):
    """q, k and v share one order."""

    shape = (2, 5, D)

    def build(self) -> None:
        table, self.norm = torch.randperm(D), nn.LayerNorm(D)
        self.a = self.free(D, D)
        self.q, self.k, self.v = (self.shuffled(D, D, table=table) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.a(x))
        return F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))


class WeightNormedWriter(Net):
    def build(self) -> None:
        super().build()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).relu())

"""Views, transposes, moves over the feature axis, and operations that run along it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import Counts, D, Each, Net, across, within

H = D // 2


def pairs_of_halves() -> Tensor:
    """Return a map that moves the features ``i`` and ``i + D/2`` together."""
    order = torch.randperm(H)
    return torch.cat([order, order + H])


class RotateHalf(Net):
    gathers, why = 1, "a random map tears the pairs (i, i + D/2) apart"

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        turned = torch.cat([-y[..., H:], y[..., :H]], dim=-1)
        return self.r(0.5 * y + 0.8 * turned)


class RotateHalfInPairs(RotateHalf):
    gathers, why = 0, ""

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(D, D, table=pairs_of_halves())


class RotateHalfByTables(RotateHalfInPairs):
    """With cosines and sines for every position and pair, as in Llama."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        speeds = 10.0 ** (-torch.arange(H, dtype=x.dtype) / H)
        angles = torch.arange(9, dtype=x.dtype)[:, None] * torch.cat([speeds, speeds])
        one, two = y.chunk(2, -1)
        return self.r(y * angles.cos() + torch.cat([-two, one], -1) * angles.sin())


class RotateInterleaved(RotateHalf):
    """Neighbours are the pairs, as in GPT-J."""

    gathers, why = 0, ""

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(D, D, table=across(D, 2))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        turned = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
        return self.r(0.5 * y + 0.8 * turned)


class RotateAsComplex(RotateInterleaved):
    """As Llama's first release: pairs as complex numbers."""

    today = 1

    def forward(self, x: Tensor) -> Any:
        y = torch.view_as_complex(self.a(x).view(-1, H, 2))
        angles = torch.linspace(0, 3, H, dtype=x.dtype)
        turned = y * torch.polar(torch.ones_like(angles), angles)
        return self.r(torch.view_as_real(turned).flatten(-2))


class Roll(Net):
    """A shift along the axis and the map are one map."""

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.roll(self.a(x), 1, -1))


class RollOverTokens(Net):
    """As Swin: the features do not move."""

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.roll(self.a(x), 2, 0))


class Flip(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).flip(-1))


class FeaturesReordered(Net):
    order: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("order", torch.randperm(D))

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x)[:, self.order])


class MultipliedByAPermutationMatrix(Net):
    """A dense product with frozen numbers: rows of its own absorb what comes after it."""

    mixing: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("mixing", torch.eye(D)[torch.randperm(D)])

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) @ self.mixing)


class FeaturesChosen(Net):
    """Some features, some of them twice."""

    gathers, why = 1, "what is chosen is no permutation"
    order: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("order", torch.randint(0, D, (D,)))

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).index_select(-1, self.order))


class GatheredByItsOwnOrder(Net):
    gathers, why = 1, "the order depends on the numbers"

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r(y.gather(-1, y.argsort(-1)) * 0.5)


class Sorted(Net):
    gathers, why = 1, "sorting runs along the axis"

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).sort(-1).values)


class TopFeatures(Net):
    gathers, why = 1, "topk runs along the axis"

    def build(self) -> None:
        self.a, self.r = self.free(D, 2 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).topk(D, -1).values)


class CumulativeSum(Net):
    gathers, why = 1, "cumsum runs along the axis"

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cumsum(self.a(x), -1))


class CumulativeSumOverTokens(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cumsum(self.a(x), 0))


class Differences(Net):
    gathers, why = 1, "neighbours are subtracted"

    def build(self) -> None:
        self.a, self.r = self.free(D, D + 1), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.diff(self.a(x), dim=-1))


class Windows(Net):
    gathers, why = 1, "windows run along the axis"

    def build(self) -> None:
        self.a, self.r = self.free(D, D + 2), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).unfold(-1, 3, 1).amax(-1))


class Convolved(Net):
    gathers, why = 1, "a convolution runs along the axis"

    def build(self) -> None:
        super().build()
        self.blur = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.blur(self.a(x).unsqueeze(1)).squeeze(1))


class SoftmaxOverTheAxis(Net):
    """The same for every order of the features."""

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.softmax(self.a(x), -1))


class LogSoftmaxOverTheAxis(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(F.log_softmax(self.a(x), -1))


class SoftmaxByHand(Net):
    """Pointwise but for a sum over the axis, which has no order."""

    def forward(self, x: Tensor) -> Any:
        y = (z := self.a(x)).sub(z.amax(-1, keepdim=True)).exp()
        return self.r(y / y.sum(-1, keepdim=True))


class OfUnitLength(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(F.normalize(self.a(x), dim=-1))


class SoftmaxOverTokens(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.softmax(self.a(x), 0))


class DotProductInOneOrder(Net):
    """A contraction: both sides are in the same order, and none is seen behind it."""

    def build(self) -> None:
        table = torch.randperm(D)
        self.r, self.s = (self.shuffled(D, D, "output", table=table) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        return (self.r(x) * self.s(x)).sum(-1), self.r(x) @ self.s(x).t()


class DotProductInTwoOrders(Net):
    gathers, why = Each(block=1, diagonal=1), "a contraction of two orders"

    def build(self) -> None:
        self.r, self.s = self.shuffled(D, D, "output"), self.shuffled(D, D, "output")

    def forward(self, x: Tensor) -> Any:
        return (self.r(x) * self.s(x)).sum(-1)


class HeadsScaled(Net):
    gathers, why = 1, "a random map does not factor into heads"
    heads = 2

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.randn(self.heads, 1))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).unflatten(-1, (self.heads, -1))
        return self.r((y / y.norm(dim=-1, keepdim=True) * self.scale).flatten(1))


class HeadsScaledWithinHeads(HeadsScaled):
    gathers, why = 0, ""

    def build(self) -> None:
        super().build()
        self.r = self.shuffled(D, D, table=within(D, 8))


class HeadsScaledAcrossHeads(HeadsScaled):
    gathers, why, heads = 0, "", 8

    def build(self) -> None:
        super().build()
        self.r = self.shuffled(D, D, table=across(D, 2))


class HeadsRegrouped(Net):
    """A flip within heads is a map of all features, and the two are one."""

    today = Each(block=1, nm=1)
    shape = (2, 5, D)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).view(2, 5, 4, 4).flip(-1)
        return self.r(y.view(2, 5, D))


class HeadsTransposed(Net):
    """A transposition of heads is a stride shuffle of the features."""

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).view(-1, 4, 4).transpose(1, 2).reshape(-1, D))


class Transposed(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).t().relu().t())


class AxesPermuted(Net):
    shape = (2, 3, 4, D)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).permute(3, 0, 2, 1).contiguous().tanh()
        return self.r(y.permute(1, 3, 2, 0))


class TokensRegrouped(Net):
    shape = (2, 6, D)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).view(2, 2, 3, D).transpose(1, 2).reshape(4, 3, D)
        return self.r(y.unsqueeze(1).relu().squeeze(1).flatten(0, 1))


class TokensMergedIntoFeatures(Net):
    """As Swin's patch merging."""

    shape = (2, 4, D)
    gathers: Counts = Each(block=1)  # so few tokens run dense elsewhere
    why = "a random map mixes tokens and features"

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(4 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).flatten(1))


class TokensMergedInOneOrder(TokensMergedIntoFeatures):
    gathers, why = 0, ""

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(4 * D, D, table=within(4 * D, D))


class FeaturesSplitIntoTokens(Net):
    def build(self) -> None:
        self.a, self.r = self.free(D, 2 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).view(-1, 2, D))


class Repeated(Net):
    gathers, why = 1, "a random map mixes the copies"

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(2 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).repeat(1, 2))


class RepeatedInOneOrder(Repeated):
    gathers, why = 0, ""

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(2 * D, D, table=within(2 * D, D))


class RepeatInterleaved(Repeated):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).repeat_interleave(2, -1))


class ExpandedOverTokens(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).mean(0, keepdim=True).expand(9, -1).relu())


class Sliced(Net):
    """The other half of the writer's rows stays where it is."""

    def build(self) -> None:
        self.a, self.r = self.free(D, 2 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x)[..., :D].relu())


class SlicedByTwo(Net):
    """Every second row of the writer follows the map, the others stay."""

    def build(self) -> None:
        self.a, self.r = self.free(D, 2 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x)[..., ::2])


class Padded(Net):
    gathers, why = 1, "padding stands at the ends of the axis"

    def build(self) -> None:
        self.a, self.r = self.free(D, D - 4), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.pad(self.a(x), (2, 2)))


class OuterProduct(Net):
    gathers, why = 1, "a random map of all products does not factor"

    def build(self) -> None:
        self.a, self.r = self.free(D, 4), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r((y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(1))


class EinsumOverFeatures(Net):
    def build(self) -> None:
        super().build()
        self.w = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.einsum("td,de->te", self.a(x), self.w))


class EinsumOverTokens(Net):
    shape = (2, 5, D)

    def build(self) -> None:
        super().build()
        self.w = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.einsum("btd,ts->bsd", self.a(x), self.w))


class EinsumDiagonal(Net):
    gathers, why = 1, "rows of the two sides meet feature by feature, one of them by its place"

    def build(self) -> None:
        super().build()
        self.w = nn.Parameter(torch.randn(9, D, D))

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.einsum("td,tdd->td", self.a(x), self.w).cumsum(-1))


class TokenMixing(Net):
    """As MLP-Mixer: a linear over tokens between writer and reader."""

    shape = (2, 8, D)

    def build(self) -> None:
        super().build()
        self.tokens = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Any:
        return self.r(self.tokens(self.a(x).transpose(1, 2)).transpose(1, 2))


class TokensPermuted(Net):
    gathers, why = 1, "the order of the tokens is that of the graph's input"
    shape = (2, D, 8)

    def build(self) -> None:
        self.a, self.r = self.free(8, 8), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).relu().transpose(1, 2))

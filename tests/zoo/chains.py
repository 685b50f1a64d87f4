"""One writer, one reader: pointwise operations, both sides, several maps, several readers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.relaxations.sinkhorn import SinkhornPermutation

from .net import D, Each, Net, across, within


class Control(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class InputPermuted(Net):
    gathers, why = 1, "the graph's input comes in its own order"

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.a(F.relu(self.r(x))))


class IdentityPermutation(Net):
    def build(self) -> None:
        self.r = self.shuffled(D, D, table=torch.arange(D))

    def forward(self, x: Tensor) -> Any:
        return self.r(x)


class LearnedThenHardened(Net):
    def build(self) -> None:
        super().build()
        self.r.permutation = SinkhornPermutation(D, generator=torch.Generator().manual_seed(0))
        self.r.harden()

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class MapWithinBlocks(Net):
    gathers, why = Each(diagonal=1), "diagonals absorb shifts only"

    def build(self) -> None:
        self.r = self.shuffled(D, D, table=within(D, 4))

    def forward(self, x: Tensor) -> Any:
        return self.r(x)


class RolledInput(Net):
    gathers, why = Each(block=1, nm=1), "a shift by 3 cuts blocks and groups"

    def build(self) -> None:
        self.r = self.shuffled(D, D, table=torch.arange(D).roll(3))

    def forward(self, x: Tensor) -> Any:
        return self.r(x)


class HalvesOfTheInputSwapped(Net):
    def build(self) -> None:
        self.r = self.shuffled(D, D, table=torch.arange(D).roll(8))

    def forward(self, x: Tensor) -> Any:
        return self.r(x)


class ManyPointwise(Net):
    def forward(self, x: Tensor) -> Any:
        y = F.gelu(self.a(x), approximate="tanh")
        y = F.silu(y).abs().clamp(-0.5, 2.0).erf() + 0.1
        y = F.leaky_relu(F.hardtanh(y) - y.sqrt().log1p(), 0.3)
        return self.r(F.softplus(y) * y.exp().reciprocal() / 3.0)


class ScaleAndShift(Net):
    shift: Tensor

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.randn(D))
        self.register_buffer("shift", torch.randn(D))

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)) * self.scale + self.shift)


class ScalarParameters(Net):
    def build(self) -> None:
        super().build()
        self.one, self.two = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) * self.one.exp() + self.two)


class VectorExpandedFirst(Net):
    shift: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("shift", torch.randn(1, D))

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) + self.shift.expand(9, D))


class ConstantMadeInForward(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) * torch.linspace(0, 1, D, dtype=x.dtype))


class GateOfOneColumn(Net):
    def build(self) -> None:
        super().build()
        self.gate = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) * torch.sigmoid(self.gate(x)))


class DropoutBetween(Net):
    def build(self) -> None:
        super().build()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.drop(F.relu(self.a(x))))


class DropoutThatStaysOn(Net):
    """Random numbers lie in the old order: a moved map would drop other features."""

    gathers, why, random = 1, "the random mask is drawn in the old order", True

    def forward(self, x: Tensor) -> Any:
        return self.r(F.dropout(self.a(x), 0.5, training=True))


class MaskOverTokens(Net):
    mask: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("mask", torch.rand(9, 1) > 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.where(self.mask, self.a(x), 0.0).masked_fill(~self.mask, -2.0))


class MaskOverFeatures(MaskOverTokens):
    def build(self) -> None:
        super().build()
        self.mask = torch.rand(D) > 0.5

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r(torch.where(self.mask, y, y.neg().exp()))


class ClampedByVectors(Net):
    low: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("low", torch.randn(D) - 1)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.clamp(self.a(x), min=self.low, max=self.low + 1.5))


class FusedTernary(Net):
    def build(self) -> None:
        super().build()
        self.u, self.v = nn.Parameter(torch.randn(D)), nn.Parameter(torch.rand(D) + 1)

    def forward(self, x: Tensor) -> Any:
        y = torch.addcmul(self.a(x), self.u, self.v, value=0.5)
        return self.r(torch.addcdiv(y, self.u, self.v))


class ComparedAndCast(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r(y * (y > 0.1).to(y.dtype) - (y < -0.1).to(y.dtype))


class CastDownAndUp(Net):
    tolerance = 1e-4

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).to(torch.float32).tanh().to(x.dtype))


class TwoWritersInterpolated(Net):
    def build(self) -> None:
        super().build()
        self.b, self.c = self.free(D, D), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        one, two = self.a(x), self.b(x)
        return self.r(torch.lerp(one, two, self.c(x).sigmoid()) + torch.maximum(one, two))


class TimesTheInput(Net):
    gathers, why = 1, "the graph's input comes in its own order"

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) * x)


class SwiGlu(Net):
    def build(self) -> None:
        self.gate, self.up = self.free(D, 2 * D), self.free(D, 2 * D)
        self.down = self.shuffled(2 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PackedGlu(Net):
    def build(self) -> None:
        self.a, self.r = self.free(D, 2 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.glu(self.a(x)))


class PackedSwiGluByChunk(PackedGlu):
    def forward(self, x: Tensor) -> Any:
        gate, up = self.a(x).chunk(2, dim=-1)
        return self.r(F.silu(gate) * up)


class PackedSwiGluBySlices(PackedGlu):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r(F.silu(y[..., D:]) * y[..., :D])


class PackedGluInterleaved(PackedGlu):
    """Gate and value alternate: the two halves are the last axis of a view."""

    def forward(self, x: Tensor) -> Any:
        gate, up = self.a(x).view(-1, D, 2).unbind(-1)
        return self.r(F.silu(gate) * up)


class OutputSide(Net):
    """The map stands between its layer and a reader that absorbs it."""

    def build(self) -> None:
        self.r, self.a = self.shuffled(D, D, "output", bias=False), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.a(self.r(x))


class OutputSideActivated(OutputSide):
    def build(self) -> None:
        self.r, self.a = self.shuffled(D, D, "output"), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.a(torch.tanh(self.r(x)))


class OutputSideReturned(Net):
    gathers, why = Each(block=1, diagonal=1), "a graph's output has its own order"

    def build(self) -> None:
        self.r = self.shuffled(D, D, "output")

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.r(x))


class OutputSideIntoInputSide(Net):
    gathers, why = Each(block=1, diagonal=1), "two maps become one, which no structure absorbs"

    def build(self) -> None:
        self.s, self.r = self.shuffled(D, D, "output"), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.s(x))


class OutputSideActivatedIntoInputSide(OutputSideIntoInputSide):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.tanh(self.s(x)))


class InversePairAcrossAnActivation(Net):
    def build(self) -> None:
        table = torch.randperm(D)
        self.s = self.shuffled(D, D, "output", table=table)
        self.r = self.shuffled(D, D, table=table.argsort())

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.tanh(self.s(x)))


class DeepChain(Net):
    gathers, why = Each(block=2, diagonal=2), "the rows of a structured writer absorb little"

    def build(self) -> None:
        super().build()
        self.r2, self.r3 = self.shuffled(D, D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r3(F.relu(self.r2(F.relu(self.r(F.relu(self.a(x)))))))


class DeepChainOfBlockMaps(DeepChain):
    """Maps of whole blocks, which the rows of the block writer before them absorb."""

    gathers, why = Each(diagonal=2), "diagonals absorb shifts only"

    def build(self) -> None:
        super().build()
        self.r2, self.r3 = (self.shuffled(D, D, table=across(D, 4)) for _ in range(2))


class ReadTwice(Net):
    gathers, why = 1, "one tensor has one order, and two readers want two"

    def build(self) -> None:
        super().build()
        self.r2 = self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h) * self.r2(h.neg())


class ReadTwiceInOneOrder(Net):
    def build(self) -> None:
        super().build()
        table = torch.randperm(D)
        self.r, self.r2 = self.shuffled(D, D, table=table), self.shuffled(D, D, table=table)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h) * self.r2(h.neg())


class ReadPermutedAndPlain(Net):
    def build(self) -> None:
        super().build()
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h) * self.b(h)


class HiddenReturned(Net):
    gathers, why = 1, "a graph's output has its own order"

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h), h


class HiddenJoined(Net):
    gathers, why = 1, "a graph's output has its own order"

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return torch.cat([h, self.r(h)], -1)


class HiddenSummed(Net):
    """What leaves is a sum over the features: no order is seen."""

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h), h.sum(-1), h.square().mean(-1, keepdim=True)

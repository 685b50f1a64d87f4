"""Residual streams, and tensors that are joined or stacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import Counts, D, Each, Net, partwise


class ResidualFromTheInput(Net):
    gathers, why = 1, "the stream begins at the graph's input"

    def forward(self, x: Tensor) -> Any:
        return self.r(x + self.a(x))


class ResidualBetweenWriters(Net):
    def build(self) -> None:
        super().build()
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.b(x) + F.gelu(self.a(x)))


class ResidualStream(Net):
    """Two blocks, each with an order of its own: the stream can have one of them."""

    gathers: Counts = Each(block=1, nm=1)  # rectangular diagonals run dense
    why = "two readers of the stream want two orders"
    one_order = False

    def build(self) -> None:
        self.a, self.head = self.free(D, D), self.free(D, 5)
        shared = torch.randperm(D) if self.one_order else None
        self.up = nn.ModuleList(self.shuffled(D, 2 * D, table=shared) for _ in range(2))
        self.down = nn.ModuleList(self.free(2 * D, D) for _ in range(2))
        self.norms = nn.ModuleList(self.norm() for _ in range(2))

    def norm(self) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            h = h + down(F.gelu(up(norm(h))))
        return self.head(h)


class ResidualStreamInOneOrder(ResidualStream):
    gathers, one_order = 0, True


class ResidualStreamNormed(ResidualStream):
    gathers, one_order = 0, True

    def norm(self) -> nn.Module:
        norm = nn.LayerNorm(D)
        nn.init.normal_(norm.weight)
        return norm


class ResidualStreamReturned(ResidualStream):
    gathers = Each(block=1, nm=1)
    why, one_order = "the stream leaves in its own order", True

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(F.gelu(up(h)))
        return h


class ParallelBranches(Net):
    """As GPT-NeoX: two branches read one norm, both are added to the stream."""

    def build(self) -> None:
        table = torch.randperm(D)
        self.a, self.head, self.norm = self.free(D, D), self.free(D, 5), nn.RMSNorm(D)
        self.r, self.s = self.shuffled(D, D, table=table), self.shuffled(D, D, table=table)
        self.b, self.c = self.free(D, D), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        y = self.norm(h)
        return self.head(h + self.b(self.r(y).relu()) + self.c(self.s(y).tanh()))


class HighwayGate(Net):
    def build(self) -> None:
        super().build()
        self.gate, self.b, self.head = self.free(D, D), self.free(D, D), self.free(D, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        g = torch.sigmoid(self.gate(h))
        return self.head(g * h + (1 - g) * self.b(F.relu(self.r(h))))


class PostNormStream(Net):
    def build(self) -> None:
        super().build()
        self.norm, self.b, self.head = nn.LayerNorm(D), self.free(D, D), self.free(D, 5)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.a(x))
        return self.head(self.norm(h + self.b(F.relu(self.r(h)))))


class SkipOverTwo(Net):
    gathers, why = Each(block=2, diagonal=2), "a structured writer's rows absorb little"

    def build(self) -> None:
        super().build()
        self.b, self.r2 = self.free(D, D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        early = self.a(x)
        late = self.r(early.relu())
        return self.b(self.r2(late.relu()) + early)


class JoinedByKeyword(Net):
    gathers, why = 1, "a random map mixes the parts"

    def build(self) -> None:
        self.a, self.b, self.r = self.free(D, D), self.free(D, D), self.shuffled(2 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(torch.cat(tensors=[self.a(x), self.b(x)], dim=-1)))


class JoinedPartwise(JoinedByKeyword):
    gathers, why = 0, ""

    def build(self) -> None:
        super().build()
        self.r = self.shuffled(2 * D, D, table=partwise(D, D))


class JoinedWithTheInput(JoinedByKeyword):
    """The part of the writer can move, that of the input cannot."""

    gathers, why = 1, "one part is the graph's input"

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cat([self.a(x), x], -1))


class JoinedWithItself(JoinedByKeyword):
    gathers, why = 1, "one tensor has one order, and two parts want two"

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(2 * D, D, table=partwise(D, D))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.r(torch.cat([y, y.neg()], -1))


class JoinedPermutedAndNot(Net):
    def build(self) -> None:
        self.r, self.b, self.a = self.shuffled(D, D, "output"), self.free(D, D), self.free(2 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.a(torch.cat([self.r(x), self.b(x)], -1))


class JoinedOverTokens(Net):
    def build(self) -> None:
        super().build()
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cat([self.a(x), self.b(x)], 0))


class ClassTokenJoined(Net):
    """As ViT: a learned token before the others, learned positions on all of them."""

    shape = (2, 5, D)

    def build(self) -> None:
        super().build()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.position = nn.Parameter(torch.randn(1, 6, D))

    def forward(self, x: Tensor) -> Any:
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1)
        return self.r(h + self.position)


class StackedAndSummed(Net):
    def build(self) -> None:
        super().build()
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.stack([self.a(x), self.b(x), self.a(-x)]).sum(0))


class DenselyConnected(Net):
    gathers, why = 2, "random maps mix the parts"

    def build(self) -> None:
        self.a = self.free(D, D)
        self.r, self.s = self.shuffled(2 * D, D), self.shuffled(3 * D, D)
        self.b, self.c = self.free(D, D), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        h = torch.cat([h, self.b(x)], -1)
        h = torch.cat([h, self.c(self.r(h).relu())], -1)
        return self.s(h)


class SplitIntoStreams(Net):
    """Both halves are read, each in an order of its own, and one is added to the other's reader."""

    def build(self) -> None:
        self.a = self.free(D, 2 * D)
        self.r, self.s = self.shuffled(D, D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        left, right = self.a(x).split(D, -1)
        return self.r(left.relu()) + self.s(right.tanh())

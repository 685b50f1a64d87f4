"""Weights used twice: reused modules, tied parameters, embeddings and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .net import D, Each, Net


class ModuleReused(Net):
    """N:M rows absorb any map: there the second use folds into the first; blocks keep it."""

    gathers, why = Each(block=1, diagonal=1), "a structured writer's rows absorb little"

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.tanh(self.r(torch.tanh(self.a(x)))))


class WriterReused(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Tied(Net):
    """``c`` reads ``a``'s weights, and nothing permutes what ``c`` writes."""

    def build(self) -> None:
        super().build()
        self.a, self.c = nn.Linear(D, D), nn.Linear(D, D)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.c(torch.tanh(self.r(torch.tanh(self.a(x)))))


class TiedTransposed(Net):
    """An autoencoder: the decoder is the encoder's transpose."""

    def build(self) -> None:
        super().build()
        self.a = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.tanh(self.r(torch.tanh(self.a(x)))), self.a.weight.t())


class TiedSparse(Net):
    gathers = Each(block=2, nm=1, diagonal=2)
    why = "the graph's input, and a structured writer's rows"

    def build(self) -> None:
        self.a, self.b = self.shuffled(D, D), self.shuffled(D, D)
        self.b.values = self.a.values

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


class SameModuleOnTwoInputs(Net):
    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(9, D, dtype=dtype), torch.randn(9, D, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return (self.r(self.a(x).relu()) - self.r(self.a(y).relu())).abs()


class LoopedBlock(Net):
    """One block three times on a stream: its order is the stream's."""

    def build(self) -> None:
        super().build()
        self.b, self.head = self.free(D, D), self.free(D, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        for _ in range(3):
            h = h + self.b(F.gelu(self.r(h)))
        return self.head(h)


class WeightReadDirectly(Net):
    """Code that computes with ``layer.weight`` gets the effective weight."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(F.relu(self.a(x)), self.r.weight, self.r.bias)


class _Tokens(Net):
    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randint(0, 11, (2, 5)),)


class EmbeddingWrites(_Tokens):
    def build(self) -> None:
        self.embed, self.r = nn.Embedding(11, D), self.shuffled(D, D)

    def forward(self, ids: Tensor) -> Any:
        return self.r(self.embed(ids))


class EmbeddingsSummed(_Tokens):
    """Words, positions and a kind of token, then a norm: as BERT."""

    def build(self) -> None:
        self.words, self.places, self.r = (
            nn.Embedding(11, D, padding_idx=0),
            nn.Embedding(5, D),
            self.shuffled(D, D),
        )
        self.kind, self.norm = nn.Parameter(torch.randn(D)), nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Any:
        places = torch.arange(ids.shape[1])
        return self.r(self.norm(self.words(ids) + self.places(places) + self.kind))


class TiedHead(_Tokens):
    """The stream's order is a change of basis that embedding and head share."""

    def build(self) -> None:
        self.embed, self.norm = nn.Embedding(11, D), nn.RMSNorm(D)
        self.r, self.b = self.shuffled(D, 2 * D), self.free(2 * D, D)

    def forward(self, ids: Tensor) -> Any:
        h = self.embed(ids) * D**0.5
        h = h + self.b(F.gelu(self.r(self.norm(h))))
        return F.linear(self.norm(h), self.embed.weight)


class EmbeddingReturned(_Tokens):
    gathers, why = 1, "a graph's output has its own order"

    def build(self) -> None:
        self.embed, self.r = nn.Embedding(11, D), self.shuffled(D, D)

    def forward(self, ids: Tensor) -> Any:
        h = self.embed(ids)
        return self.r(h), h


class ListOfParameters(Net):
    def build(self) -> None:
        super().build()
        self.list = nn.ParameterList(torch.randn(D, D) / 4 for _ in range(2))
        self.scales = nn.ParameterDict({"one": nn.Parameter(torch.randn(D))})

    def forward(self, x: Tensor) -> Any:
        for w in self.list:
            x = F.relu(F.linear(x, w))
        return self.r(x * self.scales["one"])


class StackedExperts(Net):
    """Every expert for every token, weighted: as a dense mixture of experts."""

    def build(self) -> None:
        super().build()
        self.up = nn.Parameter(torch.randn(3, D, D) / 4)
        self.gate = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Any:
        y = torch.bmm(self.a(x).expand(3, -1, -1), self.up)
        weights = self.gate(x).softmax(-1)
        return self.r(torch.einsum("etd,te->td", y, weights))


class Recomputed(Net):
    """Activation checkpointing."""

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda h: self.r(F.relu(self.a(h))), x, use_reentrant=False)


class BranchWithoutGradients(Net):
    def build(self) -> None:
        super().build()
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            h = self.a(x).relu()
        return self.r(h + self.b(x)).sub(h.mean().detach())

"""Attention in many spellings; ``o`` reads the output of 4 heads with 8 features each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import Counts, D, Each, Net, across, within
from .views import pairs_of_halves

E = 32  # 4 heads of 8: their maps are more than a block or a group of N:M absorbs


class Attention(Net):
    shape = (2, 5, D)
    gathers: Counts = 1
    why = "a random map does not factor into heads"

    def build(self) -> None:
        self.q, self.k, self.v = (self.free(D, E) for _ in range(3))
        self.o = self.shuffled(E, D, table=self.order())

    def order(self) -> Tensor | None:
        return None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v

    def forward(self, x: Tensor) -> Any:
        mixed = self.attend(*self.heads(x))
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:-1], E))


class AttentionWithinHeads(Attention):
    """Each head's map is absorbed by v."""

    gathers: Counts = 0
    why = ""

    def order(self) -> Tensor | None:
        return within(E, 8)


class AttentionHeadByHead(AttentionWithinHeads):
    """Within heads, in each another order: what a learned map with this symmetry is."""

    def order(self) -> Tensor | None:
        return torch.cat([8 * head + torch.randperm(8) for head in range(4)])


class AttentionAcrossHeads(AttentionWithinHeads):
    """Whole heads, here 16 of 2 features, move: q, k and v move with them."""

    def order(self) -> Tensor | None:
        return across(E, 2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (16, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v


class ScaledDotProduct(AttentionWithinHeads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ScaledDotProductRandom(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class MaskedAttention(AttentionWithinHeads):
    """Causal mask, positional bias of each head, dropout."""

    bias: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("bias", torch.randn(4, 1, 1) * torch.arange(5).neg())
        self.drop = nn.Dropout(0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / 2.0 + self.bias.to(q.dtype)
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        weights: Tensor = self.drop(scores.softmax(-1))
        return weights @ v


class EinsumAttention(AttentionWithinHeads):
    def forward(self, x: Tensor) -> Any:
        q, k, v = (f(x).unflatten(-1, (4, 8)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.o(torch.einsum("bhij,bjhd->bihd", scores, v).flatten(-2))


class SequenceFirst(AttentionWithinHeads):
    """Tokens before batch, heads folded into the batch for ``bmm``."""

    shape = (5, 2, D)

    def forward(self, x: Tensor) -> Any:
        t, b, _ = x.shape
        q, k, v = (f(x).view(t, b * 4, 8).transpose(0, 1) for f in (self.q, self.k, self.v))
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.o(mixed.transpose(0, 1).reshape(t, b, E))


class SharedInputAttention(Attention):
    """q, k and v each read the normed input in an order of their own."""

    gathers = Each(block=4, nm=4, diagonal=1)  # rectangular diagonals run dense
    why = "three orders of the graph's input, and heads that a random map mixes"

    def build(self) -> None:
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v = (self.shuffled(D, E) for _ in range(3))
        self.o = self.shuffled(E, D)

    def forward(self, x: Tensor) -> Any:
        return x + super().forward(self.norm(x))


class GatedByItself(Net):
    """A packed projection without heads: three writers in one."""

    shape = (2, 5, D)

    def build(self) -> None:
        self.qkv, self.o = self.free(D, 3 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).split(D, dim=-1)
        return self.o(torch.sigmoid(q * k) * v)


class PackedAttention(AttentionWithinHeads):
    """As GPT-2: one projection, split into three."""

    def build(self) -> None:
        self.qkv, self.o = self.free(D, 3 * E), self.shuffled(E, D, table=within(E, 8))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split(E, -1)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (q, k, v))
        return q, k, v


class PackedByUnbind(PackedAttention):
    """As timm's ViT: a view, a permutation of axes, unbind."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class PackedHeadByHead(PackedAttention):
    """As BLOOM and GPT-NeoX: each head's q, k and v lie together."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 4, 24).transpose(1, 2).chunk(3, -1)
        return q, k, v


class GroupedQueries(AttentionWithinHeads):
    """Two heads of keys and values for four of queries: v's map serves two heads."""

    def build(self) -> None:
        self.q, self.k, self.v = self.free(D, E), self.free(D, 16), self.free(D, 16)
        self.o = self.shuffled(E, D, table=self.order())

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)


class GroupedQueriesExpanded(GroupedQueries):
    """As transformers' ``repeat_kv``."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (part[:, :, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8) for part in (k, v))
        return q, k, v


class GroupedQueriesTornApart(GroupedQueries):
    """Two heads of queries read one head of values, in two orders."""

    gathers = Each(block=1, diagonal=1)  # groups of 8 absorb it
    why = "one head of values has one order, and two readers want two"

    def order(self) -> Tensor | None:
        return torch.cat([8 * head + torch.arange(8).roll(head) for head in range(4)])


class OneHeadOfValues(GroupedQueries):
    """Multi-query attention."""

    def build(self) -> None:
        self.q, self.k, self.v = self.free(D, E), self.free(D, 8), self.free(D, 8)
        self.o = self.shuffled(E, D, table=self.order())

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x).view(2, 5, 4, 8).transpose(1, 2)
        return q, self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)


class CrossAttention(AttentionWithinHeads):
    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(2, 5, D, dtype=dtype), torch.randn(2, 7, D, dtype=dtype)

    def forward(self, x: Tensor, memory: Tensor) -> Any:  # type: ignore[override]
        q = self.q(x).view(2, 5, 4, 8).transpose(1, 2)
        k, v = (f(memory).view(2, 7, 4, 8).transpose(1, 2) for f in (self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(-2))


class RotaryAttention(AttentionWithinHeads):
    """Rotates q and k, not v: the map of the output does not meet the rotation."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.linspace(0, 2, 5, dtype=q.dtype)[:, None]
        q, k = (
            y * angles.cos() + torch.cat([-y[..., 4:], y[..., :4]], -1) * angles.sin()
            for y in (q, k)
        )
        return F.scaled_dot_product_attention(q, k, v)


class QueriesAndKeysPermuted(Attention):
    """q and k are written in one order, head by head, and meet in a contraction."""

    gathers, why = 0, ""

    def build(self) -> None:
        table, self.v, self.o = within(E, 8), self.free(D, E), self.free(E, D)
        self.q, self.k = (self.shuffled(D, E, "output", table=table) for _ in range(2))


class QueriesAndKeysPermutedThroughRotation(QueriesAndKeysPermuted):
    """One head, so that the pairs of the rotation move together."""

    def build(self) -> None:
        table, self.v, self.o = pairs_of_halves(), self.free(D, D), self.free(D, D)
        self.q, self.k = (self.shuffled(D, D, "output", table=table) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        q, k = (
            0.6 * y + 0.8 * torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1)
            for y in (self.q(x), self.k(x))
        )
        return self.o((q @ k.transpose(1, 2)).softmax(-1) @ self.v(x))


class NormedQueriesAndKeys(AttentionWithinHeads):
    def build(self) -> None:
        super().build()
        self.qn, self.kn = nn.RMSNorm(8), nn.RMSNorm(8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)


class TalkingHeads(AttentionWithinHeads):
    def build(self) -> None:
        super().build()
        self.mix = nn.Parameter(torch.randn(4, 4))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1), self.mix)
        return scores.softmax(-1) @ v


class LinearAttention(AttentionWithinHeads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.transpose(-2, -1) @ v
        return (q @ state) / (q @ k.sum(-2).unsqueeze(-1) + 1e-3)


class CachedKeysAndValues(AttentionWithinHeads):
    """What came before is a graph input, in the order of the graph's input."""

    gathers = Each(block=1, diagonal=1)  # groups of 8 absorb it
    why = "the cache comes in its own order"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        cache = (torch.randn(2, 4, 3, 8, dtype=dtype) for _ in range(2))
        return (torch.randn(2, 5, D, dtype=dtype), *cache)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Any:  # type: ignore[override]
        q, k, v = self.heads(x)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(-2)), k, v


class BuiltInAttention(Net):
    """``nn.MultiheadAttention`` writes; its output projection is dense."""

    shape = (2, 5, D)

    def build(self) -> None:
        self.mha = nn.MultiheadAttention(D, 4, batch_first=True)
        self.r = self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.mha(x, x, x, need_weights=False)[0])


class BuiltInAttentionWithWeights(BuiltInAttention):
    def forward(self, x: Tensor) -> Any:
        y, weights = self.mha(x, x, x)
        return self.r(y), weights

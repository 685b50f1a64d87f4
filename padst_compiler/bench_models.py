"""The models that are timed as a whole, written plainly: ViT-B/16 and GPT-2 small.

GPT-2 reads a prompt and gives the logits of the last token, as the first step of a generation does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "Size", "make", "size_of"]


@dataclass(frozen=True)
class Size:
    """A transformer: of images, ``side`` pixels wide, or of ``side`` tokens of text."""

    text: bool
    depth: int
    width: int
    heads: int
    side: int
    outputs: int

    @property
    def items(self) -> int:
        """Return what one example counts as: an image, or its tokens."""
        return self.side if self.text else 1


MODELS = {
    "vit_b16": Size(text=False, depth=12, width=768, heads=12, side=224, outputs=1000),
    "gpt2": Size(text=True, depth=12, width=768, heads=12, side=128, outputs=50257),
}


def size_of(name: str) -> Size:
    """Return a model's size by name; ``vit_b16:4`` is one of four layers.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> size_of("gpt2:4").depth
        4
    """
    kind, _, depth = name.partition(":")
    if kind not in MODELS or (depth and not depth.isdecimal()):
        known = " or ".join(MODELS)
        raise ValueError(f"Expected {known}, or one with :LAYERS behind it. Got {name!r}.")
    return replace(MODELS[kind], depth=int(depth)) if depth else MODELS[kind]


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.text = size.heads, size.text

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.text)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        hidden = F.gelu(self.fc1(self.norm2(x)), approximate="tanh" if self.text else "none")
        result: Tensor = x + self.fc2(hidden)
        return result


class _Transformer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.text, width = size.text, size.width
        tokens = size.side if size.text else (size.side // 16) ** 2 + 1
        self.embed: nn.Module
        self.embed = nn.Embedding(size.outputs, width) if size.text else nn.Conv2d(3, width, 16, 16)
        self.first = None if size.text else nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(_Block(size) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size.outputs, bias=not size.text)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.first is not None:
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.position))
        result: Tensor = self.head(x[:, -1 if self.text else 0])
        return result


def make(size: Size, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a dense model, its inputs and the classes that it should find; all seeded.

    Example:
        >>> tiny = Size(text=True, depth=1, width=16, heads=2, side=8, outputs=10)
        >>> model, inputs, classes = make(tiny, batch=3)
        >>> model(inputs).shape, classes.shape
        (torch.Size([3, 10]), torch.Size([3]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, classes = _Transformer(size), torch.randint(size.outputs, (batch,))
        if size.text:
            return model, torch.randint(size.outputs, (batch, size.side)), classes
        return model, torch.randn(batch, 3, size.side, size.side), classes

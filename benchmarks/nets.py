"""The networks of the accuracy benchmark, all small: MLP, Mixer, transformer, ResNet-18."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.mixer import MixerBlock

__all__ = ["build", "sparse_names"]


def build(name: str, image: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Return a network by name, seeded, with the global generator left alone.

    Args:
        name: "mlp:DEPTHxWIDTH", "mixer:DEPTHxWIDTH", "vit:DEPTHxWIDTH" or "resnet:WIDTH".
        image: ``(side, side)`` or ``(channels, side, side)``.
        classes: outputs.
        seed: of the weights.
    """
    kind, _, size = name.partition(":")
    sizes = [int(number) for number in size.split("x")]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "mlp":
            return mlp(sizes[0], sizes[1], torch.Size(image).numel(), classes)
        if kind == "mixer":
            return ColourMixer(sizes[0], sizes[1], image, classes)
        if kind == "vit":
            return VisionTransformer(sizes[0], sizes[1], image, classes)
        return ResNet18(sizes[0], image[0], classes)


def sparse_names(model: nn.Module) -> list[str]:
    """Return the layers that become sparse: all but the first of an image model and the head."""
    found = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if isinstance(model, nn.Sequential):
        return found[:-1]
    if isinstance(model, ColourMixer):
        return [name for name in found if ".channels." in name or ".tokens." in name]
    if isinstance(model, VisionTransformer):
        return [name for name in found if name.startswith("blocks.")]
    return [name for name in found[1:-1] if ".short" not in name]


def mlp(depth: int, width: int, pixels: int, classes: int) -> nn.Sequential:
    """Return ``depth`` hidden layers of ``width`` with ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inner, outer in pairwise([pixels] + [width] * depth):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class ColourMixer(nn.Module):
    """An MLP-Mixer (arXiv 2105.01601) with patches of 4 pixels."""

    def __init__(self, depth: int, width: int, image: tuple[int, ...], classes: int) -> None:
        """Build the layers."""
        super().__init__()
        channels, side, _ = image
        self.embed = nn.Conv2d(channels, width, 4, 4)
        self.blocks = nn.ModuleList(MixerBlock((side // 4) ** 2, width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``(n, channels, side, side)``."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x).mean(dim=1))
        return result


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class VisionTransformer(nn.Module):
    """A ViT (arXiv 2010.11929) with patches of 4 pixels, heads of 32 and mean pooling."""

    def __init__(self, depth: int, width: int, image: tuple[int, ...], classes: int) -> None:
        """Build the layers."""
        super().__init__()
        channels, side = (1, image[0]) if len(image) == 2 else (image[0], image[1])
        self.embed = nn.Conv2d(channels, width, 4, 4)
        self.place = nn.Parameter(torch.randn((side // 4) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(_Attention(width, width // 32) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``(n, side, side)`` or ``(n, channels, side, side)``."""
        x = x if x.dim() == 4 else x.unsqueeze(1)
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        result: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return result


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            short = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.short = nn.Sequential(short, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images (arXiv 1512.03385, section 4.2): no stem pooling."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        """Build the layers; ``width`` is 64 in the paper."""
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for stage, (inner, outer) in enumerate(pairwise(widths)):
            blocks += [_Residual(inner, outer, 1 + (stage > 0)), _Residual(outer, outer, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``(n, channels, side, side)``."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        result: Tensor = self.head(x.mean(dim=(2, 3)))
        return result

"""The demo's model and data: a small MLP-Mixer (arXiv 2105.01601) on images of digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

__all__ = ["Images", "Mixer", "MixerBlock", "digits", "load_images"]


@dataclass(frozen=True)
class Images:
    """Images ``(n, side, side)`` in [0, 1] and labels ``(n,)``, split for training and test."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def side(self) -> int:
        """Pixels along one side."""
        return self.train_x.shape[-1]


def digits() -> Images:
    """Return scikit-learn's bundled digits, 8 x 8 pixels: 1,437 to train on, 360 to test.

    Raises:
        ImportError: the ``[demo]`` extra is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"Expected scikit-learn for its bundled digits. Got: {error}. "
            'Install it with pip install "padst-compiler[demo]", or pass --data.'
        ) from error
    bundle = load_digits()
    x = torch.from_numpy(bundle.images).float() / 16.0
    y = torch.from_numpy(bundle.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Images("digits", x[360:], y[360:], x[:360], y[:360])


def load_images(path: Path, limit: int = 10_000) -> Images:
    """Return the images of an ``.npz`` file such as Fashion-MNIST's.

    Args:
        path: holds ``x_train, y_train, x_test, y_test``; images ``(n, side, side)``, uint8.
        limit: use that many training images at most, so that the demo stays short.

    Raises:
        ValueError: the file is not such a file.
    """
    import numpy as np

    if path.is_dir():
        path = next(iter(sorted(path.glob("*.npz"))), path)
    try:
        with np.load(path) as arrays:
            x, y, x2, y2 = (arrays[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    except (OSError, KeyError, ValueError, EOFError, TypeError, BadZipFile) as error:
        raise ValueError(
            f"Expected an .npz file with x_train, y_train, x_test, y_test. Got {path} ({error}). "
            "Pass --data the path of such a file, or leave it out to use the bundled digits."
        ) from error
    pixels = [torch.from_numpy(a).float() / 255.0 for a in (x[:limit], x2)]
    labels = [torch.from_numpy(a).long() for a in (y[:limit], y2)]
    return Images(path.stem, pixels[0], labels[0], pixels[1], labels[1])


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return result


class MixerBlock(nn.Module):
    """Mix tokens, then channels, each with a residual."""

    def __init__(self, tokens: int, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(width), _Mlp(tokens, 2 * tokens)
        self.norm2, self.channels = nn.LayerNorm(width), _Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (n, tokens, width)``."""
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        result: Tensor = x + self.channels(self.norm2(x))
        return result


class Mixer(nn.Module):
    """An MLP-Mixer for grey images.

    Args:
        side: pixels along one side of an image.
        patch: pixels along one side of a patch.
        width: channels.
        depth: blocks.
        classes: outputs.

    Example:
        >>> Mixer(side=8, patch=2, width=32)(torch.zeros(3, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self, side: int, patch: int, width: int = 80, depth: int = 2, classes: int = 10
    ) -> None:
        """Build the layers."""
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        tokens = (side // patch) ** 2
        self.blocks = nn.ModuleList(MixerBlock(tokens, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify ``images (n, side, side)``: ``(n, classes)``."""
        p, n = self.patch, images.shape[0]
        rows = images.shape[1] // p
        x = images.view(n, rows, p, rows, p).transpose(2, 3).reshape(n, rows * rows, p * p)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x).mean(dim=1))
        return result

"""What the tests of all rules are written with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

permute = torch.ops.padst.permute
Rewrite = Callable[..., Any]
Net = Callable[..., Any]
N = 12
UNPROVED = "is not proved to move with a permutation"


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def heads(how: str) -> Tensor:
    """Return a map of 3 heads of 4: it moves heads, features in their head, or mixes all."""
    if how == "heads":
        return (torch.tensor([2, 0, 1])[:, None] * 4 + torch.arange(4)).flatten()
    if how == "features":
        return (torch.arange(3)[:, None] * 4 + torch.tensor([1, 3, 0, 2])).flatten()
    if how == "both":
        inner = torch.stack([torch.tensor(p) for p in ([1, 0, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3])])
        return (torch.tensor([1, 2, 0])[:, None] * 4 + inner).flatten()
    return torch.arange(N).roll(1)

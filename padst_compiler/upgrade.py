"""Files of older versions of the format, in the words of the newest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_version_1"]


def from_version_1(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Describe the soft permutations of version 1 as version 2 does, in place.

    Version 1 knew full Sinkhorn logits alone, whose temperature stood in the header.

    Args:
        header: of the file.
        tensors: of the file, by name; gets the temperatures.
    """
    for fields in header["layers"]:
        held = fields["permutation"]
        if held["kind"] == "soft":
            prefix = f"{fields['names'][0]}.permutation.".lstrip(".")
            dtype = tensors[f"{prefix}logits"].dtype
            tensors[f"{prefix}temperature"] = torch.tensor(held["temperature"], dtype=dtype)
            held |= {"form": "sinkhorn", "settings": {"iterations": held["iterations"]}}

"""What this CPU multiplies in hardware beside numbers of 32 and 64 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["HALF", "products_of"]

HALF = (torch.bfloat16, torch.float16)


def products_of(dtype: torch.dtype) -> tuple[str, ...]:
    """Name what multiplies 16-bit numbers on this CPU; "unknown" where torch does not tell."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if known.get("architecture") != "x86_64":
        return ("unknown",)
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    return tuple(unit for unit in ("avx512", "amx") if known.get(f"{unit}_{name}"))

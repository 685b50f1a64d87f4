"""The part of a cache key that is ours: a hash of our sources."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

__all__ = ["source_digest"]


def source_digest(extra: str) -> str:
    """Hash all of our sources, torch's version and ``extra``: the part of a cache key that is ours.

    Inductor does not see what a pass or a lowering does; without this a stale cache answers.
    """
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256(f"{torch.__version__}|{extra}".encode())
    for folder in (root, *(root / name for name in ("passes", "kernels", "export"))):
        folder = folder.resolve()  # rglob does not follow links, which these three may be
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.h"))):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()

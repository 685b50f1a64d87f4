"""The part of a cache key that is ours: a hash of our sources."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import fx

from padst_compiler.compat import CustomGraphPass

__all__ = ["Unchanged", "source_digest"]


class Unchanged(CustomGraphPass):
    """A joint pass that changes nothing, for a graph that holds operators which we lower.

    Its id keeps Inductor's cache from answering with kernels of other sources.
    """

    def __init__(self, extra: str = "") -> None:
        """Hash our sources and ``extra``."""
        self._id = source_digest(extra)

    def __call__(self, graph: fx.Graph) -> None:
        """Leave the graph as it is."""

    def uuid(self) -> str:
        """Return the hash."""
        return self._id


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

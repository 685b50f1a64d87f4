"""Timings on disk: a small JSON file for each contest, beside Inductor's cache."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padst_compiler.compat import inductor_cache
from padst_compiler.contest import Measured

__all__ = ["Timings"]


@dataclass(frozen=True)
class Timings:
    """A folder of timings, shared by processes; what cannot be read or written is timed anew.

    Args:
        folder: made when something is stored; None keeps nothing.
    """

    folder: Path | None

    @classmethod
    def beside_inductor(cls) -> Timings:
        """Return those in Inductor's cache folder."""
        try:
            return cls(inductor_cache() / "padst" / "timings")
        except OSError:
            return cls(None)

    def load(self, key: str) -> Measured | None:
        """Return what was stored under a key, or None."""
        if self.folder is None:
            return None
        try:
            return _read(json.loads((self.folder / f"{key}.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def store(self, key: str, site: str, measured: Measured) -> None:
        """Write a file at once, so that no reader sees half of it.

        Args:
            key: a digest.
            site: in words, for whoever looks into the file.
            measured: what to store.
        """
        if self.folder is None:
            return
        found = {name: dict(getattr(measured, name)) for name in ("seconds", "low", "dropped")}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"site": site, **found}, file, indent=1)
            Path(name).replace(self.folder / f"{key}.json")
        except OSError:
            pass  # the next compilation times again


def _read(record: Mapping[str, Any]) -> Measured:
    seconds, low = (_numbers(record[name]) for name in ("seconds", "low"))
    dropped = {str(name): str(why) for name, why in dict(record["dropped"]).items()}
    return Measured(seconds, low, dropped, cached=True)


def _numbers(given: Mapping[str, Any]) -> dict[str, float]:
    found = {str(name): float(value) for name, value in dict(given).items()}
    if not all(math.isfinite(value) and value > 0.0 for value in found.values()):
        raise ValueError(f"Expected positive numbers. Got {found}. Time again.")
    return found

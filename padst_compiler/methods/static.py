"""Static: a random mask that never moves. The baseline that every growth method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from padst_compiler.methods.base import Method
from padst_compiler.schedule import Schedule

__all__ = ["Static"]


@dataclass(frozen=True)
class Static(Method):
    """Keep every mask; permutations are still learned and hardened."""

    name: ClassVar[str] = "static"

    def updates_at(self, step: int, schedule: Schedule) -> bool:
        """Never."""
        del step, schedule
        return False

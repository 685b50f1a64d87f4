"""When masks move, how strong the penalty is, when soft permutations are looked at and sharpened.

Everything here is arithmetic on the number of optimiser steps taken; nothing is read from the
model. What decides that a permutation hardens is in ``rules.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from padst_compiler.rules import make_rule
from padst_compiler.text import suggest

__all__ = ["PENALTIES", "Schedule", "cosine_drop", "linear_ramp"]

PENALTIES = ("ramp", "constant", "augmented_lagrangian")


def cosine_drop(step: float, end_step: float, drop_fraction: float) -> float:
    """Return the share of units to drop: ``alpha / 2 (1 + cos(pi t / T_end))``, then 0.

    Args:
        step: optimiser steps taken, t.
        end_step: T_end, where updates stop.
        drop_fraction: alpha, the share at step 0.

    Source: RigL (arXiv 1911.11134, section 3) and SRigL (arXiv 2305.02299).

    Example:
        >>> [round(cosine_drop(t, 100, 0.3), 3) for t in (0, 50, 100)]
        [0.3, 0.15, 0.0]
    """
    if step >= end_step:
        return 0.0
    return drop_fraction / 2.0 * (1.0 + math.cos(math.pi * step / end_step))


def linear_ramp(step: float, end_step: float, weight: float) -> float:
    """Return a weight that grows from 0 at step 0 to ``weight`` at ``end_step`` and stays.

    Example:
        >>> [linear_ramp(t, 100, 0.5) for t in (0, 50, 100, 200)]
        [0.0, 0.25, 0.5, 0.5]
    """
    return weight * min(1.0, step / end_step)


@dataclass(frozen=True)
class Schedule:
    """What happens after which optimiser step.

    Args:
        total_steps: length of the training, in optimiser steps.
        update_every: steps between two updates of the masks.
        drop_fraction: share of units dropped by an update at step 0; 0 keeps the masks for ever.
        end: share of ``total_steps`` after which masks stay.
        penalty_weight: lambda at the end of the ramp. The default is for mini-batches and a loss of
            the order of 1. Measured on the digits (three block layers of width 128, AdamW, learning
            rates 1e-3 to 5e-3, 1500 steps): with 3 all 30 layers of 10 runs hardened before 62 %
            of the training; with 1 a layer of 18, with 0.3 eight of 18 stayed soft, and decoding
            these at the end cost up to 22 points of accuracy. Where the loss has no noise, as in
            planted problems, 0.5 to 1 finds better permutations.
        harden_every: steps between two looks at the gaps.
        penalty: "ramp" (lambda grows from 0 until masks stay), "constant", or
            "augmented_lagrangian" (``hardening.Multipliers``; it sets its own weights, so
            ``penalty_weight`` does not count).
        hardening: the rule, as ``rules.make_rule`` reads it.
        anneal: factor by which soft permutations are sharpened between step 0 and the end of the
            updates, in even steps; None for each form's own: 10 for low_rank and blockwise, else 1.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> schedule = Schedule(total_steps=1000)
        >>> [step for step in range(1001) if schedule.updates_at(step)]
        [100, 200, 300, 400, 500, 600, 700]
    """

    total_steps: int
    update_every: int = 100
    drop_fraction: float = 0.3
    end: float = 0.75
    penalty_weight: float = 3.0
    harden_every: int = 100
    penalty: str = "ramp"
    hardening: str = "gap"
    anneal: float | None = None

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("total_steps", "update_every", "harden_every"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name} to be a whole number of steps, at least 1",
                value,
                f"Pass {name}=100, say.",
            )
        _require(
            0.0 <= self.drop_fraction < 1.0,
            "0 <= drop_fraction < 1",
            self.drop_fraction,
            "Use 0.3, the published default, or 0 to keep the masks.",
        )
        _require(
            0.0 < self.end <= 1.0,
            "0 < end <= 1, a share of total_steps",
            self.end,
            "Use 0.75, the published default.",
        )
        _require(
            0.0 <= self.penalty_weight < math.inf,
            "a finite penalty_weight of at least 0",
            self.penalty_weight,
            "Use 3.0, or 0 for no penalty.",
        )
        _require(
            self.penalty in PENALTIES,
            f"penalty {', '.join(PENALTIES)}",
            repr(self.penalty),
            suggest(str(self.penalty), PENALTIES),
        )
        _require(
            self.anneal is None or 1.0 <= self.anneal < math.inf,
            "a finite anneal of at least 1, or None",
            self.anneal,
            "Use 10.0 to end ten times sharper, or None.",
        )
        make_rule(self.hardening, self.end_step)

    @property
    def end_step(self) -> float:
        """T_end: from here on masks stay and lambda is constant."""
        return self.end * self.total_steps

    def updates_at(self, step: int) -> bool:
        """Whether masks move after ``step`` optimiser steps."""
        due = step > 0 and step % self.update_every == 0
        return due and step < self.end_step and self.drop_fraction > 0.0

    def checks_at(self, step: int) -> bool:
        """Whether soft permutations are looked at after ``step`` optimiser steps."""
        return step > 0 and step % self.harden_every == 0

    def drop_at(self, step: int) -> float:
        """Return the share of units that an update after ``step`` steps drops."""
        return cosine_drop(step, self.end_step, self.drop_fraction)

    def sharpening_at(self, step: int) -> tuple[float, bool]:
        """Return the factor per step on the logits of soft permutations, and whether on all.

        It makes 8 between two looks, on those that are decided; on all from the end of the updates,
        so that every permutation becomes hard while there is training left to make up for it.
        """
        return float(8.0 ** (1.0 / self.harden_every)), step >= self.end_step

    def annealing_at(self, step: int, default: float) -> float:
        """Return the factor by which a form whose own total is ``default`` is sharpened."""
        total = default if self.anneal is None else self.anneal
        return float(total ** (1.0 / self.end_step)) if step <= self.end_step else 1.0

    def penalty_at(self, step: int) -> float:
        """Return lambda after ``step`` optimiser steps; 1 where multipliers take its place."""
        if self.penalty != "ramp":
            return self.penalty_weight if self.penalty == "constant" else 1.0
        return linear_ramp(step, self.end_step, self.penalty_weight)


def _require(holds: bool, need: str, value: object, cure: str) -> None:
    if not holds:
        raise ValueError(f"Expected {need}. Got {value}. {cure}")

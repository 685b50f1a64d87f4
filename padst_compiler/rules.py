"""When one soft permutation hardens: a rule per layer, each with its own memory.

    gap            the default: decided below the proved limit, then settled, as ``GapRule`` says
    plateau        the decoded assignment stayed the same for k looks (``plateau:3``)
    threshold      the mean gap fell below delta, 0.22 (``threshold:0.1``): the paper's
    step           at a given step (``step:5000``), by default where the updates end

All look at numbers of the permutation only; a NaN never hardens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from padst_compiler.permutation import GAP_LIMIT
from padst_compiler.text import suggest

__all__ = [
    "DELTA",
    "RULES",
    "SETTLED",
    "GapRule",
    "PlateauRule",
    "Rule",
    "RuleState",
    "StepRule",
    "ThresholdRule",
    "make_rule",
]

SETTLED = 0.02
"""Gap at which a permutation that was decided becomes an index map: every row and column has an
entry of at least ``(1 - 0.02)^2 = 0.96``, so that the switch itself changes next to nothing."""

DELTA = 0.22
"""The paper's threshold (arXiv 2510.14812, appendix C.2.1, as reported)."""

RuleState: TypeAlias = dict[str, Any]
"""What a rule has seen: its fields by name."""


@dataclass
class Rule:
    """One layer's rule; its memory is its fields."""

    name: ClassVar[str]
    settling: ClassVar[bool] = False  # whether it is decided, and to be sharpened until it hardens

    def note(self, gap: float) -> None:
        """Note a worst gap, at the start of the training or later, without hardening."""
        del gap

    def ready(
        self, gap: float, decode: Callable[[], Tensor], *, mean: float = 1.0, step: int = 0
    ) -> bool:
        """Take one look, and return whether to harden now.

        Args:
            gap: the worst gap of any row or column; NaN never hardens.
            decode: returns the present assignment ``(n,)``; costs more than the gap.
            mean: the mean gap over rows and columns.
            step: optimiser steps taken.
        """
        raise NotImplementedError(f"{type(self).__name__} must say when it hardens.")

    def state_dict(self) -> RuleState:
        """Return what was seen so far."""
        return {field.name: _copied(getattr(self, field.name)) for field in fields(self)}

    def load_state_dict(self, state: RuleState) -> None:
        """Go on from ``state``."""
        for field in fields(self):
            setattr(self, field.name, _copied(state[field.name]))


@dataclass
class PlateauRule(Rule):
    """Harden when the decoded assignment was the same for ``checks`` looks in a row.

    Example:
        >>> rule = PlateauRule(checks=2)
        >>> [rule.ready(0.6, lambda: torch.arange(4)) for _ in range(2)]
        [False, True]
    """

    name: ClassVar[str] = "plateau"
    checks: int = 5
    stable: int = 0
    assignment: Tensor | None = None

    def ready(
        self, gap: float, decode: Callable[[], Tensor], *, mean: float = 1.0, step: int = 0
    ) -> bool:
        """Take one look."""
        del mean, step
        return gap <= 1.0 and self.is_stable(decode())

    def is_stable(self, assignment: Tensor) -> bool:
        """Count looks with one assignment."""
        previous, self.assignment = self.assignment, assignment
        same = previous is not None and torch.equal(previous, assignment)
        self.stable = self.stable + 1 if same else 1
        return self.stable >= self.checks


@dataclass
class GapRule(PlateauRule):
    """Decide when one soft permutation hardens, without a tuned threshold.

    It is *decided* when the worst row or column has ``gap < 1 - 1/sqrt 2 = 0.2929``, where argmax
    is provably a permutation, and when it was learned: the gap was once at or above the limit, or
    the decoded assignment has stayed the same for ``checks`` looks in a row. The paper's fixed 0.22
    (arXiv 2510.14812, appendix C.2.1, as reported) has no such second condition, so it fires at
    once on a start near the identity.

    At the limit an entry may still be 0.5 against 0.5, and a switch there moved the demo's accuracy
    by up to 0.6 points. So what is decided is *settling* first: its owner sharpens it while the
    training goes on, and it hardens at the first look with a gap of at most ``SETTLED``.

    The limit needs columns that sum to 1. With 5 Sinkhorn iterations they ran to 0.5 and 1.9 in
    planted problems, and gaps stuck at exactly 0.2929, two rows on one column; 10 mend that.

    Example:
        >>> rule = GapRule()
        >>> [rule.ready(gap, lambda: torch.arange(4)) for gap in (0.5, 0.28, 0.09, 0.01)]
        [False, False, False, True]
    """

    name: ClassVar[str] = "gap"
    seen_above: bool = False
    settling: bool = False  # type: ignore[misc]

    def note(self, gap: float) -> None:
        """Note a gap, at the start of the training or later, without hardening."""
        self.seen_above = self.seen_above or gap >= GAP_LIMIT

    def ready(
        self, gap: float, decode: Callable[[], Tensor], *, mean: float = 1.0, step: int = 0
    ) -> bool:
        """Take one look; decode only where the limit is met and was never exceeded."""
        del mean, step
        if not gap < GAP_LIMIT:  # training undid it, or it was never there
            self.note(gap)
            self.settling = False
            return False
        self.settling = self.settling or self.seen_above or self.is_stable(decode())
        return self.settling and gap <= SETTLED


@dataclass
class ThresholdRule(Rule):
    """Harden when the mean gap over rows and columns falls below ``delta`` (arXiv 2510.14812).

    The paper's 0.22 is reported without its normalisation; of the whole sum it would mean "exact
    already", so it is read as a mean. The mean says nothing about the worst row: the decoding is by
    linear assignment where argmax is none. It fires at once on a start near the identity.

    Example:
        >>> rule = ThresholdRule()
        >>> [rule.ready(0.9, lambda: torch.arange(4), mean=mean) for mean in (0.3, 0.2)]
        [False, True]
    """

    name: ClassVar[str] = "threshold"
    delta: float = DELTA

    def ready(
        self, gap: float, decode: Callable[[], Tensor], *, mean: float = 1.0, step: int = 0
    ) -> bool:
        """Take one look."""
        del decode, step
        return gap <= 1.0 and mean < self.delta


@dataclass
class StepRule(Rule):
    """Harden at the first look at or after step ``at``, wherever the gap is.

    Example:
        >>> [StepRule(at=50).ready(0.9, lambda: torch.arange(4), step=t) for t in (40, 50)]
        [False, True]
    """

    name: ClassVar[str] = "step"
    at: float = 0

    def ready(
        self, gap: float, decode: Callable[[], Tensor], *, mean: float = 1.0, step: int = 0
    ) -> bool:
        """Take one look."""
        del decode, mean
        return gap <= 1.0 and step >= self.at


RULES: dict[str, Callable[[float], Rule]] = {
    "gap": lambda number: GapRule(checks=int(number)),
    "plateau": lambda number: PlateauRule(checks=int(number)),
    "threshold": lambda number: ThresholdRule(delta=number),
    "step": lambda number: StepRule(at=number),
}


def make_rule(text: str, end_step: float) -> Rule:
    """Return a new rule from its text: a name, and a number behind a colon where wanted.

    Args:
        text: "gap", "plateau", "threshold" or "step", or for instance "plateau:3".
        end_step: where the updates of the masks end.

    Raises:
        ValueError: no such rule, or a number that it cannot have.

    Example:
        >>> make_rule("threshold", 100.0), make_rule("step", 75.0)
        (ThresholdRule(delta=0.22), StepRule(at=75.0))
    """
    name, colon, number = str(text).partition(":")
    if name not in RULES:
        raise ValueError(
            f"Expected hardening {', '.join(RULES)}. Got {text!r}. {suggest(name, RULES)}"
        )
    default = {"gap": 5, "plateau": 5, "threshold": DELTA, "step": end_step}[name]
    try:
        chosen = float(number) if colon else default
    except ValueError:
        chosen = 0.0
    if not 0.0 < chosen < float("inf"):
        raise ValueError(
            f"Expected a number above 0 behind the colon. Got {text!r}. "
            f"Write {name!r}, or {name}:{default:g}."
        )
    return RULES[name](chosen)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

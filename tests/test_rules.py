"""What each rule sees, when it hardens, and that it goes on from its state."""

import math

import pytest
import torch

from padst_compiler.permutation import GAP_LIMIT, gaps, sinkhorn
from padst_compiler.rules import (
    DELTA,
    RULES,
    SETTLED,
    GapRule,
    PlateauRule,
    Rule,
    StepRule,
    ThresholdRule,
    make_rule,
)


def never_called() -> torch.Tensor:
    raise AssertionError("decoding is dear and was not needed")


def test_a_gap_that_falls_below_the_limit_hardens_at_once() -> None:
    rule = GapRule()
    assert not rule.ready(0.9, never_called)
    assert not rule.ready(GAP_LIMIT, never_called)
    assert not rule.settling
    assert not rule.ready(math.nextafter(GAP_LIMIT, 0), never_called)
    assert rule.settling
    assert not rule.ready(math.nextafter(SETTLED, 1), never_called)
    assert rule.ready(SETTLED, never_called)


def test_what_training_undoes_while_it_settles_is_open_again() -> None:
    rule = GapRule(seen_above=True)
    assert not rule.ready(0.1, never_called) and rule.settling
    assert not rule.ready(0.5, never_called) and not rule.settling
    assert rule.ready(0.01, never_called)


def test_a_start_above_the_limit_counts_without_a_check() -> None:
    rule = GapRule()
    rule.note(0.9)
    assert rule.ready(0.01, never_called)


def test_a_start_below_the_limit_waits_until_the_assignment_is_stable() -> None:
    rule, here = GapRule(checks=3), torch.arange(4)
    assert [rule.ready(0.01, lambda: here) for _ in range(2)] == [False, False]
    assert not rule.ready(0.01, lambda: here.flip(0))  # it moved: count anew
    assert [rule.ready(0.01, lambda: here.flip(0)) for _ in range(2)] == [False, True]


def test_nan_never_hardens() -> None:
    rule = GapRule(seen_above=True)
    assert not rule.ready(math.nan, never_called)


def test_a_rule_goes_on_from_its_state() -> None:
    rule, other = GapRule(checks=2), GapRule(checks=2)
    assert not rule.ready(0.01, lambda: torch.arange(3))
    other.load_state_dict(rule.state_dict())
    assert other.ready(0.01, lambda: torch.arange(3))
    other.load_state_dict(GapRule().state_dict())
    assert not other.ready(0.01, lambda: torch.arange(3))


def test_plateau_hardens_wherever_the_gap_is_but_never_on_nan() -> None:
    rule = PlateauRule(checks=3)
    orders = [[0, 1], [1, 0], [1, 0], [1, 0]]
    looks = [rule.ready(0.9, lambda order=order: torch.tensor(order)) for order in orders]  # type: ignore[misc]
    assert looks == [False, False, False, True]
    assert not PlateauRule(checks=1).ready(math.nan, never_called)


def test_threshold_looks_at_the_mean_gap_alone_and_fires_at_once_near_the_identity() -> None:
    assert DELTA == 0.22
    assert not ThresholdRule().ready(0.25, never_called, mean=0.22)
    assert ThresholdRule().ready(0.9, never_called, mean=0.2199)
    assert not ThresholdRule().ready(math.nan, never_called, mean=0.1)
    assert not ThresholdRule().ready(0.1, never_called, mean=math.nan)
    near = sinkhorn(8.0 * torch.eye(64) + 0.1 * torch.randn(64, 64), 5)
    mean = gaps(near).mean().item()
    assert ThresholdRule().ready(0.1, never_called, mean=mean)
    adaptive = GapRule()  # the same start: it waits
    assert not adaptive.ready(float(gaps(near).max()), lambda: torch.arange(64), mean=mean)


def test_step_hardens_at_its_step() -> None:
    rule = StepRule(at=75.0)
    assert [rule.ready(0.9, never_called, step=t) for t in (0, 74, 75, 100)] == [0, 0, 1, 1]
    assert not rule.ready(math.nan, never_called, step=100)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("gap", GapRule()),
        ("gap:3", GapRule(checks=3)),
        ("plateau", PlateauRule()),
        ("plateau:2", PlateauRule(checks=2)),
        ("threshold", ThresholdRule()),
        ("threshold:0.1", ThresholdRule(delta=0.1)),
        ("step", StepRule(at=60.0)),
        ("step:10", StepRule(at=10.0)),
    ],
)
def test_rules_are_spelled(text: str, rule: Rule) -> None:
    found = make_rule(text, 60.0)
    assert found == rule and found.name == text.partition(":")[0] in RULES
    other = make_rule(text, 60.0)
    found.ready(0.1, lambda: torch.arange(3), mean=0.2, step=70)
    other.load_state_dict(found.state_dict())
    assert other.state_dict().keys() == found.state_dict().keys()
    assert repr(other) == repr(found)


@pytest.mark.parametrize(
    "text", ["gab", "", "gap:", "step:-1", "threshold:x", "step:inf", "step:nan"]
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expected .* Got .*\. [A-Z].*[.?]"):
        make_rule(text, 60.0)

"""What each rule sees, when it hardens, and that it goes on from its state."""

import math

import torch

from padst_compiler.permutation import GAP_LIMIT
from padst_compiler.rules import SETTLED, GapRule


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

"""Numbers of method.md 8A.5: drop fractions, penalty weights, updates, looks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padst_compiler.schedule import Schedule, cosine_drop, linear_ramp


def test_the_drop_fraction_falls_by_cosine_from_alpha_to_zero() -> None:
    assert cosine_drop(0, 1000, 0.3) == pytest.approx(0.30)
    assert cosine_drop(500, 1000, 0.3) == pytest.approx(0.15)
    assert cosine_drop(1000, 1000, 0.3) == cosine_drop(5000, 1000, 0.3) == 0.0


@given(st.integers(1, 5000), st.integers(1, 500), st.floats(0.01, 1.0))
def test_no_update_at_the_start_or_at_the_end_or_after(total: int, every: int, end: float) -> None:
    schedule = Schedule(total_steps=total, update_every=every, end=end)
    steps = [step for step in range(total + 1) if schedule.updates_at(step)]
    assert all(0 < step < end * total and step % every == 0 for step in steps)
    assert len(steps) == max(0, math.ceil(end * total / every) - 1)
    assert all(schedule.drop_at(step) > 0 for step in steps)


def test_a_drop_fraction_of_zero_never_updates() -> None:
    schedule = Schedule(total_steps=100, update_every=1, drop_fraction=0.0)
    assert not any(schedule.updates_at(step) for step in range(101))


def test_lambda_ramps_to_its_weight_at_the_end_of_updates_and_stays() -> None:
    schedule = Schedule(total_steps=1000, end=0.75, penalty_weight=0.4)
    assert [schedule.penalty_at(t) for t in (0, 375, 750, 1000)] == pytest.approx(
        [0, 0.2, 0.4, 0.4]
    )
    assert linear_ramp(3, 6, 1.0) == 0.5


def test_a_constant_lambda_and_multipliers_in_its_place() -> None:
    constant = Schedule(total_steps=100, penalty_weight=0.4, penalty="constant")
    assert [constant.penalty_at(t) for t in (0, 50, 100)] == [0.4, 0.4, 0.4]
    multiplied = Schedule(total_steps=100, penalty_weight=0.4, penalty="augmented_lagrangian")
    assert [multiplied.penalty_at(t) for t in (0, 50, 100)] == [1.0, 1.0, 1.0]


def test_annealing_multiplies_to_its_total_at_the_end_of_updates() -> None:
    own = Schedule(total_steps=100, end=0.5)
    asked = Schedule(total_steps=100, end=0.5, anneal=4.0)
    for schedule, default, total in ((own, 10.0, 10.0), (own, 1.0, 1.0), (asked, 10.0, 4.0)):
        steps = range(1, 101)
        assert math.prod(schedule.annealing_at(t, default) for t in steps) == pytest.approx(total)


def test_a_rule_is_named() -> None:
    assert Schedule(total_steps=10, hardening="plateau:3").hardening == "plateau:3"
    with pytest.raises(ValueError, match=r"Expected hardening gap, .* Got 'gabs'\."):
        Schedule(total_steps=10, hardening="gabs")


def test_checks_go_on_after_the_end_of_updates() -> None:
    schedule = Schedule(total_steps=100, update_every=10, harden_every=20)
    assert [t for t in range(101) if schedule.checks_at(t)] == [20, 40, 60, 80, 100]


@pytest.mark.parametrize(
    "bad",
    [
        {"total_steps": 0},
        {"total_steps": 10.5},
        {"total_steps": True},
        {"update_every": 0},
        {"harden_every": -1},
        {"drop_fraction": 1.0},
        {"drop_fraction": -0.1},
        {"drop_fraction": math.nan},
        {"end": 0.0},
        {"end": 1.1},
        {"penalty_weight": -1.0},
        {"penalty_weight": math.inf},
        {"penalty": "ramps"},
        {"anneal": 0.5},
        {"anneal": math.nan},
    ],
)
def test_a_number_out_of_range_is_refused_by_name(bad: dict[str, float]) -> None:
    settings: dict[str, float] = {"total_steps": 100} | bad
    with pytest.raises(ValueError, match=rf"^Expected .*{next(iter(bad))}.* Got .*\. [A-Z].*[.?]$"):
        Schedule(**settings)  # type: ignore[arg-type]

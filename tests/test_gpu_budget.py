from __future__ import annotations

from padst_compiler.gpu_budget import SHARES, Budget
from padst_compiler.gpu_cases import PARTS


def test_every_part_has_a_share() -> None:
    assert tuple(SHARES) == PARTS and abs(sum(SHARES.values()) - 1.0) < 1e-9


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_part_ends_in_its_share_and_says_what_it_left_out() -> None:
    clock, said = Clock(), list[str]()
    budget = Budget(100.0, ["layers", "models"], clock)
    end = 100.0 * SHARES["layers"] / (SHARES["layers"] + SHARES["models"])
    done = []
    for item in budget.within("layers", range(20), said.append):
        done.append(item)
        clock.now += 9.0
    assert clock.now <= end < clock.now + 9.0 and done == list(range(6))
    assert said == ["layers: 14 of 20 left out for time: 6, 7, 8 and 11 more"]
    for _ in budget.within("models", range(20), said.append):
        clock.now += 1.0
    assert clock.now == 74.0 and len(said) == 1  # what one part leaves the next may use
    assert list(budget.within("models", [], said.append)) == []


def test_the_first_case_of_a_part_runs_while_any_time_is_left() -> None:
    clock, said = Clock(), list[str]()
    budget = Budget(100.0, ["layers", "models"], clock)
    clock.now = 99.0  # one case took far too long
    assert list(budget.within("layers", [1, 2], said.append)) == [1]
    clock.now = 100.0
    assert list(budget.within("models", [1], said.append)) == []
    assert len(said) == 2

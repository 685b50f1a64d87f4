import re
from collections.abc import Callable

import pytest
import torch

from padst_compiler.measure import Timing, cold, machine, paired, processor, ratio


class Clock:
    """A clock that moves when a contestant works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def test_a_timing_is_seconds_per_call() -> None:
    clock = Clock()
    times = paired(
        {"slow": clock.work("slow", 0.02), "fast": clock.work("fast", 0.005)},
        rounds=5,
        seconds=0.1,
        clock=clock,
    )
    assert times["slow"].median == pytest.approx(0.02)
    assert times["fast"].median == pytest.approx(0.005)
    assert [len(t.rounds) for t in times.values()] == [5, 5]
    assert ratio(times["slow"], times["fast"]) == pytest.approx((4.0, 4.0, 4.0))


def test_contestants_take_turns_each_for_the_asked_time() -> None:
    clock = Clock()
    paired(
        {"slow": clock.work("s", 0.0625), "fast": clock.work("f", 0.03125)},
        rounds=2,
        seconds=0.125,
        clock=clock,
    )
    runs = re.findall(r"s+|f+", "".join(clock.log))
    assert [len(run) for run in runs[2:]] == [2, 4, 2, 4]  # after the warm-up of each


def test_what_runs_while_others_settle_is_not_counted() -> None:
    clock = Clock()
    calls = {"a": clock.work("a", 0.0625), "b": clock.work("b", 0.03125)}
    times = paired(calls, rounds=2, seconds=0.0625, settle=0.125, clock=clock)
    runs = re.findall(r"a+|b+", "".join(clock.log))
    assert [len(run) for run in runs[2:]] == [2 + 1, 4 + 2] * 2
    assert {name: time.rounds for name, time in times.items()} == {
        "a": (0.0625, 0.0625),
        "b": (0.03125, 0.03125),
    }


def test_a_call_longer_than_a_measurement_runs_once_a_round() -> None:
    clock = Clock()
    times = paired({"one": clock.work("x", 3.0)}, rounds=3, seconds=0.1, clock=clock)
    assert len(clock.log) == 1 + 1 + 3  # one to compile, one to see how long it takes
    assert times["one"].rounds == (3.0, 3.0, 3.0)


def test_a_call_that_takes_no_time_ends() -> None:
    clock = Clock()
    times = paired({"none": clock.work("x", 0.0)}, rounds=1, seconds=1e-5, clock=clock)
    assert times["none"].median == 0.0


def test_the_ratio_is_paired_by_round() -> None:
    """A slow round of the machine hits both, and does not count."""
    slow, fast = Timing((2.0, 2.0, 20.0)), Timing((1.0, 1.0, 10.0))
    assert ratio(slow, fast) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        ratio(slow, Timing((1.0,)))


@pytest.mark.parametrize(("rounds", "at"), [(3, 0), (5, 0), (6, 0), (9, 1), (11, 1), (12, 2)])
def test_the_interval_holds_the_median_in_95_of_100(rounds: int, at: int) -> None:
    """Known ranks (Conover, table A3): the second of 9 to 11 rounds, the third of 12."""
    slow = Timing(tuple(float(n) for n in range(rounds)))
    middle, low, high = ratio(slow, Timing((1.0,) * rounds))
    assert (low, middle, high) == (at, (rounds - 1) / 2, rounds - 1 - at)


def test_the_median_of_an_even_number_of_rounds() -> None:
    assert Timing((1.0, 4.0, 2.0, 3.0)).median == 2.5


def test_the_machine_is_named_in_one_line() -> None:
    line = machine()
    assert "\n" not in line
    assert f"torch {torch.__version__}" in line
    assert f"{torch.get_num_threads()} threads" in line
    assert not line.startswith(",")


def test_the_processor_has_a_name() -> None:
    assert processor().strip() == processor() != ""
    assert torch.cuda.is_available() or machine().startswith(processor())


def test_cold_calls_take_turns_and_what_is_live_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("padst_compiler.measure.SWEPT", 1 << 12)
    log: list[str] = []
    live = torch.ones(3)
    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    times = cold(calls, rounds=3, live=[live])
    assert log == ["a", "b"] * 3
    assert {name: len(time.rounds) for name, time in times.items()} == {"a": 3, "b": 3}
    assert live.tolist() == [1.0] * 3

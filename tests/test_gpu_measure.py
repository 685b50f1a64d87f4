from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from padst_compiler.gpu_measure import Clock, cpu_clock, in_graphs, on_gpu
from padst_compiler.measure import ratio


class FakeGPU:
    """A device whose calls take the seconds they say, and that remembers what happened."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[str]()

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run

    def clock(self, refused: str = "") -> Clock:
        def capture(call: Callable[[], Any], count: int) -> Callable[[], None]:
            if not self.captured(call, refused):
                raise RuntimeError("a host synchronisation\nand more")

            def replay() -> None:
                for _ in range(count):
                    call()
                self.log.append(f"replayed {count}")

            return replay

        return Clock(
            mark=lambda: self.now,
            between=lambda start, end: end - start,
            wait=lambda: self.log.append("wait"),
            sweep=lambda: self.log.append("sweep"),
            capture=capture,
        )

    def captured(self, call: Callable[[], Any], refused: str) -> bool:
        before = len(self.log)
        call()
        return self.log[before] != refused


def test_every_contestant_takes_its_turn_and_each_begins_rounds() -> None:
    gpu = FakeGPU()
    calls = {name: gpu.call(name, 1.0) for name in "abc"}
    times = on_gpu(calls, rounds=3, seconds=0.5, clock=gpu.clock())
    order = "".join(entry for entry in gpu.log if entry in calls)
    assert order[6:] == "abcbcacab"  # the first six set how often each is called
    assert {name: len(timing.rounds) for name, timing in times.items()} == dict.fromkeys("abc", 3)


def test_short_calls_are_repeated_and_what_is_returned_is_of_one() -> None:
    gpu = FakeGPU()
    calls = {"short": gpu.call("short", 0.001), "long": gpu.call("long", 0.2)}
    times = on_gpu(calls, rounds=6, seconds=0.1, clock=gpu.clock())
    assert times["short"].median == pytest.approx(0.001)
    assert times["long"].median == pytest.approx(0.2)
    assert gpu.log.count("long") == 2 + 6 and 6 * 99 <= gpu.log.count("short") - 12 <= 6 * 100
    assert ratio(times["long"], times["short"])[0] == pytest.approx(200.0)


def test_cold_calls_are_swept_one_by_one_and_what_is_live_is_read() -> None:
    gpu, read = FakeGPU(), list[str]()

    class Live(torch.Tensor):
        def sum(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            read.append("read")
            return torch.zeros(())

    live = torch.zeros(2).as_subclass(Live)
    calls = {"a": gpu.call("a", 0.01), "b": gpu.call("b", 0.02)}
    times = on_gpu(calls, rounds=2, seconds=0.04, cold=True, live=(live,), clock=gpu.clock())
    assert times["a"].median == pytest.approx(0.01)
    sweeps = [at for at, entry in enumerate(gpu.log) if entry == "sweep"]
    assert sweeps and all(gpu.log[at + 1] in ("a", "b") for at in sweeps)
    assert len(read) == len(sweeps)


def test_a_graph_holds_many_calls_and_is_timed_for_one() -> None:
    gpu = FakeGPU()
    times = in_graphs(
        {"a": gpu.call("a", 0.001)}, rounds=3, seconds=0.01, say=print, clock=gpu.clock()
    )
    assert times["a"].median == pytest.approx(0.001)
    counts = {entry for entry in gpu.log if entry.startswith("replayed")}
    assert counts in ({"replayed 1", "replayed 10"}, {"replayed 1", "replayed 9"})


def test_what_cannot_be_captured_is_said_and_left_out() -> None:
    gpu, said = FakeGPU(), list[str]()
    calls = {"good": gpu.call("good", 0.1), "bad": gpu.call("bad", 0.1)}
    times = in_graphs(calls, rounds=2, seconds=0.1, say=said.append, clock=gpu.clock("bad"))
    assert list(times) == ["good"]
    assert said == ["bad is left out of CUDA graphs: a host synchronisation"]
    assert in_graphs({}, clock=gpu.clock()) == {}


def test_the_clock_of_a_process_times_a_dry_run() -> None:
    x = torch.ones(8)
    for times in (
        on_gpu({"a": x.sum}, rounds=2, seconds=1e-5, clock=cpu_clock()),
        on_gpu({"a": x.sum}, rounds=2, seconds=1e-5, cold=True, live=(x,), clock=cpu_clock()),
        in_graphs({"a": x.sum}, rounds=2, seconds=1e-5, clock=cpu_clock()),
    ):
        assert len(times["a"].rounds) == 2 and times["a"].median > 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_events_and_graphs_agree_on_a_large_product() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    hot, graph = (run({"a": lambda: a @ a})["a"].median for run in (on_gpu, in_graphs))
    assert hot > 0.0 and graph > 0.0

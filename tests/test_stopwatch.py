import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from padst_compiler import compat, gpu_measure, stopwatch
from padst_compiler.contest import Contest
from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels import CANDIDATES, install
from padst_compiler.kernels import DENSE as PACKED
from padst_compiler.measure import Timing
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.passes.pack_dense import PackDense
from padst_compiler.settings import Settings
from padst_compiler.stopwatch import Stopwatch, with_stopwatch
from padst_compiler.structures import Block, FanIn, Shape
from padst_compiler.timings import Timings
from padst_compiler.verify import MismatchError

ROOT = Path(__file__).resolve().parent.parent
GEOMETRY = Geometry(FanIn(), Shape(24, 16), 4, 9, torch.float32, "cpu", frozen=True)
DENSE = CANDIDATES[LINEAR["fan_in"]][-1]


def way(name: str, run: Callable[..., Tensor] = DENSE.run) -> Formulation:
    return Formulation(name, run, DENSE.cost)


def contest(*ways: Formulation, **changes: Any) -> Contest:
    return Contest(LINEAR["fan_in"], replace(GEOMETRY, **changes), True, (*ways, DENSE))


def wrong(x: Tensor, *rest: Any) -> Tensor:
    return 2.0 * DENSE.run(x, *rest)


def broken(x: Tensor, *rest: Any) -> Tensor:
    raise ArithmeticError("no such instruction")


@dataclass
class Bench:
    """What was compiled and timed, and how long a formulation is said to take."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    compiled: int = 0
    timed: int = 0
    threads: set[int] = field(default_factory=set)
    options: list[Mapping[str, Any]] = field(default_factory=list)

    def compile(self, graph: fx.GraphModule, examples: Sequence[Any], options: Any) -> Any:
        self.compiled += 1
        self.threads.add(threading.get_ident())
        self.options.append(options)
        return graph.forward

    def time(
        self, calls: Mapping[str, Any], live: Sequence[Tensor], device: str
    ) -> dict[str, Timing]:
        self.timed += 1
        return {name: Timing((self.seconds.get(name, 1.0),) * 3) for name in calls}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(compat, "compile_with_inductor", made.compile)
    monkeypatch.setattr(stopwatch, "_times", made.time)
    return made


def watch(folder: Path | None, *, strict: bool = False, **options: Any) -> Stopwatch:
    return Stopwatch(options, Timings(folder), strict=strict)


def test_dense_runs_as_it_would_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight of a size that pays is laid out for our kernel, others are left to BLAS."""
    install()
    graphs: list[set[str]] = []

    def compile(graph: fx.GraphModule, examples: Sequence[Any], options: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(compat, "compile_with_inductor", compile)
    passes = (PackDense(PACKED),)
    for shape, frozen in ((Shape(512, 640), True), (Shape(512, 640), False), (Shape(24, 16), True)):
        timed = contest(way("other"), shape=shape, frozen=frozen)
        Stopwatch({}, Timings(None), strict=True, passes=passes).time([timed])
    assert ["padst.block_linear.default" in targets for targets in graphs] == [True] * 2 + [
        False
    ] * 4


def test_every_formulation_of_a_site_is_compiled_and_timed_against_dense(bench: Bench) -> None:
    bench.seconds = {"a": 1.0, "b": 4.0, "dense": 2.0}
    site = contest(way("a"), way("b"))
    found = watch(None).time([site, site, contest(way("a"), way("b"))])[site]
    assert (bench.compiled, bench.timed) == (3, 1)  # alike sites are one
    assert found.seconds == bench.seconds
    assert found.low == {"a": 2.0, "b": 0.5}
    assert (found.dropped, found.cached) == ({}, False)


def test_what_is_frozen_is_made_ready_outside_of_what_is_compiled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compile_it(graph: fx.GraphModule, examples: Sequence[Any], options: Any) -> Any:
        seen.append(any("scatter" in str(node.target) for node in calls(graph)))
        return graph.forward

    monkeypatch.setattr(compat, "compile_with_inductor", compile_it)
    watch(None).time([contest(way("a")), contest(way("a"), frozen=False)])
    assert seen == [False, False, True, True]


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def test_a_site_without_a_choice_or_on_another_device_is_left_out(bench: Bench) -> None:
    others = [contest(), contest(way("a"), device="meta")]
    assert watch(None).time(others) == {}
    assert watch(None).time([]) == {}
    assert bench.compiled == 0


# -- verified --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "why"),
    [(wrong, "it disagrees with the reference"), (broken, "does not run .no such instruction")],
    ids=["wrong", "broken"],
)
def test_a_formulation_that_is_not_right_is_dropped_with_a_warning(
    bench: Bench, tmp_path: Path, run: Callable[..., Tensor], why: str
) -> None:
    site = contest(way("a"), way("bad", run))
    said = f"bad of fan_in_linear 24x16, 9 tokens is not used: .*{why}"
    for cached in (False, True):  # a cached one is dropped as loudly
        with pytest.warns(UserWarning, match=said):
            found = watch(tmp_path).time([site])[site]
        assert found.cached is cached
        assert set(found.seconds) == {"a", "dense"}
        assert set(found.dropped) == {"bad"}
        with pytest.raises(MismatchError, match=said):
            watch(tmp_path, strict=True).time([site])
    assert bench.timed == 1


def test_without_dense_nothing_is_known_and_nothing_stored(bench: Bench, tmp_path: Path) -> None:
    dense = Formulation("dense", broken, DENSE.cost)
    site = Contest(LINEAR["fan_in"], GEOMETRY, True, (way("a"), dense))
    for _ in range(2):
        with pytest.warns(UserWarning, match="dense of fan_in_linear"):
            found = watch(tmp_path).time([site])[site]
        assert (found.seconds, found.low) == ({}, {})
    assert not list(tmp_path.iterdir())


# -- cached ----------------------------------------------------------------------------------------


def test_a_second_stopwatch_times_nothing(bench: Bench, tmp_path: Path) -> None:
    sites = [contest(way("a")), contest(way("a"), tokens=10)]
    first, second = watch(tmp_path).time(sites), watch(tmp_path).time(sites)
    assert (bench.compiled, bench.timed) == (4, 2)
    assert {site: replace(found, cached=True) for site, found in first.items()} == second


def test_one_stopwatch_remembers_without_a_folder(bench: Bench) -> None:
    one, site = watch(None), contest(way("a"))
    assert one.time([site]) == one.time([site])
    assert bench.timed == 1


def test_a_damaged_file_is_timed_again_and_replaced(bench: Bench, tmp_path: Path) -> None:
    site = contest(way("a"))
    watch(tmp_path).time([site])
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert not watch(tmp_path).time([site])[site].cached
    assert watch(tmp_path).time([site])[site].cached
    assert bench.timed == 2


def test_a_folder_that_cannot_be_written_is_no_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        watch(tmp_path / "file").time([contest(way("a"))])
    assert bench.timed == 2


def test_another_site_machine_source_or_option_is_timed_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(site: Contest = contest(way("a")), **options: Any) -> int:  # noqa: B008
        before = bench.timed
        watch(tmp_path, **options).time([site])
        return bench.timed - before

    assert [timed(), timed()] == [1, 0]
    assert timed(contest(way("a"), frozen=False)) == 1
    assert timed(contest(way("b"))) == 1
    assert timed(max_autotune=True) == 1
    changes = {
        "source_digest": lambda salt: f"other sources {salt}",
        "processor": lambda: "another CPU",
    }
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(stopwatch, name, change)
            assert [timed(), timed()] == [1, 0]
    for place, name, value in (
        (torch, "get_num_threads", 64),
        (torch.backends.cpu, "get_cpu_capability", "NONE"),
        (torch, "__version__", "2.99.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value if name == "__version__" else lambda v=value: v)
            patch.setattr(torch, "set_num_threads", lambda count: None)
            assert [timed(), timed()] == [1, 0], name
    assert timed() == 0


def test_the_name_of_a_stopwatch_is_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is part of the cache key of the graphs that it chose for."""
    monkeypatch.setattr(stopwatch, "processor", lambda: "A CPU")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert repr(watch(None, b=1, a=2)) == "Stopwatch(A CPU, AVX2, 3 threads; a=2, b=1)"


@pytest.mark.slow
def test_another_process_finds_the_same_key() -> None:
    program = """
import padst_compiler
from padst_compiler.contest import Contest
from tests.test_stopwatch import contest, watch, way
print(watch(None)._key(contest(way("a"))))
"""
    keys = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        environment["OMP_NUM_THREADS"] = "1"
        keys.add(
            subprocess.run(
                [sys.executable, "-c", program],
                cwd=ROOT,
                check=True,
                env=environment,
                capture_output=True,
                text=True,
            ).stdout
        )
    assert len(keys) == 1


# -- amid another compilation ----------------------------------------------------------------------


def test_what_surrounds_the_caller_does_not_reach_it(bench: Bench) -> None:
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = watch(None).time([contest(way("a"))])
    assert [set(measured.seconds) for measured in found.values()] == [{"a", "dense"}]
    assert bench.threads and threading.get_ident() not in bench.threads


def test_the_users_settings_reach_it_and_our_pass_does_not(bench: Bench) -> None:
    seen = []

    def run(x: Tensor, *rest: Any) -> Tensor:
        seen.append(torch._inductor.config.max_fusion_size)
        return DENSE.run(x, *rest)

    with torch._inductor.config.patch(max_fusion_size=7):
        watch(None, freezing=True).time([contest(way("a", run))])
    assert set(seen) == {7}
    for options in bench.options:
        assert options["freezing"] is True
        ours = options["joint_custom_pre_pass"]
        graph = fx.symbolic_trace(lambda x: x + 1).graph
        before = str(graph)
        ours(graph)
        assert str(graph) == before
        assert len({o["joint_custom_pre_pass"].uuid() for o in bench.options}) == 1


def test_an_error_of_ours_comes_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(stopwatch, "_times", fail)
    with pytest.raises(KeyError, match="a bug"):
        watch(None).time([contest(way("a"))])


def test_how_much_is_to_do_is_said(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    sites = [contest(way("a"), way("b")), contest(way("a"), tokens=3)]
    with caplog.at_level("DEBUG", "padst_compiler"):
        watch(None).time(sites)
    assert caplog.messages[0] == "timing 5 formulations of 2 sites"
    assert caplog.messages == ["timing 5 formulations of 2 sites"]


# -- for real --------------------------------------------------------------------------------------


def test_hot_and_cold_rounds_are_paired() -> None:
    log: list[str] = []
    live = torch.ones(3)
    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    times = stopwatch._times(calls, [live], "cpu")
    assert set(times) == {"a", "b"}
    assert {len(time.rounds) for time in times.values()} == {9}
    assert log[-18:] == ["a", "b"] * 9  # the cold ones, in turn
    assert live.tolist() == [1.0] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "frozen"), [(LINEAR, True), (LINEAR, False), (LINEAR_DX, False), (LINEAR_DW, False)]
)
def test_inductor_compiles_them_and_they_are_right(ops: Any, frozen: bool) -> None:
    install()
    op, shape = ops["block"], Shape(24, 16)
    geometry = Geometry(Block(8), shape, 1, 9, torch.float32, "cpu", frozen)
    ways = tuple(way for way in CANDIDATES[op] if way.cost(geometry) is not None)
    site = Contest(op, geometry, ops is LINEAR, ways)
    found = watch(None, strict=True).time([site])[site]
    assert set(found.seconds) == {way.name for way in ways}
    assert all(seconds > 0.0 for seconds in found.seconds.values())


# -- settings --------------------------------------------------------------------------------------


def test_a_stopwatch_takes_the_place_of_timed_and_of_nothing_else() -> None:
    made = with_stopwatch(Settings(kernels="timed", verify="strict"), {"max_autotune": True})
    assert isinstance(made.kernels, Stopwatch)
    assert "max_autotune=True" in repr(made)
    assert replace(made, kernels="timed") == Settings(kernels="timed", verify="strict")
    for other in (Settings(), Settings(kernels="dense"), Settings(kernels="timed", codegen="off")):
        assert with_stopwatch(other, {}) is other


@pytest.mark.parametrize("whole", [True, False], ids=["captured", "not all captured"])
def test_a_gpu_times_replays_and_calls_after_a_sweep(
    monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    asked: list[tuple[str, bool, int]] = []

    def in_graphs(calls: Mapping[str, Any], *, say: Any) -> dict[str, Timing]:
        del say
        asked.append(("graphs", False, 0))
        return {name: Timing((1.0, 1.0)) for name in list(calls)[: None if whole else 1]}

    def on_gpu(
        calls: Mapping[str, Any], *, cold: bool = False, live: Sequence[Tensor] = ()
    ) -> dict[str, Timing]:
        asked.append(("events", cold, len(live)))
        return {name: Timing((3.0, 3.0)) for name in calls}

    monkeypatch.setattr(gpu_measure, "in_graphs", in_graphs)
    monkeypatch.setattr(gpu_measure, "on_gpu", on_gpu)
    live = [torch.zeros(1)]
    times = stopwatch._times({"a": int, "dense": int}, live, "cuda")
    assert {name: time.rounds for name, time in times.items()} == dict.fromkeys(
        ("a", "dense"), (2.0, 2.0) if whole else (3.0, 3.0)
    )
    hot = [] if whole else [("events", False, 0)]
    assert asked == [("graphs", False, 0), *hot, ("events", True, 1)]

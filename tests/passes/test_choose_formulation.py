import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from padst_compiler.compat import inductor_decompositions, trace_aten
from padst_compiler.contest import Contest, Measured
from padst_compiler.formulation import BYTE, Formulation, Geometry
from padst_compiler.kernels import CANDIDATES, PORTABLE
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.passes.choose_formulation import ChooseFormulation
from padst_compiler.rewrite import Facts
from padst_compiler.structures import (
    NM,
    STRUCTURES,
    Block,
    Diagonal,
    FanIn,
    Shape,
    Structure,
    Unstructured,
    unit_of,
)

Rewrite = Callable[..., Any]
ALL = (Block(8), NM(8), Diagonal(), FanIn(), Unstructured())
FORMS = (*ALL, Block(8, 4), Block(4, 8, balanced=False), Diagonal(band=4), Diagonal(modulus=8))
I, O = 16, 24  # noqa: E741


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stored(structure: Structure) -> dict[str, Any]:
    indices = structure.select(x(O, I), structure.kept(Shape(O, I), 0.5))
    return {"values": structure.pack(x(O, I), indices), "indices": indices}


def call(structure: Structure) -> Callable[..., Tensor]:
    def run(x: Tensor, values: Tensor, indices: Tensor, bias: Any = None) -> Tensor:
        y: Tensor = LINEAR[structure.name](x, values, indices, bias, O)
        return y

    return run


@pytest.mark.parametrize("structure", FORMS, ids=str)
@pytest.mark.parametrize("prefer", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("shape", [(I,), (9, I), (2, 5, I)])
def test_every_operator_is_replaced_and_computes_the_same(
    rewrite: Rewrite, structure: Structure, prefer: str, shape: tuple[int, ...]
) -> None:
    choose = ChooseFormulation(CANDIDATES, prefer=prefer)
    for bias in ({}, {"bias": x(O)}):
        result = rewrite(choose, call(structure), x(*shape), **stored(structure), **bias)
        assert result.before == [f"{structure.name}_linear"]
        assert not any(name.endswith("_linear") for name in result.after)
        assert (len(result.fired), result.where) == (1, ["indices"])


@pytest.mark.parametrize("structure", FORMS, ids=str)
@pytest.mark.parametrize("prefer", ["dense", "sparse"])
def test_the_backward_operators_are_replaced_too(
    rewrite: Rewrite, structure: Structure, prefer: str
) -> None:
    def run(x: Tensor, grad: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        dx = LINEAR_DX[structure.name](grad, values, indices, I)
        return dx, LINEAR_DW[structure.name](grad, x, indices, unit_of(values, indices))

    given = stored(structure)
    choose = ChooseFormulation(CANDIDATES, prefer=prefer)
    result = rewrite(choose, run, x(2, 5, I), x(2, 5, O), *given.values())
    assert sorted(result.before) == [f"{structure.name}_linear_dw", f"{structure.name}_linear_dx"]
    assert not any("linear" in name for name in result.after)
    assert len(result.fired) == 2


@pytest.mark.parametrize("structure", FORMS, ids=str)
@pytest.mark.parametrize("candidates", [CANDIDATES, PORTABLE], ids=["own", "portable"])
def test_dense_where_it_is_asked_for(
    rewrite: Rewrite, structure: Structure, candidates: Any
) -> None:
    choose = ChooseFormulation(candidates, prefer="dense")
    result = rewrite(choose, call(structure), x(9, I), bias=x(O), **stored(structure))
    assert result.fired == ["dense: dense was asked for"]
    assert result.after == ["addmm"]


def test_dense_where_nothing_else_applies(rewrite: Rewrite) -> None:
    for prefer in ("auto", "sparse"):
        choose = ChooseFormulation(CANDIDATES, prefer=prefer)
        result = rewrite(choose, call(Unstructured()), x(9, I), **stored(Unstructured()))
        assert result.fired == ["dense: no sparse formulation of unstructured applies here"]


def test_the_frozen_weight_is_made_outside_the_way_of_the_input(rewrite: Rewrite) -> None:
    choose = ChooseFormulation(CANDIDATES, prefer="dense")
    result = rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn()))
    assert result.after == ["mm"]


# -- the choice ------------------------------------------------------------------------------------


def offered(*costs: float | None, seen: list[Geometry] | None = None) -> dict[Any, Any]:
    """Return candidates of fan_in_linear that cost what is asked; the last is dense."""
    run = CANDIDATES[LINEAR["fan_in"]][-1].run

    def cost(value: float | None) -> Callable[[Geometry], float | None]:
        def answer(geometry: Geometry) -> float | None:
            if seen is not None:
                seen.append(geometry)
            return value

        return answer

    names = [*(f"sparse{i}" for i in range(len(costs) - 1)), "dense"]
    ways = [Formulation(n, run, cost(c)) for n, c in zip(names, costs, strict=True)]
    return {LINEAR["fan_in"]: ways}


@pytest.mark.parametrize(
    ("costs", "prefer", "said"),
    [
        ((79.0, 100.0), "auto", "sparse0: predicted 1.3x dense"),
        ((81.0, 100.0), "auto", "dense: sparse0 is predicted at 1.23x dense"),  # within the margin
        ((120.0, 100.0), "auto", "dense: sparse0 is predicted at 0.83x dense"),
        ((120.0, 50.0, 100.0), "auto", "sparse1: predicted 2.0x dense"),
        ((None, 50.0, 100.0), "auto", "sparse1: predicted 2.0x dense"),
        ((None, 100.0), "auto", "dense: no sparse formulation of fan_in applies here"),
        ((100.0,), "auto", "dense: no sparse formulation of fan_in applies here"),
        ((200.0, 100.0), "sparse", "sparse0: sparse was asked for; predicted 0.5x dense"),
        ((1.0, 100.0), "dense", "dense: dense was asked for"),
    ],
)
def test_the_cheapest_is_taken_and_dense_within_the_margin(
    rewrite: Rewrite, costs: tuple[float | None, ...], prefer: str, said: str
) -> None:
    choose = ChooseFormulation(offered(*costs), prefer=prefer)
    assert rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn())).fired == [said]


# -- timed -----------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A clock that tells what it was told."""

    seconds: dict[str, float]
    low: dict[str, float] = field(default_factory=dict)
    cached: bool = False
    asked: list[Contest] = field(default_factory=list)

    def time(self, contests: Sequence[Contest]) -> dict[Contest, Measured]:
        self.asked += contests
        faster = {n: self.seconds["dense"] / t for n, t in self.seconds.items() if n != "dense"}
        found = Measured(self.seconds, faster | self.low, {}, self.cached)
        return {contest: found for contest in contests if len(contest.ways) > 1}


@pytest.mark.parametrize(
    ("clock", "said"),
    [
        (  # whatever was predicted, and without a margin
            Clock({"sparse0": 1.9e-3, "sparse1": 3e-3, "dense": 2e-3}),
            "sparse0: timed 1.05x dense (1.900 against 2.000 ms)",
        ),
        (
            Clock({"sparse0": 1.9e-3, "sparse1": 1e-3, "dense": 2e-3}, cached=True),
            "sparse1: timed 2.0x dense (1.000 against 2.000 ms), cached",
        ),
        (
            Clock({"sparse0": 4e-3, "sparse1": 2.5e-3, "dense": 2e-3}),
            "dense: sparse1 is timed 0.80x dense (2.500 against 2.000 ms)",
        ),
        (  # a tie
            Clock({"sparse0": 2e-3, "sparse1": 2.5e-3, "dense": 2e-3}),
            "dense: sparse0 is timed 1.00x dense (2.000 against 2.000 ms)",
        ),
        (  # faster by the medians, and slower in too many rounds
            Clock({"sparse0": 1e-3, "sparse1": 3e-3, "dense": 2e-3}, {"sparse0": 0.9}),
            "dense: sparse0 is timed 2.0x dense (1.000 against 2.000 ms), within the noise",
        ),
        (  # the fastest one is not sure, the next one is
            Clock({"sparse0": 1e-3, "sparse1": 1.5e-3, "dense": 2e-3}, {"sparse0": 0.9}),
            "sparse1: timed 1.33x dense (1.500 against 2.000 ms)",
        ),
        (  # one was dropped
            Clock({"sparse1": 1e-3, "dense": 2e-3}),
            "sparse1: timed 2.0x dense (1.000 against 2.000 ms)",
        ),
        (Clock({"dense": 2e-3}), "dense: nothing else was seen to run right"),
    ],
)
def test_the_fastest_is_taken_and_dense_where_nothing_is_surely_faster(
    rewrite: Rewrite, clock: Clock, said: str
) -> None:
    choose = ChooseFormulation(offered(500.0, 50.0, 100.0), prefer=clock)
    assert rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn())).fired == [said]


def test_dense_where_dense_itself_was_dropped(rewrite: Rewrite) -> None:
    class Broken(Clock):
        def time(self, contests: Sequence[Contest]) -> dict[Contest, Measured]:
            return {contest: Measured({}, {}) for contest in contests}

    choose = ChooseFormulation(offered(50.0, 100.0), prefer=Broken({}))
    said = rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn())).fired
    assert said == ["dense: nothing else was seen to run right"]


def test_what_the_clock_leaves_out_is_predicted(rewrite: Rewrite) -> None:
    class Stopped(Clock):
        def time(self, contests: Sequence[Contest]) -> dict[Contest, Measured]:
            return {}

    for costs, said in (
        ((79.0, 100.0), "sparse0: predicted 1.3x dense"),
        ((81.0, 100.0), "dense: sparse0 is predicted at 1.23x dense"),
        ((100.0,), "dense: no sparse formulation of fan_in applies here"),
    ):
        choose = ChooseFormulation(offered(*costs), prefer=Stopped({}))
        assert rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn())).fired == [said]


def test_the_clock_is_asked_once_for_all_sites_with_what_applies(rewrite: Rewrite) -> None:
    given = stored(FanIn())

    def run(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = call(FanIn())(x, values, indices, bias)
        return y, call(FanIn())(x, values, indices), LINEAR_DX["fan_in"](y, values, indices, I)

    candidates = offered(None, 50.0, 100.0) | {LINEAR_DX["fan_in"]: CANDIDATES[LINEAR_DX["fan_in"]]}
    clock = Clock({"sparse1": 1.0, "dense": 2.0})
    rewrite(ChooseFormulation(candidates, prefer=clock), run, x(9, I), bias=x(O), **given)
    assert [(str(c), c.bias, [w.name for w in c.ways]) for c in clock.asked] == [
        (f"fan_in_linear {O}x{I}, 9 tokens", True, ["sparse1", "dense"]),
        (f"fan_in_linear {O}x{I}, 9 tokens", False, ["sparse1", "dense"]),
        (f"fan_in_linear_dx {O}x{I}, 9 tokens", False, ["dense"]),
    ]
    assert all(c.geometry.frozen for c in clock.asked)


@pytest.mark.parametrize("structure", FORMS, ids=str)
def test_a_contest_has_arguments_like_the_sites(rewrite: Rewrite, structure: Structure) -> None:
    """The geometry that a pass reads off a graph suffices to make the operator's arguments."""
    given = stored(structure)
    clock = Clock({"dense": 1.0})

    def run(x: Tensor, grad: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        dw = LINEAR_DW[structure.name](grad, x, indices, unit_of(values, indices))
        return call(structure)(x, values, indices), dw

    rewrite(ChooseFormulation(CANDIDATES, prefer=clock), run, x(9, I), x(9, O), **given)
    dw, linear = (contest.arguments() for contest in clock.asked)
    assert [t.shape for t in linear[1:3]] == [t.shape for t in given.values()]
    assert dw[2].shape == given["indices"].shape
    assert dw[3] == list(unit_of(*given.values()))


# -- memory format ---------------------------------------------------------------------------------

FREE = {"between": lambda h: torch.nn.functional.gelu(h) * 2.0, "saves": True}
USED = {"between": lambda h: h + h.sum(-1, keepdim=True), "saves": False}  # no pointwise way


@pytest.mark.parametrize("between", [FREE, USED], ids=["pointwise", "reduction"])
@pytest.mark.parametrize("margin", [0.9, 1.1])
@pytest.mark.parametrize("timed", [False, True])
def test_sites_stay_feature_major_together_where_that_costs_least(
    rewrite: Rewrite, between: dict[str, Any], margin: float, timed: bool
) -> None:
    width, tokens = 16, 9
    saved = 2.0 * BYTE * tokens * width * 8
    # Alone each site is cheaper token-major, by half of ``margin`` times what the pair would save.
    fm, tm = 1e9 + 0.5 * margin * saved, 1e9
    way = CANDIDATES[LINEAR["fan_in"]][-1].run
    known = {
        LINEAR["fan_in"]: [
            Formulation("features", way, lambda _: 1e8 if timed else fm, feature_major=True),
            Formulation("tokens", way, lambda _: 3e8 if timed else tm),
            Formulation("dense", way, lambda _: 4e9),
        ]
    }

    def two(x: Tensor, **given: Tensor) -> Tensor:
        h = LINEAR["fan_in"](x, given["v0"], given["i0"], None, width)
        y: Tensor = LINEAR["fan_in"](between["between"](h), given["v1"], given["i1"], None, width)
        return y

    structure = FanIn()
    given: dict[str, Tensor] = {}
    for at in "01":
        indices = structure.select(x(width, width), structure.kept(Shape(width, width), 0.5))
        given |= {f"i{at}": indices, f"v{at}": structure.pack(x(width, width), indices)}
    # A timing counts by its ratio to dense: what is predicted does not matter, but dense's cost.
    clock = Clock({"features": fm / 4e9, "tokens": tm / 4e9, "dense": 1.0})
    choose = ChooseFormulation(known, prefer=clock if timed else "auto")
    said = rewrite(choose, two, x(tokens, width), **given).fired
    said = [re.sub(r" \(.* ms\)", "", line).replace("timed", "predicted") for line in said]
    together = "features: predicted 4.0x dense, x^T kept between sites"
    alone = "tokens: predicted 4.0x dense"
    assert said == [together if between["saves"] and margin < 1.0 else alone] * 2


@pytest.mark.parametrize("prefer", ["auto", "sparse"])
def test_what_does_not_apply_is_never_taken_however_large_the_costs(
    rewrite: Rewrite, prefer: str
) -> None:
    choose = ChooseFormulation(offered(None, 1e18, 4e18), prefer=prefer)
    said = rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn())).fired
    assert [line.split(":")[0] for line in said] == ["sparse1"]
    choose = ChooseFormulation(offered(None, 4e18, 1e18), prefer="auto")
    said = rewrite(choose, call(FanIn()), x(9, I), **stored(FanIn())).fired
    assert said == ["dense: sparse1 is predicted at 0.25x dense"]


def test_an_operator_without_candidates_stays(rewrite: Rewrite) -> None:
    result = rewrite(ChooseFormulation(offered(1.0)), call(NM(8)), x(9, I), **stored(NM(8)))
    assert result.after == ["nm_linear"]
    assert result.fired == []


def test_costs_see_tokens_type_place_and_whether_weights_are_frozen(rewrite: Rewrite) -> None:
    seen: list[Geometry] = []
    choose = ChooseFormulation(offered(1.0, seen=seen))
    given = stored(FanIn())
    rewrite(choose, call(FanIn()), x(2, 5, I), **given)
    rewrite(choose, call(FanIn()), x(I), *given.values())
    rewrite(choose, call(FanIn()), x(7, I), dynamic=True, **given)
    halves = {"values": given["values"].bfloat16(), "indices": given["indices"]}
    rewrite(choose, call(FanIn()), x(2, I).bfloat16(), **halves)
    kept = given["indices"].shape[1]
    assert {(g.shape, g.kept, g.device) for g in seen} == {(Shape(O, I), kept, "cpu")}
    assert [g.tokens for g in seen] == [10, 1, 7, 2]
    assert [g.dtype for g in seen] == [torch.float64] * 3 + [torch.bfloat16]
    assert [g.frozen for g in seen] == [True, False, True, True]


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.name)
def test_a_replacement_has_the_strides_that_the_graph_was_traced_with(
    rewrite: Rewrite, structure: Structure
) -> None:
    def run(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return call(structure)(x, values, indices).view(2, -1)  # valid: the operator is contiguous

    for size in (16, 40):
        choose = ChooseFormulation(CANDIDATES, prefer="sparse")
        given = {
            name: t.float() if t.is_floating_point() else t for name, t in stored(structure).items()
        }
        result = rewrite(choose, run, torch.randn(2, size, I), **given)
        view = result.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)[-1]
        assert view.args[0].meta["val"].is_contiguous()


@pytest.mark.parametrize("kind", STRUCTURES, ids=lambda k: k.name)
def test_a_joint_graph_gets_operators_that_it_may_still_hold(kind: type[Structure]) -> None:
    structure = next(s for s in ALL if isinstance(s, kind))
    table = inductor_decompositions()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (x(9, I), *stored(structure).values())]
    traced = trace_aten(lambda x, v, i: call(structure)(x, v, i), fakes, table=table)
    for prefer in ("dense", "sparse"):
        lowered = copy.deepcopy(traced)
        ChooseFormulation(CANDIDATES, prefer=prefer)(lowered.graph, Facts(table=table))
        lowered.recompile()
        again = trace_aten(lowered, fakes, table=table)
        assert targets(again.graph) == targets(lowered.graph)  # nothing is left to decompose


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_the_cache_key_of_the_pass_names_the_preference() -> None:
    keys = {repr(ChooseFormulation(CANDIDATES, prefer=p)) for p in ("auto", "dense", "sparse")}
    keys.add(repr(ChooseFormulation(CANDIDATES, prefer=Clock({}))))
    assert len(keys) == 4
    assert not any("0x" in key for key in keys)  # no address: the key must be the same tomorrow

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.torch_version import TorchVersion

import padst_compiler.ops  # noqa: F401  (torch.ops.padst)
from padst_compiler import compat

ATEN = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent


def calls(module: fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def fake(*shapes: tuple[int, ...], dynamic: bool = False) -> list[Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    return [mode.from_tensor(torch.randn(*s), static_shapes=not dynamic) for s in shapes]


# -- trace_aten ------------------------------------------------------------------------------------


def test_a_trace_is_aten_and_carries_values() -> None:
    module = compat.trace_aten(nn.functional.linear, fake((2, 3), (4, 3)))
    assert calls(module) == [ATEN.t.default, ATEN.mm.default]
    assert [tuple(n.meta["val"].shape) for n in module.graph.nodes if "val" in n.meta] == [
        (2, 3),
        (4, 3),
        (3, 4),
        (2, 4),
    ]


def test_our_operators_stay_whole() -> None:
    def run(x: Tensor, p: Tensor) -> Tensor:
        y: Tensor = torch.ops.padst.permute(x, p)
        return y.relu()

    mode = FakeTensorMode()
    fakes = [mode.from_tensor(torch.ones(2, 3)), mode.from_tensor(torch.arange(3))]
    assert calls(compat.trace_aten(run, fakes)) == [
        torch.ops.padst.permute.default,
        ATEN.relu.default,
    ]


def test_a_trace_keeps_symbolic_sizes() -> None:
    for functional in (False, True):
        fakes = fake((5, 3), dynamic=True)
        module = compat.trace_aten(
            lambda x: x.reshape(-1, 1, x.shape[1]).exp(), fakes, functional=functional
        )
        result = module.graph.output_node().args[0]
        assert isinstance(result, fx.Node)
        assert isinstance(result.meta["val"].shape[0], torch.SymInt)
        assert fakes[0].fake_mode.shape_env.guards == []


def test_symbolic_integers_and_constants_are_inputs_too() -> None:
    (x,) = fake((5, 3), dynamic=True)
    module = compat.trace_aten(lambda n, x, k, none: x.view(n, -1) * k, [x.shape[0], x, 2, None])
    assert len(module.graph.find_nodes(op="placeholder")) == 4
    torch.testing.assert_close(module(5, torch.ones(5, 3), 2, None), torch.full((5, 3), 2.0))


def test_a_mutation_of_an_input_becomes_a_copy_at_the_end() -> None:
    def count(x: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        y = x.clone().mul_(seen)
        seen[0] = 5.0
        return y

    module = compat.trace_aten(count, fake((3,), (3,)), functional=True)
    mutable = [t for t in calls(module) if t._schema.is_mutable]
    assert mutable == [ATEN.copy_.default]
    copy = module.graph.find_nodes(op="call_function", target=ATEN.copy_.default)[0]
    assert copy.args[0] is list(module.graph.nodes)[1]
    seen = torch.zeros(3)
    assert module(torch.ones(3), seen).tolist() == [1.0] * 3
    assert seen.tolist() == [5.0, 1.0, 1.0]


def test_without_mutation_a_functional_trace_has_no_copy() -> None:
    module = compat.trace_aten(lambda x: x.clone().relu_(), fake((3,)), functional=True)
    assert ATEN.relu_.default not in calls(module)
    assert ATEN.copy_.default not in calls(module)


def test_an_input_that_changes_its_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="input 0 changes its shape or strides in place"):
        compat.trace_aten(lambda x: x.t_().exp(), fake((3, 2)), functional=True)


def test_several_results_none_and_an_input_come_through() -> None:
    module = compat.trace_aten(
        lambda x: (x, None, {"y": x.exp()}, x[0]), fake((3,)), functional=True
    )
    x = torch.ones(3)
    result = module(x)
    assert result[0] is x
    assert result[1] is None
    torch.testing.assert_close(result[2]["y"], x.exp())


def test_real_constants_are_allowed_and_the_mode_is_left_as_it_was() -> None:
    constant, fakes = torch.ones(3), fake((3,))
    before = fakes[0].fake_mode.allow_non_fake_inputs
    module = compat.trace_aten(lambda x: x + constant, fakes)
    assert module(torch.ones(3)).tolist() == [2.0] * 3
    assert fakes[0].fake_mode.allow_non_fake_inputs is before


def test_no_gradients_are_traced_and_the_callers_mode_is_left() -> None:
    seen: set[bool] = set()

    def run(x: Tensor) -> Tensor:
        seen.add(torch.is_grad_enabled())
        return x.exp()

    compat.trace_aten(run, fake((3,)))
    assert seen == {False}
    assert torch.is_grad_enabled()


def test_a_table_decomposes() -> None:
    table = compat.inductor_decompositions()
    (x,) = fake((3,))
    silu = torch.ops.aten.silu
    assert calls(compat.trace_aten(lambda x: silu(x), [x])) == [ATEN.silu.default]
    decomposed = calls(compat.trace_aten(lambda x: silu(x), [x], table=table))
    assert decomposed
    assert ATEN.silu.default not in decomposed


# -- what Dynamo passes ----------------------------------------------------------------------------


def dynamo_inputs(model: nn.Module, *inputs: Tensor) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []

    def record(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        holders = module.graph.find_nodes(op="placeholder")
        found.extend(
            (compat.source_name(h), compat.is_module_state(e))
            for h, e in zip(holders, examples, strict=True)
        )
        return module.forward

    torch.compile(model, backend=record)(*inputs)
    return found


def test_parameters_and_buffers_are_told_from_inputs_and_have_a_name() -> None:
    found = dict(dynamo_inputs(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.ones(2, 3)))
    state = {name for name, is_state in found.items() if is_state}
    assert len(found) - len(state) == 1
    assert any("_modules['0']" in name and "weight" in name for name in state)
    assert any("_modules['1']" in name and "running_mean" in name for name in state)


def test_ordinary_values_are_no_module_state() -> None:
    assert not compat.is_module_state(torch.ones(3))
    assert not compat.is_module_state(3)
    graph = fx.Graph()
    assert compat.source_name(graph.placeholder("x")) == ""


def test_a_size_is_its_hint() -> None:
    (x,) = fake((5, 3), dynamic=True)
    assert compat.size_hint(7) == 7
    assert compat.size_hint(x.shape[0]) == 5
    assert compat.size_hint(2 * x.shape[0]) == 10
    assert x.fake_mode.shape_env.guards == []


def test_a_size_that_nobody_knows_gets_a_guess() -> None:
    assert compat.size_hint(ShapeEnv().create_unbacked_symint()) == 1024


def test_a_parameter_is_owned_by_its_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3)))
    owners: list[str] = []

    def record(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        owners.extend(map(compat.owner_name, module.graph.find_nodes(op="placeholder")))
        return module.forward

    torch.compile(model, backend=record)(torch.ones(2, 3))
    assert set(owners) == {"", "0", "1.0"}
    assert compat.owner_name(fx.Graph().placeholder("x")) == ""


# -- Inductor --------------------------------------------------------------------------------------


def test_modes_are_inductors() -> None:
    assert compat.mode_options(None) == compat.mode_options("default") == {}
    for mode, expected in torch._inductor.list_mode_options().items():
        assert compat.mode_options(mode) == expected
    assert compat.mode_options("max-autotune-no-cudagraphs")["max_autotune"] is True
    with pytest.raises(ValueError, match=r"Expected a mode of \[.*\]\. Got 'fast'"):
        compat.mode_options("fast")


def test_modes_are_copied() -> None:
    compat.mode_options("max-autotune").clear()
    assert compat.mode_options("max-autotune")


def test_option_names_are_inductors() -> None:
    names = compat.inductor_option_names()
    assert {"max_autotune", "epilogue_fusion", "cpp.threads", "triton.cudagraphs"} <= names
    assert names >= {name.replace("-", "_") for name in torch._inductor.list_options()}


def test_the_cache_is_where_inductor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    assert compat.inductor_cache() == tmp_path / "new"
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        compat.inductor_cache()


def test_reset_works_without_a_gpu() -> None:
    compat.reset_inductor()


class Pass(compat.CustomGraphPass):
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def __call__(self, graph: fx.Graph) -> None:
        self.log.append(self.name)

    def uuid(self) -> str:
        return f"id of {self.name}"


@pytest.fixture
def joint_pass() -> Iterator[Callable[[Any], None]]:
    before = config.joint_custom_pre_pass
    yield lambda value: setattr(config, "joint_custom_pre_pass", value)
    config.joint_custom_pre_pass = before


def test_a_graph_compiles_and_our_pass_runs() -> None:
    log: list[str] = []
    module = fx.symbolic_trace(nn.ReLU())
    options = {"joint_custom_pre_pass": compat.composed(Pass(log, "ours"))}
    compiled = compat.compile_with_inductor(module, [torch.ones(3)], options)
    assert compiled(-torch.ones(3)).tolist() == [0.0] * 3
    assert log == ["ours"]
    assert config.joint_custom_pre_pass is None


def test_the_users_own_joint_pass_runs_too(joint_pass: Callable[[Any], None]) -> None:
    log: list[str] = []
    joint_pass(Pass(log, "theirs"))
    both = compat.composed(Pass(log, "ours"))
    module = fx.symbolic_trace(nn.Sigmoid())
    compat.compile_with_inductor(module, [torch.ones(3)], {"joint_custom_pre_pass": both})
    assert log == ["theirs", "ours"]
    assert both.uuid() == ("id of theirs", "id of ours")


def test_alone_our_pass_stays_itself() -> None:
    ours = Pass([], "ours")
    assert compat.composed(ours) is ours


def test_a_pass_without_an_identity_is_not_cached(joint_pass: Callable[[Any], None]) -> None:
    log: list[str] = []
    joint_pass(lambda graph: log.append("theirs"))
    both = compat.composed(Pass(log, "ours"))
    assert both.uuid() is None
    both(fx.Graph())
    assert log == ["theirs", "ours"]


def test_a_list_of_passes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Configured:
        joint_custom_pre_pass = (Pass(log, "one"), Pass(log, "two"))

    monkeypatch.setattr(torch._inductor, "config", Configured)
    both = compat.composed(Pass(log, "ours"))
    both(fx.Graph())
    assert log == ["one", "two", "ours"]
    assert both.uuid() == ("id of one", "id of two", "id of ours")


def test_forced_strides_are_those_asked_for() -> None:
    x = torch.randn(3, 8)
    y = compat.force_strides()(x, [1, 3])
    assert y.stride() == (1, 3) and torch.equal(y, x)
    assert compat.force_strides()(x, [8, 1]) is not None and x.stride() == (8, 1)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "names"), [("2.11.0", {"loop_ordering_after_fusion"}), ("2.12.0", set())]
)
def test_inductor_is_told_what_its_release_needs_and_the_user_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, version: str, names: set[str]
) -> None:
    told: list[dict[str, Any]] = []

    def compile_fx(*given: Any, config_patches: dict[str, Any]) -> None:
        told.append(config_patches)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    module = compat.trace_aten(torch.relu, fake((2, 3)))
    compat.compile_with_inductor(module, [], {})
    compat.compile_with_inductor(module, [], {"loop_ordering_after_fusion": True})
    assert set(told[0]) == names <= compat.inductor_option_names()
    assert not any(told[0].values())
    assert told[1] == {"loop_ordering_after_fusion": True}

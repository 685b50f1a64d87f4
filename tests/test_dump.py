import builtins
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import padst_compiler as padst
from padst_compiler.backend import padst as backend
from padst_compiler.dump import dumped, listing
from padst_compiler.rewrite import Facts, PassError, Refusal, Report, Rule, run_pipeline


@dataclass(frozen=True)
class Named:
    name: str = "named"
    fails: bool = False

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        for node in graph.find_nodes(op="call_method", target="relu"):
            node.target = "exp"
            if self.fails:
                raise KeyError("half way")
        return Report(self.name, (Rule("fc1", "a fold"),), (Refusal("fc2", "a reason"),))


def graph() -> fx.Graph:
    return fx.symbolic_trace(lambda x: x.relu()).graph


def test_every_pass_gets_a_numbered_file_with_its_report_and_both_graphs(tmp_path: Path) -> None:
    steps = dumped((Named("one"), Named("two")), tmp_path / "deep" / "er")
    reports = run_pipeline(steps, graph(), Facts())
    assert [r.name for r in reports] == ["one", "two"]
    home = tmp_path / "deep" / "er" / "graph_000"
    assert sorted(p.name for p in home.glob("*.txt")) == ["01_one.txt", "02_two.txt"]
    said, before, after = (home / "01_one.txt").read_text().split("\n\n")
    assert said == "fired at fc1: a fold\nleft at fc2: a reason"
    assert "relu = relu(x)" in before and "relu = exp(x)" in after
    assert (home / "02_two.txt").read_text().count("relu = exp(x)") == 2


def test_without_a_path_passes_stay_as_they_are() -> None:
    steps = (Named("one"), Named("two"))
    assert dumped(steps, None) == steps


def test_every_graph_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    steps = dumped((Named(),), tmp_path)
    for _ in range(2):
        run_pipeline(steps, graph(), Facts())
    run_pipeline(dumped((Named(),), tmp_path), graph(), Facts())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_000", "graph_001", "graph_002"]


def test_a_pass_that_fails_leaves_its_file_and_names_the_node(tmp_path: Path) -> None:
    with pytest.raises(
        PassError, match=r"Pass two failed \(after: none; at: %relu .*\): 'half way'"
    ):
        run_pipeline(dumped((Named("two", True), Named("one")), tmp_path), graph(), Facts())
    (path,) = tmp_path.rglob("*.txt")
    said, before, after = path.read_text().split("\n\n")
    assert said == "failed: KeyError: 'half way'"
    assert "relu(x)" in before and "exp(x)" in after


def test_shapes_dtypes_and_keywords_are_shown() -> None:
    module = fx.Graph()
    x = module.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, dtype=torch.bfloat16)
    module.output(module.call_function(torch.ops.aten.sum.dim_IntList, (x, [1]), {"keepdim": True}))
    assert listing(module).splitlines() == [
        "x: bfloat16[2, 3] = placeholder",
        "sum_dim_int_list = aten.sum.dim_IntList(x, [1], keepdim=True)",
        "return sum_dim_int_list",
    ]


def test_without_matplotlib_the_text_is_written_and_the_user_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **keywords)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.warns(UserWarning, match=r"no drawing .*padst-compiler\[plot\]") as said:
        run_pipeline(dumped((Named("one"), Named("two")), tmp_path), graph(), Facts())
    assert len(said) == 1
    assert len(list(tmp_path.rglob("*.txt"))) == 2


@pytest.mark.parametrize("grad", [False, True])
def test_the_compile_option_traces_inference_and_training(tmp_path: Path, grad: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    padst.sparsify(model, structure="block:4", sparsity=0.5, permutation="random")
    options: dict[str, Any] = {"codegen": "off", "trace": tmp_path}
    fast = torch.compile(model, backend=backend, options=options)
    with torch.set_grad_enabled(grad):
        fast(torch.randn(3, 16))
    names = [p.name for p in sorted((tmp_path / "graph_000").glob("*.txt"))]
    first = "drop_watch" if grad else "keep_strides"
    assert names[0] == f"01_{first}.txt" and names[-1].endswith("_invert_maps.txt")
    assert (tmp_path / "graph_000" / "after.png").exists()
    assert "padst.permute" in (tmp_path / "graph_000" / names[0]).read_text()

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.backend import export_onnx
from padst_compiler.export.onnx import OPSET, ExportReport, FoldedModule, write_onnx
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLinear, SparsePointwiseConv
from padst_compiler.permutation import FixedPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

ALL = (Block(8), Block(16), NM(8), Diagonal(), FanIn(), Unstructured())


def sparse(
    inputs: int, outputs: int, structure: Structure, side: str = "", module: Any = None
) -> Any:
    """Return a sparse layer with a random mask and, on ``side``, a random permutation."""
    shape, size = Shape(outputs, inputs), inputs if side == "input" else outputs
    table = FixedPermutation(IndexMap.of(torch.randperm(size))) if side else None
    indices = structure.select(torch.rand(outputs, inputs), structure.kept(shape, 0.75))
    kind = SparseLinear if module is None else SparsePointwiseConv
    dense = nn.Linear(inputs, outputs) if module is None else module
    return kind.adopt(dense, structure, indices, table, side or "input")


def mlp(structure: Structure, one: str = "output", two: str = "input") -> nn.Sequential:
    return nn.Sequential(
        sparse(16, 32, structure, one), nn.GELU(), sparse(32, 16, structure, two), nn.Linear(16, 4)
    )


def agrees(path: Path, model: nn.Module, *inputs: Tensor) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    results = session.run(None, feed)
    with torch.no_grad():
        expected = model.eval()(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(results) == len(expected)
    for result, tensor in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(result), tensor, rtol=1e-4, atol=1e-5)


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure",
    [*ALL[:2], *(pytest.param(s, marks=pytest.mark.slow) for s in ALL[2:])],
    ids=lambda s: f"{s.name}{getattr(s, 'size', '')}",
)
def test_every_structure_in_standard_operators_at_any_batch(
    structure: Structure, tmp_path: Path
) -> None:
    model = nn.Sequential(mlp(structure), nn.Linear(4, 16), mlp(structure, "input", "output"))
    path = tmp_path / "m.onnx"
    report = export_onnx(model, torch.randn(2, 16), path)
    proto = onnx.load(str(path))
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert report.gathers == 0  # layers this small run dense, and absorb their maps
    for batch in (1, 2, 7):
        agrees(path, model, torch.randn(batch, 16))


def test_layers_without_permutations(tmp_path: Path) -> None:
    model = mlp(Block(8), "", "")
    assert export_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx").gathers == 0


def test_blocks_that_pay_run_as_gather_and_matmul(tmp_path: Path) -> None:
    model = nn.Sequential(narrow(512, 1024, Block(32), ""), nn.ReLU())
    report = export_onnx(model, torch.randn(64, 512), tmp_path / "m.onnx")
    assert report.gathers == 1
    agrees(tmp_path / "m.onnx", model, torch.randn(7, 512))


def narrow(inputs: int, outputs: int, structure: Structure, side: str) -> Any:
    """Return a layer that keeps one unit in every group."""
    shape, size = Shape(outputs, inputs), inputs if side == "input" else outputs
    table = FixedPermutation(IndexMap.of(torch.randperm(size))) if side else None
    indices = structure.select(torch.rand(outputs, inputs), structure.kept(shape, 0.99))
    dense = nn.Linear(inputs, outputs)
    return SparseLinear.adopt(dense, structure, indices, table, side or "input")


def test_a_dense_writer_takes_the_map_of_the_blocks_behind_it(tmp_path: Path) -> None:
    """One gather is the blocks' own; the permutation costs none."""
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), narrow(512, 1024, Block(32), "input"))
    report = export_onnx(model, torch.randn(64, 64), tmp_path / "m.onnx")
    assert report.gathers == 1
    agrees(tmp_path / "m.onnx", model, torch.randn(7, 64))


def test_a_map_that_cannot_move_stays_a_gather(tmp_path: Path) -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = narrow(512, 1024, Block(32), "input")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.blocks(x.roll(1, -1))
            return y

    model = Rolled()
    assert export_onnx(model, torch.randn(64, 512), tmp_path / "m.onnx").gathers == 2
    agrees(tmp_path / "m.onnx", model, torch.randn(7, 512))


@pytest.mark.parametrize("structure", [Block(8), NM(8)], ids=lambda s: s.name)
def test_an_input_with_tokens(structure: Structure, tmp_path: Path) -> None:
    model, path = mlp(structure), tmp_path / "m.onnx"
    export_onnx(model, torch.randn(1, 5, 16), path)
    for batch in (1, 2, 7):
        agrees(path, model, torch.randn(batch, 5, 16))


def test_convolutions(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        sparse(16, 16, Block(8), "input", nn.Conv2d(16, 16, 1)),
        nn.ReLU(),
        sparse(16, 16, FanIn(), "output", nn.Conv2d(16, 16, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    path = tmp_path / "m.onnx"
    export_onnx(model, torch.randn(2, 3, 6, 6), path)
    for batch in (1, 7):
        agrees(path, model, torch.randn(batch, 3, 6, 6))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = sparse(16, 8, FanIn(), "input"), sparse(8, 8, Block(8), "output")

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.a(x)) + self.b(y)
        return h, h.sum(-1)


def test_several_inputs_and_results(tmp_path: Path) -> None:
    model, path = TwoInputs(), tmp_path / "m.onnx"
    export_onnx(model, (torch.randn(3, 16), torch.randn(3, 8)), path)
    for batch in (1, 2, 7):
        agrees(path, model, torch.randn(batch, 16), torch.randn(batch, 8))


def test_integer_inputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(10, 16), sparse(16, 8, FanIn(), "input"))
    path = tmp_path / "m.onnx"
    export_onnx(model, torch.randint(0, 10, (2, 5)), path)
    agrees(path, model, torch.randint(0, 10, (7, 5)))


def test_a_fixed_batch_where_it_is_asked_for(tmp_path: Path) -> None:
    model, path = mlp(FanIn()), tmp_path / "m.onnx"
    report = export_onnx(model, torch.randn(3, 16), path, dynamic_batch=False)
    assert report.batches == (3,)
    shape = onnx.load(str(path)).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [3, 16]
    agrees(path, model, torch.randn(3, 16))


def test_the_report_tells_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export_onnx(mlp(FanIn()), torch.randn(2, 16), path)
    proto = onnx.load(str(path))
    assert report.path == path
    assert report.size == path.stat().st_size
    assert sum(report.nodes.values()) == len(proto.graph.node)
    assert (report.opset, report.ir_version) == (OPSET, proto.ir_version)
    assert set(report.batches) == {1, 2, 3}
    assert 0 <= report.difference < 1e-4
    assert list(tmp_path.iterdir()) == [path]  # no draft is left behind
    text = str(report)
    for words in (str(path), "MB", f"opset {OPSET}", f"IR {proto.ir_version}", "Gemm"):
        assert words in text
    assert ExportReport(path, {}, 1, 21, 10, 0.0, (1,)).gathers == 0


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(mlp(FanIn()), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx")
    assert [m.training for m in (model, model[0], model[1], model[2])] == [True, True, True, False]
    assert torch.is_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    agrees(tmp_path / "m.onnx", model, torch.randn(7, 16))  # written in eval mode


# -- what is refused -------------------------------------------------------------------------------


def test_a_soft_permutation_is_refused_by_name(tmp_path: Path) -> None:
    model = mlp(Block(8), "", "")
    model[0].permutation = SinkhornPermutation(16, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"Got soft ones in 0\. Call padst\.harden\(model\) first"):
        export_onnx(model.train(), torch.randn(2, 16), tmp_path / "m.onnx")
    assert model.training
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "inputs", [{"x": torch.ones(2, 16)}, (torch.ones(2, 16), 3)], ids=["k", "i"]
)
def test_inputs_that_are_no_tensors_are_refused(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected positional example tensors"):
        export_onnx(mlp(FanIn()), inputs, tmp_path / "m.onnx")


def test_inputs_on_another_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Got meta"):
        export_onnx(mlp(FanIn()), torch.ones(2, 16, device="meta"), tmp_path / "m.onnx")


def test_a_model_that_fixes_its_batch_is_refused_with_the_cure(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = sparse(16, 8, FanIn(), "input")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x) + torch.ones(3, 8)
            return y

    with pytest.raises(ValueError, match=r"(?s)any batch size.*dynamic_batch=False"):
        export_onnx(Fixed().train(), torch.randn(3, 16), tmp_path / "m.onnx")
    model = Fixed()
    export_onnx(model, torch.randn(3, 16), tmp_path / "m.onnx", dynamic_batch=False)
    agrees(tmp_path / "m.onnx", model, torch.randn(3, 16))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_cure(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    model = mlp(FanIn()).train()
    with pytest.raises(ImportError, match=r"Expected onnx.*pip install \"padst-compiler\[onnx\]\""):
        export_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx")
    assert model.training
    assert list(tmp_path.iterdir()) == []


# -- the check before the file appears -------------------------------------------------------------


def written(path: Path, reference: Callable[..., Any], **keywords: Any) -> ExportReport:
    """Write ``exp`` and say that it is ``reference``."""

    class Main(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x.exp(),)

    main = torch.fx.GraphModule(nn.Module(), torch.fx.symbolic_trace(Main()).graph)
    folded = FoldedModule(main, {}, 1)
    given = {"dynamic_batch": True, "tolerance": 1e-4, **keywords}
    return write_onnx(folded, reference, (torch.randn(2, 3),), path, **given)


def test_a_file_that_agrees_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    written(path, torch.exp)
    assert onnx.load(str(path)).graph.node[0].op_type == "Exp"


@pytest.mark.parametrize(
    "reference",
    [
        lambda x: x.exp() + 1e-2,
        lambda x: x.exp() * float("nan"),
        lambda x: x.exp() + (0.1 if x.shape[0] == 3 else 0.0),  # wrong at one batch size only
    ],
)
def test_a_file_that_disagrees_never_appears_and_the_old_one_stays(
    reference: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match=r"Expected onnxruntime to agree.*No file was written"):
        written(path, reference)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_another_number_or_shape_never_appear(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for reference in (lambda x: (x.exp(), x), lambda x: x.exp()[:, :1]):
        with pytest.raises((RuntimeError, ValueError)):
            written(path, reference)
    assert not path.exists()


def test_the_tolerance_is_the_callers(tmp_path: Path) -> None:
    written(tmp_path / "m.onnx", lambda x: x.exp() + 1e-2, tolerance=0.1)
    assert (tmp_path / "m.onnx").exists()


def test_a_reference_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fails(x: Tensor) -> Tensor:
        raise KeyError("no")

    with pytest.raises(KeyError):
        written(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_constants_are_bound_by_position() -> None:
    graph = torch.fx.symbolic_trace(lambda x, w, y: (x * w - y,))
    folded = FoldedModule(torch.fx.GraphModule(nn.Module(), graph.graph), {1: torch.tensor(3.0)}, 3)
    assert float(folded(torch.tensor(2.0), torch.tensor(1.0))) == 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(folded.state_dict()) == ["constant_1"]

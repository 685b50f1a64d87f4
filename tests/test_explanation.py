import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.explanation import Explanation, explain
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.permutation import FixedPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

ALL = (Block(8), NM(8), Diagonal(), FanIn(), Unstructured())
SPARSE = {"kernels": "sparse"}


def sparse(inputs: int, outputs: int, structure: Structure, side: str = "") -> SparseLayer:
    """Return a sparse layer with a random mask and, on ``side``, a random permutation."""
    shape, size = Shape(outputs, inputs), inputs if side == "input" else outputs
    table = FixedPermutation(IndexMap.of(torch.randperm(size))) if side else None
    indices = structure.select(torch.rand(outputs, inputs), structure.kept(shape, 0.75))
    return SparseLinear.adopt(
        nn.Linear(inputs, outputs), structure, indices, table, side or "input"
    )


class Mlp(nn.Module):
    def __init__(self, structure: Structure, sides: tuple[str, str] = ("output", "input")) -> None:
        super().__init__()
        self.fc1 = sparse(16, 32, structure, sides[0])
        self.fc2 = sparse(32, 16, structure, sides[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


X = torch.randn(9, 16)


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize("kernels", ["auto", "dense", "sparse"])
def test_every_site_is_listed_by_name_with_its_kernel(structure: Structure, kernels: str) -> None:
    report = explain(Mlp(structure).eval(), X, options={"kernels": kernels})
    assert [site for site, _, _ in report.kernels] == ["fc1", "fc2"]
    assert all(kernel and why for _, kernel, why in report.kernels)
    if kernels == "dense":
        assert {kernel for _, kernel, _ in report.kernels} == {"dense"}


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.name)
def test_every_row_names_the_permutation_that_it_is_about(structure: Structure) -> None:
    report = explain(Mlp(structure).eval(), X, options=SPARSE)
    assert report.passes
    said = {n for row in report.passes if row[0] != "fuse_mlp" for n in row[1].split(", ")}
    assert said <= {"fc1.permutation", "fc2.permutation"}
    assert {row[2] for row in report.passes} <= {"fired", "left"}


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.name)
def test_dense_kernels_leave_no_gather(structure: Structure) -> None:
    assert explain(Mlp(structure).eval(), X, options={"kernels": "dense"}).gathers == 0


@pytest.mark.parametrize(
    ("structure", "gathers"), [(Block(8), 1), (FanIn(), 0), (NM(8), 0)], ids=str
)
def test_what_sparse_kernels_leave(structure: Structure, gathers: int) -> None:
    """N:M rows absorb any map; blocks do not, but two maps around a GELU are one movement."""
    assert explain(Mlp(structure).eval(), X, options=SPARSE).gathers == gathers


def test_without_folding_every_permutation_is_a_gather() -> None:
    report = explain(Mlp(FanIn()).eval(), X, options={"fold": "off", "kernels": "sparse"})
    assert report.gathers == 2
    assert not [row for row in report.passes if row[2] == "fired"]


def test_every_graph_has_a_verdict() -> None:
    report = explain(Mlp(Block(8)).eval(), X)
    assert len(report.verdicts) == 1
    assert report.verdicts[0].startswith("verified in float64")
    off = explain(Mlp(Block(8)).eval(), X, options={"verify": False})
    assert off.verdicts == ("not verified: switched off",)


def test_the_report_prints_two_tables_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    report = explain(Mlp(Block(8)).eval(), X, options=SPARSE)
    text = str(report)
    assert repr(report) == text
    for words in ("pass", "site", "state", "why", "kernel", "fc1", "graph 0: verified"):
        assert words in text
    assert text.endswith("gathers that remain: 1")
    report.print()
    assert capsys.readouterr().out == text + "\n"


def test_an_empty_report_prints() -> None:
    assert str(Explanation((), (), ())).endswith("gathers that remain: 0")


def test_a_model_without_sparse_layers_has_an_empty_report() -> None:
    report = explain(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), X)
    assert (report.passes, report.kernels, report.gathers) == ((), (), 0)


def test_soft_permutations_are_reported_as_they_are() -> None:
    model = Mlp(Block(8), ("", ""))
    model.fc2.side = "input"
    model.fc2.permutation = SinkhornPermutation(32, torch.Generator().manual_seed(0))
    report = explain(model, X)
    assert [site for site, _, _ in report.kernels] == ["fc1", "fc2"]
    assert report.gathers == 0  # a soft permutation is a product


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}], ids=["one", "tuple", "list", "dict"])
def test_inputs_come_in_any_form(inputs: Any) -> None:
    assert len(explain(Mlp(FanIn()), inputs).kernels) == 2


def test_a_graph_break_gives_several_graphs() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = sparse(16, 16, FanIn(), "input"), sparse(16, 16, FanIn(), "input")

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            x = -x if float(x.sum()) > 0 else x
            y: Tensor = self.two(x)
            return y

    report = explain(Breaks(), X)
    assert len(report.verdicts) == 2
    assert len(report.kernels) == 2


def test_it_may_be_asked_again_and_again() -> None:
    model = Mlp(FanIn()).eval()
    assert [len(explain(model, X).kernels) for _ in range(12)] == [2] * 12


def test_asking_changes_nothing() -> None:
    model = nn.Sequential(Mlp(FanIn(), ("input", "output")), nn.Dropout(0.5)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explain(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.is_grad_enabled()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model(X).requires_grad


def test_unknown_options_and_wrong_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected an option of .*Got 'fould'"):
        explain(Mlp(FanIn()), X, options={"fould": "off"})
    with pytest.raises(ValueError, match="Got meta"):
        explain(Mlp(FanIn()), X.to("meta"))

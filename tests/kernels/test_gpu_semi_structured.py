"""N:M through cuSPARSELt, which is not here: a stand-in packs and multiplies as the library does.

``python -m tests.kernels.test_gpu_semi_structured`` prints the code that Inductor generates for an
H200 that is not there.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as CuSparseLt
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as two_of_four,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as laid_out,
)

import padst_compiler as padst
from padst_compiler.compat import trace_aten
from padst_compiler.contest import Contest, Measured
from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.frozen import Split, split
from padst_compiler.kernels import install
from padst_compiler.kernels.dense import dense
from padst_compiler.kernels.gpu_semi_structured import NM_FORM, PRODUCT, SIDE, WEIGHT, is_two_four
from padst_compiler.ops import LINEAR
from padst_compiler.passes.choose_formulation import ChooseFormulation
from padst_compiler.rewrite import Facts, Report
from padst_compiler.stopwatch import Stopwatch
from padst_compiler.structures import NM, Block, Shape
from padst_compiler.timings import Timings

from .fake_h200 import code_of, code_of_model, h200
from .stored import weights

THERE = "torch.backends.cusparselt.is_available"
SHAPE = Shape(64, 160)
LLAMA = Shape(11008, 4096)
FITTING = [NM(4, 2), NM(4, 1), NM(8, 1), NM(16, 2), NM(10, 1), NM(2, 1), NM(5, 1), NM(8, 2)]
OTHERS = [NM(8, 3), NM(8, 4), NM(10, 2), NM(16, 3), NM(6, 2)]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def compress(weight: Tensor, more: int = 0) -> Tensor:
    """Return what ``_cslt_compress`` does, in CUTLASS's order; the library may want ``more``."""
    assert weight.is_contiguous() and not any(size % SIDE for size in weight.shape)
    numbers, places = two_of_four(weight)
    packed = torch.cat([numbers.flatten(), places.flatten().view(weight.dtype)])
    return F.pad(packed, (0, more * weight.shape[0])).view(weight.shape[0], -1)


def multiply(packed: Tensor, right: Tensor, bias: Tensor | None, transpose_result: bool) -> Tensor:
    """Return what ``_cslt_sparse_mm`` does: sizes are read off, strides are not looked at."""
    rows, (inner, tokens) = packed.shape[0], right.shape
    assert not inner % SIDE and not tokens % 8 and tokens and not right.is_contiguous()
    right = right.as_strided((inner, tokens), (1, inner))
    numbers, places = packed.flatten()[: rows * inner * 9 // 16].split(rows * inner // 2)
    places = places[: rows * inner // 16].view(torch.int16)
    weight: Tensor = laid_out(numbers.view(rows, -1), places.view(rows, -1))
    y = weight.double() @ right.double()
    if bias is not None:
        assert bias.dtype is packed.dtype and bias.is_contiguous()
        y += bias.double()[:, None]
    assert transpose_result
    return y.t().contiguous().to(packed.dtype)


@pytest.fixture
def library() -> Iterator[mock.Mock]:
    compressing = mock.Mock(side_effect=compress)
    with (
        mock.patch.object(torch, "_cslt_compress", compressing),
        mock.patch.object(torch, "_cslt_sparse_mm", multiply),
    ):
        yield compressing


@pytest.fixture
def there() -> Iterator[None]:
    with mock.patch(THERE, lambda: True):
        yield


def layer(structure: NM, tokens: int = 4096, shape: Shape = LLAMA) -> Geometry:
    kept = structure.kept(shape, 0.5)
    return Geometry(structure, shape, kept, tokens, torch.bfloat16, "cuda", frozen=True)


# -- which patterns --------------------------------------------------------------------------------


def test_the_rule_is_what_the_worst_choice_of_places_needs() -> None:
    for m in range(1, 33):
        for n in range(1, m + 1):
            worst = 0
            for start in range(0, math.lcm(4, m), 4):
                groups = [place // m for place in range(start, start + 4)]
                worst = max(worst, sum(min(n, groups.count(group)) for group in {*groups}))
            assert is_two_four(n, m) is (worst <= 2 and m > 1), (n, m)


@pytest.mark.parametrize("structure", [*FITTING, NM(3, 1), *OTHERS], ids=str)
def test_packing_loses_nothing_of_the_patterns_that_fit_and_some_of_the_others(
    structure: NM,
) -> None:
    assert structure.n is not None
    _, _, weight = weights(structure, Shape(64, 32 * structure.m), torch.float16)
    again = laid_out(*two_of_four(weight.half())).double()
    assert torch.equal(again, weight) is is_two_four(structure.n, structure.m)


# -- the operators ---------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("sizes", [(1,), (8,), (21,), (0,), (2, 3), (3, 16), ()], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_any_number_of_tokens_and_leading_dimensions(
    library: mock.Mock, dtype: torch.dtype, sizes: tuple[int, ...], biased: bool
) -> None:
    values, indices, weight = weights(NM(4, 2), SHAPE, dtype)
    x = torch.randn(*sizes, SHAPE.in_features).to(dtype)
    bias = torch.randn(SHAPE.out_features).to(dtype) if biased else None
    y = NM_FORM.run(x, values, indices, bias, SHAPE.out_features)
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    assert y.dtype is dtype and y.is_contiguous()
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)
    library.assert_called_once()


@pytest.mark.parametrize("structure", FITTING, ids=str)
def test_every_pattern_that_fits_computes_the_layer(library: mock.Mock, structure: NM) -> None:
    values, indices, weight = weights(structure, SHAPE, torch.bfloat16)
    x = torch.randn(24, SHAPE.in_features).bfloat16()
    y = NM_FORM.run(x, values, indices, None, SHAPE.out_features)
    assert torch.equal(y, (x.double() @ weight.t()).bfloat16())


def test_tensors_may_lie_in_any_way(library: mock.Mock) -> None:
    values, indices, weight = weights(NM(4, 2), SHAPE, torch.bfloat16)
    packed = WEIGHT(values, indices, SHAPE.in_features)
    wide = torch.randn(16, 2 * SHAPE.in_features).bfloat16()
    bias = torch.randn(SHAPE.out_features, 2)[:, 1]
    for x in (wide[:, : SHAPE.in_features], wide.t()[:160, :16].t()):
        assert not x.is_contiguous()
        expected = F.linear(x.double(), weight, bias.bfloat16().double())
        assert torch.equal(PRODUCT(x, packed, bias), expected.bfloat16())


@pytest.mark.parametrize("shape", [SHAPE, Shape(128, 256), Shape(32, 32)], ids=str)
def test_fake_tensors_say_what_comes_out(library: mock.Mock, shape: Shape) -> None:
    values, indices, _ = weights(NM(4, 2), shape, torch.bfloat16)
    packed = WEIGHT(values, indices, shape.in_features)
    x = torch.randn(2, 5, shape.in_features).bfloat16()
    y = PRODUCT(x, packed, None)
    with FakeTensorMode() as mode:
        held = WEIGHT(mode.from_tensor(values), mode.from_tensor(indices), shape.in_features)
        result = PRODUCT(mode.from_tensor(x), held, None)
    for real, fake in ((packed, held), (y, result)):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    whole = shape.out_features % 128 == 0 and shape.in_features % 128 == 0
    assert (packed.numel() == shape.numel * 9 // 16) is whole


def test_the_library_may_pad_a_weight_and_not_more_than_there_is_room_for(
    library: mock.Mock,
) -> None:
    values, indices, weight = weights(NM(4, 2), SHAPE, torch.bfloat16)
    x = torch.randn(8, SHAPE.in_features).bfloat16()
    library.side_effect = lambda weight: compress(weight, more=30)
    y = NM_FORM.run(x, values, indices, None, SHAPE.out_features)
    assert torch.equal(y, (x.double() @ weight.t()).bfloat16())
    library.side_effect = lambda weight: compress(weight, more=300)
    with pytest.raises(RuntimeError, match=r"Expected at most 18432 numbers of cuSPARSELt.*Got"):
        NM_FORM.run(x, values, indices, None, SHAPE.out_features)


def test_what_is_asked_of_torch_is_still_there() -> None:
    assert CuSparseLt._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16].sparse_min_rows == SIDE
    for name, wanted in (
        ("_cslt_compress", "(Tensor input) -> Tensor"),
        ("_cslt_sparse_mm", "(Tensor compressed_A, Tensor dense_B, Tensor? bias=None, "),
        ("_cslt_sparse_mm", "bool transpose_result=False"),
    ):
        assert hasattr(torch, name) and wanted in str(getattr(torch.ops.aten, name).default._schema)
    packed, x = (torch.empty(*sizes, device="meta") for sizes in ((64, 144), (24, 160)))
    y = torch._cslt_sparse_mm(packed, x.t(), transpose_result=True)
    assert y.shape == (24, 64)  # outputs are the rows of the packed weight, however long these are


# -- when it is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize("structure", FITTING, ids=str)
def test_it_is_predicted_just_above_dense(there: None, structure: NM) -> None:
    other = dense(NM)[0]
    for tokens in (1, 16, 197, 6304, 2**16):
        g = layer(structure, tokens, Shape(4096, 2560))
        cost, against = NM_FORM.cost(g), other.cost(g)
        assert cost is not None and against is not None and against < cost < 1.02 * against


def test_where_it_does_not_apply(there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    g = layer(NM(4, 2))
    assert NM_FORM.cost(g) is not None
    others = [layer(structure) for structure in OTHERS if LLAMA.in_features % structure.m == 0]
    assert all(NM_FORM.cost(other) is None for other in others) and len(others) == 3
    for changed in (
        {"frozen": False},
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"structure": Block(4)},
        {"shape": Shape(1000, 4096)},
        {"shape": Shape(4096, 1000)},
    ):
        assert NM_FORM.cost(replace(g, **changed)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((7, 5), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=capability: at)
        assert (NM_FORM.cost(g) is None) is (capability == (7, 5))
    monkeypatch.setattr(THERE, lambda: False)
    assert NM_FORM.cost(g) is None


class Told:
    """A clock that says how much faster than dense it was."""

    def __init__(self, times: float) -> None:
        self._times = times

    def time(self, contests: Any) -> dict[Contest, Measured]:
        seconds = {"semi_structured": 1.0 / self._times, "dense": 1.0}
        return {one: Measured(seconds, {"semi_structured": self._times}) for one in contests}


def chosen(prefer: Any, dynamic: bool = False) -> tuple[Report, Split]:
    """Choose for a layer on a GPU that is not there, with frozen weights."""
    op = LINEAR["nm"]  # stands for dense, whose weight Python's indexing lays out: on a real GPU
    candidates = {op: (NM_FORM, Formulation("dense", op, dense(NM)[0].cost))}
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    real = [*weights(NM(4, 2), LLAMA, torch.bfloat16)[:2], torch.zeros(11008).bfloat16()]
    with mode:
        on_gpu = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real]
        rows: Any = 4096
        if dynamic:
            symbol = shapes.create_symbol(rows, ConstantSource("s0"), DimDynamic.DYNAMIC)
            rows = shapes.create_symintnode(symbol, hint=rows)
        x = torch.empty(rows, LLAMA.in_features, dtype=torch.bfloat16, device="cuda")
    graph = trace_aten(lambda *given: op(*given, 11008), [x, *on_gpu])
    holders = graph.graph.find_nodes(op="placeholder")
    facts = Facts(frozen=dict(zip(holders[1:], real, strict=True)))
    report = ChooseFormulation(candidates, prefer=prefer)(graph.graph, facts)
    return report, split(graph, facts)


def names(graph: fx.GraphModule | None) -> list[str]:
    nodes = [] if graph is None else graph.graph.find_nodes(op="call_function", target=WEIGHT)
    nodes += [] if graph is None else graph.graph.find_nodes(op="call_function", target=PRODUCT)
    return [node.name for node in nodes]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_clock_chooses_it_and_the_weight_is_packed_before_the_first_call(
    there: None, dynamic: bool
) -> None:
    report, parts = chosen(Told(1.2), dynamic)
    assert report.fired[0].what.startswith("semi_structured: timed 1.20x dense")
    assert names(parts.prologue) == ["semi_structured_weight"]
    assert names(parts.main) == ["semi_structured_linear"]
    (product,) = parts.main.graph.find_nodes(op="call_function", target=PRODUCT)
    tokens, outputs = product.meta["val"].shape
    assert isinstance(tokens, torch.SymInt) is dynamic and outputs == 11008
    if dynamic:  # nothing was asked of it, so any number will do
        assert not tokens.node.shape_env.guards


@pytest.mark.parametrize("prefer", [Told(0.9), "auto", "dense"], ids=["slower", "auto", "dense"])
def test_what_was_not_timed_faster_is_left(there: None, prefer: Any) -> None:
    report, parts = chosen(prefer)
    assert report.fired[0].what.startswith("dense: ")
    assert names(parts.main) == [] and parts.prologue is None


@pytest.mark.parametrize(("structure", "right"), [(NM(4, 2), True), (NM(8, 4), False)], ids=str)
def test_a_timed_contest_tells_right_from_wrong(
    library: mock.Mock, tmp_path: Path, structure: NM, right: bool
) -> None:
    geometry = replace(layer(structure, 100, SHAPE), device="cpu")
    contest = Contest(LINEAR["nm"], geometry, True, (NM_FORM, dense(NM)[0]))
    stopwatch = Stopwatch({}, Timings(tmp_path), strict=False)
    with contextlib.nullcontext() if right else pytest.warns(match="disagrees with the reference"):
        found = stopwatch.time([contest])[contest]
    assert ("semi_structured" in found.seconds) is right and "dense" in found.seconds
    library.assert_called_once()  # the weight is packed once, however often the product runs


# -- the code around it ----------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two layers whose tokens are many."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


def main() -> None:
    """Print the code of a product, static and with symbolic tokens, and of a model."""
    install()
    torch.manual_seed(0)
    model = Mlp().bfloat16().eval()
    config = padst.SparseConfig(structure="nm:2:4", permutation="none")
    padst.sparsify(model, config, filter_fn=lambda site: True)

    def fakes() -> list[Tensor]:
        sizes = ((21, 256), (1024, 144), (1024,))
        return [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in sizes]

    def run(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = PRODUCT(x * 2.0, packed, bias)
        return F.gelu(y)

    with mock.patch(THERE, lambda: True), h200():
        found = {str(dynamic): code_of(run, fakes, dynamic=dynamic) for dynamic in (False, True)}
        found["model"] = code_of_model(model, torch.zeros(2048, 256).bfloat16())
    print(json.dumps(found))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    call = [sys.executable, "-m", "tests.kernels.test_gpu_semi_structured"]
    root = Path(__file__).parents[2]
    made = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=root)
    assert made.returncode == 0, made.stderr[-4000:]
    codes: dict[str, str] = json.loads(made.stdout)
    return codes


def calls(code: str) -> Callable[[str], int]:
    return lambda name: code.count(f"torch.ops.padst.{name}.default(")


@pytest.mark.xdist_group("semi-structured-on-gpu")
@pytest.mark.parametrize("kind", ["False", "True"])
def test_inductor_calls_the_product_between_its_own_kernels(
    generated: dict[str, str], kind: str
) -> None:
    code = generated[kind]
    assert calls(code)("semi_structured_linear") == 1
    assert code.count("async_compile.triton(") == 2  # before it, and the activation
    assert bool(re.search(r"assert_size_stride\(\w+, \(s\d+, 1024\)", code)) is (kind == "True")


@pytest.mark.xdist_group("semi-structured-on-gpu")
def test_a_model_s_weights_are_not_packed_in_its_calls(generated: dict[str, str]) -> None:
    count = calls(generated["model"])
    assert (count("semi_structured_linear"), count("semi_structured_weight")) == (2, 0)
    assert "nm_linear" not in generated["model"] and "scatter" not in generated["model"]


if __name__ == "__main__":
    main()

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import padst_compiler as padst
from padst_compiler.formulation import Geometry
from padst_compiler.kernel_ops import MAPPED
from padst_compiler.kernels import CANDIDATES, install
from padst_compiler.kernels.micro import block_width, fits, source, wide, widening, width
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, unit_of


def test_widths_tile_the_outputs() -> None:
    assert [width(n) for n in (256, 96, 80, 24, 12, 6, 1)] == [64, 48, 16, 8, 4, 0, 0]
    assert [width(n, 32) for n in (256, 96, 48)] == [32, 32, 16]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("AVX512", [64, 48, 32, 8, 0]), ("AVX2", [16, 16, 16, 8, 0]), ("DEFAULT", [8, 8, 8, 8, 0])],
)
def test_tiles_of_blocks_leave_registers_for_tokens(
    capability: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert [block_width(outputs) for outputs in (128, 48, 32, 24, 6)] == expected


def test_a_source_holds_its_headers_once_and_its_call() -> None:
    text = source("    CALLED;", "block.h")
    for said in ("all_sums(const", "block_sums(const", "typename Vector", "    CALLED;"):
        assert text.count(said) == 1
    assert "diagonal_sums(const" not in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float64}, False),
        ({"device": "cuda"}, False),
    ],
)
def test_fp32_and_16_bits_on_a_cpu(
    changed: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", **changed}
    geometry = Geometry(
        structure=Block(8), shape=Shape(64, 64), kept=2, tokens=9, frozen=True, **given
    )
    assert fits(geometry) is expected
    monkeypatch.setattr("sys.platform", "win32")  # its compiler has other vectors
    assert fits(geometry) is False


@pytest.mark.slow
@pytest.mark.parametrize("features", [16, 1024])
def test_rows_a_page_apart_are_copied_and_others_read_in_place(features: int) -> None:
    install()
    structure, shape = Block(8), Shape(16, features)
    dense = torch.randn(16, features)
    indices = structure.select(dense, 1)
    values = structure.pack(dense, indices)
    x = torch.randn(5, features)

    def run(x: Tensor, v: Tensor, i: Tensor) -> Tensor:
        y: Tensor = MAPPED[LINEAR["block"]](x, v, i, 16, None, None)
        return y

    y, codes = run_and_get_code(torch.compile(run), x, values, indices)
    read = "APART" if features == 1024 else "HERE"
    rows = features + 16 if features == 1024 else features
    tokens = 32  # of which one block is read
    assert f"<8, 8, 8, {rows}, padst::Read::{read}, false, {tokens}>" in "".join(codes)
    expected = x.double() @ structure.unpack(values.double(), indices, shape).t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


# -- 16 bits ---------------------------------------------------------------------------------------


def test_a_widened_formulation_sees_fp32_and_returns_what_it_was_given() -> None:
    seen: list[Any] = []

    def run(x: Tensor, *rest: Any) -> Tensor:
        seen.append([getattr(t, "dtype", t) for t in (x, *rest)])
        return x * 1.001

    half = torch.ones(2, dtype=torch.bfloat16)
    places = torch.zeros(2, dtype=torch.int32)
    assert wide(run)(half, half, places, None, 7).dtype is torch.bfloat16
    assert wide(run)(half.double(), half.double(), places, None, 7).dtype is torch.float64
    floats = torch.float32, torch.float64
    assert seen == [[kind, kind, torch.int32, None, 7] for kind in floats]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("known", "expected"),
    [(("avx512",), 0.3), (("unknown",), 0.2), (("avx512", "amx"), 0.05), ((), 0.8)],
)
def test_sixteen_bits_are_priced_against_what_a_dense_product_of_them_costs(
    dtype: torch.dtype,
    known: tuple[str, ...],
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("padst_compiler.kernels.micro.products_of", lambda dtype: known)

    def geometry(dtype: torch.dtype, frozen: bool) -> Geometry:
        return Geometry(Block(8), Shape(64, 64), 2, 9, dtype, "cpu", frozen)

    share = 1.5 if known == ("avx512",) else 1.0  # one product of 512 bits in a cycle
    assert widening(geometry(torch.float32, False), 0.4) == pytest.approx((0.4 * share, 0.0))
    (rate, frozen), (_, training) = (widening(geometry(dtype, f), 0.4) for f in (True, False))
    assert rate == pytest.approx(expected) and 0.0 < frozen < training


CASES = [
    pytest.param(Block(16), torch.bfloat16, id="block"),
    pytest.param(Block(16), torch.float16, id="block-fp16"),
    pytest.param(Diagonal(), torch.bfloat16, id="diagonal"),
    pytest.param(NM(16), torch.bfloat16, id="nm"),
    pytest.param(FanIn(), torch.bfloat16, id="fan_in"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "dtype"), CASES)
def test_results_in_16_bits_are_rounded_once(structure: Structure, dtype: torch.dtype) -> None:
    install()
    shape = Shape(64, 96)
    dense = torch.randn(64, 96)
    indices = structure.select(dense, structure.kept(shape, 0.7))
    values = structure.pack(dense, indices).to(dtype)
    weight = structure.unpack(values.double(), indices, shape)
    x, grad = torch.randn(2, 19, 96).to(dtype), torch.randn(2, 19, 64).to(dtype)
    flat = grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    unit = unit_of(values, indices)
    for ops, args, expected in (
        (LINEAR, (x, values, indices, None, 64), x.double() @ weight.t()),
        (LINEAR_DX, (grad, values, indices, 96), grad.double() @ weight),
        (LINEAR_DW, (grad, x, indices, unit), structure.pack(flat, indices)),
    ):
        for way in CANDIDATES[ops[structure.name]]:
            if not way.name.endswith("_kernel"):
                continue
            torch._dynamo.reset()
            y, codes = run_and_get_code(torch.compile(way.run), *args)
            assert y.dtype is dtype and "padst::" in "".join(codes)
            once = expected.to(dtype).double()  # fp32 sums may tip a tie: one unit more
            unit_of_type = torch.finfo(dtype).eps * expected.abs().clamp(min=0.1)
            assert bool(((y.double() - once).abs() <= unit_of_type).all())


@pytest.mark.slow
def test_a_16_bit_layer_runs_the_kernel() -> None:
    install()
    structure, shape = Block(8), Shape(16, 24)
    dense = torch.randn(16, 24)
    indices = structure.select(dense, 2)
    values = structure.pack(dense, indices).bfloat16()
    x = torch.randn(5, 24).bfloat16()
    run = CANDIDATES[LINEAR["block"]][0].run
    y, codes = run_and_get_code(torch.compile(run), x, values, indices, None, 16)
    assert y.dtype is torch.bfloat16 and "padst::block_sums<" in "".join(codes)
    expected = x.double() @ structure.unpack(values.double(), indices, shape).t()
    torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_all_kernels_of_a_graph_may_be_one_file() -> None:
    """``cpp_wrapper`` compiles them together: forward, and both gradients."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    blocks = padst.SparseConfig("block:16", 0.5, permutation="random")
    padst.sparsify(model, {"0": blocks, "2": padst.SparseConfig("fan_in", 0.5, permutation="none")})
    options: dict[str, Any] = {"cpp_wrapper": True, "kernels": "sparse", "verify": "strict"}
    results = []
    for call in (model, torch.compile(model, backend="padst", options=options)):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = call(x)
        wrt = [x, *(p for p in model.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y.square().sum(), wrt)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

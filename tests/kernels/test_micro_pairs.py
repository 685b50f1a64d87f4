from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import padst_compiler as padst
from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels import install
from padst_compiler.kernels.micro_pairs import DW_FORM, DX_FORM, LINEAR_FORM, ZIPPED_FORM
from padst_compiler.pairs_ops import BLOCK_PAIRS, BLOCK_PAIRS_DX
from padst_compiler.structures import Block, Shape, Structure

from .stored import weights

CPU = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}


@pytest.fixture
def has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this CPU be one with AVX-512 BF16: the kernel is right on any, and only slower."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CPU, raising=False)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    install()
    torch._dynamo.reset()


def close(y: Tensor, expected: Tensor) -> None:
    """Sums in fp32, rounded once to bf16."""
    assert y.dtype is torch.bfloat16 and y.shape == expected.shape
    error = (y.double() - expected.bfloat16().double()).abs()
    assert bool((error <= torch.finfo(torch.bfloat16).eps * expected.abs().clamp(min=0.1)).all())


def layer(structure: Block, columns: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return values of bf16, indices and the matrix that they stand for."""
    r, c = structure.sides
    shape = Shape(4 * r, columns * c)
    values, indices, _ = weights(structure, shape)
    values = values.bfloat16()
    return values, indices, structure.unpack(values.double(), indices, shape)


@pytest.mark.parametrize(
    ("structure", "columns"),
    [
        (Block(16), 6),
        pytest.param(Block(32), 64, marks=pytest.mark.slow, id="page"),
        pytest.param(Block(48, 6), 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", [LINEAR_FORM, ZIPPED_FORM], ids=lambda form: form.name)
def test_a_layer_of_bf16_is_summed_by_pairs(
    structure: Block, columns: int, form: Formulation
) -> None:
    values, indices, dense = layer(structure, columns)
    outputs, inputs = dense.shape
    bias = torch.randn(outputs).bfloat16()
    ways: list[Tensor] = [
        torch.randn(19, inputs),
        torch.randn(1, inputs),
        torch.randn(2, 3, inputs),
        torch.randn(19, inputs + 3)[:, 1:-2],  # a pair begins at an odd place
        torch.randn(inputs, 19).t(),
    ]
    for x in (way.bfloat16() for way in ways):
        torch._dynamo.reset()
        compiled = torch.compile(form.run, fullgraph=True)
        y, codes = run_and_get_code(compiled, x, values, indices, bias, outputs)
        assert "padst::Pairs>(" in "".join(codes) and "ops.padst." not in "".join(codes)
        close(y, x.double() @ dense.t() + bias.double())


def test_what_follows_is_computed_on_the_tiles_at_any_number_of_tokens() -> None:
    values, indices, dense = layer(Block(16))

    def run(x: Tensor, other: Tensor) -> Tensor:
        return LINEAR_FORM.run(x, values, indices, None, 64).relu() + other

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (7, 33):
        x, other = torch.randn(tokens, 96).bfloat16(), torch.randn(tokens, 64).bfloat16()
        y = compiled(x, other)
        once = (x.double() @ dense.t()).bfloat16().relu() + other
        assert float((y.double() - once.double()).abs().max()) <= 0.07


@pytest.mark.parametrize(
    ("structure", "columns"),
    [(Block(16), 6), pytest.param(Block(32, 48), 5, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_gradients_of_bf16_are_summed_by_pairs(structure: Block, columns: int, tokens: int) -> None:
    values, indices, dense = layer(structure, columns)
    outputs, inputs = dense.shape
    grad = torch.randn(tokens, outputs + 1).bfloat16()[:, :-1]  # rows begin at odd places
    x = torch.randn(tokens, inputs).bfloat16()
    dx, codes = run_and_get_code(torch.compile(DX_FORM.run), grad, values, indices, inputs)
    assert "padst::ByColumn<" in (code := "".join(codes)) and "ops.padst." not in code
    close(dx, grad.double() @ dense)
    unit = list(values.shape[2:])
    dw, codes = run_and_get_code(torch.compile(DW_FORM.run), grad, x, indices, unit)
    assert "padst::Pairs>(" in (code := "".join(codes)) and "ops.padst." not in code
    close(dw, structure.pack(grad.double().t() @ x.double(), indices))


def test_a_training_step_of_bf16_multiplies_pairs(has_it: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    padst.sparsify(model, structure="block:32", sparsity=0.9, permutation="random")
    model.bfloat16()
    x = torch.randn(96, 512).bfloat16()
    options: dict[str, Any] = {"kernels": "sparse", "verify": "strict"}
    compiled = torch.compile(model, backend="padst", options=options)

    def step(call: Any, x: Tensor) -> tuple[Tensor, ...]:
        wrt = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
        return torch.autograd.grad(call(x).square().sum(), wrt)

    gradients, codes = run_and_get_code(step, compiled, x)
    assert "".join(codes).count("padst::Pairs>(") == 6  # two layers: forward, dx and dw
    results = gradients, step(model.double(), x.detach().double())
    for one, exact in zip(*results, strict=True):
        scale = float(exact.abs().max())
        assert float((one.double() - exact).abs().max()) <= 0.05 * scale


@pytest.mark.parametrize(("features", "in_kernel"), [(96, True), (130, True), (131, False)])
@pytest.mark.parametrize("tokens", [3, 41])
def test_maps_are_read_and_written_through(features: int, in_kernel: bool, tokens: int) -> None:
    values, indices, dense = layer(Block(16))
    pairs = values.unflatten(2, (-1, 2)).transpose(-1, -2).contiguous()
    in_map, out_map = torch.randint(features, (96,)), torch.randperm(64)
    x = torch.randn(tokens, features).bfloat16()
    compiled = torch.compile(lambda x: BLOCK_PAIRS(x, pairs, indices, 64, in_map, out_map))
    y, codes = run_and_get_code(compiled, x)
    assert ("Read::PAIRS_THROUGH, true" in "".join(codes)) is in_kernel
    expected = (x[:, in_map].double() @ dense.t())[:, out_map]
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 41])
def test_a_gradient_reads_and_writes_through_maps(tokens: int) -> None:
    values, indices, dense = layer(Block(16))
    in_map, out_map = torch.randint(70, (64,)), torch.randperm(96)
    grad = torch.randn(tokens, 70).bfloat16()
    compiled = torch.compile(lambda g: BLOCK_PAIRS_DX(g, values, indices, 96, in_map, out_map))
    y, codes = run_and_get_code(compiled, grad)
    assert "Read::PAIRS_THROUGH, true" in "".join(codes)
    expected = (grad[:, in_map].double() @ dense)[:, out_map]
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_other_numbers_go_to_the_operator_itself() -> None:
    values, indices, dense = layer(Block(16))
    pairs = values.float().unflatten(2, (-1, 2)).transpose(-1, -2).contiguous()
    x = torch.randn(5, 96)
    compiled = torch.compile(BLOCK_PAIRS)
    y, codes = run_and_get_code(compiled, x, pairs, indices, 64, None, None)
    assert "torch.ops.padst.block_pairs" in "".join(codes)
    torch.testing.assert_close(y.double(), x.double() @ dense.t(), rtol=1e-5, atol=1e-5)


def test_a_model_of_bf16_uses_it_and_lays_frozen_weights_out_once(has_it: None) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    padst.sparsify(model, structure="block:32", sparsity=0.8, permutation="random")
    model.bfloat16()
    x = torch.randn(64, 256).bfloat16()
    with torch.no_grad():
        report = padst.explain(model, x)
        assert [kernel for _, kernel, _ in report.kernels] == ["bf16_pairs"] * 2
        y, codes = run_and_get_code(torch.compile(model, backend="padst"), x)
        expected = model.double()(x.double())
    code = "".join(codes)
    assert code.count("padst::Pairs>(") == 2
    assert code.count("padst::Read::PAIRS_THROUGH, ") == 1  # the other map is folded
    assert float((y.double() - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("structure", "dtype", "cpu", "applies"),
    [
        (Block(16), torch.bfloat16, CPU, True),
        (Block(16), torch.bfloat16, {**CPU, "avx512_bf16": False}, False),
        (Block(16), torch.float16, CPU, False),
        (Block(16), torch.float32, CPU, False),
        (Block(8), torch.bfloat16, CPU, False),  # half a vector
        (Block(16, 3), torch.bfloat16, CPU, False),  # no pairs
        (Block(16, balanced=False), torch.bfloat16, CPU, False),
    ],
)
def test_it_is_a_candidate_where_the_cpu_and_the_blocks_allow(
    structure: Structure,
    dtype: torch.dtype,
    cpu: dict[str, Any],
    applies: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    geometry = Geometry(structure, Shape(96, 96), 2, 9, dtype, "cpu", True)
    changing = replace(geometry, frozen=False)
    assert (LINEAR_FORM.cost(geometry) is not None) is applies
    assert LINEAR_FORM.cost(changing) is None and ZIPPED_FORM.cost(geometry) is None
    assert (ZIPPED_FORM.cost(changing) is not None) is applies


@pytest.mark.parametrize(
    ("structure", "dx", "dw"),
    [
        (Block(16), True, True),
        (Block(16, 3), False, True),  # of outputs; tokens are paired in any case
        (Block(3, 16), False, False),
        (Block(8, 16), True, False),
    ],
    ids=str,
)
def test_which_gradients_have_pairs(
    structure: Block, dx: bool, dw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CPU, raising=False)
    geometry = Geometry(structure, Shape(96, 96), 2, 9, torch.bfloat16, "cpu", False)
    assert (DX_FORM.cost(geometry) is not None) is dx
    assert (DW_FORM.cost(geometry) is not None) is dw


def test_with_tiles_of_amx_a_dense_product_is_the_better_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody measured it here: what is not known to pay runs dense."""
    geometry = Geometry(Block(16), Shape(768, 768), 5, 197, torch.bfloat16, "cpu", True)
    costs = []
    for amx in (False, True):
        known = {**CPU, "amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        cost = LINEAR_FORM.cost(geometry)
        assert cost is not None
        costs.append(cost)
    # Four times that, and one and a half: no Zen has them, see `widening`.
    assert costs[1] == pytest.approx(6 * costs[0], rel=0.1)

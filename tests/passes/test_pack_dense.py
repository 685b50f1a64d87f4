from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import padst_compiler as padst
from padst_compiler.kernels import DENSE, install
from padst_compiler.passes.pack_dense import PackDense

Rewrite = Callable[..., Any]
WEIGHT, BIAS = torch.randn(512, 640), torch.randn(512)
RAGGED, RAGGED_BIAS = torch.randn(501, 640), torch.randn(501)
PASS = PackDense(DENSE)


@pytest.fixture(autouse=True)
def _operators() -> None:
    install()


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what lets this CPU multiply numbers of 16 bits with these units only."""

    def has(*units: str) -> None:
        known = {"architecture": "x86_64"} | dict.fromkeys(units, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)

    return has


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def run_by(result: Any, *names: str) -> list[str]:
    """Name the products of a rewritten graph, which are none of BLAS."""
    assert not {"mm", "addmm"} & set(result.after)
    return [name for name in result.after if name in names]


def left(result: Any) -> bool:
    return not {"packed_linear", "block_linear", "block_pairs"} & set(result.after)


@pytest.mark.parametrize("tokens", [(1,), (2, 9), (600,)])
@pytest.mark.parametrize("frozen", [{"weight": WEIGHT}, {"weight": WEIGHT, "bias": BIAS}])
def test_a_frozen_weight_is_tiled(
    rewrite: Rewrite, tokens: tuple[int, ...], frozen: dict[str, Tensor]
) -> None:
    result = rewrite(PASS, linear, torch.randn(*tokens, 640), **frozen)
    assert run_by(result, "block_linear") == ["block_linear"]


@pytest.mark.parametrize(("outputs", "side"), [(448, 64), (416, 32), (432, 16)])
def test_a_tile_is_as_wide_as_the_outputs_allow(rewrite: Rewrite, outputs: int, side: int) -> None:
    result = rewrite(PASS, linear, torch.randn(5, 640), weight=torch.randn(outputs, 640))
    (node,) = [n for n in result.graph.nodes if "block_linear" in str(n.target)]
    assert node.args[1].meta["val"].shape == (outputs // side, 1, 640, side)


@pytest.mark.parametrize("tokens", [(3,), (2, 9)])
@pytest.mark.parametrize("frozen", [{"weight": RAGGED}, {"weight": RAGGED, "bias": RAGGED_BIAS}])
def test_other_numbers_of_outputs_are_packed(
    rewrite: Rewrite, tokens: tuple[int, ...], frozen: dict[str, Tensor]
) -> None:
    result = rewrite(PASS, linear, torch.randn(*tokens, 640), **frozen)
    assert run_by(result, "packed_linear") == ["packed_linear"]


@pytest.mark.parametrize(("weight", "name"), [(WEIGHT, "tiles"), (RAGGED, "packed_weight")])
def test_two_readers_share_one(rewrite: Rewrite, weight: Tensor, name: str) -> None:
    def run(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        turned = weight.t()
        return x @ turned + (y @ turned).relu()

    x, y = torch.randn(9, 640), torch.randn(9, 640)
    result = rewrite(PASS, run, x, y, weight=weight)
    products = [n for n in result.graph.nodes if "_linear" in str(n.target)]
    assert len(products) == 2 and products[0].args[1] is products[1].args[1]


@pytest.mark.parametrize("weight", [WEIGHT, RAGGED])
def test_any_number_of_tokens(rewrite: Rewrite, weight: Tensor) -> None:
    result = rewrite(PASS, linear, torch.randn(9, 640), weight=weight, dynamic=True)
    assert len(run_by(result, "packed_linear", "block_linear")) == 1


@pytest.mark.parametrize(
    ("units", "tokens", "names"),
    [
        (("avx512_bf16",), 9, ["block_pairs"]),
        ((), 9, ["block_linear"]),  # widened
        ((), 600, ["block_linear"]),
        (("avx512_bf16",), 600, ["block_pairs"]),
        (("avx512_bf16", "amx_bf16"), 9, []),
    ],
)
def test_numbers_of_16_bits(
    rewrite: Rewrite,
    cpu: Callable[..., None],
    units: tuple[str, ...],
    tokens: int,
    names: list[str],
) -> None:
    cpu(*units)
    x, weight = torch.randn(tokens, 640).bfloat16(), WEIGHT.bfloat16()
    result = rewrite(PASS, linear, x, weight=weight, bias=BIAS.bfloat16(), compare=False)
    assert [name for name in result.after if name.startswith("block_")] == names


def test_what_a_cpu_multiplies_itself_is_not_widened(
    rewrite: Rewrite, cpu: Callable[..., None]
) -> None:
    cpu("avx512_bf16")
    x, weight = torch.randn(9, 641).bfloat16(), torch.randn(512, 641).bfloat16()  # no pairs
    assert left(rewrite(PASS, linear, x, weight=weight, compare=False))


def test_a_cpu_without_wide_vectors_is_left_to_onednn(
    rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    result = rewrite(PASS, linear, torch.randn(9, 640), weight=WEIGHT)
    assert run_by(result, "packed_linear") == ["packed_linear"]


@pytest.mark.parametrize(
    ("x", "frozen"),
    [
        (torch.randn(2, 640), {"weight": RAGGED}),  # few tokens
        (torch.randn(513, 640), {"weight": RAGGED}),  # many
        (torch.randn(9, 64), {"weight": torch.randn(64, 64)}),  # small
        (torch.randn(9, 640).double(), {"weight": WEIGHT.double()}),
    ],
    ids=["few", "many", "small", "double"],
)
def test_what_gains_nothing_is_left(rewrite: Rewrite, x: Tensor, frozen: dict[str, Tensor]) -> None:
    assert left(rewrite(PASS, linear, x, compare=False, **frozen))


def test_a_weight_that_changes_and_a_product_of_frozen_ones_are_left(rewrite: Rewrite) -> None:
    assert left(rewrite(PASS, linear, torch.randn(9, 640), WEIGHT))

    def derived(x: Tensor, weight: Tensor) -> Tensor:
        return x @ (weight.t() @ weight)

    result = rewrite(PASS, derived, torch.randn(9, 640), weight=WEIGHT)
    # Of the two only what is computed in each call.
    assert run_by(result, "block_linear") == ["block_linear"]


def test_a_bias_for_each_token_or_a_scale_is_left(rewrite: Rewrite) -> None:
    def run(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.t())

    def scaled(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.t(), alpha=2.0)

    x = torch.randn(9, 640)
    assert left(rewrite(PASS, run, x, torch.randn(9, 512), weight=WEIGHT))
    assert left(rewrite(PASS, scaled, x, BIAS, weight=WEIGHT))


def test_a_model_runs_it_and_notices_new_weights() -> None:
    model = nn.Sequential(nn.Linear(512, 640), nn.ReLU(), nn.Linear(640, 501)).eval()
    padst.sparsify(model[2:], structure="unstructured", sparsity=0.5, permutation="none")
    compiled, x = torch.compile(model, backend="padst"), torch.randn(32, 512)
    with torch.no_grad():
        y, codes = run_and_get_code(compiled, x)
        code = "".join(codes)
        assert code.count("padst.packed_linear.default(") == 1
        assert code.count(", 512, 64, 512, padst::Read::HERE") == 1
        torch.testing.assert_close(y, model(x), rtol=0, atol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(2.0)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-4)
        for tokens in (1, 7, 600):
            x = torch.randn(tokens, 512)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-4)

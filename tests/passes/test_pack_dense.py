from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import padst_compiler as padst
from padst_compiler.passes.pack_dense import PackDense

Rewrite = Callable[..., Any]
WEIGHT, BIAS = torch.randn(512, 640), torch.randn(512)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def packed(result: Any) -> list[str]:
    return [name for name in result.after if name == "packed_linear"]


@pytest.mark.parametrize("tokens", [(3,), (2, 9), (512,)])
@pytest.mark.parametrize("frozen", [{"weight": WEIGHT}, {"weight": WEIGHT, "bias": BIAS}])
def test_a_frozen_weight_is_packed(
    rewrite: Rewrite, tokens: tuple[int, ...], frozen: dict[str, Tensor]
) -> None:
    result = rewrite(PackDense(), linear, torch.randn(*tokens, 640), **frozen)
    assert len(packed(result)) == 1 and not {"mm", "addmm"} & set(result.after)


def test_two_readers_share_one(rewrite: Rewrite) -> None:
    def run(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        turned = weight.t()
        return x @ turned + (y @ turned).relu()

    x, y = torch.randn(9, 640), torch.randn(9, 640)
    result = rewrite(PackDense(), run, x, y, weight=WEIGHT)
    assert len(packed(result)) == 2
    laid_out = [n for n in result.graph.nodes if "packed_weight" in str(n.target)]
    assert len(laid_out) == 1


def test_any_number_of_tokens(rewrite: Rewrite) -> None:
    result = rewrite(PackDense(), linear, torch.randn(9, 640), weight=WEIGHT, dynamic=True)
    assert len(packed(result)) == 1


@pytest.mark.parametrize(
    ("x", "frozen"),
    [
        (torch.randn(2, 640), {"weight": WEIGHT}),  # few tokens
        (torch.randn(513, 640), {"weight": WEIGHT}),  # many
        (torch.randn(9, 64), {"weight": torch.randn(64, 64)}),  # small
        (torch.randn(9, 640).bfloat16(), {"weight": WEIGHT.bfloat16()}),
        (torch.randn(9, 640).double(), {"weight": WEIGHT.double()}),
    ],
    ids=["few", "many", "small", "bf16", "double"],
)
def test_what_gains_nothing_is_left(rewrite: Rewrite, x: Tensor, frozen: dict[str, Tensor]) -> None:
    assert not packed(rewrite(PackDense(), linear, x, compare=False, **frozen))


def test_a_weight_that_changes_and_a_product_of_frozen_ones_are_left(rewrite: Rewrite) -> None:
    assert not packed(rewrite(PackDense(), linear, torch.randn(9, 640), WEIGHT))

    def derived(x: Tensor, weight: Tensor) -> Tensor:
        return x @ (weight.t() @ weight)

    result = rewrite(PackDense(), derived, torch.randn(9, 640), weight=WEIGHT)
    assert len(packed(result)) == 1  # of the two only what is computed in each call


def test_a_bias_for_each_token_or_a_scale_is_left(rewrite: Rewrite) -> None:
    def run(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.t())

    def scaled(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.t(), alpha=2.0)

    x = torch.randn(9, 640)
    assert not packed(rewrite(PackDense(), run, x, torch.randn(9, 512), weight=WEIGHT))
    assert not packed(rewrite(PackDense(), scaled, x, BIAS, weight=WEIGHT))


def test_a_model_runs_it_and_notices_new_weights() -> None:
    model = nn.Sequential(nn.Linear(512, 640), nn.ReLU(), nn.Linear(640, 512)).eval()
    padst.sparsify(model[2:], structure="unstructured", sparsity=0.5, permutation="none")
    compiled, x = torch.compile(model, backend="padst"), torch.randn(32, 512)
    with torch.no_grad():
        y, codes = run_and_get_code(compiled, x)
        assert "".join(codes).count("padst.packed_linear.default(") == 2
        torch.testing.assert_close(y, model(x), rtol=0, atol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(2.0)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-4)
        for tokens in (1, 7, 600):
            x = torch.randn(tokens, 512)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-4)

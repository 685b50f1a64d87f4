from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.passes.open_attention import OpenAttention, attention, encoder_layer
from padst_compiler.passes.use_sparse_operator import UseSparseOperator
from padst_compiler.structures import FanIn, Shape

Rewrite = Callable[..., Any]
D, H, HIDDEN = 16, 2, 32
MHA, ENCODER = (
    torch.ops.aten._native_multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd,
)


def d(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def weights() -> tuple[Tensor, ...]:
    return d(3 * D, D), d(3 * D), d(D, D), d(D)


MASKS: dict[str, tuple[Tensor | None, int | None]] = {
    "none": (None, None),
    "causal": (torch.ones(5, 5).triu(1).bool(), 0),
    "padding": (torch.tensor([[False] * 4 + [True]] * 2), 1),
    "padding in floats": (torch.tensor([[0.0] * 4 + [-torch.inf]] * 2).double(), 1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_attention_is_what_torch_computes(mask: str, needs: tuple[bool, bool]) -> None:
    x, given = d(2, 5, D), MASKS[mask]
    arguments: Any = (D, H, *weights(), given[0], *needs, given[1])
    expected, result = MHA(x, x, x, *arguments), attention(x, x, x, *arguments)
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-10)
    if needs[0]:
        torch.testing.assert_close(result[1], expected[1], rtol=0, atol=1e-10)


def test_attention_of_three_tensors_is_what_the_module_computes() -> None:
    module = nn.MultiheadAttention(D, H, batch_first=True).double()
    q, k, v = d(2, 5, D), d(2, 7, D), d(2, 7, D)
    packed: Any = (module.in_proj_weight, module.in_proj_bias)
    held = (*packed, module.out_proj.weight, module.out_proj.bias)
    expected = module(q, k, v)
    result = attention(q, k, v, D, H, *held)
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(result[1], expected[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_layer_is_what_torch_computes(mask: str, gelu: bool, first: bool) -> None:
    norms = (d(D), d(D), d(D), d(D))
    feed = (d(HIDDEN, D), d(HIDDEN), d(D, HIDDEN), d(D))
    arguments: Any = (D, H, *weights(), gelu, first, 1e-5, *norms, *feed, *MASKS[mask])
    x = d(2, 5, D)
    expected, result = ENCODER(x, *arguments), encoder_layer(x, *arguments)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-9)


def stored(o: int, i: int) -> tuple[Tensor, Tensor]:
    indices = FanIn().select(torch.rand(o, i), 4)
    return FanIn().pack(d(o, i), indices).contiguous(), indices


def unpacked(v: Tensor, k: Tensor, o: int, i: int) -> Tensor:
    made: Tensor = torch.ops.padst.unpack(v, k, "fan_in", o, i)
    return made


@pytest.mark.parametrize("place", [0, 2])
def test_a_sparse_weight_opens_it(rewrite: Rewrite, place: int) -> None:
    shape = Shape(3 * D, D) if place == 0 else Shape(D, D)
    v, k = stored(*(shape.out_features, shape.in_features))
    held = dict(zip("abce", weights(), strict=True))
    del held["abce"[place]]

    def run(x: Tensor, v: Tensor, k: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        sparse = unpacked(v, k, shape.out_features, shape.in_features)
        parts = [rest.get(name, sparse) for name in "abce"]
        y: tuple[Tensor, Tensor] = MHA(x, x, x, D, H, *parts, None, True, True, None)
        return y

    steps = [OpenAttention(), UseSparseOperator()]
    result = rewrite(steps, run, d(2, 5, D), v=v, k=k, **held)
    assert "_native_multi_head_attention" in result.before
    assert "_native_multi_head_attention" not in result.after
    assert result.after.count("fan_in_linear") == 1


def test_a_sparse_weight_opens_a_whole_layer(rewrite: Rewrite) -> None:
    names = [f"n{at}" for at in range(12)]
    norms, feed = (d(D), d(D), d(D), d(D)), (d(HIDDEN), d(D, HIDDEN), d(D))
    held = dict(zip(names[:11], (*weights(), *norms, *feed), strict=True))
    v, k = stored(HIDDEN, D)

    def run(x: Tensor, v: Tensor, k: Tensor, **rest: Tensor) -> Tensor:
        parts = [rest[name] for name in names[:11]]
        parts.insert(8, unpacked(v, k, HIDDEN, D))
        y: Tensor = ENCODER(x, D, H, *parts[:4], True, False, 1e-5, *parts[4:], None, None)
        return y

    result = rewrite([OpenAttention(), UseSparseOperator()], run, d(2, 5, D), v=v, k=k, **held)
    assert "_transformer_encoder_layer_fwd" in result.before
    assert "_transformer_encoder_layer_fwd" not in result.after
    assert result.after.count("fan_in_linear") == 1


def test_dense_attention_stays_whole(rewrite: Rewrite) -> None:
    a, b, c, e = weights()

    def run(x: Tensor, a: Tensor, b: Tensor, c: Tensor, e: Tensor) -> Tensor:
        y: Tensor = MHA(x, x, x, D, H, a, b, c, e, None, False, True, None)[0]
        return y

    result = rewrite(OpenAttention(), run, d(2, 5, D), a=a, b=b, c=c, e=e)
    assert "_native_multi_head_attention" in result.after and result.fired == []


@pytest.mark.parametrize("masked", [False, True])
def test_the_encoders_fast_path_does_not_pass_us_by(masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, H, HIDDEN, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = d(2, 5, D)
    inputs: dict[str, Any] = {"src": x}
    if masked:
        inputs["src_key_padding_mask"] = MASKS["padding"][0]
    config = padst.SparseConfig(structure="block:4", sparsity=0.5, permutation="random")
    padst.sparsify(model, {"re:.*": config}, example_inputs=inputs)
    dense = padst.to_dense(model)
    with torch.no_grad():
        fast, slow = model(**inputs), dense(**inputs)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    told = padst.explain(model, inputs, options={"kernels": "sparse"})
    used = {row[1] for row in told.passes if row[0] == "use_sparse_operator" and row[2] == "fired"}
    kernels = {site for site, kernel, _ in told.kernels if "dense" not in kernel}
    sites = {
        f"layers.{n}.{path}"
        for n in range(2)
        for path in ("self_attn.in_proj_weight_sparse", "self_attn.out_proj.weight_sparse")
    }
    assert sites <= used | kernels
    assert {f"layers.{n}.linear{m}" for n in range(2) for m in (1, 2)} <= used | kernels


@pytest.mark.parametrize("memory", ["one", "two"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_cross_attention_multiplies_by_parts_of_the_packed_weight(
    memory: str, batch_first: bool
) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, H, batch_first=batch_first)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y: Tensor = self.attention(q, k, k if memory == "one" else v)[0]
            return y

    model, inputs = Cross().double().eval(), (d(2, 5, D), d(2, 5, D), d(2, 5, D))
    config = padst.SparseConfig(structure="block:4", sparsity=0.5, permutation="random")
    padst.sparsify(model, {"re:.*": config}, example_inputs=inputs)
    told = padst.explain(model, inputs, options={"kernels": "sparse"})
    rows = [row for row in told.passes if row[0] == "use_sparse_operator"]
    assert [state for _, _, state, _ in rows] == ["fired"] * len(rows)
    assert len(told.kernels) == (3 if memory == "one" else 4), str(told)

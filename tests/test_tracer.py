import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.tracer import Trace, trace


class Calls(nn.Module):
    """A model that is one function of its weights and an input."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.w)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) if x.sum() > 0 else self.b(x)
        for _ in range(int(x.abs().max().item() > 0) + 1):
            x = x @ self.w
        return x


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def matrices(model: nn.Module, *but: str) -> set[str]:
    names = {name for name, p in model.named_parameters() if p.dim() == 2}
    return {name for name in names if not any(word in name for word in but)}


def ops_in(found: Trace) -> set[str]:
    return {op for use in found.uses.values() for op in use.ops}


def test_gpt2_has_all_its_weights() -> None:
    model = tiny_gpt2()
    for inputs in (torch.zeros(2, 6, dtype=torch.long), {"input_ids": torch.ones(1, 12).long()}):
        found = trace(model, inputs)
        assert set(found.uses) == matrices(model, "wpe")
        assert {use.tokens for use in found.uses.values()} == {12}
        tied = found.uses["transformer.wte.weight"]
        assert tied.names == ("transformer.wte.weight", "lm_head.weight")
        weights = sum(model.get_parameter(name).numel() for name in found.uses)
        assert found.linear_flops == 2 * 12 * weights
        found.graph.lint()


def test_vit_has_all_its_weights_and_counts_the_patches() -> None:
    model = tiny_vit()
    found = trace(model, torch.randn(2, 3, 16, 16))
    patches = "vit.embeddings.patch_embeddings.projection.weight"
    assert set(found.uses) == {*matrices(model), patches}
    tokens = {name: use.tokens for name, use in found.uses.items()}
    assert (tokens.pop("classifier.weight"), tokens.pop(patches)) == (2, 8)
    assert set(tokens.values()) == {10}
    assert found.uses[patches].flops == 2 * (2 * 4) * 16 * 3 * 8 * 8
    assert found.linear_flops == sum(use.flops for use in found.uses.values())


@pytest.mark.parametrize("masked", [False, True])
def test_the_encoders_fused_path_has_all_its_weights(masked: bool) -> None:
    model, x = encoder(), torch.randn(2, 5, 8)
    padding = torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])
    found = trace(model, (x, None, padding) if masked else x)
    assert "_transformer_encoder_layer_fwd" in ops_in(found)
    assert set(found.uses) == matrices(model)
    assert {use.tokens for use in found.uses.values()} == {8 if masked else 10}
    slow = trace(model.train(), x)
    assert set(slow.uses) == matrices(model) and slow.linear_flops == 2 * 10 * 2 * 512


def test_only_the_branch_that_ran_is_counted() -> None:
    found = trace(Branches(), torch.ones(3, 8))
    assert set(found.uses) == {"a.weight", "w"}
    assert found.uses["w"].count == 2 and found.uses["w"].tokens == 6


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], int, set[str]]] = {
    "linear": (F.linear, [(6, 8)], 10, {"addmm", "mm"}),
    "vector": (lambda x, w: w @ x[0, 0], [(6, 8)], 1, {"mv"}),
    "weight first": (lambda x, w: w @ x.mT, [(6, 8)], 10, {"bmm", "mm"}),
    "expanded": (lambda x, w: torch.bmm(x, w.expand(2, 8, 6)), [(8, 6)], 10, {"bmm"}),
    "cast": (lambda x, w: x.bfloat16() @ w.t().to(torch.bfloat16), [(6, 8)], 10, {"mm"}),
    "einsum": (lambda x, w: torch.einsum("bti,oi->bto", x, w), [(6, 8)], 10, {"bmm", "mm"}),
    "experts": (lambda x, w: x[:, :3].transpose(0, 1) @ w, [(3, 8, 6)], 2, {"bmm"}),
    "slices": (lambda x, w: x @ w[0].t() + x @ w.unbind()[1].t(), [(2, 6, 8)], 10, {"mm"}),
    "baddbmm": (lambda x, w: torch.baddbmm(x[..., :6], x, w), [(2, 8, 6)], 5, {"baddbmm"}),
    "addbmm": (lambda x, w: torch.addbmm(x[0, :, :6], x, w), [(2, 8, 6)], 5, {"addbmm"}),
    "joined": (lambda x, a, b: F.linear(x, torch.cat([a, b])), [(2, 8), (4, 8)], 10, {"mm"}),
    "conv 1x1": (lambda x, w: F.conv1d(x.mT, w[..., None]), [(6, 8)], 10, {"convolution"}),
    "inference": (torch.inference_mode()(F.linear), [(6, 8)], 10, {"linear"}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_raw_parameters_are_found_in_every_product(name: str) -> None:
    function, shapes, tokens, ops = FUNCTIONS[name]
    model = Calls(function, *shapes)
    found = trace(model, torch.randn(2, 5, 8))
    assert set(found.uses) == {f"w.{n}" for n in range(len(shapes))}
    assert ops_in(found) <= ops
    assert {use.tokens for use in found.uses.values()} == {tokens}
    assert found.linear_flops == sum(2 * tokens * p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: x * w, (5, 8)),
        (lambda x, w: x @ w.softmax(0).topk(3).values, (8, 6)),  # of another size by now
        (lambda x, w: x @ x.mT, (8, 6)),
        (lambda x, w: x @ w, (8,)),
    ],
)
def test_what_is_no_linear_layer_is_left_out(
    function: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    assert trace(Calls(function, shape), torch.randn(2, 5, 8)).uses == {}


def test_a_matrix_that_is_computed_before_the_product_is_known_as_such() -> None:
    made = trace(Calls(lambda x, w: x @ torch.exp(w), (8, 6)), torch.randn(2, 5, 8))
    assert made.uses["w.0"].computed and made.linear_flops == made.uses["w.0"].flops == 960
    scaled = trace(Calls(lambda x, w: x @ (w / w.norm()), (8, 6)), torch.randn(2, 5, 8))
    assert not scaled.uses["w.0"].computed and scaled.uses["w.0"].columns() == (0,)


@pytest.mark.parametrize(
    ("function", "shape", "columns"),
    [
        (lambda x, w: F.linear(x, w), (6, 8), (1,)),
        (lambda x, w: x @ w, (8, 6), (0,)),
        (lambda x, w: (w @ x.mT).mT, (6, 8), (1,)),
        (lambda x, w: torch.einsum("bti,ihk->bthk", x, w), (8, 3, 2), (0,)),
        (lambda x, w: torch.einsum("bthk,hko->bto", x.view(2, 5, 4, 2), w), (4, 2, 6), (0, 1)),
        (lambda x, w: torch.einsum("bti,eoi->bteo", x, w), (3, 6, 8), (2,)),
        (lambda x, w: torch.bmm(x, w[:2]), (3, 8, 6), (1,)),
        (lambda x, w: torch.baddbmm(torch.zeros(2, 5, 6), x, w[[2, 0]]), (3, 8, 6), (1,)),
        (lambda x, w: F.linear(x[0], w[torch.tensor(1)]), (3, 6, 8), (2,)),
        (lambda x, w: x[0] @ w.half().float().t().contiguous(), (6, 8), (1,)),
        (lambda x, w: F.linear(x, torch.cat([w, w])), (6, 8), (1,)),
        (lambda x, w: F.linear(x, w.chunk(2)[1]), (6, 8), (1,)),
        (lambda x, w: F.conv1d(x.mT, w), (6, 8, 3), (1, 2)),
        (lambda x, w: F.conv_transpose1d(x.mT, w), (8, 6, 1), (0,)),
        (lambda x, w: torch.mv(w, x[0, 0]), (6, 8), (1,)),
        (lambda x, w: F.bilinear(x, x, w), (6, 8, 8), (2,)),
    ],
)
def test_the_axes_that_a_product_sums_over_are_followed(
    function: Callable[..., Tensor], shape: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    (use,) = trace(Calls(function, shape), torch.randn(2, 5, 8)).uses.values()
    assert use.columns() == columns


def test_convolutions_of_any_size_count_in_the_total() -> None:
    x = torch.randn(2, 8, 5)
    assert trace(nn.Conv1d(8, 6, 3, groups=2), x).linear_flops == 2 * (2 * 6 * 3) * 4 * 3
    assert trace(nn.ConvTranspose1d(8, 6, 3), x).linear_flops == 2 * (2 * 8 * 5) * 6 * 3


def test_recurrent_weights_are_found() -> None:
    model = nn.LSTM(8, 8, batch_first=True)
    found = trace(model, torch.randn(2, 5, 8))
    assert set(found.uses) == {"weight_ih_l0", "weight_hh_l0"}
    assert {use.tokens for use in found.uses.values()} == {10}


def test_a_view_made_before_the_run_is_its_parameter() -> None:
    model = Branches()
    model.register_buffer("turned", model.w.detach().t())
    model.forward = lambda x: x @ model.turned  # type: ignore[method-assign, operator]
    assert set(trace(model, torch.ones(3, 8)).uses) == {"w"}


def test_the_graph_reads_inputs_and_parameters_by_name() -> None:
    graph = trace(nn.Sequential(nn.Linear(8, 4)), torch.ones(3, 8)).graph
    names = {str(node.target) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    assert names == {"input_0", "0.weight", "0.bias"}
    (product,) = [node for node in graph.nodes if node.target is torch.ops.aten.addmm.default]
    assert product.meta["shape"] == (3, 4) and product.meta["dtype"] is torch.float32
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert output.args == ((product,),)


class Writes(nn.Module):
    """Clips its weight, keeps running numbers, drops out, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data.clamp_(-0.01, 0.01)
        y: Tensor = self.drop(self.norm(self.fc(x)))
        x.zero_()
        return y


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model, x = Writes().train(training), torch.randn(3, 4)
    model.fc.weight.grad = torch.ones(4, 4)
    model.fc.weight.data.copy_(torch.randn(4, 4))
    given, seed = x.clone(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    found = trace(model, x)
    assert "fc.weight" in found.uses
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert model.training is training and model.norm.training is training
    assert torch.equal(torch.get_rng_state(), seed) and torch.equal(x, given)


def test_the_model_is_left_as_it_was_by_a_run_that_fails() -> None:
    model = Writes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        trace(model, torch.randn(3, 5))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_hooks_run_once() -> None:
    model, calls = nn.Linear(4, 4), []
    model.register_forward_hook(lambda *_: calls.append(1))
    trace(model, torch.ones(1, 4))
    assert calls == [1]


def test_inputs_on_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected .* on cpu.*Got meta"):
        trace(nn.Linear(4, 4), torch.ones(1, 4, device="meta"))


def test_a_model_on_the_meta_device_can_be_traced() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), torch.ones(3, 4)
    assert {use.tokens for use in trace(model, x).uses.values()} == {3}


def test_compiled_parts_are_seen_through() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0] = torch.compile(model[0], backend=refuse)  # type: ignore[assignment]
    assert "torch._dynamo" in sys.modules
    assert len(trace(model, torch.ones(3, 4)).uses) == 2

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

from padst_compiler.config import SparseConfig
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseConv1D, SparseLayer, SparseLinear, SparsePointwiseConv
from padst_compiler.layers import sparse_layers as layers_of
from padst_compiler.permutation import FixedPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.sparsify import sparsify
from padst_compiler.structures import STRUCTURES, Structure

SIZES: dict[str, str] = {"block": "block:8"}  # others fit the small models as they are


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))


def layer(model: nn.Module, name: str) -> SparseLayer:
    found = model.get_submodule(name)
    assert isinstance(found, SparseLayer)
    return found


def picture(model: nn.Module) -> dict[str, Any]:
    """Return all that a failed call must not change, bit for bit."""
    modules, tensors = dict(model.named_modules()), model.state_dict().items()
    return {
        "classes": {name: type(m) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "numbers": {name: t.tolist() for name, t in tensors if not (t.is_meta or is_lazy(t))},
        "training": {name: m.training for name, m in modules.items()},
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before, seed = picture(model), torch.get_rng_state()
    yield
    assert picture(model) == before and torch.equal(seed, torch.get_rng_state())


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


# -- what it makes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("permutation", ["none", "random", "learned"])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_structure_and_permutation(kind: type[Structure], permutation: str) -> None:
    model, x = mlp(), torch.randn(5, 64)
    structure = SIZES.get(kind.name, kind.name)
    made = sparsify(model, structure=structure, sparsity=0.75, permutation=permutation)
    assert made is model and set(layers_of(model)) == {"0", "2"}
    for sparse in layers_of(model).values():
        assert isinstance(sparse, SparseLinear) and isinstance(sparse, nn.Linear)
        assert sparse.sparsity == pytest.approx(0.75, abs=0.03)
        mask = sparse.structure.mask(sparse.indices, sparse.shape)
        assert mask.float().mean().item() == pytest.approx(1 - sparse.sparsity)
        held = {"none": type(None), "random": FixedPermutation, "learned": SinkhornPermutation}
        vacuous = sparse.side in sparse.structure.vacuous_sides and permutation == "learned"
        assert isinstance(sparse.permutation, held["none" if vacuous else permutation])
    first, second = (s.weight for s in layers_of(model).values())
    hidden = nn.functional.gelu(nn.functional.linear(x, first, layer(model, "0").bias))
    dense = nn.functional.linear(hidden, second, layer(model, "2").bias)
    torch.testing.assert_close(model(x), dense)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("traced", [False, True])
def test_gpt2(traced: bool) -> None:
    model, ids = tiny_gpt2(), torch.randint(0, 64, (2, 6))
    head = model.get_parameter("lm_head.weight")
    inputs = {"input_ids": ids} if traced else None
    sparsify(model, structure="block:8", sparsity=0.75, example_inputs=inputs)
    assert len(layers_of(model)) == 8
    assert all(isinstance(sparse, SparseConv1D) for sparse in layers_of(model).values())
    assert model.get_parameter("lm_head.weight") is head
    assert head is model.get_parameter("transformer.wte.weight")
    model(ids).logits.sum().backward()
    assert layer(model, "transformer.h.0.attn.c_attn").values.grad is not None


def test_vit() -> None:
    model = tiny_vit()
    sparsify(model, structure="nm:2:4", example_inputs=torch.randn(1, 3, 16, 16), strict=True)
    assert len(layers_of(model)) == 12
    assert type(model.get_submodule("classifier")) is nn.Linear
    assert model(torch.randn(2, 3, 16, 16)).logits.shape == (2, 5)


def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1, stride=2), nn.ReLU())
    model.append(nn.Conv2d(32, 8, 3))
    x, before = torch.randn(2, 3, 13, 13), model[1].bias
    sparsify(model, structure="block:8", sparsity=0.5, example_inputs=x, permutation="random")
    assert isinstance(model[1], SparsePointwiseConv) and model[1].bias is before
    wanted = nn.functional.conv2d(model[0](x), model[1].weight, model[1].bias, 2)
    torch.testing.assert_close(model[:3](x), wanted.relu())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.raw = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) if x.sum() > 0 else self.b(x)
        for _ in range(int(x.abs().max().item() > 0) + 1):
            x = x @ self.raw
        return x


def test_both_branches_become_sparse() -> None:
    model, x = Branches(), torch.ones(3, 64)
    sparsify(model, structure="block:8", example_inputs=x)
    assert set(layers_of(model)) == {"a", "b", "raw_sparse"}
    assert model(x).shape == model(-x).shape == (3, 64)


def test_the_encoders_two_paths_agree() -> None:
    layers = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layers, 2), torch.randn(2, 5, 16)
    sparsify(model, structure="block:8", sparsity=0.5, example_inputs=x)
    assert len(layers_of(model)) == 8
    slow = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), slow, atol=1e-5, rtol=1e-5)


def test_a_tied_module_becomes_one_sparse_layer() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sparsify(model, structure="block:8")
    assert model[0] is model[2] is shared and isinstance(shared, SparseLinear)
    assert len(layers_of(model)) == 1
    model(torch.randn(2, 64)).sum().backward()


def test_a_tied_weight_stays_dense_and_tied() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(32, 64), "f": nn.Linear(64, 64)})
    model["tied"] = nn.Linear(64, 32, bias=False)
    model["tied"].weight = model["e"].weight
    sparsify(model, structure="block:8")
    assert set(layers_of(model)) == {"f"} and model["tied"].weight is model["e"].weight


def test_the_model_itself_may_become_sparse() -> None:
    model = nn.Linear(64, 10)
    assert sparsify(model, structure="fan_in") is model
    assert isinstance(model, SparseLinear) and model(torch.ones(2, 64)).shape == (2, 10)


def test_hooks_modes_names_and_biases_stay() -> None:
    model, calls = mlp().eval(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].weight.requires_grad_(False)
    bias = model[0].bias
    sparsify(model, structure="block:8")
    model(torch.ones(1, 64))
    frozen = layer(model, "0")
    assert calls == [1] and not model[0].training and frozen.bias is bias
    assert frozen.soft_permutation is not None
    assert not frozen.values.requires_grad
    assert not frozen.soft_permutation.logits.requires_grad
    assert layer(model, "2").values.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weights_type_stays(dtype: torch.dtype) -> None:
    model = sparsify(mlp().to(dtype), structure="block:8")
    assert layer(model, "0").values.dtype is dtype
    assert model(torch.ones(2, 64, dtype=dtype)).dtype is dtype


def test_each_layer_keeps_its_config_as_resolved() -> None:
    model = mlp()
    sparsify(model, SparseConfig("fan_in", 0.8, distribution="erk", seed=3))
    first = layer(model, "0").config
    assert isinstance(first, SparseConfig)
    assert (first.permutation, first.side, first.seed) == ("none", "input", 3)
    assert first.sparsity == pytest.approx(layer(model, "0").sparsity, abs=0.01)


def test_a_mapping_gives_each_its_own() -> None:
    model = mlp()
    sparsify(model, {"0": SparseConfig("fan_in:4"), "re:2": SparseConfig("nm:1:8", side="input")})
    assert layer(model, "0").values.shape == (128, 4)
    assert layer(model, "2").values.shape == (64, 16, 1)


def test_more_layers_may_follow_by_name() -> None:
    model = mlp()
    sparsify(model, {"0": SparseConfig("block:8")})
    before = layer(model, "0").values
    sparsify(model, {"2": SparseConfig("block:8")})
    assert layer(model, "0").values is before and len(layers_of(model)) == 2


def test_sparsity_zero_leaves_everything_dense() -> None:
    model = mlp()
    with untouched(model):
        assert sparsify(model, sparsity=0.0) is model


def test_what_the_caller_excludes_is_no_error() -> None:
    model = mlp()
    with untouched(model):
        sparsify(model, {"re:.*": None})
        sparsify(model, filter_fn=lambda module, name: False)


def test_a_partial_refusal_warns_and_names_the_site() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 50), nn.Linear(50, 64))
    with pytest.warns(UserWarning, match="2 requested sites stay dense: 1: Expected features"):
        sparsify(model, structure="block:32")
    assert set(layers_of(model)) == {"0"}


# -- random numbers --------------------------------------------------------------------------------


def numbers(config: SparseConfig, model: nn.Module | None = None) -> dict[str, Tensor]:
    model = sparsify(mlp() if model is None else model, config)
    return {name: tensor for name, tensor in model.state_dict().items() if "bias" not in name}


def test_masks_and_permutations_follow_from_seed_and_name() -> None:
    for permutation in ("random", "learned"):
        config = SparseConfig("block:8", permutation=permutation)
        first = {k: v.clone() for k, v in numbers(config).items() if "values" not in k}
        torch.manual_seed(99)
        again = {k: v for k, v in numbers(config).items() if "values" not in k}
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        other = numbers(SparseConfig("block:8", permutation=permutation, seed=1))
        drawn = {name: tensor for name, tensor in first.items() if tensor.dim()}
        assert all(not torch.equal(tensor, other[name]) for name, tensor in drawn.items())


def test_one_layers_numbers_do_not_depend_on_the_others() -> None:
    config = SparseConfig("fan_in", permutation="random")
    alone = numbers(config, nn.Sequential(nn.Linear(64, 128), nn.GELU()))
    both = numbers(config)
    assert torch.equal(alone["0.indices"], both["0.indices"])
    square = numbers(config, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert not torch.equal(square["0.indices"], square["1.indices"])


def test_the_seed_is_stable_across_processes() -> None:
    """``hash`` of a string differs from run to run; these numbers must not."""
    model = sparsify(nn.Linear(8, 4), structure="fan_in:2")
    seed = int.from_bytes(hashlib.sha256(b"0::topology").digest()[:7], "big")
    scores = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layer(model, "").indices.long(), scores.topk(2).indices.sort().values)


def test_global_random_numbers_are_left_alone() -> None:
    model = mlp()
    seed = torch.get_rng_state()
    sparsify(model, structure="block:8", example_inputs=torch.ones(2, 64))
    assert torch.equal(seed, torch.get_rng_state())


def test_random_permutations_are_permutations() -> None:
    model = sparsify(mlp(), structure="block:8", permutation="random")
    held = layer(model, "2").permutation
    assert isinstance(held, FixedPermutation) and held.size == 64  # the narrower side
    assert not IndexMap.of(held.perm).is_identity


# -- optimizers ------------------------------------------------------------------------------------


def test_an_optimizer_goes_on_training() -> None:
    model, x = mlp(), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(x).sum().backward()
    optimizer.step()
    sparsify(model, structure="block:8", sparsity=0.75, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    wanted = [model[0].values, model[0].bias, model[2].values, model[2].bias]
    assert [id(p) for p in held[:4]] == [id(p) for p in wanted]
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["weight_decay"] == 0
    assert set(map(id, optimizer.state)) == {id(model[0].bias), id(model[2].bias)}
    before = [p.detach().clone() for p in held]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(held, before, strict=True))


def test_frozen_layers_need_no_optimizer() -> None:
    model = mlp()
    model.requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    sparsify(model, structure="block:8", optimizer=optimizer)
    assert len(layers_of(model)) == 2


# -- errors ----------------------------------------------------------------------------------------


def sparse_already() -> nn.Module:
    return sparsify(mlp(), structure="block:8")


def headless() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4), nn.Embedding(4, 4))


def wrapped() -> nn.Module:
    model = nn.Sequential(mlp())
    # What counts is the class; a process group would be needed to build one.
    model[0].__class__ = type("Wrapped", (nn.Sequential, DistributedDataParallel), {})
    return model


def computed() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(64, 64)))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "sparsity one": (mlp, {"sparsity": 1.0}, "Expected 0 <= sparsity < 1. Got 1.0"),
    "sparsity negative": (mlp, {"sparsity": -1}, "Expected 0 <= sparsity < 1. Got -1"),
    "structure": (mlp, {"structure": "blocks"}, "Did you mean 'block'"),
    "permutation": (mlp, {"permutation": "learn"}, "Did you mean 'learned'"),
    "name": (mlp, {"config": {"1": SparseConfig()}}, "Got '1', which matches none"),
    "both": (mlp, {"config": SparseConfig(), "structure": "nm"}, "Got both"),
    "empty model": (nn.Sequential, {}, "Got an empty Sequential"),
    "no site": (headless, {}, "Expected a model with linear layers"),
    "no parameters": (nn.ReLU, {}, "Expected a model with parameters"),
    "device": (mlp, {"example_inputs": torch.ones(1, 64, device="meta")}, "Got meta"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), {}, "lazy module"),
    "size": (lambda: mlp(65), {"structure": "block:16"}, "Got 2, all dense: 0: Expected"),
    "nothing to do": (lambda: mlp(32), {"structure": "block:128"}, "Choose another structure"),
    "policy": (computed, {}, "Got 1, all dense: 0: its weight is computed by _Orthogonal"),
    "sparse": (sparse_already, {}, "Got '0', which is sparse already. Call to_dense"),
    "sparse by name": (sparse_already, {"config": {"2": SparseConfig()}}, "Got '2', which"),
    "strict": (lambda: mlp(65), {"structure": "nm:8", "strict": True}, "Site '0'. Expected in_f"),
    "wrapped": (wrapped, {}, "Expected a model before DistributedDataParallel. Got it at '0'"),
    "meta": (lambda: nn.Linear(64, 64, device="meta"), {}, "is on the meta device"),
}


@pytest.mark.parametrize("name", MODELS)
def test_errors_leave_the_model_as_it_was(name: str) -> None:
    build, arguments, said = MODELS[name]
    model = build()
    with untouched(model), pytest.raises(ValueError) as caught:
        sparsify(model, **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"structure": 3}, "Expected a structure or its name. Got 3"),
        ({"sparsity": "high"}, "Expected a number"),
        ({"config": "block"}, "Expected a SparseConfig or a mapping"),
        ({"config": {"0": 0.9}}, "Expected a SparseConfig or None for '0'"),
        ({"filter_fn": "fc"}, "Expected a function as filter_fn"),
        ({"optimizer": 3}, "Expected a torch.optim.Optimizer. Got int"),
    ],
)
def test_types_are_checked(arguments: dict[str, Any], said: str) -> None:
    model = mlp()
    with untouched(model), pytest.raises(TypeError) as caught:
        sparsify(model, **arguments)
    assert said in str(caught.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected a torch\.nn\.Module. Got function"):
        sparsify(mlp)  # type: ignore[arg-type]


def test_a_foreign_optimizer_is_refused() -> None:
    model = mlp()
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with untouched(model), pytest.raises(ValueError, match="Expected an optimizer of this model"):
        sparsify(model, optimizer=other)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_undoes_what_was_done(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    adopt, calls = SparseLinear.adopt, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        made = adopt(*args, **kwargs)
        if len(calls) == 2:
            raise error
        return made

    monkeypatch.setattr(SparseLinear, "adopt", fail)
    state = {id(p): entry for p, entry in optimizer.state.items()}
    with untouched(model), pytest.raises(error):
        sparsify(model, structure="block:8", optimizer=optimizer)
    assert len(calls) == 2 and model[0].weight.shape == (128, 64)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert {id(p): entry for p, entry in optimizer.state.items()} == state
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()


def test_a_failing_handover_undoes_the_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)

    def fail(_: Any) -> None:
        raise RuntimeError("full")

    monkeypatch.setattr(optimizer, "add_param_group", fail)
    with untouched(model), pytest.raises(RuntimeError, match="full"):
        sparsify(model, structure="block:8", optimizer=optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()]

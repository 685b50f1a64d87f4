"""Layers that read one tensor learn one permutation together, from the plan to the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.layers import SparseLayer


class Attention(nn.Module):
    """q, k and v read one tensor; gate and up another; down and out have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).transpose(-1, -2) / 4.0).softmax(dim=-1)
        x = x + self.out(scores @ self.v(x))
        y = self.norm(x)
        z: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + z


X = torch.randn(2, 5, 16)
NAMES = ("q", "k", "v", "out", "gate", "up", "down")


def shared(permutation: str = "learned", **settings: Any) -> Attention:
    config = padst.SparseConfig("block:4", 0.5, permutation, share=True, **settings)
    model = Attention()
    padst.sparsify(model, config, example_inputs=X, filter_fn=lambda site: True)
    return model


def held(model: nn.Module) -> dict[str, Any]:
    return {name: layer.permutation for name, layer in padst.sparse_layers(model).items()}


@pytest.mark.parametrize("permutation", ["learned", "low_rank", "random"])
def test_siblings_share_and_others_do_not(permutation: str) -> None:
    found = held(shared(permutation))
    assert found["q"] is found["k"] is found["v"]
    assert found["gate"] is found["up"]
    assert len({id(one) for one in found.values()}) == 4
    apart = Attention()
    padst.sparsify(apart, structure="block:4", example_inputs=X, filter_fn=lambda site: True)
    assert len({id(one) for one in held(apart).values()}) == 7


def test_the_plan_says_whose_permutation_is_shared() -> None:
    config = padst.SparseConfig("block:4", 0.5, share=True)
    made = padst.plan(Attention(), X, config, filter_fn=lambda site: True)
    leaders = {site.name: site.shares for site in made.sites}
    assert leaders == dict.fromkeys(NAMES, "") | {"k": "q", "v": "q", "up": "gate"}
    assert "learned (input, that of q)" in str(made)
    assert f"{4 * 256:,} more numbers while permutations are soft" in str(made)
    assert {s["name"]: s["shares"] for s in made.to_dict()["sites"]} == leaders


def test_an_output_side_is_never_shared() -> None:
    found = held(shared(side="output"))
    assert len({id(one) for one in found.values()}) == 7


def test_without_example_inputs_it_is_refused() -> None:
    config = padst.SparseConfig("block:4", 0.5, share=True)
    with pytest.raises(ValueError, match=r"Expected example_inputs: share=True .* Got none"):
        padst.plan(Attention(), None, config)
    model = Attention()
    with pytest.raises(ValueError, match="Pass example_inputs, or share=False"):
        padst.sparsify(model, {"q": None, "re:[kv]": config})
    assert not padst.sparse_layers(model)


def test_layers_of_different_configs_do_not_share() -> None:
    model = Attention()
    both = {
        "q": padst.SparseConfig("block:4", 0.5, share=True),
        "re:[kv]": padst.SparseConfig("block:8", 0.5, share=True),
    }
    padst.sparsify(model, both, example_inputs=X)
    found = held(model)
    assert found["k"] is found["v"] and found["q"] is not found["k"]


def test_an_optimiser_gets_what_is_shared_once() -> None:
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = padst.SparseConfig("block:4", 0.5, share=True)
    padst.sparsify(
        model, config, example_inputs=X, optimizer=optimizer, filter_fn=lambda site: True
    )
    held_once = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held_once) == sorted(id(p) for p in model.parameters())


def test_one_that_trains_is_enough_to_learn_it() -> None:
    model = Attention()
    model.q.requires_grad_(False)
    config = padst.SparseConfig("block:4", 0.5, share=True)
    padst.sparsify(model, config, example_inputs=X, filter_fn=lambda site: True)
    assert all(p.requires_grad for p in held(model)["q"].parameters())


@pytest.mark.slow
def test_gradients_of_all_siblings_meet_and_they_harden_together(tmp_path: Path) -> None:
    model = shared()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    training = padst.DynamicSparsity(model, optimizer, total_steps=200, update_every=10)
    soft = held(model)["q"]
    target = torch.randn(2, 5, 16)
    for _ in range(200):
        optimizer.zero_grad()
        ((model(X) - target).square().mean() + training.penalty()).backward()
        optimizer.step()
    found = held(model)
    assert found["q"] is found["k"] is found["v"] is not soft
    shares = training.soft_fraction()
    assert shares["q"] == shares["k"] == shares["v"] < 1.0
    padst.save(model, tmp_path / "model.safetensors")
    loaded = padst.load(Attention(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(X), model(X))
    again = held(loaded)
    assert again["q"] is again["k"] is again["v"] and again["gate"] is again["up"]
    layer = loaded.get_submodule("q")
    assert isinstance(layer, SparseLayer) and layer.config.share


def test_a_conv_reads_its_own_tensor() -> None:
    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, padding=1)
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y: Tensor = self.a(x) + self.b(x)
            return y

    model = Convs()
    config = padst.SparseConfig("block:4", 0.5, share=True)
    x = torch.randn(2, 3, 4, 4)
    padst.sparsify(model, config, example_inputs=x, filter_fn=lambda site: True)
    found = held(model)
    assert found["a"] is found["b"]

"""One training of the demo: a dense, a block-sparse or a permuted block-sparse Mixer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.config import SparseConfig
from padst_compiler.layers import sparse_layers
from padst_compiler.mixer import Images, Mixer
from padst_compiler.permutation import SoftPermutation
from padst_compiler.sites import Site
from padst_compiler.sparsify import sparsify
from padst_compiler.training import DynamicSparsity, harden

__all__ = ["VARIANTS", "Run", "accuracy", "train"]

VARIANTS = ("dense", "block", "block + permutation")
BATCH = 96
UPDATE_EVERY = 20


@dataclass
class Run:
    """One trained model and what happened on the way."""

    variant: str
    seed: int
    model: nn.Module
    accuracy: float
    optimizer_bytes: int
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, test accuracy)
    history: list[Any] = field(default_factory=list)
    soft: dict[str, Tensor] = field(default_factory=dict)  # matrices at a third of the steps
    moved: list[float] = field(default_factory=list)  # change of the accuracy at each hardening
    left_soft: int = 0  # permutations that the rule did not harden: linear assignment did


def train(
    images: Images, variant: str, seed: int, epochs: int, tick: Callable[[int], object]
) -> Run:
    """Train one variant; every random number comes from ``seed``.

    Args:
        images: the data.
        variant: one of ``VARIANTS``.
        seed: of the weights, the order of the data and the topology.
        epochs: passes over the training images.
        tick: called with the number of every epoch that is done.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Mixer(images.side, patch=images.side // 4)
    if variant != "dense":
        permutation = "learned" if "permutation" in variant else "none"
        config = SparseConfig("block:8", sparsity=0.9, permutation=permutation, seed=seed)
        sparsify(model, config, filter_fn=_channel_mixing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    batches = len(images.train_x) // BATCH
    steps = epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    training = None
    if variant != "dense":
        training = DynamicSparsity(
            model,
            optimizer,
            "rigl",
            total_steps=steps,
            update_every=UPDATE_EVERY,
            end=0.6,
            penalty_weight=3.0,
            seed=seed,
        )
    result = Run(variant, seed, model, 0.0, 0)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(images.train_x), generator=order).split(BATCH)[:batches]:
            loss = F.cross_entropy(model(images.train_x[rows]), images.train_y[rows])
            if training is not None:
                loss = loss + training.penalty()
            optimizer.zero_grad()
            loss.backward()
            soft = _soft(model)
            optimizer.step()
            schedule.step()
            _measure_hardening(result, soft, images)
            if schedule.last_epoch == steps // 3:
                result.soft |= {name: each.soft().detach() for name, each in _soft(model).items()}
        result.curve.append(((epoch + 1) * batches, accuracy(model, images)))
        tick(epoch)
    if training is not None:
        result.history = list(training.history)
        training.detach()
        result.left_soft = len(_soft(model))
        harden(model)
    result.accuracy = accuracy(model, images)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    result.optimizer_bytes = sum(t.numel() * t.element_size() for t in state)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of test images that are classified right, in percent."""
    model.eval()
    guesses = torch.cat([model(x).argmax(dim=1) for x in images.test_x.split(1000)])
    return 100.0 * float((guesses == images.test_y).float().mean())


def _channel_mixing(site: Site) -> bool:
    """Sparsify the wide MLPs; the token-mixing ones are too narrow for blocks of 8."""
    return ".channels." in site.name


def _soft(model: nn.Module) -> dict[str, SoftPermutation]:
    found = {name: layer.soft_permutation for name, layer in sparse_layers(model).items()}
    return {name: soft for name, soft in found.items() if soft is not None}


def _measure_hardening(result: Run, before: dict[str, SoftPermutation], images: Images) -> None:
    """Put each permutation that just hardened back for a moment, and compare the accuracy."""
    layers = sparse_layers(result.model)
    for name, soft in before.items():
        hard = layers[name].permutation
        if hard is soft:
            continue
        after = accuracy(result.model, images)
        layers[name].permutation = soft
        result.moved.append(after - accuracy(result.model, images))
        layers[name].permutation = hard
        result.soft.setdefault(name, soft.soft().detach())
    result.model.train()

"""Sparsify, train, harden, compile: the lines of the README, with data to run on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import padst_compiler as padst


def main(steps: int = 200) -> None:
    """Train a small model on random clusters and print what the compiler did with it."""
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(512) % 10
    x = centres[labels] + 0.5 * torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 10))

    padst.sparsify(model, structure="block:8", sparsity=0.9)  # any model, in place
    print(padst.plan(model, x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    training = padst.DynamicSparsity(model, optimizer, "rigl", total_steps=steps, update_every=20)
    for _ in range(steps):
        loss = cross_entropy(model(x), labels) + training.penalty()  # P(M), ramped
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # prune and grow, and hardening, run after it
    padst.harden(model)  # soft permutations become index maps

    fast = torch.compile(model.eval(), backend="padst")
    with torch.no_grad():
        difference = (fast(x) - model(x)).abs().max().item()
        right = (fast(x).argmax(dim=1) == labels).float().mean().item()
    print(f"loss {loss.item():.3f}, right {right:.1%}, compiled against eager {difference:.0e}")
    print(padst.explain(model, x))


if __name__ == "__main__":
    main()

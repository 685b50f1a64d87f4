"""Training 2 N steps equals N, saving, loading in another process and N more: bit for bit."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import padst_compiler as padst

STEPS = 24


def start(method: str) -> tuple[nn.Module, torch.optim.Optimizer, padst.DynamicSparsity]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))
    first = padst.SparseConfig("fan_in" if method == "srigl" else "nm:8", sparsity=0.75)
    second = padst.SparseConfig("nm:8" if method == "srigl" else "block:8", sparsity=0.75)
    padst.sparsify(model, {"0": first, "2": second})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    training = padst.DynamicSparsity(
        model, optimizer, method, total_steps=STEPS, update_every=4, penalty_weight=30.0
    )
    return model, optimizer, training


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: padst.DynamicSparsity,
    steps: range,
) -> None:
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :8]).square().mean() + training.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def everything(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: padst.DynamicSparsity
) -> dict[str, Any]:
    return {
        "training": training.state_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def resume(method: str, path: str, out: str, cut: int) -> None:
    """Run in the other process."""
    model, optimizer, training = start(method)
    saved = torch.load(path, weights_only=False)
    training.load_state_dict(saved["training"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(model, optimizer, training, range(cut, STEPS))
    torch.save(everything(model, optimizer, training), out)


def same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for at, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{at}]")
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("cut", "method"),
    [
        pytest.param(*case, marks=() if case in ((7, "srigl"), (15, "rigl")) else pytest.mark.slow)
        for case in itertools.product((7, 15), ("rigl", "set", "srigl"))
    ],
)
def test_a_new_process_goes_on_with_the_same_numbers(method: str, cut: int, tmp_path: Path) -> None:
    whole = start(method)
    run(*whole, range(STEPS))
    part = start(method)
    run(*part, range(cut))
    torch.save(everything(*part), tmp_path / "part.pt")
    call = f"import test_resume as t; t.resume({method!r}, 'part.pt', 'rest.pt', {cut})"
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {call}"
    subprocess.run([sys.executable, "-c", path], cwd=tmp_path, check=True, timeout=120)
    rest = torch.load(tmp_path / "rest.pt", weights_only=False)
    same(everything(*whole), rest)
    events = whole[2].history
    assert sum(event["churn"] for event in events) > 0  # or there was nothing to lose

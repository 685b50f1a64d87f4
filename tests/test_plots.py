from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.plots import demo_picture, readme_picture
from padst_compiler.trial import Run


def permuted() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    config = padst.SparseConfig("block:8", permutation="random")
    return padst.sparsify(model, config, filter_fn=lambda site: True)


def test_the_demo_picture_is_drawn_from_the_runs(tmp_path: Path) -> None:
    event = {"step": 20, "layer": "0", "gap": 0.2, "penalty": 0.1, "churn": 0.0, "hardened": True}
    runs = [
        Run(
            variant,
            0,
            permuted(),
            90.0,
            0,
            curve=[(1, 70.0), (2, 90.0)],
            history=[event],
            soft={"0": torch.full((32, 32), 1 / 32)},
        )
        for variant in ("dense", "block", "block + permutation")
    ]
    path = demo_picture(runs, tmp_path / "demo.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_readme_picture_is_drawn_from_a_layer(tmp_path: Path) -> None:
    layer = padst.sparse_layers(permuted())["0"]
    path = readme_picture(layer, ["a permute"], ["b addmm"], tmp_path / "readme.png")
    assert path.stat().st_size > 10_000


def test_without_matplotlib_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    layer = padst.sparse_layers(permuted())["0"]
    with pytest.raises(ImportError, match="Expected matplotlib"):
        readme_picture(layer, [], [], tmp_path / "readme.png")

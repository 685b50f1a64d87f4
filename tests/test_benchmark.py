from __future__ import annotations

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.benchmark import compare_with_dense


@pytest.mark.slow
def test_the_table_has_both_contestants_the_kernels_and_the_machine() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    padst.sparsify(model, structure="block:16", permutation="none", filter_fn=lambda site: True)
    printed = compare_with_dense(model, torch.randn(8, 64), rounds=3)
    assert "dense, Inductor" in printed
    assert "sparse, padst" in printed
    assert "2 sparse layers, density 0.1875" in printed
    assert torch.__version__ in printed

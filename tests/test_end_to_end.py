"""The promises of the README, as a user meets them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import padst_compiler as padst

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_code_runs() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
def test_the_backend_is_found_without_importing_the_package() -> None:
    program = (
        "import sys, torch\n"
        "assert 'padst_compiler' not in sys.modules\n"
        "fast = torch.compile(torch.nn.Linear(8, 8), backend='padst', fullgraph=True)\n"
        "with torch.no_grad(): fast(torch.ones(2, 8))\n"
        "assert 'padst_compiler' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(sys.prefix))


def test_importing_is_light() -> None:
    program = (
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        "import padst_compiler\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'triton', 'onnx', 'onnxruntime', 'matplotlib', 'sklearn', 'scipy'}\n"
        "assert not heavy, heavy\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.slow
def test_one_model_goes_all_the_way(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 10))
    x, y = torch.randn(64, 32), torch.arange(64) % 10
    padst.sparsify(model, structure="block:8", sparsity=0.8, example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    training = padst.DynamicSparsity(model, optimizer, "rigl", total_steps=60, update_every=10)
    step = torch.compile(model, backend="padst", fullgraph=True)
    for _ in range(60):
        loss = nn.functional.cross_entropy(step(x), y) + training.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training.detach()
    padst.harden(model).eval()
    padst.save(model, tmp_path / "m.safetensors")
    fresh = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 10))
    again = padst.load(fresh, tmp_path / "m.safetensors").eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(again(x), expected)
        torch.testing.assert_close(padst.to_dense(model)(x), expected, rtol=1e-4, atol=1e-5)
        fast = torch.compile(again, backend="padst", options={"verify": "strict"})
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    report = padst.export_onnx(again, x, tmp_path / "m.onnx")
    assert report.difference < 1e-4
    assert set(padst.explain(again, x).verdicts[0].split()[:1]) == {"verified"}

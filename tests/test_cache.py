"""Inductor's cache across processes: a hit while nothing changed, a miss after any edit of ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import padst_compiler
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLinear
from padst_compiler.permutation import FixedPermutation
from padst_compiler.structures import Block, FanIn, Shape

torch.manual_seed(int(sys.argv[1]))  # other weights, masks and permutations of the same shapes

def sparse(structure, side):
    indices = structure.select(torch.rand(24, 24), structure.kept(Shape(24, 24), 0.75))
    table = FixedPermutation(IndexMap.of(torch.randperm(24)))
    return SparseLinear.adopt(nn.Linear(24, 24), structure, indices, table, side)

model = nn.Sequential(sparse(Block(8), "output"), nn.Tanh(), sparse(FanIn(), "input"))
from padst_compiler.backend import padst
x = torch.randn(11, 24, requires_grad=True)
found = {}
for mode in ("inference", "training"):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=padst, fullgraph=True)
    with torch.set_grad_enabled(mode == "training"):
        y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if mode == "training":
        grads, right = (torch.autograd.grad(t.square().sum(), [x, *model.parameters()])
                        for t in (y, expected))
        for one, two in zip(grads, right):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    seen = counters["inductor"]
    found[mode] = [seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"],
                   counters["aot_autograd"]["autograd_cache_hit"]]
print(json.dumps(found))
"""


def compiled(source: Path, seed: int) -> dict[str, list[int]]:
    """Compile in a process of its own, with the session's cache; return what it found there.

    Args:
        source: a folder that holds the package.
        seed: of all weights.

    Returns:
        Inductor's hits and misses and AOTAutograd's hits, for inference and for training.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed)],
        cwd=source,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_second_process_hits_until_a_source_of_ours_changes(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "padst_compiler", tmp_path / "padst_compiler")  # follows the links
    for hits, misses, _ in compiled(tmp_path, seed=0).values():
        assert hits == 0
        assert misses > 0
    for hits, misses, whole in compiled(tmp_path, seed=1).values():
        assert hits + whole > 0
        assert misses == 0
    with (tmp_path / "padst_compiler" / "passes" / "cancel_inverse.py").open("a") as file:
        file.write("# edited\n")
    for hits, misses, whole in compiled(tmp_path, seed=1).values():
        assert hits == whole == 0
        assert misses > 0

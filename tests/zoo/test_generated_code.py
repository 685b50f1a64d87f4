"""What is left of random permutations in the code that Inductor generates: no kernel of its own.

Every block is compiled with random permutations and with none at all. A compile takes long: the
ordinary suite takes one.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import padst_compiler as padst
from padst_compiler.mixer import MixerBlock

from . import architectures
from .test_coverage import STRUCTURES

BLOCKS = ["gpt2", "vit", "llama", "mixer"]


class Code(NamedTuple):
    """Counts in generated code."""

    kernels: int
    index_checks: int


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return one block of an architecture in float32, and inputs."""
    torch.manual_seed(0)
    if name == "mixer":
        return MixerBlock(16, 32).eval(), {"x": torch.randn(2, 16, 32)}
    model, inputs = architectures.build(name)
    for module in model.modules():
        for attribute, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList):
                setattr(module, attribute, child[:1])
    config: Any = model.config
    config.num_hidden_layers = 1
    config.use_cache = False
    narrow = {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model.float(), narrow


def sparse(name: str, structure: str, permutation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a sparse block, and inputs; layers that read one tensor share their permutation."""
    model, inputs = built(name)
    share = permutation != "none"
    config = padst.SparseConfig(structure, sparsity=0.5, permutation=permutation, share=share)
    padst.sparsify(model, config, example_inputs=inputs)
    return padst.harden(model), inputs


def generated(model: nn.Module, inputs: dict[str, Any]) -> Code:
    """Return what the code that a model compiles to has; its results are those of eager."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="padst", options={"kernels": "sparse", "verify": "strict"})
    with torch.no_grad():
        result, codes = run_and_get_code(fast, **inputs)
        expected = model(**inputs)
    for y, target in zip(floats(result), floats(expected), strict=True):
        torch.testing.assert_close(y, target, rtol=1e-4, atol=1e-4)
    code = "\n".join(codes)
    # Calls, not sources: two layers that are alike share one.
    calls = len(re.findall(r"^ +cpp_fused\w+\(", code, re.MULTILINE))
    return Code(calls, code.count("index out of bounds"))


def floats(result: Any) -> list[Tensor]:
    """Return every tensor of a result."""
    leaves = torch.utils._pytree.tree_leaves(
        list(result.values()) if isinstance(result, dict) else result
    )
    return [t for t in leaves if isinstance(t, Tensor)]


@functools.cache
def without_permutations(name: str, structure: str) -> Code:
    return generated(*sparse(name, structure, "none"))


def cases() -> list[Any]:
    """Return all pairs: a compile takes half a minute, so one structure a block is in CI."""
    return [
        pytest.param(
            name,
            structure,
            marks=pytest.mark.slow if at == turn else pytest.mark.exhaustive,
            id=f"{name}-{structure}",
        )
        for turn, name in enumerate(BLOCKS)
        for at, structure in enumerate(STRUCTURES)
    ]


@pytest.mark.parametrize(("name", "structure"), cases())
def test_no_gather_kernel_of_its_own(name: str, structure: str) -> None:
    code = generated(*sparse(name, structure, "random"))
    plain = without_permutations(name, structure)
    assert code.kernels == plain.kernels
    if structure == "fan_in":
        assert code.index_checks <= plain.index_checks


class Mlp(nn.Module):
    """Two layers without a residual stream between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


def test_an_nm_writer_leaves_no_index_load() -> None:
    """The rows of fc1 go where fc2 reads them; its own columns need no permutation here."""
    codes = []
    for permutation in ("random", "none"):
        torch.manual_seed(0)
        config = padst.SparseConfig("nm:4:16", sparsity=0.5, permutation=permutation, side="input")
        free = padst.SparseConfig("nm:4:16", sparsity=0.5, permutation="none")
        model = padst.sparsify(Mlp().eval(), {"fc1": free, "fc2": config})
        codes.append(generated(padst.harden(model), {"x": torch.randn(8, 32)}))
    assert codes[0] == codes[1]


@pytest.mark.parametrize("structure", ["block:16", "nm:4:16", "diagonal"])
def test_q_k_and_v_share_one_movement(structure: str) -> None:
    """So do gate and up; what is left of a layer's maps is fused where data move anyway."""
    model, inputs = built("llama")
    config = padst.SparseConfig(
        structure, sparsity=0.5, permutation="random", side="input", share=True
    )
    padst.harden(padst.sparsify(model, config, example_inputs=inputs))
    report = padst.explain(model, inputs, options={"kernels": "sparse", "verify": "strict"})
    moved = [row[1] for row in report.passes if row[0] == "lower_maps"]
    for siblings in ("qkv", ("gate", "up")):
        owned = [s for s in moved if any(f".{name}_proj" in s for name in siblings)]
        assert len(owned) <= 1, str(report)


@pytest.mark.parametrize("structure", ["fan_in", "unstructured"])
def test_element_wise_readers_leave_no_movement(structure: str) -> None:
    model, inputs = sparse("llama", structure, "random")
    report = padst.explain(model, inputs, options={"kernels": "sparse", "verify": "strict"})
    assert report.gathers == 0


@pytest.mark.parametrize("permutation", ["random", "none"])
@pytest.mark.parametrize("name", ["gpt2", "vit", "mixer"])
def test_the_layers_of_an_mlp_are_one_kernel(name: str, permutation: str) -> None:
    options = {"kernels": "sparse", "verify": "strict"}
    report = padst.explain(*sparse(name, "block:16", permutation), options=options)
    ((_, where, state, what),) = (row for row in report.passes if row[0] == "fuse_mlp")
    ends = {"gpt2": ("c_fc", "c_proj"), "mixer": ("channels.fc1", "channels.fc2")}
    assert all(site in where for site in ends.get(name, ("mlp.fc1", "mlp.fc2")))
    assert state == "fired" and what.startswith("one kernel, gelu")


@pytest.mark.slow
def test_feature_major_sites_hand_each_other_their_features_untransposed() -> None:
    counts = []
    for sites in (1, 3):
        torch.manual_seed(0)
        # 72 outputs: the kernels that read tokens as they lie need multiples of 16.
        net = nn.Sequential(*(f for _ in range(sites) for f in (nn.Linear(72, 72), nn.GELU())))
        padst.harden(padst.sparsify(net, structure="fan_in", sparsity=0.9)).eval()
        x = torch.randn(32, 72)
        with torch.no_grad():
            fast = torch.compile(net, backend="padst", options={"kernels": "sparse"})
            y, codes = run_and_get_code(fast, x)
            torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-4)
        counts.append("\n".join(codes).count("transpose_mxn<"))
    assert counts[0] == counts[1] > 0  # before the first site, behind the last

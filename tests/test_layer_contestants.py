import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.layer_contestants import DENSE, OTHERS, in_onnxruntime, inferred, trained


def layers(structure: str = "block:8") -> tuple[nn.Module, nn.Linear]:
    """Return a sparse layer and a dense one with its bias."""
    dense, sparse = nn.Linear(32, 64), nn.Sequential(nn.Linear(32, 64))
    config = padst.SparseConfig(structure, sparsity=0.5, permutation="none")
    padst.sparsify(sparse, config, filter_fn=lambda site: True)
    (layer,) = padst.sparse_layers(sparse).values()
    assert isinstance(layer.bias, Tensor)
    dense.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    return sparse, dense


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["block:8", "block:8:16", "nm:4"])
def test_all_compute_the_same(structure: str) -> None:
    """The dense weight is the sparse one here, so that every contestant has to agree."""
    sparse, dense = layers(structure)
    x = torch.randn(5, 32)
    with torch.no_grad():
        calls = inferred(sparse.eval(), dense.eval(), x)
        expected = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
        names = {"padst", "graph", *DENSE, *OTHERS} - (
            {"torch BSR"} if structure != "block:8" else set()
        )
        assert set(calls) == names
        for name, call in calls.items():
            result = call()
            got = torch.from_numpy(
                np.asarray(result[0] if name in ("onnxruntime", "graph") else result)
            )
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_all_train_the_same() -> None:
    sparse, dense = layers()
    calls = trained(sparse.train(), dense.train(), torch.randn(5, 32))
    of_inputs: dict[str, Tensor] = {name: call()[0] for name, call in calls.items()}
    assert set(of_inputs) == {"padst", "F.linear", "Inductor", "masked dense"}
    for name, grad in of_inputs.items():
        torch.testing.assert_close(grad, of_inputs["F.linear"], rtol=1e-5, atol=1e-5, msg=name)


def test_no_sparse_peer_in_16_bits_or_where_none_is_wanted() -> None:
    sparse, dense = layers()
    with torch.no_grad():
        calls = inferred(sparse.eval(), dense.eval(), torch.randn(5, 32), others=False)
    assert set(calls) == {"padst", "graph", *DENSE}
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        calls = inferred(sparse.bfloat16().eval(), dense.bfloat16().eval(), x)
    assert set(calls) == {"padst", "graph", "F.linear", "Inductor", "masked dense"}


def test_without_onnxruntime_there_is_no_such_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert in_onnxruntime(torch.nn.Linear(2, 2), torch.randn(1, 2)) is None

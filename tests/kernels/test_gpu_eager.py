"""Which way an operator runs on a GPU, and that each computes the same; on a CPU, interpreted."""

import pytest
import torch
from torch import Tensor

from padst_compiler.backend import gpu_eager
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, unit_of

from .stored import weights

SHAPE = Shape(96, 64)
SOME: list[Structure] = [Block(16), FanIn(), NM(16), Diagonal()]


def calls(structure: Structure) -> list[tuple[torch._ops.OpOverload, tuple[object, ...], Tensor]]:
    values, indices, dense = weights(structure, SHAPE)
    x, grad = torch.randn(2, 3, 64), torch.randn(2, 3, 96)
    flat = grad.flatten(0, 1).double(), x.flatten(0, 1).double()
    packed = structure.pack(flat[0].t() @ flat[1], indices)
    unit, name = unit_of(values, indices), structure.name
    return [
        (LINEAR[name], (x, values, indices, None, 96), x.double() @ dense.t()),
        (LINEAR_DX[name], (grad, values, indices, 64), grad.double() @ dense),
        (LINEAR_DW[name], (grad, x, indices, unit), packed),
    ]


@pytest.mark.parametrize("structure", SOME, ids=str)
@pytest.mark.parametrize("cheaper", [False, True])
def test_either_way_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, structure: Structure, cheaper: bool
) -> None:
    monkeypatch.setattr(gpu_eager, "_is_cheaper", lambda *given: cheaper)
    for op, args, expected in calls(structure):
        got = gpu_eager.run(op, *args)
        assert got.is_contiguous() and got.shape == expected.shape
        assert float((got.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def chosen(op: torch._ops.OpOverload, tokens: int, layer: Shape, structure: Structure) -> bool:
    kept = structure.kept(layer, 0.9)
    indices = torch.empty(structure.index_shape(layer, kept), dtype=torch.int32)
    x = torch.empty(tokens, layer.in_features, dtype=torch.bfloat16, device="meta")
    values = torch.empty(*indices.shape, *structure.unit(layer), device="meta", dtype=x.dtype)
    args = (x, values, indices, None, layer.out_features)
    given = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args)
    return gpu_eager._is_cheaper(op, given, False)


WIDE = Shape(11008, 4096)


@pytest.mark.parametrize("tokens", [1, 197, 6304, 50432])
@pytest.mark.parametrize("size", [32, 64])
def test_blocks_run_their_kernel(tokens: int, size: int) -> None:
    assert chosen(LINEAR["block"], tokens, Shape(3072, 768), Block(size))


@pytest.mark.parametrize("structure", [FanIn(), NM(16), Diagonal()], ids=str)
def test_single_weights_run_theirs_for_few_tokens_only(structure: Structure) -> None:
    op = LINEAR[structure.name]
    assert chosen(op, 1, WIDE, structure)
    assert not chosen(op, 6304, WIDE, structure)
    assert chosen(op, 64, WIDE, structure) == (structure.name == "nm")  # laid out in registers


def test_every_kind_of_kernel_is_known_to_the_dispatcher() -> None:
    for op in gpu_eager.LAUNCHES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")


def test_what_no_kernel_multiplies_runs_dense() -> None:
    values, indices, dense = weights(Block(16), SHAPE, torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    y = gpu_eager.run(LINEAR["block"], x, values, indices, None, 96)
    torch.testing.assert_close(y, x @ dense.t())


def test_numbers_of_two_types_are_refused_as_torch_refuses_them() -> None:
    values, indices, _ = weights(Block(16), SHAPE, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        gpu_eager.run(LINEAR["block"], torch.randn(3, 64), values, indices, None, 96)

"""The Triton block kernels against float64: interpreted where there is no GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.kernels import triton_block
from padst_compiler.kernels.triton_block import (
    by_column,
    dw,
    dx,
    gradient,
    linear,
    power,
    sums,
    variants,
)
from padst_compiler.structures import Block, Shape

from .stored import weights

pytest.importorskip("triton")

# Of the largest magnitude. The interpreter cuts bits off where it stores bf16: twice the rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}
BLOCKS = [Block(n) for n in (8, 16, 32, 64, 128, 48)] + [Block(8, 24), Block(16, 64)]
Few = settings(
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a kernel does not store be NaN."""

    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: Any, **how: Any) -> Tensor:
        y = new_empty(self, *size, **how)
        return y.fill_(math.nan) if y.is_floating_point() else y

    monkeypatch.setattr(Tensor, "new_empty", filled)


def close(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape and y.is_contiguous()
    error = float((y.double() - expected).abs().max())
    assert error <= TOLERANCE[y.dtype] * float(expected.abs().max())  # which NaN is not


def layer(
    structure: Block,
    grid: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    sparsity: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, indices and the weight of so many rows and columns of blocks."""
    rows, columns = structure.sides
    shape = Shape(grid[0] * rows, grid[1] * columns)
    values, indices, dense = weights(structure, shape, dtype, sparsity)
    return values.to(device), indices.to(device), dense.to(device)


def agree(structure: Block, x: Tensor, grad: Tensor, stored: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare all three products."""
    values, indices, dense = stored
    (outputs, inputs), dtype = dense.shape, values.dtype
    bias = torch.randn(outputs).to(values)
    for b in (None, bias):
        y = linear(x, values, indices, b, outputs)
        assert y.dtype is dtype
        close(y, x.double() @ dense.t() + (0.0 if b is None else b.double()))
    gx = dx(grad, values, indices, inputs)
    assert gx.dtype is dtype
    close(gx, grad.double() @ dense)
    gw = dw(grad, x, indices, values.shape[2:])
    assert gw.dtype is dtype
    full = grad.double().reshape(-1, outputs).t() @ x.double().reshape(-1, inputs)
    close(gw, structure.pack(full, indices))


def inputs(dense: Tensor, values: Tensor, *lead: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(*lead, dense.shape[1]).to(values),
        torch.randn(*lead, dense.shape[0]).to(values),
    )


# -- blocks, types and tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("structure", BLOCKS, ids=str)
def test_products_are_those_of_the_weight(
    structure: Block, dtype: torch.dtype, device: torch.device
) -> None:
    stored = layer(structure, (2, 4), device, dtype)
    agree(structure, *inputs(stored[2], stored[0], 19), stored)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 33, 127, 129, 300])
@pytest.mark.parametrize("structure", [Block(16), Block(8, 24)], ids=str)
def test_tokens_may_be_any_number(structure: Block, tokens: int, device: torch.device) -> None:
    stored = layer(structure, (3, 4), device)
    agree(structure, *inputs(stored[2], stored[0], tokens), stored)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_block_may_be_wider_than_a_tile(dtype: torch.dtype, device: torch.device) -> None:
    structure = Block(160, 144)  # tiles of 128: the second of each is not full
    stored = layer(structure, (1, 2), device, dtype)
    _, kept, c, r = stored[0].shape
    how = gradient((1, kept, c, r), 70, 288, dtype).values
    assert how["PARTS"] == 2 and how["CHUNKS"] > 1
    agree(structure, *inputs(stored[2], stored[0], 70), stored)


@pytest.mark.parametrize("lead", [(), (2, 9), (2, 1, 5), (1, 1)], ids=str)
def test_inputs_may_have_any_number_of_axes(lead: tuple[int, ...], device: torch.device) -> None:
    stored = layer(Block(16), (3, 4), device)
    agree(Block(16), *inputs(stored[2], stored[0], *lead), stored)


def test_inputs_may_lie_in_any_way(device: torch.device) -> None:
    stored = layer(Block(16), (3, 4), device)

    def ways(width: int) -> tuple[Tensor, ...]:
        wide = torch.randn(18, 2 * width + 3).to(device)
        transposed = torch.randn(width, 18).to(device).t()
        moved = torch.randn(9, 2, width).to(device).transpose(0, 1).flatten(0, 1)
        return (
            transposed,
            wide[:, 3 : width + 3],
            wide[:, 1 : 2 * width : 2],
            wide[:, :width],
            moved,
        )

    for x, grad in zip(ways(64), ways(48), strict=True):
        agree(Block(16), x, grad, stored)
    x, grad = (torch.randn(n, 3, 5).to(device).permute(2, 1, 0) for n in (64, 48))
    agree(Block(16), x, grad, stored)


def test_weights_may_lie_in_any_way(device: torch.device) -> None:
    values, indices, dense = layer(Block(16), (3, 4), device)
    values = values.transpose(2, 3).contiguous().transpose(2, 3)
    indices = indices.t().contiguous().t()
    agree(Block(16), *inputs(dense, values, 19), (values, indices, dense))


def test_no_tokens_give_no_outputs_and_a_gradient_of_zeros(device: torch.device) -> None:
    values, indices, dense = layer(Block(16), (3, 4), device)
    x, grad = inputs(dense, values, 0)
    assert linear(x, values, indices, None, 48).shape == (0, 48)
    assert dx(grad, values, indices, 64).shape == (0, 64)
    assert torch.equal(dw(grad, x, indices, (16, 16)), torch.zeros_like(values))


def test_blocks_may_come_in_any_order_and_repeat(device: torch.device) -> None:
    structure, shape = Block(16), Shape(48, 64)
    indices = torch.tensor([[2, 0, 3], [3, 1, 0], [1, 3, 2]], dtype=torch.int32, device=device)
    values = torch.randn(3, 3, 16, 16).to(device)
    dense = structure.unpack(values.double(), indices, shape)
    agree(structure, *inputs(dense, values, 19), (values, indices, dense))


@pytest.mark.parametrize("structure", [Block(48), Block(8, 24), Block(24, 8)], ids=str)
def test_what_a_block_does_not_read_does_not_reach_it(
    structure: Block, device: torch.device
) -> None:
    r, c = structure.sides  # not a multiple of what is summed at once
    indices = torch.tensor([[1], [0], [2]], dtype=torch.int32, device=device)
    values = torch.randn(3, 1, c, r).to(device)
    x, grad = torch.randn(19, 3 * c).to(device), torch.randn(19, 3 * r).to(device)
    x[:, :c], grad[:, :r] = math.nan, math.nan
    p, q = (torch.arange(n, device=device) for n in (3 * c, 3 * r))
    for maps in ((None, None), (p, q)):
        y = linear(x, values, indices, None, 3 * r, *maps).isnan()
        assert y[:, r : 2 * r].all() and not y[:, :r].any() and not y[:, 2 * r :].any()
        gx = dx(grad, values, indices, 3 * c, *maps[::-1]).isnan()
        assert gx[:, c : 2 * c].all() and not gx[:, :c].any() and not gx[:, 2 * c :].any()


@given(data=st.data())
@Few
def test_random_layers(data: st.DataObject, device: torch.device) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    structure, grid = Block(draw(1, 20), draw(1, 20)), (draw(1, 3), draw(1, 4))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    stored = layer(structure, grid, device, dtype, data.draw(st.sampled_from([0.0, 0.4, 0.9])))
    agree(structure, *inputs(stored[2], stored[0], draw(1, 40)), stored)


# -- maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Block(16), Block(48), Block(8, 24)], ids=str)
@pytest.mark.parametrize("where", ["from", "into", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_read_and_outputs_stored_through_maps(
    structure: Block, where: str, dtype: torch.dtype, device: torch.device
) -> None:
    values, indices, dense = layer(structure, (3, 4), device, dtype)
    x, grad = inputs(dense, values, 2, 19)
    bias = torch.randn(dense.shape[0]).to(values)

    def maps(read: int, stored: int) -> tuple[Tensor | None, Tensor | None]:
        first, second = (torch.randperm(n).to(device) for n in (read, stored))
        return (None if where == "into" else first), (None if where == "from" else second)

    def moved(y: Tensor, into: Tensor | None) -> Tensor:
        return y if into is None else torch.empty_like(y).index_copy_(-1, into, y)

    p, q = maps(dense.shape[1], dense.shape[0])
    read = (x if p is None else x[..., p]).double()
    for b in (None, bias):  # of the outputs as they are stored
        y = linear(x, values, indices, b, dense.shape[0], p, q)
        close(y, moved(read @ dense.t(), q) + (0.0 if b is None else b.double()))
    q, p = maps(dense.shape[0], dense.shape[1])
    read = (grad if q is None else grad[..., q]).double()
    close(dx(grad, values, indices, dense.shape[1], q, p), moved(read @ dense, p))


def test_a_map_may_pick_from_more_features_and_int32_will_do(device: torch.device) -> None:
    values, indices, dense = layer(Block(16), (3, 4), device)
    x, p = torch.randn(19, 100).to(device), torch.randperm(100)[:64].to(device)
    for table in (p, p.int()):
        close(linear(x, values, indices, None, 48, table), x[:, p].double() @ dense.t())


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 100, 400, 401])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_of_a_gradient_are_summed_in_parts(
    dtype: torch.dtype, tokens: int, device: torch.device
) -> None:
    structure = Block(16)
    values, indices, dense = layer(structure, (2, 2), device, dtype, sparsity=0.5)
    parts = gradient((2, 1, 16, 16), tokens, 32, dtype).values["SPLIT"]
    assert (parts > 1) == (tokens >= 400)
    x, grad = inputs(dense, values, tokens)
    gw = dw(grad, x, indices, (16, 16))
    close(gw, structure.pack(grad.double().t() @ x.double(), indices))
    assert torch.equal(gw, dw(grad, x, indices, (16, 16)))  # in one order: results repeat


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parts_of_a_gradient_are_not_rounded(dtype: torch.dtype, device: torch.device) -> None:
    assert gradient((1, 1, 16, 16), 512, 16, dtype).values["SPLIT"] > 1
    x = torch.ones(512, 16, device=device, dtype=dtype)
    x[256:], x[0] = -1.0, 1.0 + 2.0**-7  # parts are near 100, and what they leave is small
    indices = torch.zeros(1, 1, dtype=torch.int32, device=device)
    gw = dw(torch.ones_like(x), x, indices, (16, 16))
    assert torch.equal(gw, torch.full_like(gw, 2.0**-7))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_may_be_more_than_there_are_tokens_for(
    parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split(*args: Any) -> Any:
        how = gradient(*args)
        values, programs = {**how.values, "SPLIT": parts}, how.values["TILES"] * parts
        return type(how)(values, programs=programs)

    monkeypatch.setattr(triton_block, "gradient", split)
    values, indices, dense = layer(Block(16), (3, 4), device)
    x, grad = inputs(dense, values, 37)
    expected = Block(16).pack(grad.double().t() @ x.double(), indices)
    close(dw(grad, x, indices, (16, 16)), expected)


def test_a_block_column_without_blocks_has_no_gradient(device: torch.device) -> None:
    structure, shape = Block(16), Shape(48, 80)
    indices = torch.tensor([[1, 3], [1, 3], [1, 3]], dtype=torch.int32, device=device)
    values, grad = torch.randn(3, 2, 16, 16).to(device), torch.randn(37, 48).to(device)
    dense = structure.unpack(values.double(), indices, shape)
    into = torch.randperm(80).to(device)
    for table in (None, into):
        gx = dx(grad, values, indices, 80, None, table)
        gx = gx if table is None else gx[:, table]
        close(gx, grad.double() @ dense)
        for column in (0, 2, 4):
            assert not gx[:, 16 * column : 16 * column + 16].any()


@pytest.mark.parametrize(("rows", "kept", "columns"), [(1, 1, 1), (5, 3, 7), (8, 2, 40), (3, 4, 4)])
def test_blocks_are_listed_by_column(
    rows: int, kept: int, columns: int, device: torch.device
) -> None:
    indices = torch.stack([torch.randperm(columns)[:kept] for _ in range(rows)]).int()
    order, starts = by_column(indices.to(device), columns)
    flat = indices.flatten().tolist()
    lists = [[at for at, column in enumerate(flat) if column == c] for c in range(columns)]
    edges = starts.tolist()
    found = [order.tolist()[a:b] for a, b in itertools.pairwise(edges)]
    assert found == lists and len(edges) == columns + 1
    assert order.dtype is starts.dtype is torch.int32
    assert order.device.type == starts.device.type == device.type


# -- programs --------------------------------------------------------------------------------------


def test_the_next_power_of_two() -> None:
    assert [power(n) for n in (0, 1, 2, 3, 4, 5, 127, 128, 129)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        128,
        128,
        256,
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("structure", BLOCKS, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 6304])
def test_tiles_cover_what_they_must(structure: Block, tokens: int, dtype: torch.dtype) -> None:
    r, c = structure.sides
    size = (12, 3, c, r)
    launches = {
        (c, r, 12): sums(size, 12, c, tokens, dtype),
        (r, c, 9): sums(size, 9, r, tokens, dtype),
    }
    for (inner, wide, groups), how in launches.items():
        v = how.values
        assert v["PARTS"] * v["BLOCK_N"] >= wide > (v["PARTS"] - 1) * v["BLOCK_N"]
        assert how.tiles == v["TILES"] == groups * v["PARTS"]
        assert v["C"] == inner and inner % v["ALIGNED"] == 0
        assert min(v["BLOCK_M"], v["BLOCK_N"], v["BLOCK_K"]) >= 16
    how = gradient(size, tokens, 9 * c, dtype)
    v = how.values
    assert v["CHUNKS"] * v["BLOCK_M"] >= 3 * c and v["PARTS"] * v["BLOCK_N"] >= r
    assert how.programs == v["SPLIT"] * v["TILES"] == v["SPLIT"] * 12 * v["PARTS"] * v["CHUNKS"]
    assert (v["INPUTS"], v["OUTPUTS"]) == (9 * c, 12 * r)


# -- programs --------------------------------------------------------------------------------------

LLAMA = (172, 6, 64, 64)  # 4096-11008 at 90 %


@pytest.mark.parametrize("groups", [172, 64, 12, 3])
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_few_tokens_are_many_narrow_programs(groups: int, tokens: int) -> None:
    how = sums((groups, 6, 64, 64), groups, 64, tokens, torch.bfloat16)
    assert how.grid(tokens) >= triton_block.READING or how.values["BLOCK_N"] == 16
    assert how.values["TILES"] * how.values["BLOCK_N"] == groups * 64
    assert sums((groups, 6, 64, 64), groups, 64, 64, torch.bfloat16).values["BLOCK_N"] == 64


def test_long_sums_load_two_steps_ahead() -> None:
    stages = [sums((172, kept, 64, 64), 172, 64, 8192, torch.bfloat16).stages for kept in (1, 6)]
    assert stages == [3, 5]
    assert sums(LLAMA, 172, 64, 8192, torch.bfloat16, gathered=True).stages == 3


@pytest.mark.parametrize("tokens", [1, 32, 64, 8192])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_tuned_covers_the_same_outputs(
    tokens: int, gathered: bool, dtype: torch.dtype
) -> None:
    first = sums(LLAMA, 172, 64, tokens, dtype, gathered=gathered)
    ways = variants(first, dtype)
    assert ways[0] == first and len(ways) > 1
    assert all(one not in ways[:at] for at, one in enumerate(ways))
    for how in ways:
        values = how.values
        assert values["TILES"] == how.tiles == 172 * values["PARTS"]
        assert (values["PARTS"] - 1) * values["BLOCK_N"] < 64 <= values["PARTS"] * values["BLOCK_N"]
        assert values["BLOCK_K"] % values["ALIGNED"] == 64 % values["ALIGNED"] == 0
        if dtype is torch.bfloat16 and tokens >= 64:
            assert values["BLOCK_M"] >= 64  # or Hopper's matrix units would not be used


def test_every_tuned_program_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    values, indices, dense = (
        t.to(device) for t in weights(Block(64), Shape(128, 192), torch.float32, 0.5)
    )
    for tokens in (5, 70):
        x = torch.randn(tokens, 192).to(device)
        sizes = triton_block.sizes_of(values)
        for how in variants(sums(sizes, 2, 64, tokens, x.dtype), x.dtype):
            monkeypatch.setattr(triton_block, "sums", lambda *_, how=how, **__: how)
            y = linear(x, values, indices, None, 128)
            torch.testing.assert_close(y.double(), x.double() @ dense.t(), rtol=1e-5, atol=1e-4)
        monkeypatch.undo()

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from padst_compiler.formulation import Geometry
from padst_compiler.kernels import install
from padst_compiler.kernels.micro import fits, source, width
from padst_compiler.ops import LINEAR, MAPPED
from padst_compiler.structures import Block, Shape


def test_widths_tile_the_outputs() -> None:
    assert [width(n) for n in (256, 96, 80, 24, 12, 6, 1)] == [64, 48, 16, 8, 4, 0, 0]
    assert [width(n, 32) for n in (256, 96, 48)] == [32, 32, 16]


def test_a_source_holds_its_headers_once_and_its_call() -> None:
    text = source("    CALLED;", "block.h")
    for said in ("all_sums(const", "block_sums(const", "typename Vector", "    CALLED;"):
        assert text.count(said) == 1
    assert "diagonal_sums(const" not in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, True), ({"dtype": torch.bfloat16}, False), ({"device": "cuda"}, False)],
)
def test_fp32_on_a_cpu(
    changed: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", **changed}
    geometry = Geometry(
        structure=Block(8), shape=Shape(64, 64), kept=2, tokens=9, frozen=True, **given
    )
    assert fits(geometry) is expected
    monkeypatch.setattr("sys.platform", "win32")  # its compiler has other vectors
    assert fits(geometry) is False


@pytest.mark.parametrize("features", [16, pytest.param(1024, marks=pytest.mark.slow)])
def test_rows_a_page_apart_are_copied_and_others_read_in_place(features: int) -> None:
    install()
    structure, shape = Block(8), Shape(16, features)
    dense = torch.randn(16, features)
    indices = structure.select(dense, 1)
    values = structure.pack(dense, indices)
    x = torch.randn(5, features)

    def run(x: Tensor, v: Tensor, i: Tensor) -> Tensor:
        y: Tensor = MAPPED[LINEAR["block"]](x, v, i, 16, None, None)
        return y

    y, codes = run_and_get_code(torch.compile(run), x, values, indices)
    read = "APART" if features == 1024 else "HERE"
    rows = features + 16 if features == 1024 else features
    assert f"<8, 8, 8, {rows}, padst::Read::{read}, false>" in "".join(codes)
    expected = x.double() @ structure.unpack(values.double(), indices, shape).t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)

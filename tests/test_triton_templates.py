"""Private names of Inductor that templates use: they exist, and do what is said of them."""

import importlib.util
import inspect

import pytest
import torch
from torch._inductor import config
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)

from padst_compiler import triton_templates
from padst_compiler.triton_text import Kernel

aten, prims = torch.ops.aten, torch.ops.prims


def test_triton_is_looked_for_without_a_gpu() -> None:
    assert triton_templates.is_available() is bool(importlib.util.find_spec("triton"))


def test_configurations_are_timed_where_that_was_asked_for() -> None:
    assert not triton_templates.is_tuned()
    for option in ("max_autotune", "max_autotune_gemm"):
        with config.patch({option: True}):
            assert triton_templates.is_tuned()


def test_a_template_is_made_once_and_knows_its_grid() -> None:
    kernel = Kernel("padst_of_a_test", ("X",), "    pass")
    made = triton_templates._template(kernel)
    assert isinstance(made, TritonTemplate) and triton_templates._template(kernel) is made
    meta = {"BLOCK_M": 16, "TILES": 3, "PROGRAMS": 0}
    assert made.grid(33, 7, meta) == (9, 1, 1)
    assert made.grid(33, 7, {**meta, "PROGRAMS": 5}) == (5, 1, 1)


@pytest.mark.parametrize(
    "op",
    [
        aten.sort.stable,
        aten.searchsorted.Tensor,
        aten.sum.dim_IntList,
        aten.add.Tensor,
        prims.iota.default,
        prims.convert_element_type.default,
    ],
    ids=str,
)
def test_inductor_lowers_what_lists_are_made_of(op: object) -> None:
    assert op in lowerings


def test_what_is_called_takes_what_is_given() -> None:
    given = inspect.signature(TritonTemplate.generate).parameters
    assert {"input_nodes", "layout", "num_stages", "num_warps", "kwargs"} <= set(given)
    assert all(map(callable, (autotune_select_algorithm, realize_inputs, SymbolicGridFn)))

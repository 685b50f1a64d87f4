from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from padst_compiler import cpp_templates as cpp

SOURCE = """
{{template.header().getvalue()}}
extern "C" {{export}}
{{kernel.def_kernel(inputs=buffers, outputs={"Y": result}, aliases=aliases)}}
{
    {%- for name, x in inputs.items() %}
    const auto* const {{name}} = &{{kernel.index(x, [0] * x.get_size()|length)}};
    {%- endfor %}
    {%- set unused = kernel.define_stack_allocated_buffer("tile", [1, N]) %}
    float row[{{N}}], *tile = row;
    for (int64_t m = 0; m < {{kernel.size(A, 0)}}; m++) {
        for (int64_t n = 0; n < {{N}}; n++) tile[n] = {{FACTOR}} * A[m * {{kernel.stride(A, 0)}} + n] + B[n];
        {%- set to = kernel.slice_nd(flat, [("m", "m + 1"), ("0", N)]) %}
        {{kernel.store_output(to, kernel.local_buffers["tile"], made, nodes, offsets=("m", "0"), reindexers=reindexers)}}
    }
}
"""  # noqa: E501
seen: list[Any] = []


@torch.library.custom_op("padst_test::scaled", mutates_args=())
def scaled(a: Tensor, b: Tensor) -> Tensor:
    return 3.0 * a + b[0]


@scaled.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def lowering(a: Any, b: Any) -> Any:
    op = torch.ops.padst_test.scaled.default
    sizes = a.get_size()
    seen.append((cpp.are_numbers(sizes), cpp.threads()))
    if a.get_dtype() is not torch.float32:
        return cpp.fallback(op, a, b)
    *_, n = cpp.numbers(sizes[-1:])
    flat = cpp.view(a, [-1, n])
    values = {"N": n, "FACTOR": 3}
    y = cpp.run("padst_test", SOURCE, {"A": flat, "B": b}, (flat.get_size()[0], n), values)
    return cpp.view(y, list(sizes))


cpp.lower(torch.ops.padst_test.scaled.default, lowering)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=str)
def test_a_kernel_runs_and_what_follows_is_fused(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape), torch.randn(1, 8)

    def run(a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = torch.ops.padst_test.scaled(a, b)
        return F.relu(y) + a

    y, codes = run_and_get_code(torch.compile(run), a, b)
    torch.testing.assert_close(y, F.relu(3.0 * a + b[0]) + a)
    assert sum(code.count("async_compile.cpp_pybinding(") for code in codes) == 1
    assert seen[-1] == (True, torch.get_num_threads())


def test_inputs_that_lie_otherwise_are_copied() -> None:
    a, b = torch.randn(8, 5).t(), torch.randn(1, 8)
    run = torch.compile(lambda a, b: torch.ops.padst_test.scaled(a, b))
    torch.testing.assert_close(run(a, b), 3.0 * a + b[0])


def test_inputs_may_be_parts_of_one_tensor() -> None:
    x = torch.randn(6, 24)

    def run(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.padst_test.scaled(x[1:, 3:11], x[:1, 13:21])
        return y

    y, codes = run_and_get_code(torch.compile(run), x)
    torch.testing.assert_close(y, 3.0 * x[1:, 3:11] + x[0, 13:21])
    assert "torch.ops.padst_test" not in "\n".join(codes)


def test_the_operator_itself_is_the_fallback_and_symbols_are_no_numbers() -> None:
    run = torch.compile(lambda a, b: torch.ops.padst_test.scaled(a, b), dynamic=True)
    a, b = torch.randn(5, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    y, codes = run_and_get_code(run, a, b)
    torch.testing.assert_close(y, 3.0 * a + b[0])
    assert "= torch.ops.padst_test.scaled.default(" in "\n".join(codes)
    assert seen[-1][0] is False


# -- the compiler ----------------------------------------------------------------------------------


def test_a_compiler_is_found_or_not() -> None:
    assert cpp.has_compiler({})
    assert not cpp.has_compiler({"cpp.cxx": "no-such-compiler"})
    assert not cpp.has_compiler({"cpp.cxx": (None, "no-such-compiler")})
    assert cpp.has_compiler({"cpp.cxx": ("no-such-compiler", "g++"), "max_autotune": True})

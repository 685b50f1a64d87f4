import contextlib
import importlib.util
import linecache
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
import torch
from torch import Tensor

from padst_compiler import triton_text
from padst_compiler.triton_text import (
    TOKENS,
    Kernel,
    Launch,
    function_of,
    is_interpreted,
    launch,
    mapped,
    template_of,
    written,
)


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    """Let no test launch what another put in the place of a compiled function."""
    triton_text._function.cache_clear()
    yield
    triton_text._function.cache_clear()


BODY = """
    M = {{size("X", 0)}}
    N = {{size("W", 0)}}
    idx_m = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(INDEX_DTYPE)
    n = tl.program_id(0) % TILES * 4 + tl.arange(0, 4)
    w = tl.load(W + n, mask=n < N, other=0.0).to(tl.float32)
    idx_k = n[None, :]
{%- if IN_MAP %}
    idx_k = tl.load(FROM + n, mask=n < N, other=0)[None, :]
{%- endif %}
    idx_n = n[None, :]
{%- if OUT_MAP %}
    idx_n = tl.load(INTO + n, mask=n < N, other=0)[None, :]
{%- endif %}
    live = (idx_m < M) & (n < N)[None, :]
    {{load_input("X", "x", ("idx_m", "idx_k"), mask="live", indent_width=4)}}
    y = x.to(tl.float32) * w[None, :]
    {{store_output(("idx_m", "idx_n"), "y", "live", val_shape=("BLOCK_M", "4"))}}
"""
# x[m, n] * w[n], in columns of 4; in fp32, as the interpreter multiplies no bf16.
SCALED = Kernel("scaled", ("X", "W"), BODY)
SIZES = {"X": (None, 6), "W": (6,)}
PLAIN = {"BLOCK_M": 2, "TILES": 2, "IN_MAP": False, "OUT_MAP": False}
NEEDED = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="Triton is not installed"
)


def text(bias: bool = False, **changed: Any) -> str:
    return written(SCALED, SIZES, 6, PLAIN | {"INDEX_DTYPE": "tl.int32"} | changed, bias=bias)


def numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-4, 5, shape).to(device, dtype)  # whose sums and products are exact


# -- what is written -------------------------------------------------------------------------------


def test_constants_follow_the_signature_in_their_order() -> None:
    source = written(SCALED, SIZES, 6, PLAIN | {"P": repr("tf32"), "T": "tl.int64"})
    head, rest = source.split("def scaled(X, W, OUT, M):\n")
    assert head.endswith('\n\n\n@triton.jit(do_not_specialize=("M",))\n')
    assert rest.splitlines()[:6] == [
        "    BLOCK_M: tl.constexpr = 2",
        "    TILES: tl.constexpr = 2",
        "    IN_MAP: tl.constexpr = False",
        "    OUT_MAP: tl.constexpr = False",
        "    P: tl.constexpr = 'tf32'",
        "    T: tl.constexpr = tl.int64",
    ]


def test_sizes_are_numbers_but_for_the_tokens() -> None:
    lines = text().splitlines()
    assert "    M = M" in lines and "    N = 6" in lines
    assert "    x = tl.load(X + (idx_m) * 6 + (idx_k) * 1, mask=live, other=0.0)" in lines


@pytest.mark.parametrize(
    ("size", "place"),
    [
        ((7,), "(i) * 1"),
        ((5, 7), "(i) * 7 + (j) * 1"),
        ((None, 3, 5), "(i) * 15 + (j) * 5 + (k) * 1"),
    ],
    ids=str,
)
def test_inputs_are_read_where_they_lie(size: tuple[int | None, ...], place: str) -> None:
    names = str(tuple("ijk"[: len(size)]))
    kernel = Kernel("reads", ("W",), f'\n    {{{{load_input("W", "w", {names}, mask="m")}}}}')
    assert f"w = tl.load(W + {place}, mask=m, other=0.0)" in written(kernel, {"W": size}, 1, {})


def test_bias_is_the_input_before_the_output_and_added_to_sums() -> None:
    plain, biased = text(), text(bias=True)
    assert "BIAS" not in plain and "def scaled(X, W, BIAS, OUT, M):" in biased
    added = "tl.load(BIAS + (idx_n), mask=(idx_n) < 6, other=0.0).to(tl.float32)"
    assert f"(y + {added}).to(OUT.dtype.element_ty), mask=live)" in biased
    place = "tl.store(OUT + (idx_m) * 6 + (idx_n), "
    assert place in plain and place in biased


def test_the_text_is_a_function_without_gaps_or_hooks() -> None:
    for source in (text(), text(bias=True), text(IN_MAP=True, OUT_MAP=True)):
        compile(source, "scaled", "exec")
        body = source.split("@triton", 1)[1]
        assert body.endswith("\n") and all(line.strip() for line in body.splitlines())
        assert "{" not in source and "padst" not in source


def test_maps_are_read_where_the_constants_say_so() -> None:
    for inputs in (False, True):
        for outputs in (False, True):
            source = text(IN_MAP=inputs, OUT_MAP=outputs)
            assert ("FROM +" in source, "INTO +" in source) == (inputs, outputs)


def test_what_the_template_asks_for_must_be_given() -> None:
    given = {key: value for key, value in PLAIN.items() if key != "IN_MAP"}
    with pytest.raises(jinja2.UndefinedError, match="IN_MAP"):
        written(SCALED, SIZES, 6, given)
    with pytest.raises(KeyError, match="W"):
        written(SCALED, {"X": (None, 6)}, 6, PLAIN)


def test_the_template_is_the_body_behind_the_names_of_the_inputs() -> None:
    assert template_of(SCALED) == "{{def_kernel('X', 'W')}}\n" + BODY
    assert template_of(Kernel("one", ("X",), "")) == "{{def_kernel('X')}}\n"


def test_a_kernel_that_reads_more_says_so_in_its_name() -> None:
    assert SCALED.reading() == SCALED
    assert SCALED.reading("FROM", "INTO") == Kernel(
        "scaled_from_into", ("X", "W", "FROM", "INTO"), BODY
    )


def test_programs_follow_the_rows_or_are_all() -> None:
    how = Launch({"BLOCK_M": 16}, tiles=3)
    assert [how.grid(rows) for rows in (0, 1, 16, 17, 32, 33)] == [0, 3, 3, 6, 6, 9]
    fixed = Launch({"BLOCK_M": 16}, programs=5)
    assert [fixed.grid(rows) for rows in (0, 1, 1000)] == [5, 5, 5]


def test_tokens_are_the_rows_of_inputs_and_gradients() -> None:
    assert TOKENS == ("X", "G")


# -- what is launched ------------------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that would have run."""
    seen: list[str] = []

    def function(name: str, source: str) -> Any:
        seen.append(f"{name}\n{source}")
        return defaultdict(lambda: lambda *args, **how: None)  # one for every grid

    monkeypatch.setattr(triton_text, "function_of", function)
    return seen


@NEEDED
@pytest.mark.parametrize(("rows", "wide"), [(2**15, "int32"), (2**16, "int64")], ids=str)
def test_places_in_big_tensors_are_counted_in_64_bits(
    sources: list[str], rows: int, wide: str
) -> None:
    for inputs, outputs in ((32768, 4), (4, 32768)):  # 2**30 or 2**31 numbers
        x, w = (torch.empty(n, device="meta") for n in ((rows, inputs), (inputs,)))
        launch(SCALED, {"X": x, "W": w}, (rows, outputs), Launch(PLAIN, tiles=2))
        assert f"INDEX_DTYPE: tl.constexpr = tl.{wide}\n" in sources.pop()


@NEEDED
@pytest.mark.parametrize("dtype", triton_text.TYPES, ids=str)
def test_products_are_of_the_type_of_the_inputs_but_in_the_interpreter(
    sources: list[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = (torch.empty(n, device="meta", dtype=dtype) for n in ((3, 6), (6,)))
    for interpreted in (False, True):
        monkeypatch.setattr(triton_text, "is_interpreted", lambda: interpreted)  # noqa: B023
        triton_text._function.cache_clear()
        y = launch(SCALED, {"X": x, "W": w}, (3, 6), Launch(PLAIN, tiles=2))
        kind = "tl.float32" if interpreted else triton_text.TYPES[dtype]
        assert f"DOT: tl.constexpr = {kind}\n" in sources.pop() and y.dtype is dtype
    y = launch(SCALED, {"X": x, "W": w}, (3, 6), Launch(PLAIN, tiles=2), dtype=torch.float32)
    assert y.dtype is torch.float32


@NEEDED
def test_a_text_is_written_once_for_any_number_of_tokens(sources: list[str]) -> None:
    w = torch.empty(6, device="meta")
    for tokens in (3, 3, 5):
        x = torch.empty(tokens, 6, device="meta")
        launch(SCALED, {"X": x, "W": w}, (tokens, 6), Launch(PLAIN, tiles=2))
    assert len(sources) == 1


@NEEDED
def test_a_kernel_is_launched_on_the_device_of_its_inputs(
    sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
        seen.append(x)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x, w = torch.empty(3, 6, device="meta"), torch.empty(6, device="meta")
    launch(SCALED, {"X": x, "W": w}, (3, 6), Launch(PLAIN, tiles=2))
    assert len(sources) == 1 and seen == [x]


@NEEDED
def test_sizes_of_a_launch_are_those_of_its_tensors(sources: list[str]) -> None:
    x, w = torch.empty(3, 8, device="meta"), torch.empty(5, 2, 7, device="meta")
    load = '{{load_input("W", "w", ("i", "j", "k"), mask="m")}}'
    body = f'\n    {load} # {{{{size("X", 0)}}}}{{{{size("W", 0)}}}}'
    kernel = Kernel("sizes", ("X", "W"), body)
    assert launch(kernel, {"X": x, "W": w}, (3, 4), Launch({}, programs=1)).shape == (3, 4)
    assert "W + (i) * 14 + (j) * 7 + (k) * 1, mask=m, other=0.0) # M5" in sources[0]


@NEEDED
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_a_kernel_runs(tokens: int, biased: bool, device: torch.device) -> None:
    x, w = numbers(tokens, 6, device=device), numbers(6, device=device)
    bias = numbers(6, device=device) if biased else None
    y = launch(SCALED, {"X": x, "W": w}, (tokens, 6), Launch(PLAIN, tiles=2), bias=bias)
    assert torch.equal(y, x * w + (0.0 if bias is None else bias))


@NEEDED
@pytest.mark.parametrize("dtype", triton_text.TYPES, ids=str)
def test_bias_and_sums_meet_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    x, w = numbers(3, 6, device=device, dtype=dtype), numbers(6, device=device, dtype=dtype)
    bias = torch.full((6,), 2.0**-10, device=device).to(dtype)
    given, how = {"X": x, "W": w}, Launch(PLAIN, tiles=2)
    y = launch(SCALED, given, (3, 6), how, bias=bias, dtype=torch.float32)
    assert y.dtype is torch.float32
    assert torch.equal(y, x.float() * w.float() + 2.0**-10)


@NEEDED
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 0)], ids=str)
def test_an_empty_output_runs_nothing(
    shape: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_text, "function_of", lambda name, source: {})  # has no grid
    x, w = torch.zeros(shape, device=device), torch.zeros(shape[1], device=device)
    y = launch(SCALED, {"X": x, "W": w}, shape, Launch(PLAIN, tiles=2))
    assert y.shape == shape and y.dtype is x.dtype


@NEEDED
def test_inputs_that_do_not_lie_in_order_are_copied(device: torch.device) -> None:
    w = numbers(12, device=device)[::2]
    wide = numbers(5, 14, device=device)
    for x in (numbers(6, 5, device=device).t(), wide[:, 1:7], wide[:, 1:13:2], w.expand(5, 6)):
        assert not x.is_contiguous()
        y = launch(SCALED, {"X": x, "W": w}, (5, 6), Launch(PLAIN, tiles=2))
        assert torch.equal(y, x * w) and y.is_contiguous()


@NEEDED
@pytest.mark.parametrize("maps", ["none", "from", "into", "both"])
def test_inputs_are_read_and_outputs_stored_through_maps(maps: str, device: torch.device) -> None:
    x, w, bias = numbers(5, 6, device=device), numbers(6, device=device), torch.arange(6.0)
    given, bias = {"X": x, "W": w}, bias.to(device)
    p = torch.randperm(6).to(device) if maps in ("from", "both") else None
    q = torch.randperm(6).to(device) if maps in ("into", "both") else None
    how = Launch({"BLOCK_M": 2, "TILES": 2}, tiles=2)
    expected = (x if p is None else x[:, p]) * w
    if q is not None:
        expected = torch.empty_like(expected).index_copy_(1, q, expected)
    assert torch.equal(mapped(SCALED, given, 6, how, p, q), expected)
    # A bias is of the outputs as they are stored.
    assert torch.equal(mapped(SCALED, given, 6, how, p, q, bias), expected + bias)
    assert "IN_MAP" not in how.values


@NEEDED
def test_maps_name_the_kernel(sources: list[str]) -> None:
    given = {"X": torch.empty(5, 6, device="meta"), "W": torch.empty(6, device="meta")}
    p, how = torch.empty(6, dtype=torch.int64, device="meta"), Launch(PLAIN, tiles=2)
    for maps in ((None, None), (p, None), (None, p), (p, p)):
        mapped(SCALED, given, 6, how, *maps)
    names = [source.splitlines()[0] for source in sources]
    assert names == ["scaled", "scaled_from", "scaled_into", "scaled_from_into"]
    assert "def scaled_from_into(X, W, FROM, INTO, OUT, M):" in sources[-1]


# -- the function ----------------------------------------------------------------------------------


@NEEDED
def test_one_text_is_one_function() -> None:
    assert function_of("scaled", text()) is function_of("scaled", "".join([text()]))
    assert function_of("scaled", text()) is not function_of("scaled", text(bias=True))


@NEEDED
def test_a_text_can_be_read_back() -> None:
    source = text()
    function_of("scaled", source)
    place = next(name for name in linecache.cache if name.startswith("<scaled "))
    linecache.checkcache()  # as a traceback does before it shows lines: the text stays
    assert "".join(linecache.getlines(place)).startswith("import triton\n")


@NEEDED
def test_kernels_are_interpreted_where_there_is_no_gpu(device: torch.device) -> None:
    from triton import knobs

    assert is_interpreted() == (device.type == "cpu")
    for interpret in (True, False):
        with knobs.runtime.scope():
            knobs.runtime.interpret = interpret
            assert is_interpreted() is interpret


def test_without_triton_there_is_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    source = "never = compiled"
    with pytest.raises(ImportError, match="triton"):
        function_of("never", source)
    with pytest.raises(ImportError, match="triton"):
        is_interpreted()


def test_fp32_is_multiplied_as_in_dense_products() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    try:
        for fast in (False, True):
            settings.allow_tf32 = fast
            found = triton_text.numbers(torch.float32)["PRECISION"]
            assert found == ("'tf32'" if fast else "'ieee'")
            found = triton_text.numbers(torch.bfloat16)["PRECISION"]
            assert found == "'ieee'"
    finally:
        settings.allow_tf32 = before

"""What the compiler makes of Triton's kernels, without a GPU: no spills, and they fit."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {80: 163, 90: 227, 100: 227}  # KiB that a program may have, by architecture
UNITS = {80: "mma", 90: "wgmma", 100: "tcgen05.mma"}  # of 16-bit products of 64 rows and more
TENSOR = 512  # columns of tensor memory
NEEDED = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="Triton is not installed"
)

ARCHITECTURES = pytest.mark.parametrize(
    "arch", ["90", *(pytest.param(other, marks=pytest.mark.slow) for other in ("80", "100"))]
)
ALL = pytest.mark.parametrize("arch", ["90", "80", "100"])


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script, with the compiler unless the environment says otherwise."""
    inherited = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.registers", *options],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


@functools.cache
def rows(*options: str) -> list[dict[str, Any]]:
    ran = run("--json", *options)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    assert found
    return found


def fit(found: list[dict[str, Any]]) -> None:
    for row in found:
        assert row["registers"] <= 255 and row["shared"] <= SHARED[row["arch"]] * 1024, row
        assert row["tensor"] <= TENSOR, row
        products = row["kernel"].startswith("padst_block")
        halves = products and row["numbers"] in ("fp16", "bf16")
        if halves and row["tokens"] >= 64:
            assert row["matrix"] == UNITS[row["arch"]], row
        elif halves:
            assert row["matrix"] in ("mma", UNITS[row["arch"]]), row


def spilled(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # ptxas sets up to 16 bytes aside before a loop in a few kernels that have registers left.
    return [row for row in found if row["spilled"] > 16]


@NEEDED
@ARCHITECTURES
def test_the_heaviest_kernels_fit(arch: str) -> None:
    found = rows("--quick", "--arch", arch)
    names = {row["kernel"] for row in found}
    assert names >= {"padst_block", "padst_block_dx", "padst_block_dw", "padst_block_from_into"}
    assert names >= {"padst_gathered", "padst_listed", "padst_gathered_dw", "padst_block_mlp_b1"}
    assert {row["numbers"] for row in found} == {"fp32", "bf16"}
    fit(found)


@NEEDED
@ARCHITECTURES
def test_the_heaviest_kernels_do_not_spill(arch: str) -> None:
    assert not spilled(rows("--quick", "--arch", arch))


@NEEDED
@pytest.mark.slow
@ARCHITECTURES
def test_all_that_is_timed_fits_and_does_not_spill(arch: str) -> None:
    found = rows("--quick", "--tuned", "--arch", arch)
    assert len(found) > 2 * len(rows("--quick", "--arch", arch))
    fit(found)
    assert not spilled(found)


@NEEDED
@pytest.mark.exhaustive  # an hour each
@ALL
def test_all_kernels_fit(arch: str) -> None:
    fit(rows("--tuned", "--arch", arch))


@NEEDED
@pytest.mark.exhaustive
@ALL
def test_no_kernel_spills(arch: str) -> None:
    assert not spilled(rows("--tuned", "--arch", arch))


def script() -> Any:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("registers", ROOT / "benchmarks" / "registers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_loads_are_as_wide_as_their_widest() -> None:
    lines = {
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];": 128,
        "@%p1 ld.global.L1::evict_first.v2.b64 {%rd1, %rd2}, [ %rd3 + 0 ];": 128,
        "@!%p1 ld.global.b16 %rs1, [ %rd1 + 0 ];": 16,
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;": 128,
        "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;": 64,
        "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];": 0,
    }
    widest = script().widest
    assert [widest(line) for line in lines] == list(lines.values())
    assert widest("\n".join(reversed(lines))) == 128


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registers = script()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"Expected Triton, .*\. Got none\. Do pip install"):
        registers.disassembler()
    bare = SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="3.9")
    monkeypatch.setitem(sys.modules, "triton", bare)
    with pytest.raises(RuntimeError, match=r"Expected cuobjdump in Triton 3\.9\. Got none\. Do "):
        registers.disassembler()


def test_equal_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registers, seen = script(), []
    monkeypatch.setattr(registers, "disassembler", lambda: None)
    monkeypatch.setattr(registers, "row", lambda *given: seen.append(given))
    registers.rows([90, 80], True, "")
    monkeypatch.setattr(
        registers, "cases", lambda quick, cases=registers.cases: [*cases(quick)] * 2
    )
    once = len(seen)
    registers.rows([90, 80], True, "")
    assert len(seen) == 2 * once
    registers.rows([90], True, "block_dw")
    assert {given[-1].kernel.name for given in seen[2 * once :]} == {"padst_block_dw"}


def test_the_interpreter_compiles_nothing() -> None:
    ran = run("--quick", TRITON_INTERPRET="1")
    assert ran.returncode == 1 and not ran.stdout
    assert ran.stderr.strip() == (
        "Expected Triton's compiler. Got TRITON_INTERPRET, its interpreter. Do unset it."
    )

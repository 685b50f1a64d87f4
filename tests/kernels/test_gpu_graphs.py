"""Graphs for a GPU as Inductor keeps them and CUDA graphs record them: nothing is in the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from padst_compiler import digest

from .generate import CASES
from .graphs import FAST, GRAPHS, INFERENCE, TOKENS
from .interpreted import calls_of, kernels_of

ROOT = Path(__file__).parents[2]
EDITS = {  # where an edit changes what is generated: its file, a text in it, and another
    "text": ("kernels/triton_block.py", "acc = tl.zeros", "acc = 0.0 * tl.zeros"),
    "price": ("gpu_cost.py", "TRAFFIC = ", "TRAFFIC = 0.5 * "),
}
SHARED = pytest.mark.xdist_group("graphs-on-gpu")
WAITS = ("_local_scalar_dense", "nonzero", ".item(", "_to_copy", "synchronize", ".cpu()")

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return copies of the package, each with one edit."""
    folders = {}
    for name, (file, before, after) in EDITS.items():
        package = folders[name] = tmp_path_factory.mktemp(name) / "padst_compiler"
        shutil.copytree(ROOT / "padst_compiler", package)  # follows the links
        text = (package / file).read_text("utf-8")
        assert before in text
        (package / file).write_text(text.replace(before, after), "utf-8")
    return folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, edited: dict[str, Path]) -> list[Found]:
    """Return what two processes found, one after the other, that share a cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    found: list[Found] = []
    for more in ([], [str(folder) for folder in edited.values()]):
        call = [sys.executable, "-m", "tests.kernels.graphs", *more]
        made = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert made.returncode == 0, made.stderr[-4000:]
        found.append(json.loads(made.stdout))
    return found


@SHARED
def test_a_second_process_finds_every_graph_in_the_cache(runs: list[Found]) -> None:
    first, second = ([found[name] for name in GRAPHS] for found in runs)
    for (one,), (other,) in zip(first, second, strict=True):
        assert (one["cache"], other["cache"]) == (["fxgraph_cache_miss"], ["fxgraph_cache_hit"])
        assert one["key"] == other["key"] and one["code"] == other["code"]
    assert len({one["key"] for (one,) in first}) == len(GRAPHS)


@SHARED
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_kernel_or_of_a_price_misses_the_cache(
    runs: list[Found], edited: dict[str, Path], name: str
) -> None:
    before, found = runs[1]["epilogue"], runs[1][str(edited[name])]
    assert found[0]["cache"] == ["fxgraph_cache_miss"]
    assert found[0]["key"] != before[0]["key"]
    # The edit is hashed, not run: nothing else moved the key.
    assert kernels_of(found[0]["code"]) == kernels_of(before[0]["code"])


@SHARED
def test_how_fp32_is_multiplied_is_in_the_key(runs: list[Found]) -> None:
    """The number is written into a kernel's text when it is generated."""
    (exact,), (fast,) = runs[0]["epilogue"], runs[0][FAST]
    assert fast["cache"] == ["fxgraph_cache_miss"] and fast["key"] != exact["key"]
    assert "PRECISION : tl.constexpr = 'ieee'" in exact["code"]
    assert "PRECISION : tl.constexpr = 'tf32'" in fast["code"]


@pytest.mark.parametrize("file", ["triton_templates.py", "triton_text.py"])
@pytest.mark.parametrize("kernel", ["kernels/triton_sums.py", "kernels/triton_mlp.py"])
def test_texts_and_what_writes_them_are_hashed(
    edited: dict[str, Path], monkeypatch: pytest.MonkeyPatch, file: str, kernel: str
) -> None:
    package = edited["text"]
    monkeypatch.setattr(digest, "__file__", str(package / "digest.py"))
    seen = {digest.Unchanged().uuid()}
    for name in (file, kernel):
        with (package / name).open("a") as source:
            source.write("# edited\n")
        seen.add(digest.Unchanged().uuid())
    assert len(seen) == 3


@SHARED
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_recorded_whole(runs: list[Found], name: str) -> None:
    (found,) = runs[0][name]
    assert found["refusals"] == [] and found["reason"] is None
    assert found["recorded"] == [[]]  # one part, which writes to no input


@SHARED
@pytest.mark.parametrize("name", [name for name in GRAPHS if not name.endswith("recorded")])
def test_nothing_is_on_the_cpu_or_waits_for_the_gpu(runs: list[Found], name: str) -> None:
    (found,) = runs[0][name]
    assert found["devices"] == ["cuda"] and found["mutated"] == []
    calls = calls_of(found["code"]).split("def get_args", 1)[0]
    assert "empty_strided_cpu(" not in calls
    assert not [word for word in WAITS if word in calls]
    assert any("_tem_" in kernel for kernel in kernels_of(found["code"]))


@SHARED
@pytest.mark.parametrize("name", [name for name in GRAPHS if name.endswith("recorded")])
def test_a_recorder_stands_outside_of_what_is_recorded(runs: list[Found], name: str) -> None:
    """Its flag is on the CPU, and a replay would not read it."""
    (found,) = runs[0][name]
    part, rest = found["code"].split("\nclass Runner", 1)
    assert "torch.ops.padst.observe.default(" in rest
    assert "observe" not in part.split("def partition_0(", 1)[1]
    assert rest.count(".partitions[") == 1
    assert not any(f"{kernel}.run(" in rest for kernel in kernels_of(found["code"]))


@SHARED
@pytest.mark.parametrize("name", [*INFERENCE, "model"])
def test_frozen_tensors_are_told_to_stay_where_they_are(runs: list[Found], name: str) -> None:
    (found,) = runs[0][name]
    if name == "model":
        assert len(found["static"]) == found["inputs"] - 1  # all but the tokens
        return
    needs = CASES[name].needs
    assert found["static"] == [at for at, need in enumerate(needs) if need not in TOKENS]

import shutil
from pathlib import Path

import pytest
import torch
from torch import fx

from padst_compiler import digest
from padst_compiler.digest import Unchanged, source_digest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "padst_compiler"
    shutil.copytree(ROOT / "padst_compiler", package)  # follows the links
    monkeypatch.setattr(digest, "__file__", str(package / "digest.py"))
    return package


SHAPING = [
    "digest.py",
    "structures/block.py",
    "passes/cancel_inverse.py",
    "passes/folding/rules/products.py",
    "kernels/block.py",
    "ops.py",
]


@pytest.mark.parametrize("name", [*SHAPING, "export/onnx.py"])
def test_an_edit_of_any_source_changes_the_digest(copied: Path, name: str) -> None:
    before = source_digest("x")
    assert before == source_digest("x")
    source = copied / name
    text = source.read_text("utf-8")
    source.write_text(text + "# edited\n", "utf-8")
    assert source_digest("x") != before
    source.write_text(text, "utf-8")
    assert source_digest("x") == before


def test_sources_behind_a_link_are_in_the_digest(copied: Path, tmp_path: Path) -> None:
    (copied / "passes").rename(tmp_path / "passes")
    (copied / "passes").symlink_to(tmp_path / "passes")  # as in a checkout
    before = source_digest("x")
    (tmp_path / "passes" / "folding" / "choice.py").write_text("", "utf-8")
    assert source_digest("x") != before


def test_a_new_a_lost_and_a_renamed_source_change_the_digest(copied: Path) -> None:
    digests = {source_digest("x")}
    (copied / "passes" / "new.py").write_text("", "utf-8")
    digests.add(source_digest("x"))
    (copied / "passes" / "new.py").rename(copied / "passes" / "newer.py")
    digests.add(source_digest("x"))
    (copied / "kernels" / "fan_in.py").unlink()
    digests.add(source_digest("x"))
    assert len(digests) == 4


def test_what_is_handed_in_and_torchs_version_are_in_the_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = source_digest("x")
    assert source_digest("y") != before
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert source_digest("x") != before


def test_the_digest_reads_the_real_folders() -> None:
    """Were the links missing, three folders of sources would silently be left out of the key."""
    root = Path(digest.__file__).resolve().parent
    for name in SHAPING:
        assert (root / name).is_file()


def test_the_pass_that_changes_nothing_has_the_digest_for_an_id() -> None:
    graph = fx.symbolic_trace(lambda x: x + 1).graph
    before = str(graph)
    Unchanged()(graph)
    assert str(graph) == before
    assert Unchanged("x").uuid() == source_digest("x") != Unchanged().uuid() == source_digest("")

"""The wheel holds six packages under one name, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "padst_compiler": "padst_compiler",
    "padst_compiler/methods": "padst_compiler/methods",
    "padst_compiler/relaxations": "padst_compiler/relaxations",
    "padst_compiler/structures": "padst_compiler/structures",
}
FOLDERS = ("passes", "passes/folding", "passes/folding/rules", "kernels", "export")
PACKAGES |= {f"padst_compiler/{name}": name for name in FOLDERS}
DATA = (".json", ".h", ".typed")  # what package-data lets in beside the modules

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one build serves every test

WHERE = """
import padst_compiler, padst_compiler.passes
print(padst_compiler.__file__, padst_compiler.passes.__file__, sep="\\n")
"""
BACKENDS = """
import torch._dynamo
print(*torch._dynamo.list_backends(), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: a build folder in the checkout would lend it stale files."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("padst_compiler", "passes", "kernels", "export"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "-w", str(built)]
    said = subprocess.run([*pip, *options], cwd=source, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into an empty folder, as an installer does."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def start(code: str, *, cwd: Path, path: Path) -> list[str]:
    """Run a program that finds the unpacked wheel before anything but its own folder."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def test_the_wheel_holds_every_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.name}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", *DATA)
    }
    assert inside == expected
    assert "padst_compiler/py.typed" in inside


def test_the_wheel_declares_its_entry_points_and_licence(installed: Path) -> None:
    (found,) = distributions(path=[str(installed)])
    assert isinstance(found, Distribution)
    points = {(point.group, point.name, point.value) for point in found.entry_points}
    assert points == {
        ("torch_dynamo_backends", "padst", "padst_compiler.backend:padst"),
        ("console_scripts", "padst", "padst_compiler.cli:main"),
    }
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert any(path.name == "LICENSE" for path in found.files or ())


def test_an_installed_wheel_works_anywhere(installed: Path, tmp_path: Path) -> None:
    first, second, *backends = start(WHERE + BACKENDS, cwd=tmp_path, path=installed)
    assert Path(first) == installed / "padst_compiler" / "__init__.py"
    assert Path(second) == installed / "padst_compiler" / "passes" / "__init__.py"
    assert "padst" in backends


def test_an_installed_wheel_leaves_the_checkout_importable(installed: Path) -> None:
    first, second = start(WHERE, cwd=ROOT, path=installed)
    assert Path(first) == ROOT / "padst_compiler" / "__init__.py"
    assert Path(second) == ROOT / "padst_compiler" / "passes" / "__init__.py"

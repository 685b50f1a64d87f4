"""The walls of the repository: who imports whom, what mirrors what, how long a file may be."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, FOLDERS = "padst_compiler", ["passes", "kernels", "export"]
HIGH, LOW = {f"{CORE}.{name}" for name in FOLDERS}, [f"{CORE}.structures", f"{CORE}.index_map"]
LAZY = re.findall(r"\w+", "matplotlib onnx onnxruntime onnxscript safetensors sklearn transformers")
LINES = {"kernels": 350, "tests": 600, "examples": 600, "benchmarks": 600}  # else 250
FORBIDDEN = ["(^|[^[:alnum:]_.}])/(" + "work|tmp|root|home|opt)/", "py" + r"pi\.org"]
FORBIDDEN += ["python" + "hosted", "download" + r"\.pytorch", "npm" + r"js\.", "deb" + r"\.debian"]


def sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if path.resolve() == path)  # not through the links


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def below(tree: ast.AST, *kinds: type[ast.AST], word: str = "") -> set[ast.AST]:
    tops = (top for top in ast.walk(tree) if isinstance(top, kinds) and word in ast.dump(top))
    return {node for top in tops for node in ast.walk(top)}


def imported(node: ast.AST, module: list[str]) -> list[str]:
    """Return what a node imports, in full; ``from a import b`` counts as a.b."""
    if isinstance(node, ast.ImportFrom):
        base = [*module[: -node.level]] * (node.level > 0) + [str(node.module)] * bool(node.module)
        return [".." if node.level > 1 else ".".join([*base, one.name]) for one in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def wrong_imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    inside = list(path.relative_to(ROOT).with_suffix("").parts)
    module = [CORE, *inside] if inside[0] in FOLDERS else inside
    home, ours = ".".join(module[:2]), module[0] == CORE
    lazy = below(tree, ast.FunctionDef) | below(tree, ast.If, word="TYPE_CHECKING")
    guarded = below(tree, ast.If, ast.Try) if home == f"{CORE}.kernels" else set()
    for node in ast.walk(tree):
        for name in imported(node, module):
            if name == ".." or within(name, *FOLDERS):
                yield f"Expected one dot or {CORE}'s full names. Got {name}."
            if ours and home != f"{CORE}.backend" and within(name, *HIGH - {home}):
                yield f"Expected backend.py alone to import passes, kernels, export. Got {name}."
            if home in HIGH and within(name, f"{CORE}.backend"):
                yield f"Expected imports from the core. Got {name}, which stands above."
            if home == LOW[0] and within(name, CORE) and not within(name, *LOW):
                yield f"Expected structures/ to import structures and index_map. Got {name}."
            fine = lazy | guarded if within(name, "triton") else lazy
            if ours and within(name, "triton", *LAZY) and node not in fine:
                yield f"Expected {name} in a function (kernels: Triton in a try). Got it outside."


def wrong_places(path: Path) -> Iterator[str]:
    folder, *_, name = path.relative_to(ROOT).with_suffix("").parts
    init = 60 if path.parent.name == CORE else 39
    limit = init if name == "__init__" else LINES.get(folder, 250)
    if (lines := path.read_text("utf-8").count("\n")) > limit:
        yield f"Expected at most {limit} lines. Got {lines}. Split it."
    if name.strip("_") in ("utils", "util", "helpers", "misc", "common"):
        yield f"Expected a name that says what is inside. Got {name}."
    mirror = path.parent.relative_to(ROOT / CORE if folder == CORE else ROOT)
    test = Path("tests", mirror, f"test_{name.lstrip('_')}.py")
    owed = folder in (CORE, *FOLDERS) and name not in ("__init__", "__main__", "base")
    if owed and not (ROOT / test).exists():
        yield f"Expected its test in {test}. Got none."


def test_imports_sizes_names_and_mirrors() -> None:
    files = sources(CORE, *FOLDERS, *LINES.keys() - FOLDERS)
    said = ((path, text) for path in files for text in (*wrong_imports(path), *wrong_places(path)))
    breaches = [f"{path.relative_to(ROOT)}: {text}" for path, text in said]
    assert not breaches, "\n" + "\n".join(breaches)


def test_pyproject_lists_every_package() -> None:
    found = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    folders = {path.parent.relative_to(ROOT).parts for path in sources(CORE, *FOLDERS)}
    names = {".".join(parts if parts[0] == CORE else (CORE, *parts)) for parts in folders}
    assert found and set(ast.literal_eval(found[1])) == names


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows which files are ours")
def test_no_file_names_a_machine_or_a_registry() -> None:
    git = ["git", "-C", str(ROOT), "grep", "-nIE", "--untracked", "|".join(FORBIDDEN)]
    found = subprocess.run(git, capture_output=True, text=True)
    assert found.returncode == 1, f"Expected no such word. Got\n{found.stdout}{found.stderr}"

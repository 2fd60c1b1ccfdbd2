"""The repository's shape: what the wheel will hold, which way imports go, how long a file may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("schedulers", "pipelines", "distill", "eval")
TREES = ("flowkit", *LINKED)
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
# A module may import from its own layer and from those before it; everything not named here is the core, layer 0.
LAYERS = (
    "flowkit.schedulers",
    "flowkit.pipelines",
    "flowkit.hooks",
    "flowkit.guidance",
    "flowkit.eval",
    "flowkit.distill",
    "flowkit.cli",
)


def _walk(tree: str) -> Iterator[tuple[Path, list[str]]]:
    """Folders and file names of a tree; os.walk does not enter links, so each real file comes once."""
    for folder, folders, files in os.walk(ROOT / tree):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield Path(folder), sorted(files)


def _sources(*trees: str) -> list[Path]:
    found = [folder / name for tree in trees for folder, files in _walk(tree) for name in files if name.endswith(".py")]
    return [path.relative_to(ROOT) for path in found]


def _module(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "flowkit")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in _sources(*TREES)}
EVERY_SOURCE = _sources(*TREES, "tests", "examples", "benchmarks")


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def _layer(name: str) -> int:
    return next((i for i, prefix in enumerate(LAYERS, 1) if f"{name}.".startswith(f"{prefix}.")), 0)


def test_packages_are_the_folders() -> None:
    mapped = {f"flowkit.{name}": name for name in LINKED} | {"flowkit": "flowkit"}
    assert SETUPTOOLS["package-dir"] == mapped
    folders = {_module(path.parent / "__init__.py") for path in _sources(*TREES)}
    without_init = sorted(name for name in folders if name not in MODULES)
    assert not without_init, "folders with modules need an __init__.py"
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_committed(name: str) -> None:
    assert os.readlink(ROOT / "flowkit" / name) == f"../{name}"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: only the link itself was checked")
    git = subprocess.run(["git", "ls-files", "--stage", f"flowkit/{name}"], cwd=ROOT, capture_output=True, text=True)
    assert git.stdout.startswith("120000 ")


def test_imports_point_one_way() -> None:
    wrong = []
    for module, path in MODULES.items():
        if module == "flowkit":  # the root serves every layer, lazily
            continue
        for line, name in _imports(path):
            owner = name if name in MODULES else name.rpartition(".")[0]
            if name.startswith("."):
                wrong.append(f"{path}:{line} imports {name}: imports are absolute")
            if _layer(owner) > _layer(module):
                wrong.append(f"{path}:{line} imports {name}")
            # The root's lazy names would hide the direction: the module that defines a name is the one to import.
            if owner == "flowkit" and _layer(module) < len(LAYERS):
                wrong.append(f"{path}:{line} imports {name} from the root")
    assert not wrong


def test_there_is_one_copy_of_everything() -> None:
    # `import schedulers` from the root folder would work and give a second copy with other classes.
    names = (*LINKED, "tests")  # `tests` is a top-level package of torch-fidelity
    wrong = [
        f"{path}:{line} imports {name}"
        for path in EVERY_SOURCE
        for line, name in _imports(path)
        if name.partition(".")[0] in names
    ]
    assert not wrong


def test_no_module_is_too_long() -> None:
    lengths = {
        str(path): len((ROOT / path).read_text().splitlines()) for path in _sources(*TREES, "examples", "benchmarks")
    }
    assert not {path: lines for path, lines in lengths.items() if lines > 400}


@pytest.mark.parametrize("statement", ["import flowkit", "import flowkit; dir(flowkit)"])
def test_the_root_does_not_import_torch(statement: str) -> None:
    script = f"import sys; {statement}; print(sorted({{'torch', 'diffusers', 'numpy'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"

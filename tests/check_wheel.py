"""Builds the wheel and tries it where a user would: outside the repository, with its declared dependencies and nothing else.

``python tests/check_wheel.py``. The dependencies are linked from the running environment instead of installed a second time
(PyTorch has gigabytes): only the distributions that the wheel's own metadata asks for, directly or through others, so a missing
declaration or an import of an extra at module level shows. No test of pytest: it runs once, after them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TREES = {"flowkit": "flowkit"} | {name: f"flowkit/{name}" for name in ("schedulers", "pipelines", "distill", "eval")}
MOST_BYTES = 6_000_000

# Runs in the new environment, in an empty folder.
INSIDE = """
import importlib, pkgutil, sys, warnings
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings("error", category=DeprecationWarning, module="flowkit")
prefix, repository = map(Path, sys.argv[1:])
import flowkit
assert "torch" not in sys.modules, "import flowkit imports torch"
assert Path(flowkit.__file__).is_relative_to(prefix), f"flowkit comes from {flowkit.__file__}"
assert version("flowkit-diffusion") == flowkit.__version__
for name in flowkit.__all__:
    getattr(flowkit, name)
modules = [found.name for found in pkgutil.walk_packages(flowkit.__path__, "flowkit.")]
needs = ("flowkit.eval.sweep.", "flowkit.cli.sweeping", "flowkit.distill.evol", "flowkit.distill.genome")
extra = [name for name in modules if name.startswith(needs)]
assert extra
for name in (name for name in modules if name not in extra):
    file = importlib.import_module(name).__file__
    assert file and Path(file).is_relative_to(prefix), f"{name} comes from {file}"
try:
    flowkit.eval.run_sweep({})
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("a sweep ran without its extra")
strays = [path for path in sys.path if Path(path).resolve().is_relative_to(repository)]
assert not strays, f"the repository is on the path: {strays}"
for name in ("schedulers", "pipelines", "distill", "eval"):
    assert importlib.util.find_spec(name) is None, f"a top-level {name} can be imported"
print(f"{len(flowkit.__all__)} public names and {len(modules) - len(extra)} modules import")
"""


def build(folder: Path) -> Path:
    """Builds the sdist, and the wheel from it, so that a left-over build folder cannot put anything in."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Every file of the five trees is inside, under ``flowkit/``, and nothing else is at the top."""
    size = wheel.stat().st_size
    assert size < MOST_BYTES, f"{wheel.name} has {size:,} bytes, more than {MOST_BYTES:,}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    strays = {name for name in names if not name.startswith(("flowkit/", "flowkit_diffusion-"))}
    assert not strays, f"outside flowkit/: {sorted(strays)}"
    sources = {
        (Path(inside) / file.relative_to(ROOT / tree)).as_posix()
        for tree, inside in TREES.items()
        for folder, _, files in os.walk(ROOT / tree)
        for file in map(Path(folder).joinpath, files)
        if "__pycache__" not in file.parts and file.suffix != ".pyc"
    }
    inside = {name for name in names if name.startswith("flowkit/")}
    assert inside == sources, f"missing: {sorted(sources - inside)}; unexpected: {sorted(inside - sources)}"
    print(f"{wheel.name}: {len(inside)} files, {size / 1e6:.2f} MB")


def needed(wheel: Path) -> dict[str, Distribution]:
    """The wheel's dependencies without its extras, direct and indirect, as installed here."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(text), "") for text in metadata.get_all("Requires-Dist") or []]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        found[name] = installed = distribution(name)
        assert requirement.specifier.contains(installed.version, prereleases=True), (
            f"{requirement}, not {installed.version}"
        )
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in installed.requires or []]
    return found


def environment(folder: Path, wheel: Path) -> Path:
    """A new environment with the wheel, and links to what it needs; returns its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages, scripts = (Path(sysconfig.get_path(key, "venv", paths)) for key in ("purelib", "scripts"))
    python = scripts / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    for installed in needed(wheel).values():
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(installed.locate_file(top)))
    return python


def main() -> None:
    """Builds, looks inside, and runs it."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name).resolve()
        wheel = build(temporary)
        check_contents(wheel)
        python = environment(temporary / "env", wheel)
        elsewhere = temporary / "elsewhere"
        elsewhere.mkdir()
        (script := temporary / "inside.py").write_text(INSIDE)
        quiet = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
            "OMP_NUM_THREADS": "1"
        }
        commands: tuple[list[str | Path], ...] = (
            [python, "-I", script, temporary / "env", ROOT],
            [python.parent / "flowkit", "--version"],
            [python.parent / "flowkit", "--help"],
        )
        for command in commands:
            if subprocess.run(command, cwd=elsewhere, env=quiet).returncode:
                sys.exit(f"the wheel fails: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()

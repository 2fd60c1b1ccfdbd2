"""docs/grids.md: what it prints is what its commands print, and what it lists is what diffusers has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import diffusers
import pytest
from typer.testing import CliRunner

from flowkit.cli import app
from flowkit.grids import GRIDS, named
from flowkit.schedulers import stock, stock_classes

PAGE = (Path(__file__).parents[1] / "docs" / "grids.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n\$ flowkit (.*)\n((?:.*\n)*?)```", PAGE)


@pytest.mark.parametrize(("command", "shown"), BLOCKS)
def test_commands_print_what_the_page_shows(
    command: str, shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command))
    assert (result.exit_code, result.stdout) == (0, shown)


@pytest.mark.parametrize("code", re.findall(r"```python\n((?:.*\n)*?)```", PAGE))
def test_examples_run(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_every_name_is_in_the_table() -> None:
    table = PAGE.partition("## Names")[2].partition("\n## ")[0]
    for name in GRIDS:
        assert re.search(rf"^\|.*\b{name}\b", table, re.MULTILINE)


def test_every_scheduler_that_walks_a_path_is_told_of() -> None:
    """And stands where it belongs: among those that can be put on a grid of whole model times, or among the others."""
    takes, _, neither = PAGE.partition("| class | takes |")[2].partition("These take neither:")
    neither = neither.partition("\n\n")[0]
    for name in stock_classes.CLASSES:
        if stock_classes._signature(name) is None:  # a stand-in for want of a package
            continue
        scheduler = getattr(diffusers, name)(**({"stages": 1} if name == "HeliosScheduler" else {}))
        path = stock.make_path(stock_classes.translate({**scheduler.config, "_class_name": name}))
        grid = named("karras", 4, path) if path.name in ("edm", "cosine") else named("linspace", 4, path)
        try:
            grid.for_stock(scheduler)
            assert f"{name}" in takes
        except ValueError:
            assert name in neither
    assert "UniPCMultistepScheduler with use_flow_sigmas" in takes


def test_the_pipelines_are_those_of_diffusers() -> None:
    found: dict[bool, set[str]] = {True: set(), False: set()}
    root = Path(diffusers.__file__).parent / "pipelines"
    for file in root.rglob("*.py"):
        text = "" if "deprecated" in file.parts else file.read_text(encoding="utf-8")
        for name, body in re.findall(
            r"^class (\w+Pipeline)\b(.*?)(?=^class |^def |\Z)", text, re.MULTILINE | re.DOTALL
        ):
            signature = re.search(r"^    def __call__\((.*?)\n    \)", body, re.MULTILINE | re.DOTALL)
            arguments = re.findall(r"^        (\w+)", signature[1], re.MULTILINE) if signature else []
            if (
                "num_inference_steps" in arguments
                and "sigmas" not in arguments
                and not name.startswith(("Flax", "Onnx"))
            ):
                found["timesteps" in arguments].add(name)
    some, none = (set(block.replace(">", " ").split()) for block in re.findall(r"(?:^>.*\n)+", PAGE, re.MULTILINE))
    for listed, there in ((some, found[True]), (none, found[False])):
        assert {f"{n}Pipeline" for n in listed} == there

"""docs/sweeps.md and the examples of sweeps: they run as written, with fewer images, and the page shows what is printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from flowkit.cli import app
from flowkit.eval.sweep.config import SweepConfig, read

from .scripts import script_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(yaml|bash|python)\n((?:.*\n)*?)```", PAGE)
# What makes the blocks quick.
SMALLER = {"images: 500": "images: 20", "trials: 12": "trials: 3", '"images": 500': '"images": 20',
           "samples=2000, steps=400": "samples=128, steps=10",
           "inputs=range(10))[4]": "inputs=range(10), anchors=20, samples=20)[4]"}  # fmt: skip
EXAMPLE = ROOT / "examples" / "sweep_digits.yaml"
TEXT_TO_IMAGE = ROOT / "examples" / "sweep_text_to_image.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def invoke(*arguments: object) -> str:
    """What a command prints that must succeed."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def shown(command: str) -> str:
    """What the page says that a command prints."""
    (found,) = re.findall(rf"<!-- printed by `python {re.escape(command)}` -->\n((?:.*\n)*?)<!-- end -->", PAGE)
    return str(found)


def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for large in SMALLER:
        assert large in PAGE
    names: dict[str, Any] = {}
    for kind, block in BLOCKS:
        code = block
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        if kind == "python":
            exec(compile(code, "docs/sweeps.md", "exec"), names)
        elif kind == "yaml":
            Path(code.split()[1]).write_text(code)
            read(code.split()[1])
        else:
            for line in code.splitlines():
                assert line.startswith("flowkit sweep ")
                invoke(*shlex.split(line)[1:])
    assert "tabular" in Path("table.tex").read_text()
    cells = {folder.name: json.loads((folder / "results.json").read_text())["rows"] for folder in Path("runs").glob("*")
             if folder.name != "student"}  # fmt: skip
    assert {name: len(rows) for name, rows in cells.items()} == {"s1": 6, "compare": 4, "search": 3, "python": 4}
    assert not [row for rows in cells.values() for row in rows if "error" in row]


def test_the_example_has_every_field_with_its_default(tmp_path: Path) -> None:
    (every,) = (block for kind, block in BLOCKS if kind == "yaml" and block.startswith("# every.yaml"))
    fields = re.findall(r"^(?:# )?(\w+):", every, re.MULTILINE)
    assert sorted(fields) == sorted(SweepConfig.model_fields)
    (tmp_path / "every.yaml").write_text(every)
    config = read(tmp_path / "every.yaml")
    given = {"name", "model", "images", "labels", "reference", "axes"}
    plain = read({name: value for name, value in yaml.safe_load(every).items() if name in given})
    assert config.source() == plain.source()


def test_commands_that_are_not_run_have_these_options() -> None:
    sweep = typer.main.get_command(app).commands["sweep"]  # type: ignore[attr-defined]
    lines = re.findall(r"^    .*?(?:flowkit|flowkit\.cli) sweep (\w+) (.*?)(?: &)?$", PAGE, re.MULTILINE)
    assert len(lines) == 7
    for name, rest in lines:
        sweep.commands[name].make_context(name, shlex.split(rest))


def test_the_page_shows_what_the_benchmark_prints() -> None:
    command = [sys.executable, "benchmarks/sweep.py", "--table"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == shown(
        "benchmarks/sweep.py --table"
    )


@pytest.mark.slow
def test_the_page_shows_the_cost_of_the_text_to_image_example() -> None:
    with script_module(ROOT / "benchmarks" / "sweep.py") as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert module.text_to_image() + "\n" == shown("benchmarks/sweep.py --text-to-image")


def test_the_digits_example_runs(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert "images: 500\n" in text
    (tmp_path / "digits.yaml").write_text(text.replace("images: 500\n", "images: 40\n"))
    out = tmp_path / "out"
    assert f"15 of 15 cells; report: {out}/report.html" in invoke(
        "sweep", "run", tmp_path / "digits.yaml", "--output", out
    )
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["FlowMatchEulerDiscreteScheduler, 4 steps"]["evaluations"] == 4
    plain, adaptive = (
        rows[f"flowkit, unipc, 8 steps, w = 1.5{end}"] for end in ("", ", AdaptiveGuidance(threshold=0.99)")
    )
    assert plain["evaluations"] == 16
    assert 9 <= adaptive["evaluations"] < 16
    assert {len(row["metrics"]) for row in rows.values()} == {2}


@pytest.mark.slow
def test_the_digits_example_as_it_stands(tmp_path: Path) -> None:
    invoke("sweep", "run", EXAMPLE, "--output", tmp_path / "out")
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    fid = {name: row["metrics"]["fid"]["value"] for name, row in rows.items()}
    assert (
        fid["flowkit, unipc, 4 steps"]
        < fid["flowkit, euler, 4 steps"]
        < fid["FlowMatchEulerDiscreteScheduler, 4 steps"]
    )


def test_the_text_to_image_example_is_whole(tmp_path: Path) -> None:
    for file in (TEXT_TO_IMAGE, TEXT_TO_IMAGE.with_name("prompts.txt")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match='line 14: reference is "images"'):
        read(tmp_path / TEXT_TO_IMAGE.name)
    (tmp_path / "images").mkdir()
    config = read(tmp_path / TEXT_TO_IMAGE.name)
    assert len(config.cells()) == 18
    assert config.images % len((tmp_path / "prompts.txt").read_text().splitlines()) == 0
    assert f"18 cells of {config.images} images from 24 prompts" in PAGE.replace("\n", " ")

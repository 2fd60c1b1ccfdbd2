"""docs/steps.md: its tables are what the benchmark prints, its examples run, and its command prints such lines."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowkit.cli import app

from .scripts import script_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "steps.md").read_text(encoding="utf-8")


def benchmark(*arguments: str) -> str:
    command = [sys.executable, "benchmarks/steps.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout


def test_the_page_shows_what_the_benchmark_prints() -> None:
    (shown,) = re.findall(r"<!-- printed by `python benchmarks/steps.py --table` -->\n((?:.*\n)*?)<!-- end -->", PAGE)
    with script_module(ROOT / "benchmarks" / "steps.py") as steps:
        assert shown == steps.tables(json.loads((ROOT / "benchmarks" / "steps.json").read_text()))


@pytest.mark.slow
def test_the_page_shows_a_loss_that_more_samples_take_away() -> None:
    pattern = r"<!-- printed by `python benchmarks/steps.py --points` -->\n((?:.*\n)*?)<!-- end of points -->"
    (shown,) = re.findall(pattern, PAGE)
    tables = [re.findall(r"\| (\d+) \| \S+ \| (\S+) ± (\S+) \|", text) for text in (shown, benchmark("--points"))]
    for table in tables:
        assert [row[0] for row in table] == ["64", "256", "1024"]
        few, *_, many = ((float(gain), float(error)) for _, gain, error in table)
        assert few[0] < -2 * few[1]
        assert abs(many[0]) < 2 * many[1]
    # Rounding differs between machines.
    for one, other in zip(*tables, strict=True):
        assert float(one[1]) == pytest.approx(float(other[1]), abs=0.3)


def test_its_file_holds_what_it_would_measure() -> None:
    with script_module(ROOT / "benchmarks" / "steps.py") as steps:
        found = json.loads((ROOT / "benchmarks" / "steps.json").read_text())
        assert found["settings"] == json.loads(json.dumps(steps.FULL))
        assert {key.split("/")[0] for key in found["rows"]} == set(steps.FULL)
        for key, rows in found["rows"].items():
            name, solver = key.split("/")
            assert solver in steps.SOLVERS
            assert [int(k) for k in rows] == steps.FULL[name]["steps"]
            for k, row in rows.items():
                for grid in row.values():
                    assert grid["levels"][-1] == 0
                    assert len(grid["levels"]) == int(k) + 1


def test_gains_are_paired_and_counted() -> None:
    with script_module(ROOT / "benchmarks" / "steps.py") as steps:
        row: dict[str, Any] = {"uniform": {"rmse": [0.5, 0.1]}, "final": {"rmse_gain": [0.1, 0.02]}}
        assert steps.gain(row, "final") == "+20.0 ± 4.0"
        gains = [[0.1, 0.04], [0.1, 0.06], [-0.1, 0.04]]
        rows = {str(k): {g: {"rmse_gain": v} for g in ("local", "final")} for k, v in enumerate(gains, 2)}
        results = {"settings": {"smooth": {}}, "rows": {"smooth/euler": rows}}
        assert "| smooth | 3 | 1 better, 1 worse | 1 better, 1 worse | |" in steps.summary(results)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    printed = benchmark("--fast", "--output", str(file))
    assert printed.count("**shapes**") == 2
    before = file.read_bytes()
    assert benchmark("--fast", "--output", str(file)) == printed
    assert file.read_bytes() == before


@pytest.mark.parametrize("code", re.findall(r"```python\n((?:.*\n)*?)```", PAGE))
def test_examples_run(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})


@pytest.mark.slow
def test_commands_print_such_lines_and_their_files_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The figures are those of one machine."""
    monkeypatch.chdir(tmp_path)
    ((command, shown),) = re.findall(r"```console\n\$ flowkit (.*)\n((?:.*\n)*?)```", PAGE)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output

    def words(text: str) -> list[str]:
        return re.sub(r"[-+]?\d\S*", "#", text).replace("─", "").split()

    assert words(result.stdout) == words(shown)
    (block,) = re.findall(r"```bash\n((?:.*\n)*?)```", PAGE)
    for line in block.splitlines():
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, result.output

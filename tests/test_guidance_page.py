"""docs/guidance.md: its tables are what the benchmarks print, and its examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
TABLES = re.findall(r"<!-- printed by `python (benchmarks/\w+\.py --table)` -->\n((?:.*\n)*?)<!-- end -->", PAGE)


@pytest.mark.parametrize(("command", "shown"), TABLES, ids=[command for command, _ in TABLES])
def test_the_page_shows_what_the_benchmarks_print(command: str, shown: str) -> None:
    printed = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown == printed.stdout


def test_there_are_both_tables() -> None:
    assert [command for command, _ in TABLES] == [
        "benchmarks/guidance.py --table",
        "benchmarks/dynamic_guidance.py --table",
    ]
    assert (ROOT / "docs" / "guidance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("code", re.findall(r"```python\n((?:.*\n)*?)```", PAGE))
def test_examples_run(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})

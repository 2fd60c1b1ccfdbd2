"""docs/train.md: its commands have these options, and its program runs as it stands, with fewer updates."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from flowkit.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "train.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_have_these_options() -> None:
    (block,) = re.findall(r"```bash\n((?:.*\n)*?)```", PAGE)
    command = typer.main.get_command(app).commands["train"].commands["flow"]  # type: ignore[attr-defined]
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:3] == ["flowkit", "train", "flow"]
        command.make_context("flow", words[3:])
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        assert any(option in parameter.opts for parameter in command.params) or option == "--format", option


@pytest.mark.filterwarnings("ignore:a Frechet distance of")
def test_the_program_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ot")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n((?:.*\n)*?)```", PAGE)
    exec(block.replace("steps=3000", "steps=4").replace("every=500", "every=2"), {})
    assert (tmp_path / "three.png").is_file()
    assert (tmp_path / "runs" / "flow" / "training" / "samples-000002.png").is_file()

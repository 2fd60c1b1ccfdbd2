"""docs/distill.md and the examples of distillation: they run as written, in small, and the page shows what is printed."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from diffusers import DDIMScheduler
from typer.testing import CliRunner

from flowkit.cli import app
from flowkit.cli.distill_file import model, read
from flowkit.distill.reflow import Reflow
from flowkit.distill.settings import Training

from . import tiny

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(yaml|bash|python)\n((?:.*\n)*?)```", PAGE)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def script(name: str) -> str:
    done = subprocess.run([sys.executable, ROOT / name], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return done.stdout


def distill(*arguments: object) -> str:
    """What a command prints that must succeed."""
    done = CliRunner().invoke(app, ["distill", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def lines() -> list[str]:
    """The command lines of the page."""
    found = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    found += re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)
    return found + re.findall(r"^    (?:accelerate launch -m )?(flowkit.*)$", PAGE, re.MULTILINE)


def test_the_commands_of_the_page_have_these_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for line in lines():
        _, name, *rest = shlex.split(line)
        command = commands[name]
        if name == "distill":
            seen.add(rest[0])
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(name, rest)
    assert seen == {"reflow", "rectified-diffusion"}


def test_every_field_is_shown_with_its_default(tmp_path: Path) -> None:
    (every,) = (block for kind, block in BLOCKS if kind == "yaml" and block.startswith("# every.yaml"))
    assert sorted(re.findall(r"^(?:# )?(\w+):", every, re.MULTILINE)) == sorted(model("reflow").model_fields)
    (tmp_path / "every.yaml").write_text(every)
    found = read(tmp_path / "every.yaml", "reflow")
    assert Reflow(**found["options"]) == Reflow()
    assert Training(**found["training"]) == Training(**Reflow().training)
    for group, kind in {"options": Reflow, "training": Training}.items():
        block = re.search(rf"^{group}:.*\n((?: .*\n)+)", every, re.MULTILINE)
        assert block is not None
        shown = re.findall(r"^  (?:# )?(\w+):", block[1], re.MULTILINE)
        assert shown == [field.name for field in dataclasses.fields(kind)]


def test_the_page_shows_the_program_and_what_it_costs() -> None:
    (own,) = (block for kind, block in BLOCKS if kind == "python" and "class Points" in block)
    assert own == (ROOT / "examples" / "own_model.py").read_text()
    (shown,) = re.findall(r"<!-- printed by `python benchmarks/distill_cost.py` -->\n((?:.*\n)*?)<!-- end -->", PAGE)
    assert shown == script("benchmarks/distill_cost.py")


def smaller(file: Path, folder: Path, **changes: Any) -> Path:
    """An example with other numbers."""
    settings = yaml.safe_load(file.read_text())
    for name, value in changes.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    made = folder / file.name
    made.write_text(yaml.safe_dump(settings))
    return made


def test_the_digits_example_runs(tmp_path: Path) -> None:
    file = smaller(
        ROOT / "examples" / "distill_digits.yaml",
        tmp_path,
        samples=60,
        num_images=40,
        training={"steps": 4, "batch_size": 8},
    )
    told = distill("reflow", "--config", file, "--output", tmp_path / "student")
    assert re.search(r"training-1, after 4 updates, FD [\d.]+ ± [\d.]+, error to the teacher [\d.]+", told)
    for name in (
        "README.md",
        "distill.json",
        "training-1/training.json",
        "training-1/training.png",
        "unet/config.json",
    ):
        assert (tmp_path / "student" / name).is_file()


def test_the_text_to_image_example_runs_on_a_tiny_model(tmp_path: Path) -> None:
    example = ROOT / "examples" / "distill_text_to_image.yaml"
    assert read(example, "rectified-diffusion")["prompts"] == example.parent / "prompts.txt"
    tiny.build("sd15", DDIMScheduler(timestep_spacing="trailing")).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    small = {"steps": 2, "batch_size": 8, "every": 0, "tracker": None, "precision": "no", "checkpointing": False}
    file = smaller(
        example, tmp_path, model="model", variant=None, dtype="float32", samples=8, batch_size=4, options={"evaluations": 2},
        lora={"rank": 2}, training=small, call={"height": 16, "width": 16},
    )  # fmt: skip
    told = distill("rectified-diffusion", "--config", file, "--output", tmp_path / "student")
    assert f"--lora {tmp_path / 'student'}" in told
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_page_runs_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (averages,) = (block for kind, block in BLOCKS if kind == "python" and "synthesize" in block)
    for large, small in {"steps=200": "steps=20", "samples=1000": "samples=100"}.items():
        assert large in averages
        averages = averages.replace(large, small)
    exec(compile(averages, "docs/distill.md", "exec"), {})
    assert (tmp_path / "runs" / "averaged-0.08" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_program_brings_one_step_to_the_data() -> None:
    printed = script("examples/own_model.py")
    far = [float(value) for value in re.findall(r"distance to the data ([\d.]+)", printed)]
    assert far[1] < 0.2 * far[0]
    (shown,) = re.findall(r"```text\n((?:.*\n)*?)```", PAGE)
    words = [re.sub(r"\d+\.\d+", "#", text).split() for text in (printed, shown)]
    assert words[0] == words[1]


@pytest.mark.slow
def test_the_command_prints_such_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The figures are those of one machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ((command, shown),) = re.findall(r"```console\n\$ flowkit distill (.*)\n((?:.*\n)*?)```", PAGE)
    printed = distill(*shlex.split(command))

    def words(text: str) -> list[str]:
        return re.sub(r"[-+]?\d\S*", "#", text).split()

    assert words(printed) == words(shown)

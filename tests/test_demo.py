"""``flowkit demo`` from end to end, and the examples of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowkit import ClassConditionalPipeline, Grid
from flowkit.cli import demo

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FAST", (256, 40))
        demo.run("digits", folder, fast=True, samples=400, seed=1)
    return folder


def test_the_demo_leaves_its_pictures_table_and_report(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    for row in rows.values():
        assert row["evaluations"] == row["steps"]
        assert row["metrics"]["fid"]["value"] > 0
        assert row["metrics"]["fid"]["se"] > 0
        assert Image.open(output / row["image"]).size[0] > 400
    stock, parity = rows["diffusers FlowMatchEuler"], rows["flowkit from its config"]
    for metric in ("fid", "fid/pixels"):
        assert parity["metrics"][metric]["value"] == pytest.approx(stock["metrics"][metric]["value"], rel=1e-4)
    figure = {name: row["metrics"]["fid"]["value"] for name, row in rows.items()}
    assert figure["teacher, 16 steps"] < figure["flowkit Euler, uniform"] < figure["teacher, one step"]
    assert figure["flowkit Euler, uniform"] < figure["diffusers FlowMatchEuler"]
    assert figure["student, one step"] < figure["teacher, one step"]
    assert (output / "report.html").stat().st_size > 50_000
    assert len((output / "table.md").read_text().splitlines()) == len(rows) + 2
    assert not [p.name for p in output.iterdir() if p.name.startswith(".")]


def test_the_student_and_the_grid_can_be_used(output: Path) -> None:
    student = ClassConditionalPipeline.from_pretrained(output / "student")
    student.set_progress_bar_config(disable=True)
    images = student([0, 1], num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    grid = Grid.load(output / "four-steps.json")
    assert len(grid) == demo.STEPS
    assert grid.solver == "euler"


def test_the_readme_shows_the_rows_of_the_demo(output: Path) -> None:
    names = [row["name"] for row in json.loads((output / "results.json").read_text())["rows"]]
    shown = re.findall(r"^\| ([^|]+?) \| +\d", README, re.MULTILINE)
    assert shown == names


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_example(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_has_three_examples() -> None:
    assert len(EXAMPLES) == 3


def test_readme_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example(EXAMPLES[0], tmp_path, monkeypatch)
    assert Image.open(tmp_path / "three.png").size == (8, 8)


def test_readme_distil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "samples=2000, steps=400" in EXAMPLES[1]
    short = EXAMPLES[1].replace("samples=2000, steps=400", "samples=128, steps=10")
    run_example(short, tmp_path, monkeypatch)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "one-step.png", "four-steps.json"}


@pytest.mark.slow
def test_readme_distil_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example(EXAMPLES[1], tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore:a Frechet distance of")
def test_readme_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(EXAMPLES[2], tmp_path, monkeypatch)
    figures = [float(f) for f in re.findall(r"FD ([\d.]+)", capsys.readouterr().out)]
    assert len(figures) == 6
    assert figures[2] < figures[0]  # eight Euler steps beat two


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--samples 5 is fewer than the 20"):
        demo.run("digits", tmp_path, samples=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        demo.run("digits", tmp_path / "file")


def test_the_docs_name_every_stock_scheduler() -> None:
    from flowkit.schedulers.stock_classes import CLASSES, REFUSED

    page = (Path(__file__).parents[1] / "docs" / "schedulers.md").read_text(encoding="utf-8")
    table, refused = page.split("Refused, with the reason")
    assert [n for n in CLASSES if n not in table] == []
    assert [n for n in REFUSED if n not in refused] == []

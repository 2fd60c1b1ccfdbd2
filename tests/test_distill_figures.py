"""Students of the embedded digits reach the figures that distillation is for, and benchmarks/distill.json holds them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, load_demo, rng
from flowkit.distill import Reflow, run
from flowkit.distill.conditions import Conditions
from flowkit.distill.pairs import Held, PairLoss
from flowkit.distill.shards import Trajectories
from flowkit.eval import evaluate

from .scripts import script_module

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "distill.md"
SMALL: dict[str, Any] = {"samples": 2000, "steps": 400, "progress": False}


def teacher() -> ClassConditionalPipeline:
    """The digits under Euler on even steps."""
    pipe = load_demo("digits")
    pipe.scheduler = RectifiedFlowScheduler(solver="euler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fd(pipe: ClassConditionalPipeline, steps: int) -> float:
    how: dict[str, Any] = {"inputs": range(10), "call": {"num_inference_steps": steps}, "batch_size": 250}
    return evaluate(pipe, "digits", 2000, progress=False, **how)["fid"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="module")
def student(folder: Path) -> ClassConditionalPipeline:
    """A student by reflow."""
    made: ClassConditionalPipeline = run("reflow", teacher(), output=folder / "reflow", **SMALL)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def distances() -> tuple[float, float]:
    """Of the teacher in one step and in 16."""
    return fd(teacher(), 1), fd(teacher(), 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_student_by_reflow_needs_one_step(student: ClassConditionalPipeline, distances: tuple[float, float]) -> None:
    one, many = distances
    few = fd(student, 1)
    assert few <= one / 6
    assert few <= 1.4 * many
    assert fd(student, 2) < few  # and gains by another


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_student_of_one_step_is_as_good_as_its_teacher_of_16(
    student: ClassConditionalPipeline, distances: tuple[float, float], folder: Path
) -> None:
    made = run("onestep", student, output=folder / "onestep", **SMALL)
    found = fd(made, 1)
    assert found <= 1.2 * distances[1]
    assert found < fd(student, 1)


@pytest.mark.slow
def test_each_sample_of_a_student_follows_its_own_noise(student: ClassConditionalPipeline) -> None:
    noise, labels = rng.normal((1, 8, 8), 99, range(200), tag=rng.DATA), torch.arange(200) % 10
    wanted, found = (
        pipe(labels, latents=noise, num_inference_steps=steps, output_type="latent").images
        for pipe, steps in ((teacher(), 32), (student, 1))
    )
    others = wanted.view(20, 10, 1, 8, 8).roll(1, 0).reshape_as(wanted)  # of the same class
    assert (found - wanted).square().mean() < 0.25 * (found - others).square().mean()


@dataclass(frozen=True)
class Shuffled(Reflow):
    """Reflow on noise with the sample of other noise, of the same class."""

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> PairLoss:
        made = super().loss(predict, data, samples)
        assert isinstance(made, PairLoss)
        made.pairs = OfOthers(data, samples)
        return made


class OfOthers(Held):
    def __init__(self, pairs: Trajectories, samples: Sequence[int]) -> None:
        super().__init__(pairs, samples)
        of_class = [[i for i, sample in enumerate(samples) if sample % 10 == label] for label in range(10)]
        self._other = torch.zeros(len(samples), dtype=torch.int64)
        for own in map(torch.tensor, of_class):
            self._other[own] = own.roll(1)

    def __call__(self, picked: Tensor) -> Tensor:
        return torch.stack([super().__call__(picked)[:, 0], super().__call__(self._other[picked])[:, 1]], 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_shuffled_pairs_teach_no_single_step(folder: Path, distances: tuple[float, float]) -> None:
    # Negative control: the same samples and the same noise, only not each other's.
    made = run(Shuffled(), teacher(), output=folder / "shuffled", **SMALL)
    assert fd(made, 1) > distances[0] / 2


# ------------------------------------------------------------------------------------------------- the benchmark


def test_the_page_shows_what_the_benchmark_prints() -> None:
    pattern = r"<!-- printed by `python benchmarks/distill.py --table` -->\n((?:.*\n)*?)<!-- end of figures -->"
    (shown,) = re.findall(pattern, PAGE.read_text(encoding="utf-8"))
    with script_module(ROOT / "benchmarks" / "distill.py") as distill:
        assert shown == distill.tables(json.loads((ROOT / "benchmarks" / "distill.json").read_text()))


def test_its_file_holds_what_it_would_measure() -> None:
    with script_module(ROOT / "benchmarks" / "distill.py") as distill:
        found = json.loads((ROOT / "benchmarks" / "distill.json").read_text())
        keys = [key for key, _ in distill.wanted(distill.MODELS, distill.SEEDS)]
        assert [key for key in keys if key in found["rows"]] == list(found["rows"])
        for data, sizes in found["settings"].items():
            assert sizes == distill.FULL[data]
            rows = {key.partition("/")[2] for key in found["rows"] if key.startswith(f"{data}/")}
            everywhere = [name for name, how in distill.STUDENTS.items() if how.everywhere]
            assert rows >= {"teacher"} | {f"{seed}/{name}" for seed in distill.SEEDS for name in everywhere}
        for key, row in found["rows"].items():
            known = distill.STUDENTS.get(key.rpartition("/")[2])
            assert known is None or [int(k) for k in row["figures"]] == list(known.steps)


def test_its_figures_reach_their_targets() -> None:
    rows = json.loads((ROOT / "benchmarks" / "distill.json").read_text())["rows"]
    one, many = (rows["digits/teacher"]["figures"][k]["fd"][0] for k in ("1", "16"))
    for seed in range(3):
        straight = rows[f"digits/{seed}/reflow"]["figures"]["1"]["fd"][0]
        assert straight <= min(one / 6, 1.4 * many)
        for name in ("one step", "one step, after reflow"):
            assert rows[f"digits/{seed}/{name}"]["figures"]["1"]["fd"][0] <= 1.2 * many


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"

    def printed(*arguments: str) -> str:
        command = [sys.executable, "benchmarks/distill.py", "--fast", "--output", str(file), "--work", str(tmp_path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
        return done.stdout

    assert "| teacher | 16 |" in printed("--data", "digits", "--seeds", "1")
    before = json.loads(file.read_text())["rows"]
    assert "0 rows to measure: none" in printed("--data", "digits", "--seeds", "1")
    printed("--data", "digits", "--seeds", "2")
    rows = json.loads(file.read_text())["rows"]
    assert {key: rows[key] for key in before} == before
    assert {key.split("/")[1] for key in rows} == {"teacher", "1", "2"}

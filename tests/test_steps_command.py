"""``flowkit steps``: from the command line to grids, tables, pictures and one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from typer.testing import CliRunner

import flowkit
from flowkit import Grid, RectifiedFlowScheduler, optimize_steps
from flowkit.cli import app
from flowkit.cli.stepping import _rows, _stock
from flowkit.distill.fine import Runs, fine_solution, rmse
from flowkit.eval import evaluate
from flowkit.eval.intervals import paired
from flowkit.eval.provenance import describe_pipeline

from . import tiny

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--anchors", 12, "--samples", 6, "--held-out", 10, "--budget", 24)
DIGITS = ("digits", "--labels", "0-9", "--solver", "euler", *TINY)
MEASURED = (*DIGITS, "--steps", 2, 3, "--reference", "digits", "--num-images", 40)
pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def invoke(*arguments: object, code: int = 0, command: str = "steps") -> list[str]:
    """Runs a command; returns the lines of its output, or of its errors."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return (result.stdout if code == 0 else result.stderr).splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("steps") / "runs"
    return folder, invoke(*MEASURED, "--output", folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "result.json"}


def test_the_grids_are_those_of_python(run: tuple[Path, list[str]]) -> None:
    how: dict[str, Any] = {"anchors": 12, "samples": 6, "held_out": 10, "budget": 24, "solver": "euler"}
    found = optimize_steps(flowkit.load_demo(), [2, 3], inputs=range(10), progress=False, **how)
    assert {k: Grid.load(run[0] / f"{k}.json") for k in (2, 3)} == found


def test_the_table_holds_what_was_measured(run: tuple[Path, list[str]]) -> None:
    folder, lines = run
    rows = json.loads((folder / "steps.json").read_text())["rows"]
    assert [(row["steps"], row["grid"]) for row in rows] == [
        (k, name) for k in (2, 3) for name in ("found", "uniform", "Karras", "stock")
    ]
    table = {(row["steps"], row["grid"]): row for row in rows}
    for k in (2, 3):
        grid, row = Grid.load(folder / f"{k}.json"), table[k, "found"]
        assert row["levels"] == list(grid.sigmas)
        assert row["cost"] == [grid.about["cost"], grid.about["cost_se"]]
        assert row["rmse"] == pytest.approx([grid.about["rmse"], grid.about["rmse_se"]])
        uniform = table[k, "uniform"]
        assert uniform["rmse_more_than_found"] == pytest.approx([grid.about["gain"], grid.about["gain_se"]])
        assert (row["rmse_more_than_found"], row["fd_more_than_found"]) == (None, None)
    text = "\n".join(lines)
    assert "stock: FlowMatchEulerDiscreteScheduler" in text
    assert f"{table[3, 'Karras']['rmse'][0]:.3g} ± {table[3, 'Karras']['rmse'][1]:.1g}" in text


def test_the_stock_scheduler_is_run_as_it_is(run: tuple[Path, list[str]]) -> None:
    rows = json.loads((run[0] / "steps.json").read_text())["rows"]
    found, *_, stock = (row for row in rows if row["steps"] == 3)
    pipe = flowkit.load_demo()
    pipe.set_progress_bar_config(disable=True)
    runs = Runs(pipe, "euler", inputs=range(10))
    fine = fine_solution(runs, runs.anchors(12), range(6, 16))
    # Ours from the stock configuration walks the stock levels, 0.001 and 0 at the end.
    levels = (1.0, 0.5005, 0.001, 0.0)
    error = rmse(runs.errors(Grid(levels), fine))
    assert stock["rmse"] == pytest.approx([error.value, error.se], rel=1e-4)
    pipe.scheduler = RectifiedFlowScheduler(solver="euler")
    how: dict[str, Any] = {"inputs": range(10), "progress": False, "call": {"num_inference_steps": 3}}
    figures = []
    for grid in (Grid(levels), Grid(tuple(found["levels"]))):
        pipe.scheduler.set_grid(grid)
        figures.append(evaluate(pipe, "digits", 40, **how).figure("fid"))
    more = paired(figures[0], figures[1])
    assert found["fd"] == pytest.approx([figures[1].value, figures[1].se], rel=1e-4)
    assert stock["fd_more_than_found"] == pytest.approx([more.value, more.se], rel=1e-3)


def test_pictures_are_pictures(run: tuple[Path, list[str]]) -> None:
    for name in ("grids.png", "costs.png"):
        with Image.open(run[0] / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_the_lines_say_how_to_use_a_grid(
    run: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = run
    monkeypatch.chdir(tmp_path)
    commands = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines if ": " in line}
    name, command, *arguments = commands["to sample"]
    assert (name, command) == ("flowkit", "sample")
    invoke(*arguments, command="sample")
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 10
    name, command, *arguments = commands["in stock diffusers"]
    assert (name, command) == ("flowkit", "grid")
    exported = invoke(*arguments, command="grid")
    levels = Grid.load(folder / "3.json").sigmas
    assert f"sigmas=[{', '.join(map(str, levels[:-1]))}]" in "".join(exported)
    assert invoke(folder / "3.json", "--comfyui", command="grid") == [", ".join(map(str, levels))]
    pipe: Any = flowkit.load_demo()
    first, second = (line.strip() for line in lines[-3:-1])
    exec(f"{first.partition(': ')[2].strip()}\n{second}", {"flowkit": flowkit, "pipe": pipe})
    assert pipe.scheduler.grid == Grid.load(folder / "3.json")


def test_the_same_command_goes_on_where_it_was_stopped(
    run: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    forward, count, stops = torch.nn.Module.__call__, 0, 0

    def stopping(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if type(module).__name__ == "UNet2DModel":
            count += 1
            if count > limit:
                raise Stop
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", stopping)
    while True:
        count, limit = 0, 8 + 12 * stops
        try:
            invoke(*MEASURED, "--output", tmp_path / "runs")
            break
        except Stop:
            stops += 1
    assert stops >= 3
    ignored = {"steps.json"}  # holds the command
    one, other = ({k: v for k, v in contents(f).items() if k not in ignored} for f in (run[0], tmp_path / "runs"))
    assert one.keys() == other.keys()
    changed = [k for k, v in one.items() if other[k] != v and not k.startswith("fd/")]
    assert changed == []
    tables = [json.loads((f / "steps.json").read_text())["rows"] for f in (run[0], tmp_path / "runs")]
    assert tables[0] == tables[1]
    count, limit = 0, 1000
    invoke(*MEASURED, "--output", tmp_path / "runs")
    # No more than the two batches that tell the time, and held-out errors: two grids in the search, four rows of the table.
    assert count == 2 + (2 + 4) * (2 + 3)


def test_a_record_does_not_depend_on_the_order_of_a_set() -> None:
    pipe = flowkit.load_demo()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    before = describe_pipeline(pipe)
    pipe.scheduler.register_to_config(_use_default_values=pipe.scheduler.config["_use_default_values"][::-1])
    assert describe_pipeline(pipe) == before


@pytest.mark.slow
def test_another_process_may_go_on(run: tuple[Path, list[str]]) -> None:
    """Whose sets have another order."""
    before = json.loads((run[0] / "steps.json").read_text())["rows"]
    arguments = [sys.executable, "-m", "flowkit.cli", "steps", *map(str, MEASURED), "--output", str(run[0])]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run(arguments, check=True, env=env, capture_output=True)
    assert json.loads((run[0] / "steps.json").read_text())["rows"] == before


@pytest.mark.parametrize("numbers", [("2", "3"), ("2,3",), ("2,", "3")])
def test_numbers_of_steps_are_read_as_people_write_them(
    numbers: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowkit.cli import stepping

    seen: list[Any] = []
    monkeypatch.setattr(stepping, "run", lambda options, search: seen.append((options, search)))
    for words in (("--steps", *numbers, "--labels", "7", "digits"), ("digits", "--labels", "7", "--steps", *numbers)):
        invoke(*words, "--output", tmp_path)
        options, search = seen.pop()
        assert (options.model, options.labels) == ("digits", "7")
        assert stepping._check(options, search)[0] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "4", "13"), "whole numbers from 1 to 12 (the anchors), got [4, 13]"),
        (("--steps", "0"), "whole numbers from 1 to 12 (the anchors), got [0]"),
        (("--steps", "four"), "--steps 'four' are no numbers of steps; write them as --steps 2 4 6 8"),
        (("--steps", "4", "--solver", "sde-dpm++2m"), "draws noise at every step"),
        (("--steps", "4", "--solver", "fast"), "unknown solver 'fast'"),
        (("--steps", "4", "--budget", "5"), "budget=5 is enough for 1 runs of 4 steps"),
        (("--steps", "4", "--objective", "fid"), "--objective fid is of --method evolve, and needs a --reference"),
        (("--steps", "4", "--samples", "1"), "--samples 1 is out of range; give at least 2"),
        (("--steps", "4", "--reference", "gone"), "no reference 'gone'"),
        (("--steps", "4", "--arg", "num_inference_steps=3"), "num_inference_steps cannot be in call"),
        (("--steps", "4", "--labels", "11"), "has classes 0 to 9"),
        (("--steps", "4", "--guidance", "2", "--arg", "guidance_scale=3"), "guidance_scale is given twice"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    lines = invoke(*DIGITS, "--output", tmp_path / "runs", *arguments, code=2)
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_a_model_without_labels_and_folders_that_cannot_be_used(tmp_path: Path) -> None:
    *_, error = invoke("digits", *TINY, "--steps", 4, "--output", tmp_path / "runs", code=2)
    assert error == "error: ClassConditionalPipeline needs class_labels; pass --labels 0-9"
    (tmp_path / "file").touch()
    (error,) = invoke(*DIGITS, "--steps", 4, "--output", tmp_path / "file", code=2)
    assert error.endswith("is a file; choose another folder")
    (error,) = invoke(*DIGITS, "--steps", 4, "--output", tmp_path, code=2)
    assert error.endswith("is not empty and holds no search of steps; choose another folder")
    *_, error = invoke("nowhere", "--steps", 4, "--output", tmp_path / "runs", code=2)
    assert "nowhere" in error
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_diffusers_with_its_own_scheduler(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    tiny.build("dit", scheduler).save_pretrained(tmp_path / "dit")
    lines = invoke(tmp_path / "dit", "--labels", "0,1", *TINY, "--steps", 1, "--output", tmp_path / "runs")
    assert lines[-1].startswith("in stock diffusers: DDIMScheduler takes neither sigmas nor timesteps")
    rows = json.loads((tmp_path / "runs" / "steps.json").read_text())["rows"]
    assert all(row["rmse"][0] > 0 for row in rows)
    grid = Grid.load(tmp_path / "runs" / "1.json")
    assert (grid.path, grid.solver, len(grid)) == ("vp", "euler", 1)
    *_, error = invoke(
        "digits",
        "--labels",
        0,
        "--grid",
        tmp_path / "runs" / "1.json",
        "--output",
        tmp_path / "out",
        code=2,
        command="sample",
    )
    assert "belongs to the path 'vp', this scheduler walks 'flow'" in error


def test_a_path_without_a_stock_scheduler(tmp_path: Path) -> None:
    network = flowkit.MixtureDenoiser.of(torch.zeros(1, 1, 1, 1), 0.5, path="cosine")
    pipe = flowkit.ClassConditionalPipeline(network, RectifiedFlowScheduler(path="cosine", solver="euler"))
    assert _stock(pipe.scheduler) is None
    runs = Runs(pipe, inputs=[0])
    grids = {1: runs.anchors(1)}
    assert [row.name for row in _rows(runs, grids, 4, None)] == ["found", "uniform", "Karras"]


def test_a_search_of_other_settings_is_refused(run: tuple[Path, list[str]]) -> None:
    *_, error = invoke(*MEASURED, "--seed", 1, "--output", run[0], code=2)
    assert "samples.seed 0, this one has 1; choose another folder" in error


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from flowkit.cli import main\n"
        "sys.argv = ['flowkit', 'steps', '--help']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('LOADED', sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert "LOADED []" in shown
    assert "2 4 6 8" in shown

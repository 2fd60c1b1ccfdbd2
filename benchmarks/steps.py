"""Grids of a few steps, searched and not, by how far their samples end from the fine solution; FD of the embedded models beside it.

    python benchmarks/steps.py            # measures what benchmarks/steps.json does not have yet; about 8 CPU-minutes in all
    python benchmarks/steps.py --table    # prints the tables of docs/steps.md from it
    python benchmarks/steps.py --points   # a search that loses on held-out noise, on more and more samples; ten seconds

Problems: the two exact mixtures of benchmarks/samplers.py on the flow path, and the embedded models. Each solver has its own
search; all grids of a problem are compared to one fine solution, `REFERENCE` on many even steps, on held-out noise: root mean
squared error over elements and samples, and what is gained over the uniform grid, in per cent of its error, with the standard error
of the paired difference. FD is that of the same samples, in the classifier's features, with its own paired difference. These are
errors, not speeds: a busy machine does not change them.

The grids: uniform; karras, from the model's own first to its last level, then 0; shift, uniform pushed to noise by `SHIFT`; local
and final, the two objectives of method "bellman"; evolved, method "evolve" with the same budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import samplers
import torch
from diffusers.utils.logging import disable_progress_bar
from sampler_tables import markdown, number

from flowkit import ClassConditionalPipeline, MixtureDenoiser, RectifiedFlowScheduler, load_demo, optimize_steps
from flowkit.distill.fine import Fine, Runs, coarse, fine_solution, rmse
from flowkit.eval import evaluate
from flowkit.eval.images import images
from flowkit.eval.intervals import Figure, paired
from flowkit.grids import Grid, named
from flowkit.progress import bar
from flowkit.weights import write_bytes

RESULTS = Path(__file__).with_suffix(".json")
SOLVERS = ("euler", "dpm++2m", "unipc")
REFERENCE, SHIFT = "unipc", 3.0
MODELS = ("digits", "shapes")
# A search on few samples, measured on more of them; `fine` is the number of steps of the solution that all are compared to.
MIXTURE = {"steps": [*range(1, 11)], "anchors": 100, "samples": 500, "budget": 400, "held_out": 4000, "fine": 200}
FULL: dict[str, dict[str, Any]] = {
    "smooth": MIXTURE,
    "clusters": MIXTURE,
    "digits": {"steps": [2, 4, 6, 8], "anchors": 60, "samples": 64, "budget": 160, "held_out": 1000, "fine": 60},
    "shapes": {"steps": [4, 6, 8], "anchors": 60, "samples": 32, "budget": 100, "held_out": 240, "fine": 60},
}
_TINY = {"steps": [1, 2], "anchors": 6, "samples": 4, "budget": 8, "held_out": 40, "fine": 6}
FAST = dict.fromkeys(FULL, _TINY)

Record = dict[str, Any]


def pipeline(name: str) -> Any:  # noqa: ANN401
    """The problem as a pipeline."""
    if name in MODELS:
        pipe = load_demo(name)
        pipe.unet.to(memory_format=torch.channels_last)  # a third faster on CPUs
    else:
        means, std, weights = samplers.problem(name)
        network = MixtureDenoiser.of(means[:, :, None, None], std, weights, path="flow")
        pipe = ClassConditionalPipeline(network, RectifiedFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any) -> Record:  # noqa: ANN401
    """How the problem is sampled: all its classes in turn."""
    return {"inputs": range(max(pipe.num_classes, 1)), "batch_size": 250 if pipe.num_classes else 4000}


@cache
def solution(name: str, first: int, count: int, steps: int) -> Fine:
    """What all grids are compared to, on the samples after the first ones, which the searches see."""
    pipe = pipeline(name)
    runs = Runs(pipe, REFERENCE, **arguments(pipe))
    return fine_solution(runs, runs.anchors(steps), range(first, first + count))


def grids(pipe: Any, solver: str, settings: Record) -> dict[int, dict[str, Grid]]:  # noqa: ANN401
    """Every grid of each number of steps."""
    how = {
        **arguments(pipe),
        **{k: settings[k] for k in ("anchors", "samples", "budget")},
        "held_out": 0,
        "progress": False,
    }
    steps = settings["steps"]
    final = optimize_steps(pipe, steps, solver=solver, **how)
    evolved = optimize_steps(pipe, steps, method="evolve", solver=solver, **how)
    runs = Runs(pipe, solver, **arguments(pipe))
    anchors, path, found = runs.anchors(settings["anchors"]), runs.scheduler.path, {}
    for k in steps:
        plain = {"uniform": Grid.uniform(k), "karras": named("karras", k, path), "shift": Grid.shifted(k, SHIFT)}
        searched = {"local": coarse(anchors, final[k].about["local_indices"]), "final": final[k]}
        found[k] = {**plain, **searched, "evolved": evolved[k]}
    return found


def measured(name: str, solver: str, settings: Record) -> Record:
    """All grids of one problem and solver: steps -> grid -> figures."""
    pipe = pipeline(name)
    fine = solution(name, settings["samples"], settings["held_out"], settings["fine"])
    runs, rows = Runs(pipe, solver, **arguments(pipe)), {}
    for k, candidates in grids(pipe, solver, settings).items():
        figures: dict[str, tuple[Figure, Figure | None]] = {}
        for label, grid in candidates.items():
            ends = torch.cat([x for _, x in runs.ends(grid, fine.samples)])
            error = rmse(fine.errors(ends))
            figures[label] = error, distance(name, ends)
        rows[str(k)] = {label: compared(figures, label) for label in candidates}
        for label, grid in candidates.items():
            rows[str(k)][label]["levels"] = [float(f"{v:.4g}") for v in grid.sigmas]
    return rows


def distance(name: str, ends: torch.Tensor) -> Figure | None:
    """FD of samples of an embedded model."""
    if name not in MODELS:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
        return evaluate(images(ends, value_range=(-1, 1), clip=True), name, progress=False).figure("fid")


def compared(figures: dict[str, tuple[Figure, Figure | None]], label: str) -> Record:
    """Figures with their standard errors, and what is gained over uniform with that of the pair."""
    found: Record = {}
    for key, figure, base in zip(("rmse", "fd"), figures[label], figures["uniform"], strict=True):
        if figure is not None and base is not None:
            gain = paired(base, figure)
            found[key], found[f"{key}_gain"] = shortened(figure), shortened(gain)
    return found


def shortened(figure: Figure) -> list[float]:
    """Value and standard error in four and two digits."""
    return [float(f"{figure.value:.4g}"), float(f"{figure.se:.2g}")]


def measure(file: Path, settings: Record) -> Record:
    """Measures what a file does not hold yet, and writes it after each problem and solver.

    Raises:
        ValueError: for a file of other settings.
    """
    rows: Record = {}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise ValueError(f"{file} holds rows of other settings; name another file with --output")
        rows = found["rows"]
    todo = [key for key in map("/".join, itertools.product(settings, SOLVERS)) if key not in rows]
    with bar(True) as progress:
        task = progress.add_task("rows", total=len(todo))
        for key in todo:
            progress.update(task, description=key)
            name, solver = key.split("/")
            rows[key] = measured(name, solver, settings[name])
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(row)}" for k, row in rows.items())
            write_bytes(file, f'{{\n "settings": {json.dumps(settings)},\n "rows": {{\n{lines}\n }}\n}}\n'.encode())
            progress.advance(task)
    return {"settings": settings, "rows": rows}


def tables(results: Record) -> str:
    """The tables of docs/steps.md: a line for each number of steps and solver, a column for each grid."""
    parts = [summary(results)]
    for name, settings in results["settings"].items():
        found = {key.split("/")[1]: row for key, row in results["rows"].items() if key.startswith(f"{name}/")}
        if not found:
            continue
        labels = list(next(iter(next(iter(found.values())).values())))
        head = ["solver", "steps", "uniform", *labels[1:]]
        sizes = f"search on {settings['samples']:,} samples, {settings['budget']} evaluations of each"
        sizes = f"{settings['held_out']:,} held-out samples; {sizes}"
        body = [
            [f"`{solver}`", k, number(row["uniform"]["rmse"][0]), *(gain(row, label) for label in labels[1:])]
            for solver, rows in found.items()
            for k, row in rows.items()
        ]
        parts.append(f"**{name}**: RMSE of uniform, and gain over it in % ({sizes})\n\n{markdown(head, body)}")
        if name in MODELS:
            cells = [
                [f"`{s}`", k, *(distance_cell(row, label) for label in labels)]
                for s, rows in found.items()
                for k, row in rows.items()
            ]
            title = (
                f"**{name}**: FD of the same {settings['held_out']:,} samples, and its paired difference from uniform"
            )
            parts.append(f"{title}\n\n{markdown(head, cells)}")
    return "\n".join(parts)


def summary(results: Record) -> str:
    """How many searches of two steps or more came out better and worse than uniform, by two standard errors."""
    body = []
    for name in results["settings"]:
        rows = [
            row
            for key, found in results["rows"].items()
            for k, row in found.items()
            if key.startswith(f"{name}/") and k != "1"
        ]
        labels = ("local", "final", "evolved")
        columns = [[row[label]["rmse_gain"] for row in rows if label in row] for label in labels]
        columns.append([row["final"]["fd_gain"] for row in rows if "fd_gain" in row["final"]])
        cells = []
        for gains in columns:
            better, worse = (sum(sign * value > 2 * error for value, error in gains) for sign in (1, -1))
            cells.append(f"{better} better, {worse} worse" if gains else "")
        body.append([name, str(len(rows)), *cells])
    head = ["", "searches", "local, RMSE", "final, RMSE", "evolved, RMSE", "final, FD"]
    title = "**Against uniform, by more than two standard errors** (all numbers of steps but 1, all solvers)"
    return f"{title}\n\n{markdown(head, body, text=(0, 2, 3, 4, 5))}"


def gain(row: Record, label: str) -> str:
    """What is gained in per cent of the error of uniform."""
    base = row["uniform"]["rmse"][0]
    value, error = (100 * v / base for v in row[label]["rmse_gain"])
    return f"{value:+.1f} ± {error:.1f}" if math.isfinite(value) else "-"


def distance_cell(row: Record, label: str) -> str:
    """FD, and how much lower than that of uniform it is."""
    value = f"{row[label]['fd'][0]:.2f}"
    if label == "uniform":
        return value
    change, error = row[label]["fd_gain"]
    return f"{value} ({-change:+.2f} ± {error:.2f})"


def points() -> str:
    """A search of three steps among six random points in 16 dimensions on the VP path, which loses where it sees few samples."""
    means = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of Stable Diffusion
    network = MixtureDenoiser.of(means, 0.2, path="vp")
    pipe = ClassConditionalPipeline(network, RectifiedFlowScheduler(path="vp", solver="euler", **betas))
    pipe.set_progress_bar_config(disable=True)
    how: Record = {"anchors": 40, "budget": 200, "held_out": 2000, "inputs": [0], "batch_size": 2000, "progress": False}
    body = []
    for samples in (64, 256, 1024):
        about = optimize_steps(pipe, [3], samples=samples, **how)[3].about
        seen = 100 * (1 - about["search_rmse"] / about["uniform_search_rmse"])
        value, error = (100 * about[key] / about["uniform_rmse"] for key in ("gain", "gain_se"))
        body.append([str(samples), f"{seen:+.1f}", f"{value:+.1f} ± {error:.1f}"])
    return markdown(["search samples", "gain on them, %", "gain on held-out noise, %"], body, text=())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Grids of a few steps, searched and not.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--fast", action="store_true", help="a smoke run, to another --output")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows that are there")
    parser.add_argument("--points", action="store_true", help="print a search that loses, on more and more samples")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    disable_progress_bar()  # of loading a model
    if options.points:
        print(points(), end="")
        return
    if options.table:
        results = json.loads(options.output.read_text(encoding="utf-8"))
    else:
        results = measure(options.output, FAST if options.fast else FULL)
    print(tables(results), end="")


if __name__ == "__main__":
    main()

"""Every solver at equal numbers of network calls: on exact mixtures, where the answer is known, and on the embedded models.

    python benchmarks/samplers.py            # measures what benchmarks/samplers.json does not have yet; about 15 CPU-minutes in all
    python benchmarks/samplers.py --table    # prints the tables of docs/samplers.md from it
    python benchmarks/samplers.py --plot docs/samplers.png

A solver takes the number of steps whose calls come nearest to 4, 8, 16 and 32, the fewer of two that are as near; a last step that
ends at sigma 0 may be one call where the others are more, so heun makes 3, 7, 15 and 31. Two figures on each mixture and path:
- RMSE over coordinates and samples to a fine solution of the probability-flow ODE from the same noise (deterministic solvers);
- the sliced Wasserstein-2 distance to exact samples, by `PROJECTIONS` fixed directions: root of the mean square between the sorted
  projections and their expectation, which `EXACT` independent exact sets give. Exact samples themselves are a row: the floor.

On the embedded models: the Frechet distance in the classifier's features (`flowkit.eval.evaluate`), same seeds in every row. These
are errors, not speeds: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import sampler_tables
import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from flowkit import RectifiedFlowScheduler, load_demo, paths, solvers, table
from flowkit.analytic import MixtureDenoiser
from flowkit.eval import evaluate
from flowkit.progress import bar
from flowkit.weights import write_bytes

RESULTS = Path(__file__).with_suffix(".json")
FULL: dict[str, Any] = {"samples": 8192, "seeds": 5, "digits": 1000, "shapes": 480, "calls": [4, 8, 16, 32],
                        "model_calls": [4, 8, 16]}  # fmt: skip
FAST: dict[str, Any] = {"samples": 128, "seeds": 2, "digits": 20, "shapes": 24, "calls": [4], "model_calls": [2]}
PROJECTIONS, EXACT, FINE, SIGMA_MAX = 32, 64, 64, 80.0

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
PATHS: dict[str, dict[str, Any]] = {
    "flow": {"path": "flow", "grid": "uniform"},
    "vp": {"path": "vp", "grid": "trailing", **BETAS},
    "vp, karras": {"path": "vp", "grid": "karras", **BETAS},
    "edm": {"path": "edm", "grid": "karras"},
}
# Solvers that are one and the same everywhere: measured once (tests/test_samplers_page.py).
SAME = {"euler": ("ddim", "dpm++1s"), "ab4": ("lms",)}
ROWS: dict[str, dict[str, Any]] = {
    name: {"solver": name} for name in solvers.SOLVERS if not any(name in others for others in SAME.values())
} | {"edm, s_churn=2": {"solver": "edm", "s_churn": 2.0}}

Record = dict[str, Any]


@cache
def problem(name: str) -> tuple[Tensor, float, Tensor]:
    """Means (K, d), standard deviation and weights: "smooth", five wide ones in 4-D, or "clusters", eight narrow ones in 2-D."""
    if name == "smooth":
        rows = [[1.2, 0.3, -0.5, 0.1], [-0.9, 0.8, 0.4, -0.6], [0.2, -1.1, 0.9, 0.7], [-0.4, -0.3, -1.2, 1.0],
                [0.6, 1.0, 0.2, -1.1]]  # fmt: skip
        return torch.tensor(rows, dtype=torch.float64), 0.6, torch.ones(5, dtype=torch.float64)
    k = torch.arange(8, dtype=torch.float64)
    spiral = (0.4 + 0.2 * k)[:, None] * torch.stack([(2.4 * k).cos(), (2.4 * k).sin()], 1)
    return spiral, 0.05, 1 + k


def normal(seed: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Fixed noise: equal for all solvers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + step), dtype=torch.float64)


def noise(name: str, seed: int, count: int) -> Tensor:
    """Noise of unit variance that samples start from, (count, d)."""
    return normal(seed, 0, (count, problem(name)[0].shape[1]))


def exact(name: str, seed: int, count: int) -> Tensor:
    """Exact samples of a mixture, (count, d)."""
    means, std, weights = problem(name)
    generator = torch.Generator().manual_seed(10**6 + seed)
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    return means[which] + std * torch.randn(count, means.shape[1], generator=generator, dtype=torch.float64)


def projected(x: Tensor) -> Tensor:
    """Sorted projections on fixed directions, (N, PROJECTIONS)."""
    directions = normal(7, 7, (x.shape[1], PROJECTIONS))
    return torch.sort(x @ (directions / directions.norm(dim=0)), dim=0)[0]


@cache
def expected(name: str, count: int) -> Tensor:
    """Expectation of the sorted projections of exact samples."""
    return torch.stack([projected(exact(name, 100 + i, count)) for i in range(EXACT)]).mean(0)


def distance(name: str, x: Tensor) -> float:
    """Sliced Wasserstein-2 distance to the mixture."""
    return float((projected(x) - expected(name, len(x))).square().mean().sqrt())


def run(name: str, path: paths.Path, rows: list[table.Row], x: Tensor, seed: int) -> Tensor:
    """The end of a table, from a sample at its start."""
    model = MixtureDenoiser.of(*problem(name), path=path.name)

    def network(x: Tensor, time: float) -> Tensor:
        output: Tensor = model(x * path.input_scale(path.at_time(time)), time).sample
        return output

    return table.solve(rows, x, network, lambda i: normal(seed, i + 1, tuple(x.shape)))


def fine(name: str, path: paths.Path, z: Tensor, steps: int = FINE) -> Tensor:
    """The probability-flow ODE from pure noise, by RK4 in flow time, in steps that shrink towards the data."""
    high = SIGMA_MAX if path.name == "edm" else 1.0
    first = paths.from_rho(high) if path.name == "edm" else path.start
    levels = [first * (1 - i / steps) ** 2 for i in range(steps + 1)]
    prediction = {"flow": "flow_prediction", "edm": "edm"}.get(path.name, "epsilon")
    rows = table.build(replace(solvers.find("rk4"), gauge="flow"), path, prediction, levels)
    return run(name, path, rows, high * z, 0)


@cache
def solution(name: str, path: str, seed: int, count: int) -> Tensor:
    """What deterministic solvers converge to."""
    return fine(name, paths.named(path), noise(name, seed, count))


def steps_for(scheduler: RectifiedFlowScheduler, calls: int) -> tuple[int, float, list[table.Row]]:
    """The number of steps whose calls are nearest to those wanted, the fewer of two; scale of its start, and its table."""
    about = max(1, calls // scheduler.method.stages)
    plans = {n: scheduler.plan(n, None, None, None) for n in (about, about + 1)}
    tables = {n: plan.rows() for n, plan in plans.items()}
    best = min(tables, key=lambda n: abs(len(tables[n]) - calls))
    return best, plans[best].start, tables[best]


def averaged(values: list[float]) -> list[float]:
    """Mean and its standard error, in three and two digits."""
    return [float(f"{statistics.fmean(values):.3g}"), float(f"{statistics.stdev(values) / len(values) ** 0.5:.2g}")]


def mixture(name: str, kind: str, row: str, calls: int, samples: int, seeds: int) -> Record:
    """One solver on one mixture and path."""
    scheduler = RectifiedFlowScheduler(**PATHS[kind], **ROWS[row])
    steps, scale, rows = steps_for(scheduler, calls)
    errors, distances = [], []
    for seed in range(1, seeds + 1):
        y = run(name, scheduler.path, rows, scale * noise(name, seed, samples), seed)
        distances.append(distance(name, y))
        errors.append(float((y - solution(name, scheduler.path.name, seed, samples)).square().mean().sqrt()))
    record = {"steps": steps, "calls": len(rows), "w2": averaged(distances)}
    return record if any(r.c for r in rows) else record | {"rmse": averaged(errors)}


def bounds(name: str, kind: str, samples: int, seeds: int) -> Record:
    """What no solver can beat: exact samples, and the fine solution from pure noise; and how far off that solution is."""
    sets = [exact(name, seed, samples) for seed in range(1, seeds + 1)]
    path = PATHS[kind]["path"]
    ends = [solution(name, path, seed, samples) for seed in range(1, seeds + 1)]
    finer = fine(name, paths.named(path), noise(name, 1, samples)[:1000], 2 * FINE)
    off = float((finer - ends[0][:1000]).square().mean().sqrt())
    w2 = {"exact": averaged([distance(name, x) for x in sets]), "ode": averaged([distance(name, x) for x in ends])}
    return {**w2, "reference_error": float(f"{off:.2g}")}


def embedded(data: str, row: str, calls: int, images: int) -> Record:
    """One solver on an embedded model."""
    pipe = load_demo(data)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.scheduler = RectifiedFlowScheduler(noise="keyed", **ROWS[row])
    steps, _, rows = steps_for(pipe.scheduler, calls)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
        result = evaluate(pipe, data, images, inputs=range(pipe.num_classes), batch_size=240, progress=False,
                          call={"num_inference_steps": steps})  # fmt: skip
    return {"steps": steps, "calls": len(rows), "fd": [float(f"{result['fid']:.4g}"), float(f"{result.se['fid']:.2g}")]}


def jobs(settings: Record) -> dict[str, Callable[[], Record]]:
    """Every row by its name, cheap ones first."""
    size = (settings["samples"], settings["seeds"])
    found: dict[str, Callable[[], Record]] = {}
    for name, kind in itertools.product(("smooth", "clusters"), PATHS):
        found[f"{name}/{kind}"] = partial(bounds, name, kind, *size)
        for row, calls in itertools.product(ROWS, settings["calls"]):
            found[f"{name}/{kind}/{row}/{calls}"] = partial(mixture, name, kind, row, calls, *size)
    for data, row, calls in itertools.product(("digits", "shapes"), ROWS, settings["model_calls"]):
        found[f"{data}/{row}/{calls}"] = partial(embedded, data, row, calls, settings[data])
    return found


def measure(file: Path, settings: Record) -> Record:
    """Runs the rows that a file does not hold yet, and writes it after each.

    Raises:
        ValueError: for a file of other settings.
    """
    rows: Record = {}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if found["settings"].get(key) != value:
                raise ValueError(f"{file} holds rows of {key} = {found['settings'].get(key)}, not of {value}; "
                                 "name another file with --output")  # fmt: skip
        rows = found["rows"]
    todo = {key: job for key, job in jobs(settings).items() if key not in rows}
    with bar(True) as progress:
        task = progress.add_task("rows", total=len(todo))
        for key, job in todo.items():
            progress.update(task, description=key)
            rows[key] = job()
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(row)}" for k, row in rows.items())
            text = f'{{\n "settings": {json.dumps(settings)},\n "rows": {{\n{lines}\n }}\n}}\n'
            write_bytes(file, text.encode())
            progress.advance(task)
    return {"settings": settings, "rows": rows}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Every solver at equal numbers of network calls.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--fast", action="store_true", help="a smoke run, to another --output")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows that are there")
    parser.add_argument("--plot", type=Path, help="draw the rows that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    disable_progress_bar()  # of loading a model
    if not (options.table or options.plot):
        results = measure(options.output, {**(FAST if options.fast else FULL), "paths": PATHS})
    else:
        results = json.loads(options.output.read_text(encoding="utf-8"))
    if options.plot:
        write_bytes(options.plot, sampler_tables.plot(results, options.plot))
    else:
        print(sampler_tables.tables(results, SAME), end="")


if __name__ == "__main__":
    main()

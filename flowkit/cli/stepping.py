"""What ``flowkit steps`` does: a search, its grids measured against others, and how to use them.

    DIR/K.json      the grid of K steps
    DIR/steps.json  every figure of the latest command
    DIR/grids.png   the levels, DIR/costs.png the cost of every step between two anchors
    DIR/search      what the search keeps, see `flowkit.optimize_steps`
    DIR/fd          evaluations of flowkit.eval

Each file is written whole or not at all. A command that was stopped goes on in search and fd and ends the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flowkit import solvers
from flowkit.cli.options import Options
from flowkit.cli.sample import join, memory_told, open_model
from flowkit.distill.bellman import COSTS, forecast, optimize_steps
from flowkit.distill.costs import Costs
from flowkit.distill.fine import Runs, coarse, fine_solution, rmse
from flowkit.distill.shortest import check_steps, uniform_path
from flowkit.eval import evaluate
from flowkit.eval.intervals import Figure, paired
from flowkit.eval.references import match
from flowkit.eval.runs import write_json
from flowkit.eval.sources import device_of
from flowkit.grids import Grid, named
from flowkit.progress import bar, duration
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.schedulers.saving import stock_config
from flowkit.weights import check_writable, write_bytes

SEARCH, FD, TABLE, GRIDS, COST_PLOT = "search", "fd", "steps.json", "grids.png", "costs.png"
_FORMAT = "flowkit.steps-table/1"
FOUND, STOCK = "found", "stock"


@dataclass(frozen=True)
class Search:
    """What is searched and measured, see `flowkit.cli.steps`; None means not given."""

    numbers: str
    method: str
    objective: str
    solver: str | None
    anchors: int
    samples: int
    budget: int
    held_out: int | None
    reference: str | None
    num_images: int


@dataclass
class Row:
    """One line of the table: a grid of K steps, or the stock scheduler on its own levels.

    Attributes:
        steps: K.
        name: of the grid.
        grid: None for the stock scheduler.
        cost: predicted by the cost matrix; None where the levels are no anchors.
        error: RMSE to the fine solution on held-out noise.
        fd: Fréchet distance.
    """

    steps: int
    name: str
    grid: Grid | None
    cost: Figure | None = None
    error: Figure | None = None
    fd: Figure | None = None


def run(given: Options, search: Search) -> None:
    """Carries out ``flowkit steps``.

    Raises:
        ValueError, TypeError, OSError, ImportError: for options, a model or a folder that cannot be used, before the search; and as
            `flowkit.optimize_steps`.
    """
    state = join(given.device)
    if state.num_processes > 1:
        raise ValueError(
            f"flowkit steps is one process, and {state.num_processes} were started; run it without a launcher"
        )
    steps, held_out = _check(given, search)
    console = Console(stderr=True)
    pipe, request, _, _ = open_model(given, state.device, console)
    batch = given.batch_size or (4 if "prompt" in request.rows[0] else 64)
    inputs = request.inputs() if request.rows != [{}] else None
    shared: dict[str, Any] = {"inputs": inputs, "call": request.call, "seed": given.seed, "batch_size": batch}
    goal: dict[str, Any] = {"reference": search.reference} if search.objective == "fid" else {}
    if search.reference is not None:
        match(search.reference, None, device_of(pipe))
    folder = given.output
    with memory_told():
        runs = Runs(pipe, search.solver, **shared)
        runs.check_deterministic()
        _say_time(runs, steps, search, held_out, console)
        grids = optimize_steps(
            pipe, steps, method=search.method, objective=search.objective, solver=search.solver, anchors=search.anchors,
            samples=search.samples, held_out=held_out, budget=search.budget, output=folder / SEARCH, **shared, **goal,
        )  # fmt: skip
        for k, grid in grids.items():
            grid.save(folder / f"{k}.json")
        stock = _stock(pipe.scheduler)
        rows = _rows(runs, grids, search.anchors, stock)
        with bar(True) as display:
            _measure(runs, rows, search, held_out, stock, folder / SEARCH, display)
        if search.reference is not None:
            for row in rows:
                row.fd = _distance(runs, row, search, shared, stock, folder / FD)
    command = shlex.join(["flowkit", *sys.argv[1:]])
    name = None if stock is None else type(stock).__name__
    facts = {"format": _FORMAT, "command": command, "solver": runs.solver, "stock": name}
    write_json(folder / TABLE, {**facts, "rows": list(_plain(rows))})
    Console().print(_table(rows, held_out, search, name))
    _draw(runs, grids, folder)
    _say_how(given, runs, stock, folder, list(grids))


def _check(given: Options, search: Search) -> tuple[list[int], int]:
    """Numbers of steps, and of held-out samples."""
    words = search.numbers.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"--steps {search.numbers!r} are no numbers of steps; write them as --steps 2 4 6 8")
    if search.objective == "fid" and (search.method != "evolve" or search.reference is None):
        raise ValueError("--objective fid is of --method evolve, and needs a --reference; give both, or leave it out")
    held_out = search.samples if search.held_out is None else search.held_out
    for option, value, least in (
        ("--anchors", search.anchors, 1),
        ("--samples", search.samples, 2),
        ("--held-out", held_out, 2),
        ("--num-images", search.num_images, 2),
    ):
        if value < least:
            raise ValueError(f"{option} {value} is out of range; give at least {least}")
    steps = check_steps(dict.fromkeys(map(int, words)), search.anchors)
    if search.solver is not None:
        solvers.find(search.solver)
    check_writable(given.output)
    if given.output.is_dir() and any(given.output.iterdir()) and not (given.output / SEARCH).is_dir():
        raise ValueError(f"{given.output} is not empty and holds no search of steps; choose another folder")
    return steps, held_out


def _say_time(runs: Runs, steps: list[int], search: Search, held_out: int, console: Console) -> None:
    """How long all will take, from one batch of one step."""
    one, batch = runs.anchors(1), range(min(runs.batch_size, search.samples))
    runs.start(one)  # the first call of a network takes longer
    began = time.perf_counter()
    list(runs.ends(one, batch))
    seconds = (time.perf_counter() - began) / (len(batch) * runs.evaluations(one))
    budget = 0 if search.objective == "local" else search.budget
    needed = forecast(runs, steps, search.anchors, search.samples, held_out, budget)
    others = 2 * held_out * sum(runs.evaluations(runs.anchors(k)) for k in steps)
    measured = needed.pop("measurement") + 2 * others
    parts = {"search": sum(needed.values()), "errors": measured}
    if search.reference is not None:
        parts["FD"] = 2 * others * search.num_images // held_out
    told = ", ".join(f"{name} {duration(seconds * count)}" for name, count in parts.items())
    total = duration(seconds * sum(parts.values()))
    console.print(
        f"at most about {total}: {told}; what is there already is not done again", highlight=False, soft_wrap=True
    )


def _stock(scheduler: Any) -> Any:  # noqa: ANN401
    """The model's own scheduler, or diffusers' in the place of ours; None where it has none."""
    if not isinstance(scheduler, RectifiedFlowScheduler):
        return scheduler
    try:
        name, config = stock_config(scheduler)
    except ValueError:
        return None
    return getattr(diffusers, name).from_config({key: value for key, value in config.items() if key != "flowkit"})


def _rows(runs: Runs, grids: Mapping[int, Grid], anchors: int, stock: Any) -> list[Row]:  # noqa: ANN401
    """The grids to measure: found, uniform and Karras; and the stock scheduler."""
    fine, rows = runs.anchors(anchors), list[Row]()
    for k, grid in grids.items():
        about = grid.about
        unbounded = grid.path in ("ve", "edm")  # whose fine steps are Karras spacing, by the scheduler's own limits
        karras = runs.anchors(k) if unbounded else named("karras", k, runs.scheduler.path)
        costs = {
            key: Figure(about[f"{key}cost"], about[f"{key}cost_se"])
            for key in ("", "uniform_")
            if f"{key}cost" in about
        }
        rows += [
            Row(k, FOUND, grid, costs.get("")),
            Row(k, "uniform", coarse(fine, uniform_path(anchors, k)), costs.get("uniform_")),
            Row(k, "Karras", karras),
            *([] if stock is None else [Row(k, STOCK, None)]),
        ]
    return rows


def _measure(
    runs: Runs,
    rows: list[Row],
    search: Search,
    held_out: int,
    stock: Any,  # noqa: ANN401
    folder: Path,
    display: Progress,
) -> None:
    """Errors on held-out noise; a stock scheduler that cannot take so many steps has none."""
    first = search.samples * (2 if search.method == "evolve" else 1)  # which ranks its best grids on as many again
    samples = range(first, first + held_out)
    fine = fine_solution(runs, runs.anchors(search.anchors), samples, folder, display)
    task = display.add_task("errors", total=len(rows))
    for row in rows:
        if row.grid is not None:
            row.error = rmse(runs.errors(row.grid, fine))
        else:
            try:
                with _under(runs.pipe, copy.deepcopy(stock)):
                    row.error = rmse(fine.errors(torch.cat([x for _, x in runs.stock_ends(row.steps, fine.samples)])))
            except ValueError as error:
                display.console.print(f"stock is not measured with {row.steps} steps: {error}", highlight=False)
        display.advance(task)


def _distance(
    runs: Runs,
    row: Row,
    search: Search,
    shared: Mapping[str, Any],
    stock: Any,  # noqa: ANN401
    folder: Path,
) -> Figure | None:
    """FD on the same noise for every row."""
    if row.error is None:
        return None
    key = json.dumps([runs.solver, _levels(row), search.reference, search.num_images])
    output = folder / f"{row.steps}-{row.name.lower()}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    call = {**shared["call"], "num_inference_steps": row.steps}
    scheduler = copy.deepcopy(stock)  # a run leaves its levels in it
    if row.grid is not None:
        scheduler = runs.scheduler.fork()
        scheduler.set_grid(row.grid)
    with _under(runs.pipe, scheduler), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
        result = evaluate(runs.pipe, search.reference, search.num_images, output=output, **{**shared, "call": call})
    return result.figure("fid")


@contextmanager
def _under(pipe: Any, scheduler: Any) -> Iterator[None]:  # noqa: ANN401
    """The pipeline with another scheduler."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def _levels(row: Row) -> list[Any] | None:
    return None if row.grid is None else row.grid.to_dict()["sigmas"]


def _compared(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Figure]]]:
    """Each row with what it has more than the found grid of its steps, paired."""
    found: Row | None = None
    for row in rows:
        found = row if row.name == FOUND else found
        more = {}
        for key in ("error", "fd"):
            one, base = getattr(row, key), getattr(found, key)
            if row is not found and one is not None and base is not None:
                more[key] = paired(one, base)
        yield row, more


def _plain(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """The table as values of JSON: figures as [value, standard error], null where there are none."""
    for row, more in _compared(rows):
        figures = {"cost": row.cost, "rmse": row.error, "fd": row.fd}
        figures |= {"rmse_more_than_found": more.get("error"), "fd_more_than_found": more.get("fd")}
        values = {key: None if figure is None else [figure.value, figure.se] for key, figure in figures.items()}
        yield {"steps": row.steps, "grid": row.name, "levels": _levels(row), **values}


def _table(rows: list[Row], held_out: int, search: Search, stock: str | None) -> Table:
    """The table for the terminal."""
    measured = search.reference is not None
    caption = [f"stock: {stock}"] * (stock is not None) + ["cost: summed over the steps, predicted"]
    caption += [f"error: RMSE to the fine solution, {held_out:,} held-out samples"]
    caption += [f"FD: of {search.num_images:,} images"] * measured + ["more: than found, in %, on the same noise"]
    heads = ("grid", "cost", "error", "more, %", *(("FD", "more, %") if measured else ()))
    look: dict[str, Any] = {"box": box.SIMPLE, "pad_edge": False, "collapse_padding": True}
    table = Table("K", *heads, **look, caption="\n".join(caption), caption_justify="left")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    last = [i for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1].name == FOUND]
    bases = dict[str, Figure]()
    for i, (row, more) in enumerate(_compared(rows)):
        cells = ["" if row.cost is None else f"{row.cost.value:.3g}"]
        for key in ("error", "fd")[: 1 + measured]:
            figure = getattr(row, key)
            if row.name == FOUND:
                bases[key] = figure
            cells.append("" if figure is None else f"{figure.value:.3g} ± {figure.se:.1g}")
            cells.append(_percent(more[key], bases[key].value) if key in more else "")
        table.add_row(str(row.steps) if row.name == FOUND else "", row.name, *cells, end_section=i in last)
    return table


def _percent(more: Figure, base: float) -> str:
    if not base:
        return ""
    value, error = 100 * more.value / base, 100 * more.se / base
    return f"{value:+.0f} ± {error:.0f}" if abs(value) >= 100 else f"{value:+.1f} ± {error:.1f}"


def _draw(runs: Runs, grids: Mapping[int, Grid], folder: Path) -> None:
    """Pictures of the grids, and of the costs that they were chosen by."""
    from flowkit.cli.grid_plot import draw
    from flowkit.distill.cost_plot import plot_costs

    steps = {k: f"{k} step{'s' * (k > 1)}" for k in grids}
    try:
        levels = [(steps[k], grid.sigmas, runs.scheduler.path) for k, grid in grids.items()]
        write_bytes(folder / GRIDS, draw(levels, folder / GRIDS))
        paths = {steps[k]: grid.about["indices"] for k, grid in grids.items() if "indices" in grid.about}
        if (folder / SEARCH / COSTS).is_file():
            plot_costs(Costs.load(folder / SEARCH / COSTS), paths, folder / COST_PLOT)
    except ImportError as error:
        typer.echo(f"no pictures: {error}", err=True)


def _say_how(given: Options, runs: Runs, stock: Any, folder: Path, steps: list[int]) -> None:  # noqa: ANN401
    """The lines that put a grid to use."""
    file, solver = folder / f"{steps[-1]}.json", runs.solver
    words = ["flowkit", "sample", given.model, "--grid", str(file), "--solver", solver]
    words += ["--labels", given.labels] if given.labels is not None else []
    words += [word for prompt in given.prompts for word in ("--prompt", prompt)]
    words += ["--prompts", str(given.prompts_file)] if given.prompts_file is not None else []
    words += ["--guidance", f"{given.guidance:g}"] if given.guidance is not None else []
    typer.echo(f"{len(steps)} grid{'s' * (len(steps) > 1)}, {TABLE} and pictures: {folder}")
    typer.echo(f"to sample:          {shlex.join([*words, '--output', 'samples'])}")
    typer.echo("in Python:          pipe.scheduler = flowkit.RectifiedFlowScheduler.from_config("
               f'pipe.scheduler.config, solver="{solver}")')  # fmt: skip
    typer.echo(f'                    pipe.scheduler.set_grid(flowkit.Grid.load("{file}"))')
    if stock is None:
        return
    folder_too = Path(given.model).is_dir() and not isinstance(runs.pipe.scheduler, RectifiedFlowScheduler)
    name = given.model if folder_too else type(stock).__name__
    try:
        Grid.load(file).for_stock(stock)
        typer.echo(f"in stock diffusers: flowkit grid {shlex.join([str(file), '--for-stock', name])}")
    except ValueError as error:
        typer.echo(f"in stock diffusers: {error}")

"""What ``flowkit sweep`` does: from files and folders to `flowkit.eval.sweep`, and from cells to lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from flowkit import assets
from flowkit.eval.results import Result
from flowkit.eval.sweep import folder as folders
from flowkit.eval.sweep import planning, summary
from flowkit.eval.sweep.config import SweepConfig, read
from flowkit.eval.sweep.runner import run as run_sweep
from flowkit.eval.sweep.storage import storage_url
from flowkit.eval.sweep.study import Entry, Study
from flowkit.eval.tables import export as export_table
from flowkit.progress import bar, duration
from flowkit.weights import write_bytes


def run(file: Path, output: Path | None, storage: str | None) -> None:
    """Carries out ``flowkit sweep run``."""
    config = read(file)
    _work(config, output or Path(config.name), storage)


def resume(folder: Path, failed: bool, storage: str | None) -> None:
    """Carries out ``flowkit sweep resume``."""
    config, url = folders.load(folder, storage)
    _work(config, folder, url, failed)


def _work(config: SweepConfig, output: Path, storage: str | None, failed: bool = False) -> None:
    _threads(config)
    entries = run_sweep(config, output, storage=storage, retry_failed=failed)
    wrong = [entry for entry in entries if entry.state == "failed"]
    if not entries:  # a process that helps the main one
        return
    Console().print(_front(config, entries))
    for entry in wrong:
        typer.echo(f"failed: {_name(entry)}: {entry.error}", err=True)
    typer.echo(f"{len(entries) - len(wrong)} of {len(entries)} cells; report: {output / 'report.html'}")
    if wrong:
        typer.echo(f"to try the failed ones again: flowkit sweep resume {output} --failed", err=True)
        raise typer.Exit(1)


def plan(file: Path) -> None:
    """Carries out ``flowkit sweep plan``."""
    config = read(file)
    _threads(config)
    with bar(True) as display:
        costs = planning.costs(config, Path(config.name), display)
    grid, images = config.search.sampler == "grid", config.images
    cells = len(costs) if grid else int(config.search.trials or 0)
    title = f"{cells} cells of {images:,} images" + ("" if grid else "; the cheapest and the dearest:")
    table = Table(
        "cell", "calls", "time", title=title, caption="calls: network evaluations for one image", box=box.SIMPLE
    )
    for cost in costs:
        calls = f"{cost.evaluations:.4g}" if cost.measured else f"about {cost.evaluations:.4g}"
        table.add_row(cost.cell.name, calls, f"about {duration(cost.seconds * images)}")
    Console().print(table)
    if grid:
        calls = f"{images * sum(cost.evaluations for cost in costs):,.0f} network evaluations, "
        time = f"about {duration(images * sum(cost.seconds for cost in costs))}"
    else:
        low, high = (images * cells * cost.seconds for cost in costs)
        calls, time = "", f"between {duration(low)} and {duration(high)}"
    typer.echo(f"in all {images * cells:,} images, {calls}{time} with one worker on this machine")


def status(folder: Path, storage: str | None) -> None:
    """Carries out ``flowkit sweep status``."""
    config, entries = _entries(folder, storage)
    counts = {state: sum(e.state == state for e in entries) for state in ("done", "running", "waiting", "failed")}
    typer.echo(f"{config.name}: {len(entries)} cells, " + ", ".join(f"{n} {state}" for state, n in counts.items() if n))
    for entry in entries:
        if entry.state == "running":
            typer.echo(f"running: {_name(entry)} ({entry.worker})")
        if entry.state == "failed":
            typer.echo(f"failed: {_name(entry)}: {entry.error}")
    spent = [entry.result["spec"]["wall_seconds"] for entry in entries if entry.result is not None]
    left = counts["running"] + counts["waiting"]
    if left and spent:
        workers = max(1, counts["running"])
        seconds = left * statistics.mean(spent) / workers
        typer.echo(f"about {duration(seconds)} left with {workers} worker{'s' * (workers > 1)}")


def best(folder: Path, evaluations: float | None, storage: str | None) -> None:
    """Carries out ``flowkit sweep best``."""
    config, entries = _entries(folder, storage)
    done = [e for e in entries if e.result is not None]
    if not done:
        raise ValueError(f"no cell of {folder} is done yet; flowkit sweep status {folder} shows how far it is")
    if evaluations is not None:
        cheap = [
            e for e in done if e.result is not None and (e.result["spec"]["network_evaluations"] or 0) <= evaluations
        ]
        if not cheap:
            least = min(e.result["spec"]["network_evaluations"] or 0 for e in done if e.result is not None)
            raise ValueError(f"no cell has at most {evaluations:g} evaluations; the cheapest has {least:g}")
        done = cheap
    Console().print(_front(config, done))


def export(folder: Path, file_format: str, output: Path | None, storage: str | None) -> None:
    """Carries out ``flowkit sweep export``."""
    config, entries = _entries(folder, storage)
    summary.write(config, entries, folder)
    text = export_table(folder, file_format)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_bytes(output, text.encode())
        typer.echo(f"{output}")


def _entries(folder: Path, storage: str | None) -> tuple[SweepConfig, list[Entry]]:
    config, url = folders.load(folder, storage)
    study = Study(config, storage_url(url, folder))
    study.open(make=False)
    return config, study.entries()


def _front(config: SweepConfig, entries: Sequence[Entry]) -> Table:
    """The Pareto front for the terminal."""
    table = Table("cell", *config.objectives, title="best cells: no other is better in every objective", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in summary.front(config, entries):
        if entry.result is None:
            continue
        result = Result.from_json(entry.result)
        values = summary.objectives(config, result)
        table.add_row(
            _name(entry), *(summary.figure(value, result.se.get(key, math.nan)) for key, value in values.items())
        )
    return table


def _name(entry: Entry) -> str:
    return entry.cell.name if entry.cell is not None else f"cell {entry.slot}"


def _threads(config: SweepConfig) -> None:
    """So small a network as the embedded ones gains nothing from a second thread, and two wait for each other endlessly."""
    models = {config.model, *(model for axes in config.axes for model in axes.get("model", ()))} - {None}
    if models <= set(assets.NAMES) and not torch.cuda.is_available():
        torch.set_num_threads(1)

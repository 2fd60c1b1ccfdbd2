"""What a sweep will cost, from one batch of each kind of cell."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flowkit.eval.job import collect_share, plans_of
from flowkit.eval.sources import open_source
from flowkit.eval.sweep.axes import Range
from flowkit.eval.sweep.cells import Cell
from flowkit.eval.sweep.config import SweepConfig
from flowkit.eval.sweep.worker import Worker


@dataclass(frozen=True)
class Cost:
    """What an image of a cell costs.

    Attributes:
        cell: the cell.
        evaluations: network rows.
        seconds: of sampling and of features.
        measured: whether the cell itself was tried, or the cheapest of its kind, from which steps tell.
    """

    cell: Cell
    evaluations: float
    seconds: float
    measured: bool


def costs(config: SweepConfig, output: Path, bar: Progress) -> list[Cost]:
    """Returns the cost of each cell; of a search, of its cheapest and of its dearest cell.

    Cells that differ only in their steps share a probe, one batch of the one with the fewest; the others are taken to cost in
    proportion. Models are loaded, and nothing is left on the disk.

    Args:
        config: the sweep.
        output: its folder, where a disk without room is refused.
        bar: shows how far it is.

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: whatever keeps a cell from running; the cell is named.
    """
    worker = Worker(config, output, bar)
    cells = config.cells() if config.search.sampler == "grid" else _ends(config)
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(_kind(cell), []).append(cell)
    task, found = bar.add_task("trying out", total=len(kinds)), {}
    for alike in kinds.values():
        cheapest = min(alike, key=lambda cell: cell.get("steps") or 0)
        try:
            evaluations, seconds = _probe(worker, cheapest, bar)
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise type(error)(f"the cell {cheapest.name!r} cannot run: {error}") from error
        for cell in alike:
            share = (cell.get("steps") or 1) / (cheapest.get("steps") or 1)
            found[cell.key] = Cost(cell, evaluations * share, seconds * share, cell is cheapest)
        for probe in (shown for shown in bar.task_ids if shown != task):
            bar.remove_task(probe)
        bar.advance(task)
    return [found[cell.key] for cell in cells]


def _kind(cell: Cell) -> str:
    return repr(sorted((name, value) for name, value in {**cell.base, **cell.settings}.items() if name != "steps"))


def _probe(worker: Worker, cell: Cell, bar: Progress) -> tuple[float, float]:
    """Network rows and seconds an image, of one batch."""
    config = worker.config
    count = min(config.batch_size, config.images)
    with worker.pipeline(cell) as (pipe, call), tempfile.TemporaryDirectory(prefix="flowkit-") as folder:
        source = open_source(pipe, count, config.seed, worker.inputs, call, config.batch_size)
        slots = [slot for request in worker.requests for slot in request.slots()]
        (one,) = plans_of([(None, source, slots)], Path(folder))
        collect_share(one, worker.processes, bar)
        entries = one.spools.entries()
    seconds = math.fsum(entry["seconds"][part] for entry in entries for part in ("sampling", "features"))
    return sum(entry["rows"] for entry in entries) / count, seconds / count


def _ends(config: SweepConfig) -> list[Cell]:
    """The cells of a search with the lowest and with the highest numbers."""

    def end(among: Sequence[Any] | Range, last: bool) -> Any:  # noqa: ANN401
        if isinstance(among, Range):
            return among.ends()[last]
        numbers = [value for value in among if isinstance(value, (int, float)) and not isinstance(value, bool)]
        return (max if last else min)(numbers) if len(numbers) == len(among) else among[0]

    choices = config.choices()
    return [config.cell({name: end(among, last) for name, among in choices.items()}) for last in (False, True)]

"""`flowkit.eval.run_sweep`: cells from the study until none is left, and at the end the report."""

from __future__ import annotations

import errno
import math
import time
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

from rich.progress import Progress, TaskID

from flowkit.eval import runs
from flowkit.eval.report import write_report
from flowkit.eval.results import Result
from flowkit.eval.sweep import folder, summary
from flowkit.eval.sweep.cells import Cell
from flowkit.eval.sweep.config import Source, SweepConfig, read
from flowkit.eval.sweep.storage import storage_url
from flowkit.eval.sweep.study import Claim, Entry, Study
from flowkit.eval.sweep.trackers import Trackers
from flowkit.eval.sweep.worker import Worker
from flowkit.progress import bar as progress_bar

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_WAIT = 3.0  # seconds between looks at the cells that other workers have


def run(
    source: Source | SweepConfig,
    output: str | PathLike[str] | None = None,
    resume: bool = True,
    storage: str | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Entry]:
    """Carries out a sweep; arguments and errors as of `flowkit.eval.run_sweep`."""
    config = source if isinstance(source, SweepConfig) else read(source)
    place = Path(output) if output is not None else Path(str(config.name))
    folder.check(place, config, resume)
    with progress_bar(progress) as bar:
        worker = Worker(config, place, bar)
        processes = worker.processes
        bar.disable = bar.disable or not processes.main
        book = processes.agree(lambda: _Book(worker, place, storage, retry_failed, bar) if processes.main else None)
        with ExitStack() if book is None else book.trackers:
            _work(worker, book)
        return processes.share(processes.agree(lambda: book.close() if book is not None else []))


class _Book:
    """What the main process of a worker writes down: the study, the results so far, and what people see meanwhile."""

    def __init__(self, worker: Worker, place: Path, storage: str | None, again: bool, bar: Progress) -> None:
        self._worker, self._place, self._bar = worker, place, bar
        self._config = worker.config
        storage = storage or self._config.storage
        place.mkdir(parents=True, exist_ok=True)
        self._study = Study(self._config, storage_url(storage, place))
        self._study.open()
        folder.make(place, self._config, storage)
        if again:
            self._study.retry_failed()
        self.trackers = Trackers(self._config, place)
        self._claim: Claim | None = None
        self._alive = ExitStack()
        self._task: TaskID | None = None

    def next(self) -> tuple[Cell | None, bool]:
        """Returns the next cell, and whether others still have some."""
        self._claim = self._study.claim()
        entries = self._study.entries()
        others = self._claim is None and any(entry.state == "running" for entry in entries)
        self._show(entries, "cells (waiting for other workers)" if others else "cells")
        if self._claim is None:
            return None, others
        self._alive.enter_context(self._study.alive(self._claim))
        return self._claim.cell, True

    def _show(self, entries: list[Entry], title: str) -> int:
        over = sum(entry.state in ("done", "failed") for entry in entries)
        if self._task is None:
            self._task = self._bar.add_task(title, total=len(entries))
        for cell in (task for task in self._bar.task_ids if task != self._task):
            self._bar.remove_task(cell)
        self._bar.update(self._task, completed=over, description=title)
        return over

    def done(self, result: Result) -> None:
        """Writes a cell's figures down."""
        claim = self._released()
        values = summary.objectives(self._config, result)
        if wrong := [key for key, value in values.items() if not math.isfinite(value)]:
            self._study.fail(claim, f"{wrong[0]} is {values[wrong[0]]}; look at the cell's pictures")
            return
        self._study.finish(claim, list(values.values()), result.to_json())
        self._worker.forget(claim.cell)
        self.trackers.log(claim, values)
        entries = self._study.entries()
        summary.write(self._config, entries, self._place)
        count, text = self._show(entries, "cells"), summary.line(self._config, result)
        self._say(f"{count}/{len(entries)} {claim.cell.name}: {text}")

    def failed(self, error: BaseException, stop: bool) -> None:
        """Writes down why a cell failed; where the worker stops, gives it back."""
        claim = self._released()
        if stop:
            self._study.give_back(claim)
            return
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._study.fail(claim, text[:2000])
        self._say(f"failed: {claim.cell.name}: {text[:300]}")

    def _say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _released(self) -> Claim:
        self._alive.close()
        if self._claim is None:
            raise RuntimeError("no cell was claimed")
        claim, self._claim = self._claim, None
        return claim

    def close(self) -> list[Entry]:
        """Writes results and report."""
        entries = self._study.entries()
        for entry in entries:
            if entry.state == "done" and entry.cell is not None:
                self._worker.forget(entry.cell)
        summary.write(self._config, entries, self._place)
        write_report(self._place)
        return entries


def _work(worker: Worker, book: _Book | None) -> None:
    """Measures cells until every one is done or failed; the book is the main process's."""
    processes = worker.processes
    while True:
        cell, more = processes.share(processes.agree(lambda: (None, False) if book is None else book.next()))
        if cell is None and not more:
            return
        if cell is None:
            time.sleep(_WAIT)
            continue
        try:
            result = worker.measure(cell)
        except KeyboardInterrupt as error:
            if book is not None:
                book.failed(error, stop=True)
            raise
        except Exception as error:
            # Every other cell would fail by a full disk too.
            full = isinstance(error, runs.NoRoomError) or getattr(error, "errno", None) in _FULL
            stop = any(processes.gather(full))
            if book is not None:
                book.failed(error, stop)
            if stop:
                raise
        else:
            processes.agree(lambda result=result: book.done(result) if book is not None else None)  # type: ignore[misc]

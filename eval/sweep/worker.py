"""One worker of a sweep: it measures cells, with one extractor, one reference and one set of seeds for all of them."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from flowkit.eval import runs
from flowkit.eval.job import carry_out, prepare
from flowkit.eval.measuring import plan
from flowkit.eval.pictures import picture, save_tiles
from flowkit.eval.processes import Processes
from flowkit.eval.results import Result
from flowkit.eval.sweep import cells
from flowkit.eval.sweep.cells import Cell
from flowkit.eval.sweep.config import SweepConfig
from flowkit.hooks import attach
from flowkit.pipelines import loading, swap

CELLS, REFERENCES, PICTURE = "cells", "references", "samples"


class Worker:
    """Measures cells of a sweep; the model of the last one stays loaded.

    Args:
        config: the sweep.
        output: its folder.
        bar: shows how far a cell is.

    Raises:
        FileNotFoundError: for a reference or weights that are not there.
        OSError: for a disk without room for the features of one cell.
        ValueError: for metrics, extractors and references that do not fit.
    """

    def __init__(self, config: SweepConfig, output: Path, bar: Progress) -> None:
        self.config, self._output, self._bar = config, output, bar
        self.device = loading.choose_device(config.device, here())
        self.processes = Processes.join(self.device)
        self.requests = self.processes.agree(
            lambda: plan(config.metrics, cells.references(config), config.extractor, self.device)
        )
        self.processes.agree(self._check_space)
        self.inputs = cells.inputs(config)
        self._loaded: tuple[Any, ...] | None = None
        self._pipe: Any = None
        self._scheduler: Any = None

    def _check_space(self) -> None:
        output = self._output.absolute()
        folder = next(place for place in (output, *output.parents) if place.exists())
        dims = sum(slot.kind()[0] for request in self.requests for slot in request.slots())
        runs.check_room(folder, 4 * dims * self.config.images)

    def folder(self, cell: Cell) -> Path:
        """Returns the folder of a cell's run."""
        return self._output / CELLS / cell.key

    def measure(self, cell: Cell) -> Result:
        """Returns a cell's figures; one that was stopped goes on, and one whose folder is whole is not run again.

        Raises:
            Exception: whatever goes wrong in this cell.
        """
        if (found := self._found(cell)) is not None:  # done by a worker that could not tell the study
            return found
        try:
            return self._measured(cell)
        except Exception:
            # A worker that was taken for dead, or one with equal settings of a search, was faster and removed the features.
            if (found := self._found(cell)) is not None:
                return found
            raise

    def _found(self, cell: Cell) -> Result | None:
        """The result of a cell whose folder is whole."""
        folder = self.folder(cell)
        whole = (folder / runs.RESULT).is_file() and (find_picture(folder) is not None or not self.config.keep)
        return self.processes.agree(lambda: Result.load(folder)) if self.processes.share(whole) else None

    def _measured(self, cell: Cell) -> Result:
        folder = self.folder(cell)
        with self.pipeline(cell) as (pipe, call):
            sampling = {"seed": self.config.seed, "inputs": self.inputs, "call": call}
            count, size = self.config.images, self.config.batch_size
            job = self.processes.agree(lambda: prepare(pipe, self.requests, count, size, sampling, self.processes))
            result = carry_out(
                job, self.processes, self._bar, folder, keep=self.config.keep, exact=self.config.exact,
                references=self._output / REFERENCES,
            )  # fmt: skip
        if len(result.images):
            tiles = [picture(image) for image in result.images]
            self.processes.agree(lambda: save_tiles(folder / PICTURE, tiles) if self.processes.main else None)
        return result

    def forget(self, cell: Cell) -> None:
        """Removes the features of a finished cell, which are large; figures, record and picture stay."""
        shutil.rmtree(self.folder(cell) / "samples", ignore_errors=True)

    @contextmanager
    def pipeline(self, cell: Cell) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields a cell's pipeline, scheduler and guidance in place, and the arguments of its calls."""
        self.processes.agree(lambda: self._load(cell))
        pipe, config = self._pipe, self.config

        def ready() -> tuple[dict[str, Any], Any]:
            call = cells.call(config, cell)
            pipe.scheduler = swap.make(self._scheduler, str(cell.get("scheduler")), cells.knobs(config, cell))
            steps = swap.steps(pipe.scheduler, call.get("num_inference_steps"))
            return {**call, **({} if steps is None else {"num_inference_steps": steps})}, cells.guidance(config, cell)

        call, part = self.processes.agree(ready)
        try:
            with nullcontext() if part is None else attach(pipe, part):
                yield pipe, call
        finally:
            pipe.scheduler = self._scheduler

    def _load(self, cell: Cell) -> None:
        """Loads the cell's model, unless it is there."""
        model, lora = cells.model(self.config, cell), cells.lora(self.config, cell)
        if self._loaded == (model, lora):
            return
        self._loaded = self._pipe = self._scheduler = None  # two models may not fit into memory
        gc.collect()
        source = loading.find(model, self.config.variant)
        pipe = loading.load(source, loading.choose_dtype(self.config.dtype, self.device), self.config.variant)
        if lora is not None:
            loading.load_lora(pipe, lora)
        pipe.to(self.device)
        self._pipe, self._scheduler, self._loaded = pipe, pipe.scheduler, (model, lora)


def find_picture(folder: Path) -> Path | None:
    """Returns the picture of a cell's samples; None where there is none."""
    return next(iter(sorted(folder.glob(f"{PICTURE}.*"))), None)


def here() -> torch.device:
    """Returns the device of this process among those that a launcher started."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

"""What an evolutionary search makes smaller, on three kinds of noise: that of the search, of the ranking, and held out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flowkit import rng
from flowkit.distill.costs import Costs
from flowkit.distill.fine import Fine, Runs, fine_solution, rmse
from flowkit.distill.observe import under
from flowkit.eval import evaluate, make_statistics
from flowkit.eval.intervals import Figure
from flowkit.eval.provenance import describe
from flowkit.eval.references import Extractor, Reference, match
from flowkit.eval.sources import device_of
from flowkit.grids import Grid
from flowkit.hooks import Part

_NOISE = {
    "search": 2**63 + 2,
    "ranking": 2**63 + 3,
    "held-out": 2**63 + 4,
}  # indices of seeds, as in flowkit.distill.fine


class Distance:
    """Root mean squared error of last samples to the fine solution.

    Args:
        runs: of the pipeline.
        anchors: the fine grid.
        samples: number of them in a search and in the ranking.
        held_out: number of held-out ones.
    """

    key = "rmse"

    def __init__(self, runs: Runs, anchors: Grid, samples: int, held_out: int) -> None:
        self._runs, self._anchors = runs, anchors
        self.trajectories, self.held_out = samples, held_out
        bounds = {"search": (0, samples), "ranking": (samples, 2 * samples)}
        self._samples = {name: range(*own) for name, own in bounds.items()}
        self._samples["held-out"] = range(2 * samples, 2 * samples + held_out)
        self._fine: dict[str, Fine] = {}

    def describe(self) -> dict[str, Any]:
        """Returns nothing: the fine solution is described by its run."""
        return {}

    def prepare(self, noise: str, folder: Path | None, display: Progress, costs: Costs | None = None) -> None:
        """Runs the fine solution of one kind of noise, once, and adds the costs of its steps."""
        if noise not in self._fine:
            self._fine[noise] = fine_solution(self._runs, self._anchors, self._samples[noise], folder, display, costs)

    def measure(self, grid: Grid, attached: Sequence[Part], noise: str) -> Figure:
        """Returns the figure of a grid on one kind of noise."""
        with under(self._runs.pipe, self._runs.scheduler, *attached):
            return rmse(self._runs.errors(grid, self._fine[noise]))


class Frechet:
    """Frechet distance of images to a reference.

    Args:
        runs: of the pipeline.
        reference: what `flowkit.eval.evaluate` takes, one.
        extractor: likewise.
        samples: number of images in a search and in the ranking.
        held_out: number of held-out ones.

    Raises:
        FileNotFoundError, ValueError: as `flowkit.eval.evaluate`.
    """

    key = "fid"
    TRAJECTORIES = 100  # at most, that costs are measured on: a seed of the search, which needs no fine solution

    def __init__(
        self, runs: Runs, reference: Reference, extractor: Extractor | None, samples: int, held_out: int
    ) -> None:
        if reference is None:
            raise ValueError(
                "objective 'fid' measures against a reference, got None; pass reference=, such as statistics of images"
            )
        (self._match,) = match(reference, extractor, device_of(runs.pipe))
        self._runs, self._stats = runs, self._match.stats
        self.trajectories, self.held_out = min(samples, self.TRAJECTORIES), held_out
        self._counts = {"search": samples, "ranking": samples, "held-out": held_out}

    def describe(self) -> dict[str, Any]:
        """Returns extractor and reference, for the record."""
        return {"extractor": dict(self._match.extractor.identity), "reference": describe(self._match.describe())}

    def prepare(self, noise: str, folder: Path | None, display: Progress, costs: Costs | None = None) -> None:
        """Makes the statistics of a reference that is images, once, and runs the fine trajectories that costs are measured on."""
        if self._stats is None:
            self._stats = make_statistics(
                self._match.images,
                self._match.extractor,
                batch_size=self._runs.batch_size,
                progress=not display.disable,
            )
        if costs is not None:
            fine_solution(self._runs, costs.grid, range(self.trajectories), folder, display, costs)

    def measure(self, grid: Grid, attached: Sequence[Part], noise: str) -> Figure:
        """Returns the figure of a grid on one kind of noise."""
        runs, seed = self._runs, rng.sample_seed(self._runs.seed, _NOISE[noise])
        runs.scheduler.set_grid(grid)
        with under(runs.pipe, runs.scheduler, *attached), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a Frechet distance of")  # all have the same number
            return evaluate(
                runs.pipe, self._stats, self._counts[noise], "fid", self._match.extractor, seed, runs.inputs,
                {**runs.call, "num_inference_steps": len(grid)}, runs.batch_size, progress=False,
            ).figure("fid")  # fmt: skip

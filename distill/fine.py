"""Runs of a pipeline on fine and on coarse grids from the same noise, and how far a coarse one ends from the fine one.

Noise is named by sample indices. A search looks at some, its *search noise*; what it gains is measured on others, *held-out
noise*, since the best of many grids looks better than it is on the noise that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from flowkit import rng, weights
from flowkit.distill.costs import Costs, StepErrors
from flowkit.distill.observe import ending, first_sample, recording
from flowkit.eval.intervals import Figure, jackknife
from flowkit.grids import Grid
from flowkit.pipelines.sampling import Inputs, as_inputs, blocks, check_arguments, parameters, sample_outputs
from flowkit.progress import bar
from flowkit.schedulers import RectifiedFlowScheduler

# Indices of the runs' own seeds: beyond every sample's, so that none shares noise with an evaluation under the same seed.
SEARCH, RECORD = 2**63, 2**63 + 1
_OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Fine:
    """Where samples end on the fine grid.

    Attributes:
        samples: their indices: the noise.
        ends: their last states, (len(samples), ...).
        level: where that is, in the convention of grids.
    """

    samples: range
    ends: Tensor
    level: float = 0.0

    def errors(self, ends: Tensor) -> Tensor:
        """Returns how far other ends of the samples are from these, squared and meant over elements, float64 (B,)."""
        return (ends.double() - self.ends.double()).flatten(1).square().mean(1)


class Runs:
    """Runs of one pipeline under one solver, each sample from the same noise on every grid.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes; between runs it is left as it was.
        solver: one of `flowkit.solvers.SOLVERS`, or a scheduler of ours; None means the pipeline's own if it is ours, and Euler if
            not.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all samples.
        seed: of the noise; it is not that of `flowkit.eval.evaluate` under the same seed.
        batch_size: samples at a time.
        stream: index of the run's own seed, `SEARCH` or `RECORD`.

    Raises:
        TypeError: for arguments that the pipeline does not take, and steps or levels in ``call``.
        ValueError: for a scheduler that has no path of ours.
    """

    def __init__(
        self,
        pipe: Any,  # noqa: ANN401
        solver: str | RectifiedFlowScheduler | None = None,
        *,
        inputs: Inputs = None,
        call: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 64,
        stream: int = SEARCH,
    ) -> None:
        self.pipe, self.inputs, self.call, self.seed, self.batch_size = pipe, inputs, dict(call or {}), seed, batch_size
        self.own_seed = rng.sample_seed(seed, stream)
        if given := {"num_inference_steps", "timesteps", "sigmas"} & self.call.keys():
            raise TypeError(
                f"{', '.join(sorted(given))} cannot be in call: the steps are what is searched for; leave it out"
            )
        check_arguments(pipe, as_inputs(pipe, inputs)(0), {**self.call, "num_inference_steps": 1})
        blocks(pipe, 1, inputs=inputs, batch_size=batch_size)  # refuses a bad batch size
        named = isinstance(solver, str)
        base = solver if isinstance(solver, RectifiedFlowScheduler) else getattr(pipe, "scheduler", None)
        ours = isinstance(base, RectifiedFlowScheduler)
        chosen = {"solver": solver} if named else {} if ours else {"solver": "euler"}
        self.scheduler: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(base, grid="karras", **chosen)

    def check_deterministic(self) -> None:
        """Refuses a solver under which there is no one fine solution.

        Raises:
            ValueError: for one that draws noise, or that takes its first step twice.
        """
        self.scheduler.set_grid(self.anchors(2))
        plan = self.scheduler.plan(2, None, None, None)
        if self.call.get("eta") or any(row.c for row in plan.rows()):
            raise ValueError(f"solver {self.solver!r} draws noise at every step (eta or churn included), so there is no one fine "
                             "solution to come near to; pass solver='euler' or another deterministic one, and no eta")  # fmt: skip
        if len(plan.times) != 2:
            raise ValueError(f"solver {self.solver!r} takes its first step twice, so its steps are no path over anchors; pass "
                             "solver='ab4'")  # fmt: skip

    @property
    def solver(self) -> str:
        """Name of the solver."""
        return self.scheduler.method.name

    @property
    def prediction(self) -> str:
        """What the network predicts, as the scheduler's configuration says."""
        return str(self.scheduler.config["prediction_type"])

    def anchors(self, count: int) -> Grid:
        """Returns the fine grid of so many steps: even in model time, or Karras spacing on VE and EDM, whose noise is unbounded."""
        path = self.scheduler.path
        if path.name in ("ve", "edm"):  # the scheduler's own limits
            self.scheduler.set_grid(None)
            return Grid(tuple(self.scheduler.plan(count, None, None, None).levels), path.name, self.solver)
        return replace(Grid.uniform(count, path), solver=self.solver)

    def evaluations(self, grid: Grid) -> int:
        """Returns the network evaluations of one sample on a grid, guidance not counted."""
        self.scheduler.set_grid(grid)
        return len(self.scheduler.plan(len(grid), None, None, None).rows())

    def trajectories(
        self, grid: Grid, samples: range, on_step: _OnStep = lambda rows: None
    ) -> Iterator[tuple[range, list[Tensor], list[Tensor]]]:
        """Runs samples on a grid, batch by batch.

        Args:
            grid: of N steps.
            samples: their indices.
            on_step: called after each network evaluation with the number of samples in the batch.

        Yields:
            The indices of a batch, its states at the N + 1 levels, and the network's outputs at the first N.

        Raises:
            ValueError: for a pipeline that does not simply take N steps, or that changes the sample between them.
        """
        self.scheduler.set_grid(grid)
        rows = self.scheduler.plan(len(grid), None, None, None).rows()
        first = [i for i, row in enumerate(rows) if not i or row.step != rows[i - 1].step]
        with recording(self.pipe, self.scheduler, on_step) as take:
            for block in self.draw(len(grid), samples):
                run = take()
                self._check(len(run.outputs), len(rows))
                yield block, [run.states[i] for i in (*first, -1)], [run.outputs[i] for i in first]

    def ends(self, grid: Grid, samples: range, on_step: _OnStep = lambda rows: None) -> Iterator[tuple[range, Tensor]]:
        """Runs samples on a grid; arguments and errors as in `trajectories`.

        Yields:
            The indices of a batch, and its last states, (B, ...) on the CPU.
        """
        rows = self.evaluations(grid)
        with ending(self.pipe, self.scheduler, on_step) as take:
            for block in self.draw(len(grid), samples):
                states, count = take()
                self._check(count, rows)
                yield block, states

    def stock_ends(
        self, steps: int, samples: range, on_step: _OnStep = lambda rows: None
    ) -> Iterator[tuple[range, Tensor]]:
        """Runs samples with the pipeline's own scheduler as it is, on the levels that it chooses for so many steps.

        Yields:
            As `ends`.

        Raises:
            ValueError: for a scheduler that cannot take so many steps.
        """
        with ending(self.pipe, None, on_step) as take:
            for block in self.draw(steps, samples):
                yield block, take()[0]

    def errors(self, grid: Grid, fine: Fine, on_step: _OnStep = lambda rows: None) -> Tensor:
        """Returns how far each sample ends from the fine solution, squared and meant over its elements.

        Args:
            grid: of a few steps, on the pipeline's path.
            fine: the fine solution; its samples are run.
            on_step: as in `trajectories`.

        Returns:
            float64 (len(fine.samples),).

        Raises:
            ValueError: for a grid of another path or prediction type, or that ends at another level than the fine solution, and
                for results that are not finite.
        """
        if grid.sigmas[-1] != fine.level:
            raise ValueError(f"the grid ends at sigma {grid.sigmas[-1]:g}, the fine solution at {fine.level:g}, so their last "
                             "samples do not compare; end the grid there")  # fmt: skip
        errors = fine.errors(torch.cat([states for _, states in self.ends(grid, fine.samples, on_step)]))
        if not bool(errors.isfinite().all()):
            raise ValueError(f"{int((~errors.isfinite()).sum())} of {len(errors)} samples end in NaN or infinity on the levels "
                             f"{list(grid.sigmas)!r:.120}; try float32, or another solver")  # fmt: skip
        return errors

    def start(self, grid: Grid) -> Tensor:
        """Returns the noise that sample 0 begins with on a grid, (1, ...), at the cost of one network evaluation."""
        self.scheduler.set_grid(grid)
        return first_sample(self.pipe, self.scheduler, lambda: list(self.draw(len(grid), range(1))))

    def blocks(self, samples: range) -> list[range]:
        """Returns the batches that samples are drawn in."""
        return blocks(self.pipe, len(samples), inputs=self.inputs, batch_size=self.batch_size, start=samples.start)

    def draw(self, steps: int, samples: range) -> Iterator[range]:
        """Calls the pipeline for one batch after the other; images are not decoded where that costs another network.

        Yields:
            The indices of each batch, after its call.
        """
        call = {**self.call, "num_inference_steps": steps}
        if "output_type" in parameters(self.pipe) and getattr(self.pipe, "vae", None) is not None:
            call.setdefault("output_type", "latent")
        cut = self.blocks(samples)
        for block, _ in sample_outputs(self.pipe, cut, seed=self.own_seed, inputs=self.inputs, call=call):
            yield block

    def _check(self, taken: int, wanted: int) -> None:
        if taken != wanted:
            raise ValueError(f"{type(self.pipe).__name__} took {taken} of {wanted} steps; call it so that it starts from pure "
                             "noise (strength=1)")  # fmt: skip


def fine_solution(
    runs: Runs,
    grid: Grid,
    samples: range,
    folder: Path | None = None,
    display: Progress | None = None,
    costs: Costs | None = None,
) -> Fine:
    """Runs samples on the fine grid, or reads what an earlier call left of them.

    Args:
        runs: of the pipeline.
        grid: the fine one.
        samples: their indices.
        folder: where each batch is kept, whole or not at all; None keeps nothing.
        display: shows how far it is, and the time left; None shows nothing.
        costs: what the cost of every step of the samples is added to; None measures none.

    Returns:
        Where the samples end.

    Raises:
        ValueError: as `Runs.trajectories`, and for a corrupt file in the folder.
    """
    display = display or bar(False)
    total = runs.evaluations(grid)
    task = display.add_task("fine steps", total=total * len(samples))
    step_errors = None if costs is None else StepErrors(runs.scheduler.plan(len(grid), None, None, None))
    found = []
    for block in runs.blocks(samples):
        file = None if folder is None else folder / f"fine-{block.start:06d}-{block.stop:06d}.safetensors"
        if file is not None and file.is_file():
            tensors, _ = weights.read(file)
            display.advance(task, total * len(block))
        else:
            if step_errors is None:
                ((_, ends),) = runs.ends(grid, block, lambda rows: display.advance(task, rows))
                tensors = {"ends": ends}
            else:
                ((_, states, outputs),) = runs.trajectories(grid, block, lambda rows: display.advance(task, rows))
                own = Costs(grid, len(samples))
                own.add(step_errors(states, outputs), block.start)
                tensors = {"ends": states[-1], "sums": own.sums, "counts": own.counts}
            if file is not None:
                weights.write(file, tensors)
        found.append(tensors["ends"])
        if costs is not None:
            costs.sums += tensors["sums"]
            costs.counts += tensors["counts"]
    return Fine(samples, torch.cat(found), grid.sigmas[-1])


def coarse(anchors: Grid, path: Sequence[int]) -> Grid:
    """Returns the grid of some of the anchors."""
    return replace(anchors, sigmas=tuple(anchors.sigmas[i] for i in path))


def rmse(errors: Tensor) -> Figure:
    """Returns the root of the mean squared error, with its jackknife error.

    Two of them on the same noise pair, sample by sample: `flowkit.eval.intervals.paired` gives their difference with its
    standard error.

    Args:
        errors: squared error of each sample, from `Runs.errors`.
    """
    total, count = errors.sum(), len(errors)
    left_out: Sequence[float] = ((total - errors) / (count - 1)).clamp_min(0).sqrt().tolist()
    return jackknife(float((total / count).sqrt()), left_out)

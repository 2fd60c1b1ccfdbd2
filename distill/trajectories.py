"""Recording the trajectories of a pipeline: the data of step searches and distillations, from the user's own pipeline."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit import rng
from flowkit.distill import shards
from flowkit.distill.costs import Costs, StepErrors
from flowkit.distill.fine import RECORD, Runs
from flowkit.distill.shards import RECORDING, Shard, Trajectories, initial
from flowkit.eval import runs as folders
from flowkit.eval.processes import Processes
from flowkit.eval.provenance import describe
from flowkit.eval.sources import PipelineSource
from flowkit.grids import Grid
from flowkit.pipelines.sampling import Inputs, as_inputs
from flowkit.progress import bar
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.weights import digest

KEEP = ("state", "output")
# A shard is at most so many batches, so that little is lost, and no larger than this, unless one batch is.
_BATCHES, _BYTES = 16, 2**26


def record(
    pipe: Any,  # noqa: ANN401
    output: str | os.PathLike[str],
    samples: int,
    steps: int | Grid,
    *,
    solver: str | RectifiedFlowScheduler | None = None,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    keep: Sequence[str] = KEEP,
    at: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    resume: bool = True,
    progress: bool = True,
) -> Trajectories:
    """Records trajectories of a pipeline under a scheduler of ours, guidance and all.

    It may be killed at any moment: called again with the same arguments it draws the shards that are missing, and ends with the
    same bytes. Processes started by ``accelerate launch`` or ``torchrun`` share the shards. The noise is not that of
    `flowkit.eval.evaluate` or `flowkit.optimize_steps` under the same seed.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes; it is left as it was.
        output: folder, which all processes must see.
        samples: number of trajectories.
        steps: number of steps N, even in model time (Karras spacing on VE and EDM), or a grid.
        solver: one of `flowkit.solvers.SOLVERS`, or a scheduler of ours; None means the pipeline's own if it is ours, and Euler if
            not.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`. Plain values are kept with the samples,
            tensors by their hash.
        call: arguments shared by all samples, such as ``dict(guidance_scale=5.0)``.
        keep: "state", the sample at the levels, in the path's coordinates; "output", what ``scheduler.step`` is given at the first
            N of them; or both.
        at: numbers of the levels to keep them at, rising, among 0 (noise) ... N (the last sample); None means all. ``[0, N]`` with
            ``keep=["state"]`` gives pairs of noise and sample.
        seed: of the noise.
        batch_size: samples at a time; memory holds ``2 N + 1`` states of each.
        resume: go on with the recording in the folder; False refuses a folder that holds one.
        progress: show a bar with the time left.

    Returns:
        The recorded trajectories, a data set.

    Raises:
        OSError: for a disk without room, before anything is drawn; and where it fills up meanwhile.
        TypeError: for arguments that the pipeline does not take.
        ValueError: for numbers out of range, a folder of something else or with a recording of other settings (the first that
            differs is named), a damaged shard, or a pipeline that does not simply take N steps.
    """
    if samples < 1 or not keep or set(keep) - set(KEEP):
        what = f"keep={list(keep)}" if samples >= 1 else f"samples={samples}"
        raise ValueError(f"cannot record {what}; give at least 1 sample, and keep {' or '.join(KEEP)}")
    runs = Runs(pipe, solver, inputs=inputs, call=call, seed=seed, batch_size=batch_size, stream=RECORD)
    grid = steps if isinstance(steps, Grid) else runs.anchors(steps)
    levels = list(range(len(grid) + 1)) if at is None else list(at)
    if not levels or levels != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] <= len(grid):
        raise ValueError(
            f"at must hold rising whole numbers from 0 to {len(grid)}, got {levels!r:.80}; leave it out for all"
        )
    folder, processes = Path(output), Processes.join(torch.device(pipe.device))
    job = processes.agree(lambda: _Job(runs, grid, samples, [k for k in KEEP if k in keep], levels, folder))
    processes.agree(lambda: folders.open_run(folder, job.settings, resume, RECORDING) if processes.main else None)
    missing = processes.agree(lambda: job.missing(processes.main))
    processes.agree(lambda: job.check_space(missing))
    mine = missing[processes.rank :: processes.count]
    with bar(progress and processes.main) as display:
        total = sum(len(block) for number in mine for block in job.blocks[number]) * runs.evaluations(grid)
        task = display.add_task("trajectories", total=total)
        processes.agree(lambda: job.draw(mine, lambda rows: display.advance(task, rows)))
    processes.agree(lambda: job.finish() if processes.main else None)
    processes.wait()
    return Trajectories(folder)


def recorded_costs(trajectories: Trajectories, batch_size: int = 64, samples: int | None = None) -> Costs:
    """Returns the costs of all steps between two recorded levels, without another run of the pipeline.

    Args:
        trajectories: of two samples or more, with states and outputs at all levels of their grid.
        batch_size: samples at a time.
        samples: number of the trajectories that are used, the first ones; None means all.

    Raises:
        ValueError: where less was recorded, or a solver that draws noise.
    """
    trajectories.check_deterministic()
    grid, count = trajectories.grid, len(trajectories) if samples is None else samples
    if len(trajectories.at) <= len(grid) or len(trajectories.outputs_at) < len(grid) or count < 2:
        raise ValueError(f"costs need states and outputs at all {len(grid) + 1} levels of two samples or more; "
                         f"{trajectories.folder} holds states at {len(trajectories.at)} and outputs at "
                         f"{len(trajectories.outputs_at)} of {count} samples")  # fmt: skip
    scheduler = trajectories.scheduler()
    scheduler.set_grid(grid)
    errors, costs = StepErrors(scheduler.plan(len(grid), None, None, None)), Costs(grid, count)
    for first in range(0, count, batch_size):
        items = [trajectories[i] for i in range(first, min(first + batch_size, count))]
        states, outputs = (torch.stack([item[name] for item in items], 1) for name in ("states", "outputs"))
        costs.add(errors(list(states), list(outputs)))
    return costs


def batches_of_shard(sample: int, batch_size: int) -> int:
    """Returns how many batches make a shard.

    Args:
        sample: bytes of one.
        batch_size: samples of a batch.
    """
    return min(_BATCHES, max(1, _BYTES // (sample * batch_size)))


class _Job:
    """A recording: its settings, and which samples are in which shard."""

    def __init__(
        self, runs: Runs, grid: Grid, samples: int, keep: Sequence[str], at: Sequence[int], folder: Path
    ) -> None:
        self.runs, self.grid, self.folder, self.at, self.samples = runs, grid, folder, at, samples
        self.states = at if "state" in keep else []
        self.outputs = [i for i in at if i < len(grid)] if "output" in keep else []
        first = runs.start(grid)
        self.shape, self.dtype = list(first.shape[1:]), first.dtype
        self.scale = runs.scheduler.plan(len(grid), None, None, None).start
        self.bytes = (len(self.states) + len(self.outputs)) * math.prod(self.shape) * first.element_size()
        batches, size = runs.blocks(range(samples)), batches_of_shard(self.bytes, runs.batch_size)
        self.blocks = [batches[low : low + size] for low in range(0, len(batches), size)]
        source = PipelineSource(runs.pipe, samples, runs.seed, runs.inputs, runs.call, runs.batch_size).describe()
        del source["pipeline"]["scheduler"], source["seeds"]
        # Processes differ in its number.
        source["pipeline"]["device"] = source["pipeline"]["device"].partition(":")[0]
        config = {k: v for k, v in describe(dict(runs.scheduler.config)).items() if k != "grid" and k[0] != "_"}
        self.settings = {
            "format": RECORDING.format,
            "grid": {**grid.to_dict(), "solver": runs.solver},
            "keep": list(keep),
            "at": list(at),
            "scheduler": config,
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "samples": source,
            "own_seed": runs.own_seed,
        }
        self.run = shards.run_id(self.settings)

    def missing(self, verify: bool) -> list[int]:
        """Numbers of the shards to be drawn; those that are there must be whole."""
        absent = []
        for number in range(len(self.blocks)):
            if shards.shard_file(self.folder, number).is_file():
                shards.read_shard(self.folder, number, self.run, verify)
            else:
                absent.append(number)
        return absent

    def check_space(self, missing: Sequence[int]) -> None:
        """Refuses a disk that cannot hold the shards still to come."""
        needed = sum(len(block) for number in missing for block in self.blocks[number]) * self.bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"the trajectories take {needed / 1e9:.1f} GB more, and {self.folder} has {free / 1e9:.1f} GB left; "
                          "choose another folder, fewer samples, or keep fewer levels (at=)")  # fmt: skip

    def draw(self, numbers: Sequence[int], on_step: Callable[[int], None]) -> None:
        """Draws and writes shards."""
        own = as_inputs(self.runs.pipe, self.runs.inputs)
        for number in numbers:
            states, outputs = [], []
            for block in self.blocks[number]:
                ((_, walked, given),) = self.runs.trajectories(self.grid, block, on_step)
                states.append(_stacked([walked[i] for i in self.states], walked[0]))
                outputs.append(_stacked([given[i] for i in self.outputs], walked[0]))
            samples = range(self.blocks[number][0].start, self.blocks[number][-1].stop)
            inputs = [describe(own(i)) for i in samples]
            shard = self._shard(torch.cat(states), torch.cat(outputs), samples, inputs)
            shards.write_shard(self.folder, number, self.run, shard)

    def _shard(self, states: Tensor, outputs: Tensor, samples: range, inputs: list[dict[str, Any]]) -> Shard:
        """A shard, without the noise where that can be made again."""
        noise, noise_sha256 = "none", ""
        if self.states and self.states[0] == 0:
            noise, first = "stored", states[:, 0]
            seeds = [rng.sample_seed(self.runs.own_seed, i) for i in samples]
            for kind in ("keyed", "generator"):
                if torch.equal(initial(kind, self.shape, self.dtype, seeds, self.scale), first):
                    noise, noise_sha256, states = kind, digest(first), states[:, 1:].contiguous()
                    break
        return Shard(states, outputs, noise, self.scale, inputs, noise_sha256)

    def finish(self) -> None:
        """Writes the index of a complete recording."""
        entries = []
        for number, blocks in enumerate(self.blocks):
            shard = shards.read_shard(self.folder, number, self.run, verify=False)
            first = blocks[0].start
            name = shards.shard_file(self.folder, number).name
            entries.append({"file": name, "first": first, "count": len(shard.inputs), "sha256": shard.sha256})
        folders.write_json(self.folder / shards.INDEX, {"count": self.samples, "shards": entries})


def _stacked(steps: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tensors (B, ...) of several steps as one, (B, steps, ...)."""
    return torch.stack(list(steps), 1) if steps else like.new_empty(len(like), 0, *like.shape[1:])

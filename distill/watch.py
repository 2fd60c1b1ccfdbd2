"""Watching a student while it trains: always the same pictures, the same held-out pairs, the same evaluation.

On B held-out pairs (x_1, x_0), the state that the sampler starts from and the teacher's sample, with z the student's sample from
the same x_1, all means over the B samples, and m and Var the mean and the variance of each element:

    mean_drift      |m(z) - m(x_0)| / sqrt(sum Var(x_0)), 0 for a student whose mean has not moved;
    variance_ratio  sum Var(z) / sum Var(x_0), 1 where nothing is lost, towards 0 for a student that collapses;
    rmse            sqrt(E (z - x_0)^2), meant over elements too;
    straightness    S = int E |y_1 - y_0 - v(y_s, s)|^2 ds on the student's own paths, in flow coordinates y = n(s) x, where every
                    path of `flowkit.paths` is straight (Liu, Gong & Liu 2022, section 3; see `flowkit.eval.straightness`);
                    "straightness_relative" is S / E |y_1 - y_0|^2.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flowkit import predictions
from flowkit.distill.fine import rmse
from flowkit.distill.observe import recording
from flowkit.eval.harness import evaluate
from flowkit.eval.pictures import mosaic, picture, save_png
from flowkit.eval.processes import Processes
from flowkit.eval.references import Extractor, Reference
from flowkit.eval.runs import write_json
from flowkit.eval.straightness import straightness
from flowkit.grids import Grid
from flowkit.hooks import Trajectory
from flowkit.hooks.layout import networks
from flowkit.pipelines.sampling import Arguments, Inputs, as_inputs, as_uint8, blocks, parameters, sample_outputs
from flowkit.schedulers import RectifiedFlowScheduler

WATCHED = "watch.json"
_FORMAT = "flowkit.watch/1"
_SMALLEST, _LARGEST = 48, 256  # side of a tile in pixels


@dataclass(frozen=True)
class Pairs:
    """Pairs that the student is not trained on.

    Attributes:
        noise: x_1, what the sampler starts from, in the path's coordinates (packed as ``scheduler.step`` sees it), (B, ...).
        samples: x_0, where the teacher ends, same shape.
        indices: number of each sample, which names its inputs, B of them.
        matched: whether the samples are the teacher's from that noise. Others, such as images, give no error of each.
    """

    noise: Tensor
    samples: Tensor
    indices: Sequence[int]
    matched: bool = True


class Watch:
    """Measures a student in training; called by the trainer while the network holds the averaged weights.

    What it finds is a function of the weights alone, so that a run that was killed and resumed finds the same. Modes and random
    streams are left as they were. Where several processes train, all of them call it; the main one writes.

    Args:
        pipe: the student's pipeline, around the network in training, with the student's `RectifiedFlowScheduler`.
        folder: for pictures and figures.
        steps: number of the student's steps K.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all samples; ``dict(guidance_scale=1.0)`` where guidance is baked in.
        pictures: number of samples in the picture; 0 for none, as of pipelines that make no images.
        reference: see `flowkit.eval.evaluate`; None measures no Frechet distance, nor is one measured of a network in shards.
        num_images: number of samples N of the Frechet distance; figures of few are biased upwards, and compare with each other.
        extractor: of the Frechet distance; None means the reference's own.
        pairs: held out from training; None measures nothing on pairs.
        nodes: Euler steps, even in flow time, that S is integrated over; 0 leaves it out, as for a student that was trained at its
            own few levels alone.
        seed: of the noise of pictures and Frechet distance.
        batch_size: samples at a time.

    Raises:
        TypeError: for a scheduler of another kind; for pairs where the pipeline takes no ``latents``.
        ValueError: for numbers out of range, and pairs that do not fit each other or do not vary.
    """

    def __init__(
        self,
        pipe: Any,  # noqa: ANN401
        folder: Path,
        steps: int,
        *,
        inputs: Inputs = None,
        call: Mapping[str, Any] | None = None,
        pictures: int = 20,
        reference: Reference = None,
        num_images: int = 1000,
        extractor: Extractor | None = None,
        pairs: Pairs | None = None,
        nodes: int = 16,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if steps < 1 or pictures < 0 or nodes < 0 or num_images < 2 or batch_size < 1:
            raise ValueError(f"got steps={steps}, pictures={pictures}, nodes={nodes}, num_images={num_images}, "
                             f"batch_size={batch_size}; pictures and nodes may be 0, num_images is 2 or more, the others 1 or "
                             "more")  # fmt: skip
        if not isinstance(pipe.scheduler, RectifiedFlowScheduler):
            raise TypeError(f"the student has a {type(pipe.scheduler).__name__}; give it "
                            "RectifiedFlowScheduler.from_config(pipe.scheduler)")  # fmt: skip
        self.pipe, self.folder, self.steps, self.inputs, self.seed = pipe, folder, steps, inputs, seed
        self.call = dict(call or {})
        self.pictures, self.reference, self.num_images, self.extractor = pictures, reference, num_images, extractor
        self.pairs, self.nodes, self.batch_size = pairs, nodes, batch_size
        if pairs is not None:
            _check(pairs, pipe)

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        """Draws and measures, and writes ``samples-<step>.png`` and a row of ``watch.json``.

        Args:
            step: number of updates that the weights have behind them; its row, where there is one, is replaced.
            network: the pipeline's denoiser, wrapped or not.

        Returns:
            Of "fd" and its standard error "fd_se", "mean_drift", "variance_ratio", "rmse", "straightness" and
            "straightness_relative" those that were asked for; the same in all processes.

        Raises:
            ValueError: for a network that is not the pipeline's, samples that are not finite, pairs of another pipeline, or a
                ``watch.json`` of something else.
        """
        within = set(network.modules())
        if not any(own in within for own in networks(self.pipe)):
            raise ValueError(f"the network in training, a {type(network).__name__}, is not the denoiser of the "
                             f"{type(self.pipe).__name__} that is watched; build that around it")  # fmt: skip
        processes = Processes.join(torch.device(self.pipe.device))
        with _inference(network):
            found = processes.agree(lambda: self._draw(step, processes.main))
            if self.reference is not None and any(isinstance(m, FSDPModule) for m in within):
                # Processes draw different numbers of batches, and would wait for each other's parts of the network for ever.
                warnings.warn("no Frechet distance is measured of a network in shards (FSDP); measure the finished student",
                              stacklevel=2)  # fmt: skip
            elif self.reference is not None:
                found = self._distance() | found
        found = processes.share(found)
        processes.agree(lambda: _keep(self.folder, step, found) if processes.main else None)
        return found

    def _draw(self, step: int, main: bool) -> dict[str, float]:
        """Pictures and pairs, which every process draws whole: a network in shards needs them all."""
        if self.pictures:
            call = {**self.call, "num_inference_steps": self.steps}
            shared: dict[str, Any] = {"inputs": self.inputs, "call": call}
            cut = blocks(self.pipe, self.pictures, inputs=self.inputs, batch_size=self.batch_size)
            drawn = sample_outputs(self.pipe, cut, seed=self.seed, **shared)
            tiles = [tile for block, output in drawn for tile in _tiles(output, block)]
            if main and tiles:
                side = min(max(_SMALLEST, *tiles[0].size), _LARGEST)
                save_png(self.folder / f"samples-{step:06d}.png", mosaic(tiles, size=side))
        return {} if self.pairs is None else self._on_pairs(self.pairs)

    def _distance(self) -> dict[str, float]:
        result = evaluate(
            self.pipe,
            self.reference,
            self.num_images,
            extractor=self.extractor,
            seed=self.seed,
            inputs=self.inputs,
            call={**self.call, "num_inference_steps": self.steps},
            batch_size=self.batch_size,
            progress=False,
        )
        return {"fd": result["fid"]} | ({"fd_se": result.se["fid"]} if math.isfinite(result.se["fid"]) else {})

    def _on_pairs(self, pairs: Pairs) -> dict[str, float]:
        runs = self._runs(pairs, self.pipe.scheduler, self.steps)
        found = torch.cat([run.states[-1] for run in runs]).double().flatten(1)
        wanted = pairs.samples.double().cpu().flatten(1)
        spread = wanted.var(0).sum()
        figures = {
            "mean_drift": float((found.mean(0) - wanted.mean(0)).square().sum().div(spread).sqrt()),
            "variance_ratio": float(found.var(0).sum() / spread),
        }
        if pairs.matched:
            figures["rmse"] = rmse((found - wanted).square().mean(1)).value
        return figures | (self._straightness(pairs) if self.nodes else {})

    def _straightness(self, pairs: Pairs) -> dict[str, float]:
        """S along Euler's fine paths from the pairs' noise."""
        own: RectifiedFlowScheduler = self.pipe.scheduler
        path = own.path
        start = path.at_level(_begin(own, self.steps)[0])
        times = [start * (1 - k / self.nodes) for k in range(self.nodes + 1)]
        scheduler: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(own, solver="euler", grid="karras")
        scheduler.set_grid(Grid(tuple(path.level(s) for s in times), path.name, "euler"))
        states: list[list[Tensor]] = []
        velocities: list[list[Tensor]] = []
        for run in self._runs(pairs, scheduler, self.nodes):
            states.append([path.norm(s) * x.double() for s, x in zip(times, run.states, strict=True)])
            velocities.append([])
            for s, x, raw in zip(times, run.states, run.outputs, strict=False):
                levels = path.alpha(s), path.sigma(s), path.sigma_data
                p, q = predictions.row(scheduler.prediction, (-1.0, 1.0), *levels)
                velocities[-1].append(p * x.double() + q * raw.double())
        joined = [[torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in (states, velocities)]
        figure = straightness(joined[0], times, joined[1])
        return {"straightness": figure.value, "straightness_relative": figure.details["relative"]}

    def _runs(self, pairs: Pairs, scheduler: RectifiedFlowScheduler, steps: int) -> list[Trajectory]:
        """Runs the pipeline from the pairs' noise, batch by batch; images are not decoded."""
        scale = _begin(scheduler, steps)[1]
        network: Any = networks(self.pipe)[0]
        noise = (pairs.noise / scale).to(network.dtype)
        own = as_inputs(self.pipe, self.inputs)

        def inputs(row: int) -> Arguments:
            return {**own(int(pairs.indices[row])), "latents": noise[row]}

        call = {**self.call, "num_inference_steps": steps}
        if "output_type" in parameters(self.pipe):
            call["output_type"] = "latent"
        cut = blocks(self.pipe, len(noise), inputs=inputs, batch_size=self.batch_size)
        found = []
        with recording(self.pipe, scheduler) as take:
            for block, _ in sample_outputs(self.pipe, cut, seed=self.seed, inputs=inputs, call=call):
                run = take()
                _check_start(run.states[0], pairs.noise[block.start : block.stop], self.pipe)
                found.append(run)
        return found


def _tiles(output: Any, block: range) -> list[Image.Image]:  # noqa: ANN401
    """Pictures of what a pipeline returned: its images, or the middle frames of its videos; none of sound."""
    if isinstance(output, tuple):  # a pipeline that gives no name to what it makes
        return []
    found = next(iter(output.values()))
    if "frames" in output:
        return [picture(video[len(video) // 2]) for video in as_uint8(found, block, video=True)]
    return [picture(image) for image in as_uint8(found, block)] if "images" in output else []


def _begin(scheduler: RectifiedFlowScheduler, steps: int) -> tuple[float, float]:
    """The level where a run begins, and what its noise is scaled with."""
    if scheduler.config.get("use_dynamic_shifting"):  # a shift that hangs on the pipeline leaves pure noise where it is
        return 1.0, 1.0
    plan = scheduler.fork().plan(steps, None, None, None)
    return plan.levels[0], plan.start


def rows(folder: Path) -> list[dict[str, float]]:
    """Returns what was watched, by rising "step"; nothing where nothing was.

    Raises:
        ValueError: for a file of something else.
    """
    file = folder / WATCHED
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); delete it") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{file} does not hold what a training was watched for; delete it, or choose another folder")
    found: list[dict[str, float]] = content["rows"]
    return found


def _keep(folder: Path, step: int, found: Mapping[str, float]) -> None:
    """Writes the row of a step, in the place of an older one."""
    others = [row for row in rows(folder) if row["step"] != step]
    kept = sorted([*others, {"step": step, **found}], key=lambda row: row["step"])
    write_json(folder / WATCHED, {"format": _FORMAT, "rows": kept})


@contextmanager
def _inference(network: nn.Module) -> Iterator[None]:
    """The network without dropout and gradients; its modes and the random streams are as before afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        network.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _check(pairs: Pairs, pipe: Any) -> None:  # noqa: ANN401
    shapes = tuple(pairs.noise.shape), tuple(pairs.samples.shape)
    if shapes[0] != shapes[1] or len(pairs.noise) != len(pairs.indices) or len(pairs.noise) < 2:
        raise ValueError(f"got pairs of noise {shapes[0]}, samples {shapes[1]} and {len(pairs.indices)} indices; give at least "
                         "two pairs, with one sample of the noise's shape and one index each")  # fmt: skip
    if not pairs.samples.isfinite().all() or not pairs.samples.double().var(0).sum() > 0:
        raise ValueError(
            f"the teacher's {len(pairs.samples)} held-out samples are all the same or not finite; look at them"
        )
    if "latents" not in parameters(pipe):
        raise TypeError(
            f"{type(pipe).__name__} takes no latents, so it cannot start from the pairs' noise; leave out pairs"
        )


def _check_start(found: Tensor, noise: Tensor, pipe: Any) -> None:  # noqa: ANN401
    """Refuses a pipeline that makes something else of the noise that it is given."""
    rtol, atol = (1e-4, 1e-5) if found.dtype.itemsize > 2 else (2e-2, 1e-2)
    if found.shape != noise.shape or not torch.allclose(found.double(), noise.double().cpu(), rtol, atol):
        raise ValueError(f"{type(pipe).__name__} starts from something else than the pairs' noise (shape {tuple(noise.shape)}, it "
                         f"has {tuple(found.shape)}); give states as scheduler.step sees them")  # fmt: skip

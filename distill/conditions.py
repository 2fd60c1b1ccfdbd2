"""A pipeline's network as a function of sample, time and conditioning, one row beside the other: what distillation trains.

For each distinct input the pipeline is run up to, and not including, the first call of its network, and the arguments of the
conditional rows are kept: embedded prompts, labels, guidance embeddings, images beside the sample. Rows of any samples, each at a
time of its own, then make one call of the network, or of a student in its place.

With a guidance scale above 1 the unconditional rows are left out: a student learns the guided output from the conditional call.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.distill.fine import Runs
from flowkit.distill.kept import InFolder, InMemory, Kept
from flowkit.distill.observe import under
from flowkit.eval.provenance import describe, fingerprint, hash_inputs
from flowkit.hooks import DenoiserCall, Guidance, Recorder, Trajectory, layout
from flowkit.hooks.arguments import Arguments
from flowkit.hooks.denoiser import aligned_to
from flowkit.hooks.joining import Frame, apart
from flowkit.paths import Path
from flowkit.pipelines.sampling import Inputs, as_inputs, blocks
from flowkit.schedulers import RectifiedFlowScheduler

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST = 1e-6  # flow time; the time of an EDM network ends nowhere


class _Reached(Exception):
    """Ends a run of the pipeline before the first call of its network."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments


class _Capture(Guidance):
    needs_guidance = False

    def plan(self, step: int, sigma: float, state: Mapping[str, Any]) -> str:
        raise _Reached(state["evaluation"].conditioning)

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Mapping[str, Any]) -> Any:  # noqa: ANN401
        raise AssertionError(step)


class Conditions:
    """Runs a network with the conditioning that the pipeline gives it for each sample.

    Samples of equal inputs share what was captured once, for the first of them: noise that a pipeline adds to an image that it
    is given, say, is then the same for all.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes; it is left as it was.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        count: number of samples.
        call: arguments shared by all samples, such as ``dict(guidance_scale=5.0)``; no steps.
        batch_size: inputs at a time.
        folder: where captured arguments are kept, as memory-mapped safetensors; a capture that was killed goes on there, and
            processes started together share it. None keeps them in memory.
        on_input: called with the number of inputs that have been captured since its last call.

    Attributes:
        path: of the pipeline's scheduler.
        prediction: what the network predicts, one of `flowkit.predictions.PREDICTIONS`.
        shape: of one sample, in the path's coordinates, as ``scheduler.step`` sees it.
        dtype: of the pipeline's samples.
        start: flow time of the noisiest level.
        network: the pipeline's own.
        guided: whether the pipeline asks for unconditional rows, which are left out.
        distinct: number of distinct inputs.
        latent: whether samples are latents of an autoencoder, and no images.

    Raises:
        TypeError: for arguments that the pipeline does not take, and for arguments of the network that cannot be kept.
        ValueError: for a pipeline whose network is no function of sample, time and conditioning that can be called again, and for
            a folder of something else, or of other inputs or another pipeline (the first setting that differs is named).
    """

    def __init__(
        self,
        pipe: Any,  # noqa: ANN401
        inputs: Inputs,
        count: int,
        *,
        call: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        folder: FilePath | None = None,
        on_input: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._pipe, self._own, self._call = pipe, as_inputs(pipe, inputs), dict(call or {})
        cut = self._distinct(count, batch_size)
        networks = layout.networks(pipe)
        if len(networks) > 1:
            raise ValueError(f"{type(pipe).__name__} has {len(networks)} networks that take turns, and a student takes the place "
                             "of one; take a pipeline with one")  # fmt: skip
        scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler, solver="euler")
        self.path: Path = scheduler.path
        self.prediction: str = scheduler.prediction
        block = [self._first[i] for i in cut[0][:2]]
        run, reference = self._reference(block * (1 if len(block) == 2 else 2))
        self._denoise: DenoiserCall = run.denoiser()
        self.network: nn.Module = self._denoise.network
        self.guided = "uncond" in self._denoise.roles
        self.shape, self.dtype = tuple(run.states[0].shape[1:]), run.states[0].dtype
        latents = Arguments((), reference).latents
        self.latent = any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae", "movq", "vqgan"))
        self._called, self._input, device = latents[0].dtype, tuple(latents[0].shape), latents[0].device
        self._check(run, reference, device)
        self._kept: Kept = (
            InMemory(cut, self._capture, on_input)
            if folder is None
            else InFolder(folder, self._settings(count, batch_size), cut, self._capture, on_input, device)
        )
        self._frames: dict[tuple[str, torch.device], Frame] = {}

    def _distinct(self, count: int, batch_size: int) -> list[range]:
        """Numbers the distinct inputs, and returns the batches to capture them in."""
        if count < 1:
            raise ValueError(f"count must be a whole number of at least 1, got {count!r}")
        numbers: dict[str, int] = {}
        self._first, self._number = list[int](), list[int]()
        for index in range(count):
            number = numbers.setdefault(json.dumps(describe(self._own(index)), sort_keys=True), len(numbers))
            if number == len(self._first):
                self._first.append(index)
            self._number.append(number)
        self.distinct = len(numbers)
        return blocks(self._pipe, self.distinct, inputs=lambda i: self._own(self._first[i]), batch_size=batch_size)

    def _runs(self, samples: Sequence[int]) -> Runs:
        """Runs of the pipeline for some samples."""
        return Runs(
            self._pipe, "euler", inputs=lambda i: self._own(samples[i]), call=self._call, batch_size=len(samples)
        )

    def _reference(self, samples: Sequence[int]) -> tuple[Trajectory, dict[str, Any]]:
        """A run of two steps, and the arguments of the network in it."""
        runs, recorder = self._runs(samples), Recorder("state", "cond", limit=sys.maxsize)
        grid = runs.anchors(2)
        self.start: float = self.path.at_level(grid.sigmas[0]) if self.path.name in ("ve", "edm") else self.path.start
        runs.scheduler.set_grid(grid)
        with under(self._pipe, runs.scheduler, recorder):
            list(runs.draw(2, range(len(samples))))
        (run,) = recorder.trajectories
        if len(run.sigmas) != 2:
            raise ValueError(f"{type(self._pipe).__name__} took {len(run.sigmas)} of 2 steps; call it so that it starts from pure "
                             "noise (strength=1)")  # fmt: skip
        return run, self._captured(samples)

    def _captured(self, samples: Sequence[int]) -> dict[str, Any]:
        """The network's arguments for some samples."""
        runs = self._runs(samples)
        runs.scheduler.set_grid(runs.anchors(2))
        try:
            with under(self._pipe, runs.scheduler, _Capture()):
                list(runs.draw(2, range(len(samples))))
        except _Reached as reached:
            self._pipe.maybe_free_model_hooks()
            return dict(reached.arguments)
        raise ValueError(f"{type(self._pipe).__name__} made a sample without a call of its network")

    def _apart(self, arguments: Mapping[str, Any], rows: int) -> list[tuple[Frame, dict[str, Tensor]]]:
        """The arguments of each row; a sample without images beside it need not be kept."""
        given = Arguments((), dict(arguments))
        latents = given.latents
        if tuple(latents[0].shape) != self._input:
            raise ValueError(f"a sample comes to the network in shape {tuple(latents[0].shape)}, the first in {self._input}; give "
                             "all inputs of one training the same size")  # fmt: skip
        if math.prod(self._input) == math.prod(self.shape):
            blank = [row.to("meta") for row in latents]
            given = given.replaced(torch.stack(blank) if isinstance(latents, Tensor) else type(latents)(blank))
        return apart(given.kwargs, rows)

    def _check(self, run: Trajectory, arguments: Mapping[str, Any], device: torch.device) -> None:
        """Refuses a network whose rows depend on more than what was taken for theirs: here they change places."""
        rows = self._apart(arguments, len(run.states[0]))[::-1]
        if rows[0][0].key != rows[-1][0].key:
            return  # they make no call together
        given = rows[0][0].join([row for _, row in rows], device)
        close = 1e-3 if self._called in (torch.float32, torch.float64) else 0.05
        for state, time, cond in zip(run.states, run.timesteps, run.cond, strict=False):
            assert cond is not None
            with torch.no_grad():
                found = self._denoise(state.flip(0).to(device), time, given=given).flip(0).cpu().double()
            wanted = aligned_to(self._denoise.sign * cond, found)
            if float((found - wanted).norm()) > close * float(wanted.norm()):
                raise ValueError(f"a row of the network's batch of {type(self._pipe).__name__} comes out otherwise in another "
                                 "place or at another step, so rows of other samples cannot be put together")  # fmt: skip

    def _settings(self, count: int, batch_size: int) -> dict[str, Any]:
        """What the captured arguments depend on."""
        return {
            "pipeline": type(self._pipe).__qualname__,
            "network": type(self.network).__qualname__,
            "weights": fingerprint(self._pipe, layout.networks(self._pipe)),
            "dtype": str(self._called).removeprefix("torch."),
            "inputs": hash_inputs(self._own, count),
            "count": count,
            "call": describe(self._call),
            "batch_size": batch_size,
        }

    def _capture(self, block: range) -> list[tuple[Frame, dict[str, Tensor]]]:
        """Frame and tensors of some distinct inputs, on the CPU."""
        samples = [self._first[number] for number in block]
        # Of a batch of one row it cannot be told what belongs to the row.
        arguments = self._captured(samples if len(samples) > 1 else samples * 2)
        found = self._apart(arguments, max(2, len(samples)))[: len(samples)]
        cpu = torch.device("cpu")
        frames = {frame.key: frame.to(cpu) for frame in {id(frame): frame for frame, _ in found}.values()}
        return [
            (frames[frame.key], {name: x.detach().to(cpu, copy=True) for name, x in row.items()})
            for frame, row in found
        ]

    def __call__(self, network: nn.Module, x: Tensor, s: Tensor, samples: Sequence[int] | Tensor) -> Tensor:
        """Returns the network's prediction for samples with their own conditioning, each at its own time.

        Args:
            network: the pipeline's own, or one that is called alike: a student, wrapped for training or not.
            x: noisy samples in the path's coordinates, (B, *shape), on the network's device; gradients go through.
            s: flow time of each, (B,), at most `start`.
            samples: index of each, whose conditioning it gets.

        Returns:
            The prediction of type `prediction`, as ``scheduler.step`` expects it, (B, *shape), in float32 at least. Samples whose
            conditioning cannot be joined, such as prompts of other lengths, take a call for each group.

        Raises:
            IndexError: for a sample that is not one of the `count`.
            ValueError: for samples of another shape, or another number of times or samples.
        """
        indices = samples.tolist() if isinstance(samples, Tensor) else [int(i) for i in samples]
        if wrong := [i for i in indices if not 0 <= i < len(self._number)]:
            raise IndexError(f"sample {wrong[0]} is not one of {len(self._number)}")
        if x.shape != (len(indices), *self.shape) or s.shape != x.shape[:1]:
            raise ValueError(f"got samples of shape {tuple(x.shape)}, times of shape {tuple(s.shape)} and {len(indices)} "
                             f"indices; one sample has shape {self.shape} and one time")  # fmt: skip
        numbers = [self._number[i] for i in indices]
        low = _LEAST if self.path.name in ("ve", "edm") else 0.0
        levels = [min(max(level, low), self.start) for level in s.detach().double().tolist()]
        times = torch.tensor([self.path.time(level) for level in levels], dtype=torch.float64)
        groups: dict[str, list[int]] = {}
        for place, number in enumerate(numbers):
            groups.setdefault(self._kept.keys[number], []).append(place)
        dtype = next((p.dtype for p in network.parameters() if p.dtype in _FLOATS), self._called)
        found = []
        for key, places in groups.items():
            given = self._given(key, [self._kept.row(numbers[i]) for i in places], x.device, dtype)
            rows = x if len(places) == len(x) else x[torch.tensor(places, device=x.device)]
            found.append(self._denoise(rows, times[places], given=given, network=network))
        result = found[0]
        if len(groups) > 1:
            order = torch.tensor([place for places in groups.values() for place in places]).argsort()
            result = torch.cat(found)[order.to(x.device)]
        return result.to(torch.promote_types(result.dtype, torch.float32))

    def _given(
        self, key: str, rows: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
    ) -> Arguments:
        """The arguments of a call; what the pipeline's network takes in its own dtype, another takes in its own."""
        place = (key, device)
        if place not in self._frames:
            self._frames[place] = self._kept.frames[key].to(device)
        given = self._frames[place].join(rows, device)
        return given if dtype == self._called else Arguments((), _cast(given.kwargs, self._called, dtype))


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:  # noqa: ANN401
    """Tensors of one dtype in another, in dicts, lists and tuples too."""
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, dict):
        return {key: _cast(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, old, new) for item in value)
    return value

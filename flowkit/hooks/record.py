"""Recording a pipeline in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkit.hooks.arguments import Arguments, changes, size
from flowkit.hooks.denoiser import DenoiserCall, aligned_to
from flowkit.hooks.levels import TIME_MAPS
from flowkit.hooks.parts import Level, Part
from flowkit.hooks.selftest import aligned

KINDS = ("state", "output", "cond", "uncond")


@dataclass
class Trajectory:
    """One call of a pipeline, of N evaluations; tensors on the CPU, but for the conditioning.

    Attributes:
        states: the sample before each evaluation and after the last, N + 1 tensors (B, ...); empty unless kept, as are the others.
        outputs: what ``scheduler.step`` was given, without the channels of a learned variance, N tensors (B, ...).
        cond: the network's conditional output, N tensors (B, C, ...), None where it was not run.
        uncond: its unconditional output, likewise, None too where it was not run for every sample.
        sigmas: level of each evaluation in the convention of diffusers' ``sigmas``, as `Guidance.plan` gets it.
        timesteps: the scheduler's.
        identity: names of pipeline and network, and the levels, as values for JSON.
        edited: numbers of the evaluations before which the pipeline changed the sample, where states are kept.
        conditioning: the network's arguments by name, beside latents and time, for the conditional rows at the first evaluation:
            embedded prompts, labels and the like, where they were.
        changed: the network's arguments, beside latents and time, that the pipeline changes between evaluations, and "the network
            itself" where two take turns.
    """

    states: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    cond: list[Tensor | None] = field(default_factory=list)
    uncond: list[Tensor | None] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    edited: list[int] = field(default_factory=list)
    conditioning: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    _network: Any = None
    _calls: dict[str, Arguments] = field(default_factory=dict)
    _level: Level | None = None
    _sign: int = 1
    _total: int = 1000
    _expected: Tensor | None = None
    _x: Tensor | None = None

    def denoiser(self) -> DenoiserCall:
        """Returns the network as it was called, to run at any sample and time.

        Raises:
            ValueError: where the pipeline's call cannot be repeated: it changes other arguments than sample and time, gives the
                time in an unknown form, or a repeated call does not return what was recorded.
        """
        name = self.identity.get("pipeline", "the pipeline")
        if not self._calls or self._expected is None:
            raise ValueError("nothing was recorded yet; call the pipeline while the recorder is attached")
        if self._x is None:
            raise ValueError(f"{name} gives its network something else than the sample (frames or images in its place, or packed "
                             "otherwise), so it cannot be called at other samples")  # fmt: skip
        if self.changed:
            raise ValueError(f"{name} changes {', '.join(sorted(self.changed))} from step to step, so its network cannot be "
                             "called at other samples and times")  # fmt: skip
        with torch.no_grad():
            for form in TIME_MAPS:
                call = DenoiserCall(
                    self._network, self._calls, self._x.shape, form, self._total, self._sign, self._level
                )
                if not call.fits(self.timesteps[0]):
                    continue
                found = call(self._x, self.timesteps[0])
                if torch.allclose(found, aligned_to(self._expected * self._sign, found), rtol=1e-4, atol=1e-5):
                    return call
        raise ValueError(f"a repeated call of the network of {name} does not return what was recorded: it is given sample or "
                         "time in a form that is not known")  # fmt: skip


class Recorder(Part):
    """Keeps what a pipeline's network and scheduler are given and return, in memory.

    Args:
        *keep: any of "state", "output", "cond" and "uncond" (see `Trajectory`); none means the first two.
        limit: bytes that may be kept, the network's arguments at each first evaluation included; more is an error.

    Attributes:
        trajectories: one for every call of the pipeline, in order.

    Raises:
        ValueError: for another kind, a limit that is not positive, and while the pipeline runs, at the limit.
    """

    def __init__(self, *keep: str, limit: int = 2**31) -> None:
        if unknown := [kind for kind in keep if kind not in KINDS]:
            raise ValueError(f"cannot record {unknown[0]!r}; choose from {', '.join(KINDS)}")
        if not isinstance(limit, int | float) or not limit > 0:
            raise ValueError(f"limit must be a positive number of bytes, got {limit!r}; 2**31 is 2 GiB")
        self.keep, self.limit, self.bytes = keep or KINDS[:2], limit, 0
        self.trajectories: list[Trajectory] = []

    def take(self) -> list[Trajectory]:
        """Returns the trajectories and forgets them."""
        taken, self.trajectories, self.bytes = self.trajectories, [], 0
        return taken

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Starts a trajectory."""
        self.trajectories.append(Trajectory())

    def before_step(self, run: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:  # noqa: ANN401
        """Keeps what the network returned, and the sample."""
        step, now = run.step, self.trajectories[-1]
        if step is None:
            return
        rows = step.size
        if not now.sigmas:
            self._remember(run, now, sample)
        elif step.network is not now._network:
            now.changed.add("the network itself")
        else:
            now.changed |= changes(now._calls["cond"], step.calls["cond"])
            now._calls = {**step.calls, **now._calls}
        now.sigmas.append(step.sigma)
        now.timesteps.append(float(timestep))
        now.identity["levels"].append(step.sigma)
        if "state" in self.keep:  # in place of the last step's result, which the pipeline may have edited
            kept = self._kept(sample[:rows])
            if now.states:
                old = now.states.pop()
                self.bytes -= size(old)
                if not torch.equal(old.to(kept.dtype), kept):
                    now.edited.append(len(now.sigmas) - 1)
            now.states.append(kept)
        if "output" in self.keep:
            now.outputs.append(self._kept(model_output[:rows, : sample.shape[1]]))
        for kind, outputs, value in (("cond", now.cond, step.cond), ("uncond", now.uncond, step.uncond)):
            if kind in self.keep:
                outputs.append(None if value is None else self._kept(value))

    def after_step(self, run: Any, sample: Tensor) -> None:  # noqa: ANN401
        """Keeps the next sample."""
        now = self.trajectories[-1]
        if "state" in self.keep and run.step is not None:
            now.states.append(self._kept(sample[: run.step.size]))

    def _remember(self, run: Any, now: Trajectory, sample: Tensor) -> None:  # noqa: ANN401
        """What it takes to call the network again."""
        step = run.step
        now.identity = {"pipeline": type(run.pipe).__name__, "network": type(step.network).__name__, "levels": []}
        now._network, now._calls, now._level = step.network, dict(step.calls), step.evaluation.level
        now._sign, now._total = run.sign, run.clock.total
        given = step.calls["cond"]
        varying = {id(given.latents), id(given.time)}
        now.conditioning = {k: v for k, v in step.evaluation.conditioning.items() if id(v) not in varying}
        now._expected, x = step.cond, aligned(step.evaluation.x.detach(), sample[: step.size])
        # A network that is not given the sample itself, up to a factor, is not a function of it alone: frames are put in its place.
        if x is not None:
            wide, seen = sample[: step.size].double(), x.double()
            part = float((wide * seen).sum()) / max(float(wide.square().sum()), 1e-300)
            if float((seen - part * wide).norm()) <= 0.02 * float(seen.norm()):
                now._x = x.clone()
        self._count(size([[call.args, call.kwargs] for call in now._calls.values()]) + size([now._expected, now._x]))

    def _kept(self, x: Tensor) -> Tensor:
        """A copy that no later step of the pipeline writes into."""
        self._count(size(x))
        return x.detach().to("cpu", copy=True)

    def _count(self, more: int) -> None:
        self.bytes += more
        if self.bytes > self.limit:
            raise ValueError(f"the recorder is full: {self.bytes} bytes, and its limit is {self.limit}; raise limit, keep less "
                             f"than {', '.join(self.keep)}, or record fewer samples")  # fmt: skip

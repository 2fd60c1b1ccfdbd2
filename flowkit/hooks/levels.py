"""At which noise level a pipeline is: from its scheduler, ours or stock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkit.hooks.parts import Level
from flowkit.paths import Path
from flowkit.schedulers import RectifiedFlowScheduler

# How networks are told the time, of that of the scheduler.
TIME_MAPS: dict[str, Callable[[Any, int], Any]] = {
    "t": lambda t, total: t,
    "t / T": lambda t, total: t / total,
    "1 - t / T": lambda t, total: 1.0 - t / total,
    "(T - t)": lambda t, total: total - t,
}


@dataclass(frozen=True)
class Clock:
    """The timesteps of a run and their levels.

    Attributes:
        timesteps: as the scheduler gives them to the pipeline.
        total: its number of training times.
        path: of the model; None where the scheduler's is not known.
        prediction: what the network predicts.
        values: flow time of each timestep; empty without a path.
        sigmas: level of each timestep in the convention of diffusers' ``sigmas``; nan where nothing is known.
    """

    timesteps: tuple[float, ...]
    total: int
    path: Path | None
    prediction: str
    values: tuple[float, ...]
    sigmas: tuple[float, ...]

    def level(self, index: int, sign: int) -> Level | None:
        """Returns the level of the call at a timestep's position."""
        if self.path is None or not 0 <= index < len(self.values):
            return None
        return Level(self.path, self.values[index], self.prediction, sign)

    def sigma(self, index: int) -> float:
        """Returns the level of a timestep's position as diffusers' ``sigmas`` say it; nan outside the run."""
        return self.sigmas[index] if 0 <= index < len(self.sigmas) else float("nan")


def clock(scheduler: Any) -> Clock:  # noqa: ANN401
    """Reads the timesteps of a scheduler and their levels.

    Args:
        scheduler: ours or stock, after ``set_timesteps``.
    """
    times = tuple(float(t) for t in torch.as_tensor(scheduler.timesteps).tolist())
    total = int(scheduler.config.get("num_train_timesteps", 1000))
    exported = [float(v) for v in getattr(scheduler, "sigmas", torch.empty(0)).tolist()][: len(times)]
    try:
        ours = scheduler if isinstance(scheduler, RectifiedFlowScheduler) else _ours(scheduler)
        path = ours.path
        exact = isinstance(scheduler, RectifiedFlowScheduler) and len(exported) == len(times)
        levels = exported if len(exported) == len(times) else (None,) * len(times)
        values = tuple(path.at_level(v) if exact and v is not None else _at(path, t, v)
                       for t, v in zip(times, levels, strict=True))  # fmt: skip
    except (ValueError, TypeError):  # a scheduler that is not known here
        padded = tuple(exported) if len(exported) == len(times) else (float("nan"),) * len(times)
        return Clock(times, total, None, "", (), padded)
    return Clock(times, total, path, ours.prediction, values, tuple(path.level(s) for s in values))


def _at(path: Path, time: float, level: float | None) -> float:
    """Flow time of a timestep. Stock schedulers may round it, but not the level, which counts where it belongs to the timestep."""
    s = path.at_time(time)
    if level is None or path.name in ("ve", "edm"):
        return s
    unrounded = path.at_level(level)
    return unrounded if abs(path.time(unrounded) - time) <= 1.0 else s


def _ours(scheduler: Any) -> RectifiedFlowScheduler:  # noqa: ANN401
    made: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(scheduler, solver="euler")
    return made


def position(clock: Clock, time: Any, expected: int) -> int:  # noqa: ANN401
    """Returns the position of the timestep that a network was told, at or after the expected one; that one if it is not found.

    Args:
        clock: of the run.
        time: the network's time argument: a number or a tensor, of which the largest magnitude counts (frames that are given have
            time 0).
        expected: position of the next timestep, as far as is known.
    """
    values = time.detach().flatten().double() if isinstance(time, Tensor) else torch.tensor([float(time)])
    told = float(values[values.abs().argmax()])
    for form in TIME_MAPS.values():  # the usual first: what is left of a time may be another time of the grid
        for at in range(expected, len(clock.timesteps)):
            if abs(told - form(clock.timesteps[at], clock.total)) <= 2e-3 * max(1e-3, abs(told)):
                return at
    return expected

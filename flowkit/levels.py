"""Levels: an exact list of noise levels, and what it can be turned into."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, get_args

import numpy as np

from flowkit import paths, spacing
from flowkit.paths import Path, PathName


@dataclass(frozen=True)
class Levels:
    """The levels of a grid, checked, and their transformations; users make a `flowkit.Grid`.

    Attributes are those of `flowkit.grids.Grid`.

    Raises:
        ValueError: for levels that do not fall, or lie outside the path.
    """

    sigmas: tuple[float, ...]
    path: str = "flow"
    solver: str | None = None
    timesteps: tuple[float, ...] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(v) for v in self.sigmas))
        if self.path not in get_args(PathName):
            raise ValueError(f"unknown path {self.path!r:.60} of a grid; choose one of {', '.join(get_args(PathName))}")
        if len(self.sigmas) < 2:
            raise ValueError(f"a grid needs at least a start and an end level, got {short(self.sigmas)}")
        if not all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"the levels of a grid must strictly fall, got {short(self.sigmas)}")
        top = 1.0 if self.path == "flow" else math.inf
        if not 0 <= self.sigmas[-1] < self.sigmas[0] <= top:
            cure = "; sigma/alpha above 1 belongs to the paths vp, cosine, ve and edm" if top == 1 else ""
            raise ValueError(
                f"the levels of a {self.path} grid must lie in [0, {top:g}], got {short(self.sigmas)}{cure}"
            )
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(v) for v in self.timesteps))
            if len(self.timesteps) != len(self) or not all(math.isfinite(v) for v in self.timesteps):
                raise ValueError(
                    f"a grid of {len(self)} steps needs as many finite timesteps, got {short(self.timesteps)}"
                )

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.sigmas) - 1

    def resampled(self, steps: int) -> Self:
        """Returns N levels between the first and the last positive one, log-linear over the step number (Sabour et al. 2024).

        A last level of 0 stays. Timesteps are dropped, and so is ``about``, which told of another grid; a grid of N steps is
        returned as it is.

        Raises:
            ValueError: for N < 1, an infinite first level, or a single positive level.
        """
        check_steps(steps)
        positive = [v for v in self.sigmas if v > 0]
        tail = self.sigmas[len(positive) :]
        if steps == len(self):
            return self
        if math.isinf(positive[0]):
            raise ValueError("a grid that starts at inf has no log-linear resampling; resample grid.on('flow')")
        if len(positive) < 2 and steps > 1:
            raise ValueError(
                f"the grid {short(self.sigmas)} has one positive level, which cannot be resampled; name a spacing"
            )
        levels = spacing.resample(np.array(positive), steps + 1 - len(tail)).tolist()
        return replace(self, sigmas=(*levels, *tail), timesteps=None, about={})

    def with_shift(self, shift: float | None = None, *, mu: float | None = None, kind: str = "exponential") -> Self:
        """Returns the flow grid pushed towards noise, ``k s / (1 + (k - 1) s)`` (Esser et al. 2024, equation 23).

        Args:
            shift: k > 0, the static shift; 1 changes nothing. Give either this or mu.
            mu: amount of the dynamic shift: ``k = exp(mu)``, or mu itself, > 0, with ``kind="linear"``.
            kind: "exponential" or "linear", time_shift_type in diffusers.

        Raises:
            ValueError: for a grid of another path, both or neither of shift and mu, an amount that is no positive k, or an
                unknown kind.
        """
        if kind not in ("exponential", "linear"):
            raise ValueError(f"unknown kind of shift {kind!r}; choose exponential or linear")
        if (shift is None) == (mu is None):
            raise ValueError(f"give either a shift or mu, got shift={shift} and mu={mu}")
        k = shift if mu is None else mu
        if mu is not None and kind == "exponential":
            k = math.inf if mu > 700 else math.exp(mu)
        if k is None or not 0 < k < math.inf:
            raise ValueError(f"shift must be a positive number, got {k}; 1 means none")
        return self._pushed(lambda s: spacing.shift(s, k))

    def stretched(self, terminal: float) -> Self:
        """Returns the flow grid stretched so that its last positive level is ``terminal``: shift_terminal of diffusers.

        Args:
            terminal: the last positive level, in (0, 1).

        Raises:
            ValueError: for a grid of another path, a terminal out of range, or a grid whose only positive level is 1.
        """
        if not 0 < terminal < 1:
            raise ValueError(f"terminal must lie in (0, 1), got {terminal}; give a level such as 0.1")
        if self.sigmas[1] == 0:
            raise ValueError(f"the grid {short(self.sigmas)} has a single positive level; give it at least two steps")
        return self._pushed(lambda s: spacing.stretch(s, terminal))

    def _pushed(self, move: Callable[[spacing.Array], spacing.Array]) -> Self:
        if self.path != "flow":
            raise ValueError(f"only flow grids can be shifted, this is one of {self.path!r}; shift grid.on('flow')")
        count = len([v for v in self.sigmas if v > 0])
        levels = move(np.array(self.sigmas[:count])).tolist()
        return replace(self, sigmas=(*levels, *self.sigmas[count:]), timesteps=None, about={})

    def on(self, path: str) -> Self:
        """Returns the same noise-to-signal ratios as a grid of another path: ``s = rho / (1 + rho)``, rho = sigma/alpha.

        Timesteps are dropped: every path has its own clock. A level beyond what a model of the new path knows stays as it is.

        Args:
            path: name of the path; `flowkit.paths` says how they hang together.

        Raises:
            ValueError: for an unknown path.
        """
        if path == self.path:
            return self
        convert = paths.from_rho if path == "flow" else paths.rho if self.path == "flow" else float
        return replace(self, path=path, sigmas=tuple(convert(v) for v in self.sigmas), timesteps=None)

    def at_whole_times(self, path: Path) -> Self:
        """Returns the grid with each level moved to the nearest whole model time, for classes that take no others.

        Args:
            path: the model's path; the grid must belong to it.

        Returns:
            The grid with its times in ``timesteps``; the level where it ends stays.

        Raises:
            ValueError: for a grid of another path, a path whose clock is the noise itself (VE, EDM), or levels so close that two
                of them share a time.
        """
        if path.name in ("ve", "edm"):
            raise ValueError(f"the clock of the path {path.name!r} has no whole times; leave the grid as it is")
        if path.name != self.path:
            raise ValueError(f"the grid belongs to {self.path!r}, the path to {path.name!r}; convert it with grid.on")
        times = [float(round(path.time(path.at_level(v)))) for v in self.sigmas[:-1]]
        if len(set(times)) < len(times):
            raise ValueError(f"two of {len(self)} levels share a whole model time, {short(times)}; use fewer steps")
        levels = (*(path.level(path.at_time(t)) for t in times), self.sigmas[-1])
        return replace(self, sigmas=levels, timesteps=tuple(times), about={})


def check_steps(steps: int) -> None:
    """Raises ValueError where a number of steps is none."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"the number of steps must be a whole number of at least 1, got {steps!r:.80}")


def short(values: Iterable[float]) -> str:
    """Returns a list for an error message."""
    text = str(list(values))
    return text if len(text) <= 160 else f"{text[:140]} ... {text[-15:]}"

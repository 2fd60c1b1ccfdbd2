"""Grids: the noise levels of a sampler's steps, and the small JSON file in which they travel with a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, get_args

from flowkit import paths
from flowkit.paths import Path, PathName
from flowkit.weights import write_bytes

_FORMAT = "flowkit.grid/1"


@dataclass(frozen=True)
class Grid:
    """An exact grid of N steps.

    Attributes:
        sigmas: N + 1 strictly falling levels in diffusers' convention: flow time s on the flow path, sigma/alpha on every other
            (inf at zero terminal SNR); the first is where sampling starts, the last where it ends, usually 0.
        path: name of the path that the levels belong to, "flow", "vp", "cosine", "ve" or "edm".
        solver: the solver that it was made for; None means any.
        timesteps: N model times to call the network with; None means the path's clock at each level.
        about: how it was made and what it gained, for people; any JSON values.

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
            raise ValueError(f"unknown path {self.path!r} of a grid; choose one of {', '.join(get_args(PathName))}")
        if len(self.sigmas) < 2:
            raise ValueError(f"a grid needs at least a start and an end level, got {list(self.sigmas)}")
        if not all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"the levels of a grid must strictly fall, got {list(self.sigmas)}")
        top = 1.0 if self.path == "flow" else math.inf
        if not 0 <= self.sigmas[-1] < self.sigmas[0] <= top:
            raise ValueError(f"the levels of a {self.path} grid must lie in [0, {top:g}], got {list(self.sigmas)}")
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(v) for v in self.timesteps))
            if len(self.timesteps) != len(self) or not all(math.isfinite(v) for v in self.timesteps):
                raise ValueError(
                    f"a grid of {len(self)} steps needs as many finite timesteps, got {list(self.timesteps)}"
                )

    def __len__(self) -> int:
        """The number of steps N."""
        return len(self.sigmas) - 1

    @classmethod
    def uniform(cls, steps: int, path: Path | None = None) -> Grid:
        """Levels at evenly spaced model times that end at 0 without a wasted call.

        Args:
            steps: N >= 1.
            path: where; None means flow, ``sigma_i = 1 - i/N``. On a discrete VP path the times are those of "trailing" spacing.

        Raises:
            ValueError: for N < 1, N above the number of discrete times, or a path without a start (VE, EDM).
        """
        path = path or paths.flow()
        _check_steps(steps)
        if path.name in ("ve", "edm"):
            raise ValueError(f"the path {path.name!r} has no uniform grid, its noise is unbounded; use Grid.karras")
        if path.name == "vp":
            total = len(path.rhos)
            if steps > total:
                raise ValueError(f"{steps} steps on a path of {total} discrete times; ask for at most {total}")
            times = [round(total * (1 - i / steps)) - 1 for i in range(steps)]
            return cls((*(path.level(path.at_time(t)) for t in times), 0.0), "vp")
        levels = [path.level(path.at_time(path.num_train_timesteps * (1 - i / steps))) for i in range(steps)]
        return cls((*levels, 0.0), path.name)

    @classmethod
    def shifted(cls, steps: int, shift: float) -> Grid:
        """The uniform flow grid pushed towards noise, ``k s / (1 + (k - 1) s)`` (Esser et al. 2024, equation 23).

        Args:
            steps: N >= 1.
            shift: k > 0; 1 changes nothing.
        """
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"shift must be a positive number, got {shift}; 1 means none")
        return cls(tuple(shift * s / (1 + (shift - 1) * s) for s in cls.uniform(steps).sigmas))

    @classmethod
    def karras(
        cls, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, path: str = "edm"
    ) -> Grid:
        """Levels ``(max^(1/rho) + i/(N-1) (min^(1/rho) - max^(1/rho)))^rho``, then 0 (Karras et al. 2022, equation 5).

        Args:
            steps: N >= 1; one step starts at sigma_max.
            sigma_min: last level before 0, in the path's convention.
            sigma_max: first level.
            rho: 7 spends most steps at small noise; 1 is linear.
            path: name of the path.
        """
        _check_steps(steps)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        ramp = [i / max(steps - 1, 1) for i in range(steps)]
        return cls((*((high + r * (low - high)) ** rho for r in ramp), 0.0), path)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; inf is written "inf"."""
        return {
            "format": _FORMAT,
            "path": self.path,
            "sigmas": ["inf" if math.isinf(v) else v for v in self.sigmas],
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "solver": self.solver,
            "about": dict(self.about),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """Reads what `to_dict` returns.

        Raises:
            ValueError: where it is something else.
        """
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            raise ValueError(f"not a flowkit grid: expected the format {_FORMAT!r}; write one with Grid.save")
        about, solver = values.get("about") or {}, values.get("solver")
        sigmas, timesteps = _numbers(values.get("sigmas")), _numbers(values.get("timesteps"))
        if sigmas is None or not isinstance(about, Mapping) or not (solver is None or isinstance(solver, str)):
            raise ValueError(f"a grid needs a list of sigmas and a solver's name or null, got {dict(values)!r:.200}")
        return cls(sigmas, str(values.get("path")), solver, timesteps, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the grid as JSON, whole or not at all."""
        write_bytes(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Grid:
        """Reads a grid file.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it does not hold a grid; names the file.
        """
        if not FilePath(path).is_file():
            raise FileNotFoundError(f"no grid file at {path}; check the path, or write one with Grid.save")
        try:
            return cls.from_dict(json.loads(FilePath(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error}); write the grid again with Grid.save") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"the number of steps must be a whole number of at least 1, got {steps!r}")


def _numbers(values: object) -> tuple[float, ...] | None:
    """The numbers of a JSON list, "inf" among them; None for null.

    Raises:
        ValueError: for anything else.
    """
    if values is None:
        return None
    if isinstance(values, list) and all(v == "inf" or (isinstance(v, int | float) and v is not True) for v in values):
        return tuple(map(float, values))
    raise ValueError(f"a grid needs lists of numbers, got {values!r:.200}")

"""Grids: the noise levels of a sampler's steps, and the small JSON file in which they travel with a model."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from flowkit import paths, spacing, stock_lists
from flowkit.levels import Levels, check_steps
from flowkit.paths import Path
from flowkit.spacing import Array, cleanest, model_times
from flowkit.weights import write_bytes

GRIDS = (
    "uniform",
    "trailing",
    "leading",
    "linspace",
    "straight",
    "karras",
    "exponential",
    "beta",
    "ays-sd15",
    "ays-sdxl",
    "ays-svd",
)
BOUNDED = ("karras", "exponential", "beta")  # those between sigma_min and sigma_max

_FORMAT = "flowkit.grid/1"
_LARGEST = 1 << 24  # bytes; a grid of a thousand steps takes some 40 kB
_AYS = {
    "sd15": ("StableDiffusionSigmas", "vp"),
    "sdxl": ("StableDiffusionXLSigmas", "vp"),
    "svd": ("StableDiffusionVideoSigmas", "edm"),
}


@dataclass(frozen=True)
class Grid(Levels):
    """An exact grid of N steps, by name, from a file or as it comes; `flowkit.levels.Levels` says what it can be turned into.

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

    @classmethod
    def uniform(cls, steps: int, path: Path | None = None) -> Grid:
        """Levels at evenly spaced model times that end at 0 without a wasted call: "trailing" spacing.

        Args:
            steps: N >= 1.
            path: where; None means flow, ``sigma_i = 1 - i/N``.

        Raises:
            ValueError: as `spaced`.
        """
        return cls.spaced(steps, path, "trailing")

    @classmethod
    def spaced(cls, steps: int, path: Path | None = None, spacing: str = "trailing") -> Grid:
        """Levels at evenly spaced model times, then 0 (Lin et al. 2024, table 2).

        Args:
            steps: N >= 1.
            path: where; None means flow. On a discrete VP path the times are whole and those of DDIM in diffusers.
            spacing: "trailing", "leading" or "linspace", see `flowkit.spacing.model_times`; on the flow path "linspace" is the
                grid of FlowMatchEulerDiscreteScheduler. Or "straight": levels evenly spaced in flow time on any path, from the
                noisiest that the model knows.

        Raises:
            ValueError: for N < 1, N above the number of discrete times, an unknown spacing, or a path without a start (VE, EDM).
        """
        path = path or paths.flow()
        check_steps(steps)
        if path.name in ("ve", "edm"):
            raise ValueError(f"the path {path.name!r} has no {spacing} grid, its noise is unbounded; use Grid.karras")
        if spacing == "straight":
            return cls((*(path.level(path.start * (1 - i / steps)) for i in range(steps)), 0.0), path.name)
        whole = path.name == "vp"
        total = len(path.rhos) if whole else path.num_train_timesteps
        if whole and steps > total:
            raise ValueError(f"{steps} steps on a path of {total} discrete times; ask for at most {total}")
        times = model_times(spacing, steps, total, whole=whole)
        return cls((*(path.level(path.at_time(float(t))) for t in times), 0.0), path.name)

    @classmethod
    def shifted(cls, steps: int, shift: float) -> Grid:
        """The uniform flow grid, pushed towards noise as `with_shift` does.

        Args:
            steps: N >= 1.
            shift: k > 0; 1 changes nothing.
        """
        return cls.uniform(steps).with_shift(shift)

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

        Raises:
            ValueError: for N < 1, or limits that are not 0 < sigma_min < sigma_max < inf.
        """
        return cls._between(steps, sigma_min, sigma_max, path, lambda low, high, n: spacing.karras(low, high, n, rho))

    @classmethod
    def exponential(cls, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, path: str = "edm") -> Grid:
        """Levels ``max^(1-r) min^r`` with ``r = i/(N-1)``, then 0; arguments and errors as in `karras`."""
        return cls._between(steps, sigma_min, sigma_max, path, spacing.exponential)

    @classmethod
    def beta(
        cls,
        steps: int,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        alpha: float = 0.6,
        beta: float = 0.6,
        path: str = "edm",
    ) -> Grid:
        """Levels at even quantiles of a beta distribution over the limits, then 0 (Lee et al. 2024; `flowkit.spacing.beta`).

        Args:
            steps: as in `karras`, and so are sigma_min, sigma_max and path.
            sigma_min: last level before 0.
            sigma_max: first level.
            alpha: > 0; below 1 crowds the levels at the clean end.
            beta: > 0; below 1 crowds them at the noisy end.
            path: name of the path.

        Raises:
            ImportError: without SciPy.
            ValueError: as in `karras`, or for alpha or beta not above 0.
        """
        if not 0 < min(alpha, beta) <= max(alpha, beta) < math.inf:
            raise ValueError(
                f"alpha and beta must be positive numbers, got {alpha} and {beta}; the paper uses 0.6 for both"
            )
        return cls._between(
            steps, sigma_min, sigma_max, path, lambda low, high, n: spacing.beta(low, high, n, alpha, beta)
        )

    @classmethod
    def _between(
        cls, steps: int, low: float, high: float, path: str, place: Callable[[float, float, int], Array]
    ) -> Grid:
        check_steps(steps)
        if not 0 < low < high < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {low} and {high}")
        levels = place(low, high, steps).tolist()
        levels[-1:], levels[:1] = [low], [high]  # as given, not to the last bit of a power
        return cls((*levels, 0.0), path)

    @classmethod
    def ays(cls, model: str, steps: int = 10) -> Grid:
        """The levels of Align Your Steps (Sabour et al. 2024), as diffusers tabulates them for 10 steps, resampled to N.

        Args:
            model: "sd15", "sdxl" (sigma/alpha of the vp path) or "svd" (sigma of the edm path).
            steps: N >= 1. Other numbers than 10 are interpolated, see `resampled`; one step starts at the first level.

        Raises:
            ValueError: for an unknown model or N < 1.
        """
        if model not in _AYS:
            raise ValueError(f"no Align Your Steps table for {model!r}; choose one of {', '.join(_AYS)}")
        from diffusers.schedulers import AysSchedules

        key, path = _AYS[model]
        return cls(tuple(AysSchedules[key]), path).resampled(steps)

    @classmethod
    def parse(cls, text: str, path: str = "flow") -> Grid:
        """Reads an explicit list such as "1.0, 0.75, 0.5, 0.0": N + 1 levels, the last where sampling ends.

        Args:
            text: numbers separated by commas or blanks, as ComfyUI writes sigmas; brackets around them are ignored.
            path: name of the path that they belong to.

        Raises:
            ValueError: for something else than numbers, or levels that make no grid.
        """
        words = text.strip().strip("[]()").replace(",", " ").split()
        try:
            levels = tuple(map(float, words))
        except ValueError as error:
            raise ValueError(f"not a list of levels: {text!r:.80}; write them as 1.0,0.75,0.5,0.0") from error
        return cls(levels, path)

    def for_stock(self, scheduler: Any, mu: float | None = None) -> dict[str, Any]:  # noqa: ANN401
        """Returns the list that puts a stock scheduler of diffusers on this grid; see `flowkit.stock_lists.find`."""
        return stock_lists.find(self, scheduler, mu)

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
        if (size := FilePath(path).stat().st_size) > _LARGEST:
            raise ValueError(f"{path} has {size} bytes, far more than a grid; write the grid again with Grid.save")
        try:
            return cls.from_dict(json.loads(FilePath(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); write the grid again with Grid.save") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def limits(path: Path) -> tuple[float, float]:
    """Returns sigma_min and sigma_max for want of others: the model's own last and first levels, .002 and 80 on VE and EDM."""
    if path.name in ("ve", "edm"):
        return 0.002, 80.0
    if path.name == "vp":
        return path.rhos[0], path.rhos[-1] if math.isfinite(path.rhos[-1]) else path.rhos[-2]
    total = path.num_train_timesteps
    if path.name == "flow":
        return cleanest(total) / total, 1.0
    return path.level(path.at_time(cleanest(total))), path.level(path.at_time(total - cleanest(total)))


def named(
    name: str,
    steps: int,
    path: Path,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: float = 1.0,
    mu: float | None = None,
    kind: str = "exponential",
) -> Grid:
    """Builds a grid from one of the names `GRIDS`.

    Args:
        name: "uniform" or "trailing", "leading", "linspace", "straight" (`Grid.spaced`); "karras", "exponential", "beta" with
            their usual parameters; "ays-sd15", "ays-sdxl", "ays-svd" (`Grid.ays`), converted to the path.
        steps: N >= 1.
        path: the path of the model.
        sigma_min: last level before 0 of the `BOUNDED` grids, in the path's convention; None means that of `limits`.
        sigma_max: their first level; None means that of `limits`.
        shift: static shift of the result on the flow path, > 0; 1 means none.
        mu: amount of the dynamic shift, in place of shift; None means none.
        kind: how mu shifts, "exponential" or "linear", see `Grid.with_shift`.

    Raises:
        ValueError: for an unknown name, a number out of range, a start above a vp model's own noise, limits for a
            grid that has none, a shift on another path than flow, or both shifts.
        ImportError: for "beta" without SciPy.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r:.60}; choose one of {', '.join(GRIDS)}")
    if name not in BOUNDED and (sigma_min is not None or sigma_max is not None):
        raise ValueError(
            f"the grid {name!r} has no sigma_min and sigma_max, got {sigma_min} and {sigma_max}; leave them out"
        )
    low, high = limits(path)
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    match name:
        case "karras":
            grid = Grid.karras(steps, low, high, path=path.name)
        case "exponential":
            grid = Grid.exponential(steps, low, high, path.name)
        case "beta":
            grid = Grid.beta(steps, low, high, path=path.name)
        case "ays-sd15" | "ays-sdxl" | "ays-svd":
            grid = Grid.ays(name.removeprefix("ays-"), steps).on(path.name)
        case _:
            grid = Grid.spaced(steps, path, "trailing" if name == "uniform" else name)
    if path.name == "vp" and grid.sigmas[0] > 1.01 * path.rhos[-1]:
        cure = "lower sigma_max" if name in BOUNDED else "name another grid"
        raise ValueError(f"{name} starts at {grid.sigmas[0]:g}, the model knows {path.rhos[-1]:.4g}; {cure}")
    if mu is not None:
        return grid.with_shift(None if shift == 1 else shift, mu=mu, kind=kind)
    return grid if shift == 1 else grid.with_shift(shift)


def _numbers(values: object) -> tuple[float, ...] | None:
    """The numbers of a JSON list, "inf" among them; None for null.

    Raises:
        ValueError: for anything else.
    """
    if values is None:
        return None
    if isinstance(values, list) and all(
        v == "inf" or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values
    ):
        with contextlib.suppress(OverflowError):  # a whole number of more than 308 digits
            return tuple(map(float, values))
    raise ValueError(f"a grid needs lists of numbers, got {values!r:.200}")

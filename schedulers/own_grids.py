"""The grids of schedulers that imitate no stock class, and of those that were given one by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from flowkit.grids import BOUNDED, Grid, named
from flowkit.paths import Path


def count(steps: int | None, given: Sequence[float] | None) -> int:
    """Returns the number of steps: as asked for, or that of a list with or without its terminal 0.

    Raises:
        ValueError: where nothing says it.
    """
    if steps is not None:  # whole numbers of NumPy too; what is none is refused by the grid
        return operator.index(steps) if hasattr(steps, "__index__") and not isinstance(steps, bool) else steps
    if given is None or not len(given):
        raise ValueError(
            "nothing says how many steps to take; pass num_inference_steps, timesteps or sigmas, or set a grid"
        )
    return len(given) - (len(given) > 1 and float(given[-1]) == 0)


def by_name(config: Mapping[str, Any], path: Path, steps: int) -> Grid:
    """Returns the grid that a configuration names, before any shift; None means "uniform", and "karras" on VE and EDM."""
    name = config["grid"] or ("karras" if path.name in ("ve", "edm") else "uniform")
    # EDM configurations always carry the limits of their own schedule.
    bounds = {k: config[k] for k in ("sigma_min", "sigma_max")} if name in BOUNDED or not config["stock"] else {}
    return named(name, steps, path, **bounds)


def lay(
    config: Mapping[str, Any],
    path: Path,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> Grid:
    """Returns the grid of a scheduler that imitates no class; arguments as those of `set_timesteps`.

    Timesteps are model times as they are, sigmas are taken before the shift; a grid by name wins over both.

    Raises:
        ValueError: for arguments that make no falling grid of N steps, or contradict each other.
    """
    given = sigmas if sigmas is not None else timesteps
    if config["grid"] is None and given is not None:
        lists = [] if sigmas is None else [_pushed(config, _closed(sigmas, path), mu)]
        if timesteps is not None:
            lists.append(_closed([path.level(path.at_time(float(t))) for t in timesteps], path))
        if not _same(lists[0], lists[-1]):
            raise ValueError(f"sigmas {_shown(sigmas)} and timesteps {_shown(timesteps)} disagree; pass one of the two")
        levels = lists[-1]
        if steps is not None and len(levels) != steps:
            raise ValueError(f"{steps} steps asked for, but {len(levels)} levels are given; drop num_inference_steps")
        return levels
    return _pushed(config, by_name(config, path, count(steps, given)), mu)


def _pushed(config: Mapping[str, Any], grid: Grid, mu: float | None) -> Grid:
    """The grid after the static or the dynamic shift, and the stretch."""
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise ValueError("use_dynamic_shifting=True needs a number mu, got None; pass mu=...")
        grid = grid.with_shift(mu=mu, kind=config["time_shift_type"])
    elif config["shift"] != 1:
        grid = grid.with_shift(config["shift"])
    return grid.stretched(config["shift_terminal"]) if config["shift_terminal"] else grid


def _closed(values: Sequence[float], path: Path) -> Grid:
    """The grid of a list, with the terminal 0 unless it is there."""
    levels = [float(v) for v in values]
    return Grid((*levels, 0.0) if levels and levels[-1] > 0 else tuple(levels), path.name)


def _shown(values: Sequence[float] | None) -> list[float]:
    return [] if values is None else [float(v) for v in values]


def _same(one: Grid, other: Grid) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-4 for a, b in zip(one.sigmas, other.sigmas, strict=True))

"""What the grids of diffusers' scheduler classes share: checked arguments, and which spacing a configuration asks for."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flowkit.spacing import Array as Array
from flowkit.spacing import beta, exponential, karras

Config = Mapping[str, Any]
# In the order in which the stock classes look at them.
CONVERSIONS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")


class Laid(NamedTuple):
    """A grid: N + 1 levels, N model times, and the N levels where the steps end (levels[1:], but for DDIM's stride)."""

    levels: Array
    times: Array
    ends: Array


def closed(levels: Array, times: Array, end: float) -> Laid:
    """Returns the grid of N levels that ends at one more; an end above the last level by rounding is that level."""
    levels = np.append(levels, levels[-1] if levels[-1] < end <= levels[-1] * (1 + 1e-9) else end)
    return Laid(levels, times, levels[1:])


def conversion(c: Config) -> str | None:
    """Returns the flag that respaces the levels, or None."""
    return next((k for k in CONVERSIONS if c.get(k)), None)


def converted(c: Config, span: Array, n: int, *, limits: bool = True) -> Array:
    """Respaces n levels between the first and the last of ``span`` as the configuration's flag asks.

    Args:
        c: the configuration; sigma_min and sigma_max replace the limits of ``span``.
        span: levels, noisiest first.
        n: number of levels.
        limits: whether a karras grid reads sigma_min and sigma_max too.

    Raises:
        ImportError: for a beta grid without SciPy.
    """
    kind, high, low = conversion(c), span[0], span[-1]
    if kind != "use_lu_lambdas" and (limits or kind != "use_karras_sigmas"):
        low = low if c.get("sigma_min") is None else c["sigma_min"]
        high = high if c.get("sigma_max") is None else c["sigma_max"]
    if kind == "use_karras_sigmas":
        return karras(low, high, n)
    if kind == "use_beta_sigmas":
        return beta(low, high, n)
    return exponential(low, high, n)


def numbers(name: str, values: Iterable[float] | None) -> Array | None:
    """Returns a list of the caller's as an array.

    Raises:
        ValueError: where it is empty, not finite or does not strictly fall.
    """
    if values is None:
        return None
    array = np.asarray([float(v) for v in values], dtype=np.float64)
    if not len(array) or not np.isfinite(array).all() or not (array[1:] < array[:-1]).all():
        raise ValueError(f"{name} must be finite and fall strictly from noise to data, got {short(array)}; sort them")
    return array


def check_range(name: str, values: Array, high: float) -> None:
    """Raises ValueError where falling values leave [0, high]."""
    if values[-1] < 0 or values[0] > high:
        raise ValueError(f"{name} must lie in [0, {high:g}], got {short(values)}; give them in the model's own units")


def count(n: int | None, listed: int | None = None, *, most: int | None = None, least: int = 1) -> int:
    """Returns the number of steps.

    Args:
        n: num_inference_steps, or None where a list says it.
        listed: steps of the list, or None.
        most: largest number allowed, or None.
        least: smallest number allowed.

    Raises:
        ValueError: for a number out of range, in conflict with the list, or none at all.
    """
    if n is None:
        if listed is None:
            raise ValueError("nothing says how many steps to take; pass num_inference_steps, timesteps or sigmas")
        n = listed
    try:
        whole = 0 if isinstance(n, bool) else operator.index(n)
    except TypeError:
        whole = 0
    if whole < least:
        raise ValueError(f"num_inference_steps must be a whole number, {least} or more, got {n!r}; ask for 20 to 50")
    if listed is not None and whole != listed:
        raise ValueError(f"num_inference_steps={n} contradicts the {listed} steps of the list given; leave one out")
    if most is not None and whole > most:
        raise ValueError(f"num_inference_steps={n} exceeds the {most} times the model knows; ask for at most {most}")
    return whole


def short(values: Array) -> str:
    """Returns a list for an error message, on one line."""
    return np.array2string(values, threshold=6, precision=6, max_line_width=1000)

"""Formulas that place noise levels: spacings between two levels, and the transformations of a whole list.

All take and return float64 arrays of levels, noisiest first, without the 0 where sampling usually ends. A level is what a grid
holds: flow time s on the flow path, sigma/alpha on every other.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def karras(low: float, high: float, n: int, rho: float = 7.0) -> Array:
    """Returns n levels from high to low, even in ``sigma^(1/rho)`` (Karras et al. 2022, equation 5)."""
    low, high = low ** (1 / rho), high ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, n) * (low - high)) ** rho)


def exponential(low: float, high: float, n: int) -> Array:
    """Returns n levels from high to low, even in ``log sigma``."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta(low: float, high: float, n: int, a: float = 0.6, b: float = 0.6) -> Array:
    """Returns n levels from high to low at even quantiles of a beta distribution over [low, high].

    ``low + F^-1(1 - i/(n-1)) (high - low)``, F the distribution function of Beta(a, b). Lee et al. 2024 place the model times of
    their beta sampling so; the levels are what diffusers (`_convert_to_beta`) places.

    Raises:
        ImportError: without SciPy.
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ImportError("a beta grid needs SciPy; install it with: pip install scipy") from error
    return np.asarray(low + distribution.ppf(1 - np.linspace(0, 1, n), a, b) * (high - low))


def shift(s: Array, k: float) -> Array:
    """Returns flow times pushed towards noise, ``k s / (1 + (k - 1) s)`` (Esser et al. 2024, equation 23).

    In sigma/alpha this is multiplication by k, so ``shift(shift(s, k), 1 / k)`` is s. Pure noise, 1, stays what it is to the last
    bit, and nothing is rounded above it.
    """
    return np.where(s == 1, 1.0, np.minimum(k * s / (1 + (k - 1) * s), 1.0))


def stretch(s: Array, terminal: float) -> Array:
    """Returns flow times with their distance from noise scaled so that the last is ``terminal``.

    ``1 - (1 - s_i) (1 - terminal) / (1 - s_last)``: `shift_terminal` of diffusers, from LTX-Video. The last must be below 1.
    """
    return np.asarray(1 - (1 - s) / ((1 - s[-1]) / (1 - terminal)))


def resample(levels: Array, n: int) -> Array:
    """Returns n levels with the same ends, linear in the log of the level over the step number (Sabour et al. 2024)."""
    at = np.linspace(0, len(levels) - 1, n)
    found = np.exp(np.interp(at, np.arange(len(levels)), np.log(levels)))
    return np.where(at % 1 == 0, levels[at.astype(int)], found)  # what stays is exact


def cleanest(total: int) -> float:
    """Returns the least time of a continuous clock worth a call: 1, as in diffusers, or a thousandth where the clock runs to 1."""
    return 1.0 if total > 1 else 1e-3


def model_times(spacing: str, n: int, total: int, *, whole: bool) -> Array:
    """Returns n falling model times (Lin et al. 2024, table 2).

    A discrete model knows the times 0 ... total - 1; a continuous clock runs up to total, pure noise, and takes the same times
    plus 1 (`cleanest`), unrounded, so that no call falls on time 0, where there is nothing left to do.

    Args:
        spacing: "trailing" places the ends of the intervals, noise first: its first time is the noisiest; "leading" the
            beginnings: its last time is the cleanest; "linspace" holds both, and one time alone is the noisiest.
        n: number of times, >= 1.
        total: number of discrete times, or the time of pure noise.
        whole: whether the model is discrete.

    Raises:
        ValueError: for an unknown spacing.
    """
    first = 1.0 if whole else cleanest(total)
    match spacing:
        case "trailing":
            # The additions of np.arange decide which way halves are rounded.
            found = np.arange(total, 0, -total / n)[:n] if whole else total * (1 - np.arange(n) / n)
        case "leading":
            found = np.arange(n - 1.0, -1.0, -1.0) * (total // n if whole else (total - first) / n) + first
        case "linspace":
            found = np.linspace(first, total, n)[::-1] if n > 1 else np.array([float(total)])
            found = np.round(found - 1) + 1 if whole else found  # from 0, so that halves are rounded as in stock
        case _:
            raise ValueError(f"unknown spacing {spacing!r}; choose trailing, leading or linspace")
    return np.round(found) - 1 if whole else found

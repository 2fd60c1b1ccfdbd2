"""A figure with its standard error; jackknife, paired differences, repeated runs, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """What a metric says.

    Attributes:
        value: the estimate.
        se: its standard error: the noise of drawing the samples, the reference taken as it is. NaN where it is not known.
        details: how it came about, values for JSON.
    """

    value: float
    se: float = math.nan
    details: Mapping[str, Any] = field(default_factory=dict)


def jackknife_error(distances: Iterable[float]) -> float:
    """Returns the standard error from delete-one values, ``sqrt((K-1)/K sum (d_k - mean d)^2)`` (Efron & Stein 1981).

    It is cautious: on average not below the true one (their inequality), and above it where terms of second order matter,
    that is where the distance is small (up to 1.9 times on the embedded digits).

    Args:
        distances: the distance with each chunk left out in turn, d_1 ... d_K.

    Returns:
        The standard error of the sampling noise; the bias of a finite N is not in it. NaN for fewer than two values.
    """
    values = list(distances)
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in values))


def jackknife(value: float, left_out: Iterable[float]) -> Figure:
    """Returns a figure with its jackknife error.

    Args:
        value: from all samples.
        left_out: the same figure with each of K chunks of nearly equal size left out in turn.

    Returns:
        The figure; its details hold "left_out", which `paired` needs, and "corrected": ``K value - (K - 1) mean(left_out)``,
        without the bias of order 1/N (Quenouille 1956), which has a larger spread and no sign.

    Raises:
        ValueError: for fewer than two chunks.
    """
    values = list(left_out)
    count = len(values)
    if count < 2:
        raise ValueError(f"a jackknife needs at least 2 chunks, got {count}; cut the samples into more")
    corrected = count * value - (count - 1) * math.fsum(values) / count
    return Figure(value, jackknife_error(values), {"corrected": corrected, "left_out": values})


def paired(one: Figure, other: Figure, level: float = 0.95) -> Figure:
    """Returns the difference ``one - other`` of two figures whose samples were drawn with the same seeds, chunk by chunk.

    Chunk k of both holds the same noise, so leaving it out moves both figures alike, and the jackknife of the difference
    counts only what does not cancel: the standard error that decides which of two models is better.

    Args:
        one: with "left_out" in its details, see `jackknife`.
        other: the same with as many chunks, of the same seeds against the same reference; that is the caller's to know.
        level: of the interval, between 0 and 1.

    Returns:
        The difference; its details hold "interval" at that "level", "left_out", and "corrected", the difference of the figures
        without their biases, which do not cancel between models.

    Raises:
        ValueError: for figures without delete-one values, or with unequal numbers of them.
    """
    values = [figure.details.get("left_out") for figure in (one, other)]
    if values[0] is None or values[1] is None or len(values[0]) != len(values[1]):
        sizes = ["no" if v is None else len(v) for v in values]
        raise ValueError(
            f"got {sizes[0]} and {sizes[1]} delete-one values; give two figures of `jackknife` with equal chunks"
        )
    figure = jackknife(one.value - other.value, [a - b for a, b in zip(*values, strict=True)])
    bounds = interval(figure.value, figure.se, len(values[0]) - 1, level)
    return Figure(figure.value, figure.se, {**figure.details, "interval": bounds, "level": level})


def repeated(values: Sequence[float], level: float = 0.95) -> Figure:
    """Returns the mean of a figure over runs with disjoint blocks of seeds: three of 50,000 in EDM's protocol.

    EDM reports the smallest, which falls with the number of runs; here it is a detail.

    Args:
        values: at least two.
        level: of the interval, between 0 and 1.

    Returns:
        The mean with its standard error; its details hold "values", "spread" (their standard deviation), "smallest", "interval"
        and "level".

    Raises:
        ValueError: for fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"a spread needs at least 2 runs, got {count}; draw another block of seeds")
    mean = math.fsum(values) / count
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    se = spread / math.sqrt(count)
    details = {"values": list(values), "spread": spread, "smallest": min(values)}
    return Figure(mean, se, {**details, "interval": interval(mean, se, count - 1, level), "level": level})


def interval(value: float, se: float, degrees: int, level: float = 0.95) -> tuple[float, float]:
    """Returns the interval ``value -+ t se`` with Student's t.

    Args:
        value: the estimate.
        se: its standard error.
        degrees: of freedom of the error: chunks or runs less one.
        level: that the interval covers the truth, between 0 and 1.
    """
    half = student_t(degrees, level) * se
    return value - half, value + half


def student_t(degrees: int, level: float) -> float:
    """Returns t with ``P(|T| <= t) = level`` for Student's T with so many degrees of freedom.

    Raises:
        ValueError: for fewer than one degree of freedom, or a level that is not between 0 and 1.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(
            f"got degrees={degrees} and level={level}; at least 1 degree and a level between 0 and 1 are needed"
        )
    low, high = 0.0, 1.0
    while _inside(high, degrees) < level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _inside(middle, degrees) < level else (low, middle)
    return middle


def _inside(t: float, degrees: int) -> float:
    """``P(|T| <= t)``, a finite sum (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

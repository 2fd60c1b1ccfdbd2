"""The geometry of one scatter plot: a metric against network evaluations, with error bars and the frontier.

Everything is in SVG units, y downwards; the report's template only draws what is computed here. Both axes are logarithmic, since
evaluations double and Fréchet distances fall by factors; the metric's is linear when a value is zero or less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 44, 390, 12, 248
BADGE = 9.0  # radius of a numbered point
DOT = 4.0  # radius where there are too many points to number
MOST_BADGES = 24


@dataclass(frozen=True)
class Measured:
    """One row of the table as the plot sees it.

    Attributes:
        number: the row's number in the table.
        name: the row's name.
        evaluations: network evaluations an image.
        value: the metric.
        se: its standard error; None if unknown.
    """

    number: int
    name: str
    evaluations: float
    value: float
    se: float | None


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """A row drawn: its centre, the ends of its error bar (None without one), and whether it is on the frontier."""

    row: Measured
    x: float
    y: float
    bar: tuple[float, float] | None
    best: bool


@dataclass(frozen=True)
class Chart:
    """One plot, ready to draw; `frontier` is SVG path data, `logarithmic` the metric's axis."""

    points: Sequence[Point]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    frontier: str
    radius: float
    numbered: bool
    logarithmic: bool


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool) -> _Axis:
        values = list(values)
        low, high = (math.log(min(values)), math.log(max(values))) if log else (min(values), max(values))
        room = 0.08 * (high - low) or 0.5 * (1.0 if log else abs(high) or 1.0)
        return cls(low - room, high + room, start, end, log)

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log(value) if value > 0 else self.low
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def round_values(self) -> list[float]:
        """Returns between three and about eight round values inside the axis."""
        low, high = (math.exp(self.low), math.exp(self.high)) if self.log else (self.low, self.high)
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                inside = [v for d in decades for m in mantissas if low <= (v := m * 10.0**d) <= high]
                if len(inside) >= 4:
                    return inside
        step = 10.0 ** math.floor(math.log10((high - low) / 3))
        step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 3), 1)
        return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(rows: Sequence[Measured], lower_is_better: bool) -> Chart:
    """Lays out one plot.

    A row is on the frontier when no other row is at least as good with at most as many evaluations, and better in one of the two.

    Args:
        rows: at least one; evaluations above zero, values finite.
        lower_is_better: the metric's direction.

    Returns:
        The plot, inside (0, 0) to (WIDTH, HEIGHT).

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("a chart of no rows: give at least one row that has the metric")
    x_axis = _Axis.over((r.evaluations for r in rows), LEFT, RIGHT, log=True)
    log = all(r.value > 0 for r in rows)
    # On a logarithmic axis an error bar may reach down to zero: it is cut at a third of the value.
    lows = [max(r.value - (r.se or 0.0), r.value / 3 if log else -math.inf) for r in rows]
    y_axis = _Axis.over([*lows, *(r.value + (r.se or 0.0) for r in rows)], BOTTOM, TOP, log)
    numbered = len(rows) <= MOST_BADGES
    points: list[Point] = []
    for row in sorted(rows, key=lambda r: (r.evaluations, r.number)):
        x, y = x_axis(row.evaluations), y_axis(row.value)
        if numbered:
            x = _beside(x, y, points)
        bar = (y_axis(row.value - row.se), y_axis(row.value + row.se)) if row.se else None
        points.append(Point(row, x, y, bar, not any(_beats(other, row, lower_is_better) for other in rows)))
    return Chart(
        points,
        _apart([Tick(x_axis(v), f"{v:g}") for v in sorted({r.evaluations for r in rows})], 24.0),
        [Tick(y_axis(v), _label(v)) for v in y_axis.round_values()],
        _staircase([p for p in points if p.best]),
        BADGE if numbered else DOT,
        numbered,
        log,
    )


def _label(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _beats(a: Measured, b: Measured, lower_is_better: bool) -> bool:
    better, equal = (a.value < b.value) == lower_is_better and a.value != b.value, a.value == b.value
    return a.evaluations <= b.evaluations and (better or (equal and a.evaluations < b.evaluations))


def _beside(x: float, y: float, placed: Sequence[Point]) -> float:
    """The nearest free place on the same height."""
    gap = 2 * BADGE + 1
    for shift in (0, 1, -1, 2, -2, 3, -3):
        at = x + shift * gap
        if LEFT + BADGE <= at <= RIGHT - BADGE and all(math.hypot(at - p.x, y - p.y) >= gap for p in placed):
            return round(at, 2)
    return x


def _apart(ticks: Sequence[Tick], gap: float) -> list[Tick]:
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or tick.at - kept[-1].at >= gap:
            kept.append(tick)
    return kept


def _staircase(best: Sequence[Point]) -> str:
    """The best value to be had with at most so many evaluations, as path data that runs on to the right edge."""
    steps = "".join(f"H{p.x:g}V{p.y:g}" for p in best[1:])
    return f"M{best[0].x:g} {best[0].y:g}{steps}H{RIGHT}"

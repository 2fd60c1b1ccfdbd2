"""The geometry of one scatter plot: a metric against a cost, such as network evaluations, with error bars and the frontier.

Everything is in SVG units, y downwards; the report's template only draws what is computed here. Both axes are logarithmic, since
evaluations double and Fréchet distances fall by factors; an axis is linear when a value on it is zero or less.
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
MOST_TICKS = 20  # of whole costs, which are then marked each


@dataclass(frozen=True)
class Measured:
    """One row of the table as the plot sees it.

    Attributes:
        number: the row's number in the table.
        name: the row's name.
        cost: network evaluations an image, or whatever lies along.
        value: the metric.
        se: its standard error; None if unknown.
    """

    number: int
    name: str
    cost: float
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
    """One plot, ready to draw; `frontier` is SVG path data, `linear` names the axes that are not logarithmic."""

    points: Sequence[Point]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    frontier: str
    radius: float
    numbered: bool
    linear: str


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


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Returns whether one is at least as low as the other in every part, and lower in some: Pareto's order."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def chart(rows: Sequence[Measured], lower_is_better: bool, lower_cost_is_better: bool = True) -> Chart:
    """Lays out one plot.

    A row is on the frontier when no other row dominates it: is at least as good at no more cost, and better in one of the two.

    Args:
        rows: at least one; costs and values finite.
        lower_is_better: the metric's direction.
        lower_cost_is_better: the direction of what lies along, which may be a second metric.

    Returns:
        The plot, inside (0, 0) to (WIDTH, HEIGHT).

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("a chart of no rows: give at least one row that has the metric")
    along = all(r.cost > 0 for r in rows)
    x_axis = _Axis.over((r.cost for r in rows), LEFT, RIGHT, along)
    log = all(r.value > 0 for r in rows)
    # On a logarithmic axis an error bar may reach down to zero: it is cut at a third of the value.
    lows = [max(r.value - (r.se or 0.0), r.value / 3 if log else -math.inf) for r in rows]
    y_axis = _Axis.over([*lows, *(r.value + (r.se or 0.0) for r in rows)], BOTTOM, TOP, log)
    numbered = len(rows) <= MOST_BADGES
    signs = (1 if lower_cost_is_better else -1), (1 if lower_is_better else -1)
    wanted = {r.number: (signs[0] * r.cost, signs[1] * r.value) for r in rows}
    points: list[Point] = []
    for row in sorted(rows, key=lambda r: (r.cost, r.number)):
        x, y = x_axis(row.cost), y_axis(row.value)
        if numbered:
            x = _beside(x, y, points)
        bar = (y_axis(row.value - row.se), y_axis(row.value + row.se)) if row.se else None
        best = not any(dominates(other, wanted[row.number]) for other in wanted.values())
        points.append(Point(row, x, y, bar, best))
    costs = sorted({r.cost for r in rows})
    marked = costs if len(costs) <= MOST_TICKS and all(cost == round(cost) for cost in costs) else x_axis.round_values()
    linear = " and ".join(name for name, at in (("horizontal", along), ("vertical", log)) if not at)
    return Chart(
        points,
        _apart([Tick(x_axis(v), _label(v)) for v in marked], 24.0),
        [Tick(y_axis(v), _label(v)) for v in y_axis.round_values()],
        _staircase([p for p in points if p.best], lower_cost_is_better),
        BADGE if numbered else DOT,
        numbered,
        linear,
    )


def _label(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


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


def _staircase(best: Sequence[Point], lower_cost_is_better: bool) -> str:
    """The best value to be had at each cost or a worse one, as path data that runs on to the edge."""
    path = best if lower_cost_is_better else best[::-1]
    steps = "".join(f"H{p.x:g}V{p.y:g}" for p in path[1:])
    return f"M{path[0].x:g} {path[0].y:g}{steps}H{RIGHT if lower_cost_is_better else LEFT}"

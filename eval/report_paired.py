"""Intervals of a report's figures, and their paired differences to the row that its reader compares with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowkit.eval.intervals import Figure, interval, paired, student_t
from flowkit.eval.report_rows import Results, Row

MINUS = "\N{MINUS SIGN}"
MOST_PLACES = 8


@dataclass(frozen=True)
class Difference:
    """A row's metric less the baseline's: the figures, and how they are shown; `mark` is "better", "worse" or empty."""

    value: float
    low: float
    high: float
    text: str
    interval: str
    mark: str


def compared(results: Results) -> list[str]:
    """Returns the metrics of which some rows have paired delete-one values, so that differences can be shown."""
    found = []
    for key in results.metrics if results.baseline is not None else ():
        groups = [
            (row.pairs, len(m.left_out)) for row in results.rows if row.pairs and (m := row.measured(key)).left_out
        ]
        if len(set(groups)) < len(groups):
            found.append(key)
    return found


def candidates(results: Results) -> set[int]:
    """Returns the rows that can be compared with: those with their own pairs and delete-one values."""
    keys = compared(results)
    return {i for i, row in enumerate(results.rows) if row.pairs and any(row.measured(key).left_out for key in keys)}


def bounds(row: Row, key: str) -> tuple[float, float] | None:
    """Returns a metric's 95 % interval by Student's t, where the row has delete-one values."""
    figure = row.measured(key)
    if figure.value is None or figure.se is None or not figure.left_out:
        return None
    return interval(figure.value, figure.se, len(figure.left_out) - 1)


def difference(rows: Sequence[Row], one: int, other: int, key: str, lower: bool) -> Difference | None:
    """Returns a metric of one row less that of another, chunk by chunk; None where they are not paired."""
    a, b = rows[one].measured(key), rows[other].measured(key)
    alike = rows[one].pairs and rows[one].pairs == rows[other].pairs and len(a.left_out) == len(b.left_out)
    if not alike or a.value is None or b.value is None or not a.left_out:
        return None
    found = paired(Figure(a.value, details={"left_out": a.left_out}), Figure(b.value, details={"left_out": b.left_out}))
    low, high = found.details["interval"]
    # Not finer than a tenth of what the figure itself is shown with: below lies rounding of the network.
    digits = min(places(found.se), places(a.se or 0.0) + 1)
    shown = [signed(v, digits) for v in (found.value, low, high)]
    sign = {"+": 1, MINUS: -1}
    sides = [sign.get(text[0], 0) for text in shown[1:]]
    mark = "" if sides[0] != sides[1] or not sides[0] else "better" if (sides[0] < 0) == lower else "worse"
    return Difference(found.value, low, high, shown[0], f"({shown[1]}, {shown[2]})", mark)


def places(se: float) -> int:
    """Returns the decimal places that show two digits of an error."""
    return min(MOST_PLACES, max(0, 1 - math.floor(math.log10(se)))) if se > 0 else MOST_PLACES


def signed(value: float, digits: int) -> str:
    """Returns a difference with its sign; the script of the page shows it alike."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else ("+" if value > 0 else MINUS) + text


def students(rows: Sequence[Row]) -> dict[int, float]:
    """Returns Student's t at 95 % for each number of delete-one values that occurs."""
    counts = {len(m.left_out) for row in rows for m in row.metrics.values() if m.left_out}
    return {count: student_t(count - 1, 0.95) for count in sorted(counts)}

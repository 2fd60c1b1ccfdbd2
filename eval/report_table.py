"""The columns of a report's table: settings that vary, evaluations, metrics with their differences, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowkit.eval.report_paired import MINUS, MOST_PLACES, bounds, compared, difference
from flowkit.eval.report_rows import Objective, Results, Row, Scalar

# "fid" is the Fréchet distance in whatever extractor was used, hence FD; a part after the slash names another space.
LABELS = {"fid": "FD", "kid": "KID", "cmmd": "CMMD", "is": "Inception score", "clip": "CLIP score"}
MISSING = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Cell:
    """A value of the table: as read, as sorted (None when missing), and whether it is the best of its column."""

    text: str
    key: float | None
    error: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A sortable column; `better` is "lower", "higher", or empty for what is no metric; a difference's `key` is its metric's."""

    key: str
    label: str
    kind: str  # "setting", "evaluations", "metric", "difference" or "seconds"
    cells: Sequence[Cell]
    better: str = ""
    numbers: bool = True


def columns(results: Results) -> list[Column]:
    """Returns the columns of the table: settings that vary, evaluations, metrics, their differences to the baseline, time."""
    rows = results.rows
    found = [_setting(key, rows) for key in varying(rows)]
    found.append(Column("evaluations", "Evaluations", "evaluations", [_plain(row.evaluations) for row in rows]))
    for key, objective in results.metrics.items():
        found.append(_metric(key, objective, rows))
        if key in compared(results):
            cells = [_difference_cell(results, i, key) for i in range(len(rows))]
            found.append(Column(key, f"{label(key)} difference", "difference", cells))
    found.append(Column("seconds", "Time", "seconds", [duration(row.seconds) for row in rows]))
    return [c for c in found if c.kind == "difference" or any(cell.key is not None for cell in c.cells)]


def label(key: str) -> str:
    """Returns a metric's name for readers."""
    base, _, space = key.partition("/")
    return LABELS.get(base, base[:1].upper() + base[1:]) + (f" ({space})" if space else "")


def setting_label(key: str) -> str:
    """Returns a setting's name for readers."""
    return key[:1].upper() + key[1:].replace("_", " ")


def scalar(value: Scalar) -> str:
    """Returns a setting as text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def varying(rows: Sequence[Row]) -> list[str]:
    """Returns the settings that are not the same in all rows; one that a row lacks counts as another value."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    return [key for key in keys if len({scalar(row.settings.get(key)) for row in rows}) > 1]


def constant(rows: Sequence[Row]) -> dict[str, str]:
    """Returns the settings that are the same in all rows, as text."""
    rest = set(varying(rows))
    return {key: scalar(value) for key, value in rows[0].settings.items() if key not in rest and value is not None}


def _setting(key: str, rows: Sequence[Row]) -> Column:
    """Numbers sort by value, before texts by alphabet; what a row lacks is missing."""
    values = [row.settings.get(key) for row in rows]
    by_text = {scalar(value): value for value in values}
    ranks = {text: i for i, text in enumerate(sorted(by_text, key=lambda text: _order(by_text[text])))}
    cells = [Cell(scalar(value), None if value is None else ranks[scalar(value)]) for value in values]
    numbers = not any(isinstance(value, str | bool) for value in values)
    return Column(key, setting_label(key), "setting", cells, numbers=numbers)


def _order(value: Scalar) -> tuple[bool, float, str]:
    text = isinstance(value, str)
    return text, 0.0 if text or value is None else float(value), str(value)


def _metric(key: str, objective: Objective, rows: Sequence[Row]) -> Column:
    found = [row.measured(key) for row in rows]
    values = [m.value for m in found if m.value is not None]
    best = (min(values) if objective.lower else max(values)) if len(values) > 1 else None
    cells = []
    for row, m in zip(rows, found, strict=True):
        text, error, digits = _shown(m.value, m.se)
        ends = bounds(row, key)
        around = f"({ends[0]:,.{digits}f}, {ends[1]:,.{digits}f})".replace("-", MINUS) if ends else ""
        cells.append(Cell(text, m.value, error, around, best=m.value is not None and m.value == best))
    return Column(key, label(key), "metric", cells, objective.better)


def _difference_cell(results: Results, number: int, key: str) -> Cell:
    if number == results.baseline:
        return Cell("baseline", 0.0 if results.rows[number].value(key) is not None else None)
    found = difference(results.rows, number, results.baseline or 0, key, results.metrics[key].lower)
    return Cell(found.text, found.value, found.mark, found.interval) if found else Cell(MISSING, None)


def _shown(value: float | None, se: float | None) -> tuple[str, str, int]:
    """A value with the digits that its error supports: two of the error, or four of the value without one."""
    if value is None:
        return MISSING, "", 0
    scale, digits = (se, 2) if se else (abs(value), 4)
    count = max(0, digits - 1 - math.floor(math.log10(scale))) if scale else 0
    if count <= MOST_PLACES:
        return f"{value:,.{count}f}".replace("-", MINUS), f"{se:.{count}f}" if se else "", count
    return f"{value:.3g}".replace("-", MINUS), f"{se:.1e}" if se else "", MOST_PLACES


def _plain(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,g}", value)


def duration(seconds: float | None) -> Cell:
    """Returns a time as readers read it; a number stays with its unit."""
    if seconds is None:
        return Cell(MISSING, None)
    if seconds < 100:
        return Cell(f"{seconds:.1f}{NBSP}s" if seconds >= 1 else f"{seconds:.2g}{NBSP}s", seconds)
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return Cell(f"{minutes}{NBSP}min {rest:02}{NBSP}s", seconds)
    return Cell(f"{minutes // 60}{NBSP}h {minutes % 60:02}{NBSP}min", seconds)

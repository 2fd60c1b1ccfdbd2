"""What a report says about its rows: columns, intervals, paired differences, the front, and the row to take for each budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowkit.eval import chart
from flowkit.eval.intervals import Figure, interval, jackknife_error, paired, student_t
from flowkit.eval.report_rows import Measurement, Objective, Results, Row, Scalar

# "fid" is the Fréchet distance in whatever extractor was used, hence FD; a part after the slash names another space.
LABELS = {"fid": "FD", "kid": "KID", "cmmd": "CMMD", "is": "Inception score", "clip": "CLIP score"}
AXES = {"evaluations": ("network evaluations per image", "evaluations"), "seconds": ("seconds of sampling", "seconds")}
MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
MOST_PLACES = 8


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


@dataclass(frozen=True)
class Difference:
    """A row's metric less the baseline's: the figures, and how they are shown; `mark` is "better", "worse" or empty."""

    value: float
    low: float
    high: float
    text: str
    interval: str
    mark: str


@dataclass(frozen=True)
class Choice:
    """The row to take up to a budget, and the rows within it that are as good within the error; `gains` if none is cheaper."""

    number: int
    budget: str
    rivals: Sequence[int]
    gains: bool = True


@dataclass(frozen=True)
class Plot:
    """A chart with the words around it."""

    key: str
    label: str
    note: str
    along: str
    unit: str
    chart: chart.Chart


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
    found.append(Column("seconds", "Time", "seconds", [_duration(row.seconds) for row in rows]))
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


def compared(results: Results) -> list[str]:
    """Returns the metrics of which some rows have paired delete-one values, so that differences can be shown."""
    found = []
    for key in results.metrics if results.baseline is not None else ():
        groups = [
            (row.pairs, len(m.left_out)) for row in results.rows if row.pairs and (m := measured(row, key)).left_out
        ]
        if len(set(groups)) < len(groups):
            found.append(key)
    return found


def candidates(results: Results) -> set[int]:
    """Returns the rows that can be compared with: those with their own pairs and delete-one values."""
    keys = compared(results)
    return {i for i, row in enumerate(results.rows) if row.pairs and any(measured(row, key).left_out for key in keys)}


def measured(row: Row, key: str) -> Measurement:
    """Returns a metric of a row, with its error; all unknown where the row has no value."""
    found = row.metrics.get(key, Measurement())
    if found.value is None:
        return Measurement()
    se = jackknife_error(found.left_out) if found.se is None and found.left_out else found.se
    return Measurement(found.value, se, found.left_out)


def bounds(row: Row, key: str) -> tuple[float, float] | None:
    """Returns a metric's 95 % interval by Student's t, where the row has delete-one values."""
    figure = measured(row, key)
    if figure.value is None or figure.se is None or not figure.left_out:
        return None
    return interval(figure.value, figure.se, len(figure.left_out) - 1)


def difference(rows: Sequence[Row], one: int, other: int, key: str, lower: bool) -> Difference | None:
    """Returns a metric of one row less that of another, chunk by chunk; None where they are not paired."""
    a, b = measured(rows[one], key), measured(rows[other], key)
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


def front(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[int]:
    """Returns the rows that no other row dominates in all objectives, of those that have a value in each."""
    wanted = {}
    for i, row in enumerate(rows):
        values = [(objective, row.value(objective.key)) for objective in objectives]
        known = [(1 if o.lower else -1) * value for o, value in values if value is not None]
        if objectives and len(known) == len(values):
            wanted[i] = known
    return [i for i, one in wanted.items() if not any(chart.dominates(other, one) for other in wanted.values())]


def choices(results: Results) -> list[Choice]:
    """Returns the row to take for each budget of evaluations (else of seconds): the front over that and the first metric.

    Where neither is an objective, the front is returned from the best of the first objective on.
    """
    rows = results.rows
    wanted = next((o for o in results.objectives if o.key in results.metrics), None)
    if wanted is None:
        return []
    keys = {o.key for o in results.objectives}
    cost = next((key for key in ("evaluations", "seconds") if key in keys), "")
    if not cost:
        best = front(rows, results.objectives)
        best.sort(key=lambda i: (rows[i].value(wanted.key) or 0.0) * (1 if wanted.lower else -1))
        return [Choice(i, "", ()) for i in best]
    found: dict[float, Choice] = {}
    for i in sorted(front(rows, [Objective(cost, True), wanted]), key=lambda i: rows[i].value(cost) or 0.0):
        budget = rows[i].value(cost) or 0.0
        affordable = [
            j for j, row in enumerate(rows) if j != i and (spent := row.value(cost)) is not None and spent <= budget
        ]
        gaps = [(j, difference(rows, j, i, wanted.key, wanted.lower)) for j in affordable]
        rivals = sorted((abs(gap.value), j) for j, gap in gaps if gap and not gap.mark)
        text = (
            f"{budget:,g} evaluation{'s' if budget != 1 else ''}" if cost == "evaluations" else _duration(budget).text
        )
        gains = all(rows[j].value(cost) == budget for _, j in rivals)
        found.setdefault(budget, Choice(i, text, [j for _, j in rivals], gains))
    return list(found.values())


def plots(results: Results) -> list[Plot]:
    """Returns a chart of each metric against evaluations, and of the first against the other objectives."""
    rows, metrics = results.rows, results.metrics
    wanted = [o for o in results.objectives if o.key in metrics][:1]
    others = [o for o in results.objectives if o not in wanted and o.key != "evaluations"]
    pairs = [(m, Objective("evaluations", True)) for m in metrics.values()] + [(w, o) for w in wanted for o in others]
    found = []
    for metric, cost in pairs:
        points = [
            chart.Measured(number, row.name, along, m.value, m.se)
            for number, row in enumerate(rows, 1)
            if (m := measured(row, metric.key)).value is not None
            and (along := row.value(cost.key)) is not None
            and (along > 0 or cost.key in metrics)
        ]
        if len(points) < 2:
            continue
        drawn = chart.chart(points, metric.lower, cost.lower)
        named, unit = AXES.get(cost.key) or (f"{label(cost.key)}, {_better(cost)} is better", label(cost.key))
        note = f"{_better(metric)} is better" + (f"; {drawn.linear} scale linear" if drawn.linear else "")
        found.append(Plot(metric.key, label(metric.key), note, named, unit, drawn))
    return found


def _better(objective: Objective) -> str:
    return "lower" if objective.lower else "higher"


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
    found = [measured(row, key) for row in rows]
    values = [m.value for m in found if m.value is not None]
    best = (min(values) if objective.lower else max(values)) if len(values) > 1 else None
    cells = []
    for row, m in zip(rows, found, strict=True):
        text, error, digits = _shown(m.value, m.se)
        ends = bounds(row, key)
        around = f"({ends[0]:.{digits}f}, {ends[1]:.{digits}f})".replace("-", MINUS) if ends else ""
        cells.append(Cell(text, m.value, error, around, best=m.value is not None and m.value == best))
    return Column(key, label(key), "metric", cells, _better(objective))


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
    if not scale or scale > 1e-4:
        return f"{value:,.{count}f}".replace("-", MINUS), f"{se:.{count}f}" if se else "", count
    return f"{value:.3g}".replace("-", MINUS), f"{se:.1e}" if se else "", min(count, MOST_PLACES)


def _plain(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,g}", value)


def _duration(seconds: float | None) -> Cell:
    if seconds is None:
        return Cell(MISSING, None)
    if seconds < 100:
        return Cell(f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s", seconds)
    minutes, rest = divmod(round(seconds), 60)
    return Cell(f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s", seconds)


def outline_parts(specs: Sequence[Mapping[str, object]]) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Splits provenances into what is the same in all of them and, of each, the rest."""
    if len(specs) < 2:
        return {}, [dict(spec) for spec in specs]
    shared: dict[str, object] = {}
    rest: list[dict[str, object]] = [{} for _ in specs]
    for key in dict.fromkeys(key for spec in specs for key in spec):
        values = [spec.get(key) for spec in specs]
        if all(value == values[0] for value in values) and all(key in spec for spec in specs):
            shared[key] = values[0]
            continue
        if all(isinstance(value, dict) for value in values):
            inner, values = outline_parts([value for value in values if isinstance(value, dict)])  # type: ignore[assignment]
            if inner:
                shared[key] = inner
        for own, value, spec in zip(rest, values, specs, strict=True):
            if key in spec and value != {}:
                own[key] = value
    return shared, rest

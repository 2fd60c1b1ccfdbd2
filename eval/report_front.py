"""What to use: the rows that no other row beats, the one to take for each budget, and their plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowkit.eval import chart
from flowkit.eval.report_paired import difference
from flowkit.eval.report_rows import Objective, Results, Row
from flowkit.eval.report_table import duration, label

AXES = {"evaluations": ("network evaluations per image", "evaluations"), "seconds": ("seconds of sampling", "seconds")}


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
        within = [j for j, row in enumerate(rows) if (spent := row.value(cost)) is not None and spent <= budget]
        gaps = [(j, difference(rows, j, i, wanted.key, wanted.lower)) for j in within if j != i]
        rivals = [j for _, j in sorted((abs(gap.value), j) for j, gap in gaps if gap and not gap.mark)]
        gains = all(rows[j].value(cost) == budget for j in rivals)
        counted = f"{budget:,g} evaluation{'s' if budget != 1 else ''}"
        words = counted if cost == "evaluations" else duration(budget).text
        found.setdefault(budget, Choice(i, words, rivals, gains))
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
            if (m := row.measured(metric.key)).value is not None
            and (along := row.value(cost.key)) is not None
            and (along > 0 or cost.key in metrics)
        ]
        if len(points) < 2:
            continue
        drawn = chart.chart(points, metric.lower, cost.lower)
        named, unit = AXES.get(cost.key) or (f"{label(cost.key)}, {cost.better} is better", label(cost.key))
        note = f"{metric.better} is better" + (f"; {drawn.linear} scale linear" if drawn.linear else "")
        found.append(Plot(metric.key, label(metric.key), note, named, unit, drawn))
    return found

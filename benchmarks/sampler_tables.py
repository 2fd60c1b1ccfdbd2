"""Markdown tables and the picture of `benchmarks/samplers.json`; `benchmarks/samplers.py` is the command line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowkit.solvers import SOLVERS

Rows = dict[str, dict[str, Any]]

MIXTURES = {"smooth": "five wide Gaussians in 4-D", "clusters": "eight narrow ones in 2-D"}
MODELS = ("digits", "shapes")
FIGURES = {"rmse": "RMSE to the probability-flow ODE", "w2": "Sliced Wasserstein-2 distance to the data"}
# Told apart by colour, by marker, and by the legend's order; readable with the usual colour blindness (Okabe & Ito 2008).
DRAWN = {
    "euler": ("#000000", "o"),
    "heun": ("#e69f00", "s"),
    "midpoint": ("#cc79a7", "D"),
    "ab2": ("#56b4e9", "v"),
    "dpm++2m": ("#009e73", "^"),
    "unipc": ("#d55e00", "P"),
}


def tables(results: dict[str, Any], same: dict[str, tuple[str, ...]]) -> str:
    """All tables of docs/samplers.md.

    Args:
        results: of `benchmarks/samplers.py`.
        same: other names of solvers that were measured once.
    """
    rows, settings = results["rows"], results["settings"]
    names = list(dict.fromkeys(key.split("/")[-2] for key in rows if key.count("/") > 1))
    labels = {name: ", ".join((name, *same.get(name, ()))) for name in names}
    parts = [facts(), models(rows, settings, labels)]
    parts += [mixtures(kind, figure, rows, settings, labels) for figure in FIGURES for kind in settings["paths"]]
    return "\n".join(parts)


def facts() -> str:
    """One line a solver, from `Solver.facts`."""
    body = []
    for name, solver in SOLVERS.items():
        order, calls, kind, limit, stored, *remark = solver.facts.split("; ", 5)
        numbers = (order.replace("order ", ""), calls.split()[0], stored.split()[1])
        body.append((f"`{name}`", *numbers, kind, limit.removeprefix("converges to the "), *(remark or [""])))
    head = ("`solver=`", "order", "calls a step", "stores", "kind", "converges to the", "remark")
    return f"**Solvers**\n\n{markdown(head, body, text=(0, 4, 5, 6))}"


def mixtures(kind: str, figure: str, rows: Rows, settings: dict[str, Any], labels: dict[str, str]) -> str:
    """One figure on one path: a column for each mixture and number of calls, standard errors where they are large."""
    columns = [(name, calls) for name in MIXTURES for calls in settings["calls"]]
    found = {n: [rows[f"{name}/{kind}/{n}/{calls}"] for name, calls in columns] for n in labels}
    kept = {n: [row[figure] for row in of] for n, of in found.items() if all(figure in row for row in of)}
    cells = {n: [number(v) + (f" ± {se:.1g}" if se > 0.1 * v else "") for v, se in of] for n, of in kept.items()}
    grid = settings["paths"][kind]["grid"]
    title = f"**{FIGURES[figure]}**, path {kind.partition(',')[0]}, grid {grid}"
    if figure == "w2":
        for key, what in (("exact", "exact samples"), ("ode", "the fine solution")):
            bounds = (rows[f"{name}/{kind}"][key] for name in MIXTURES)
            title += f"; {what}: " + ", ".join(f"{v:.3f} ± {se:.3f}" for v, se in bounds)
    return table(title, columns, kept, cells, labels, {n: of[: len(settings["calls"])] for n, of in found.items()})


def models(rows: Rows, settings: dict[str, Any], labels: dict[str, str]) -> str:
    """Frechet distances of the embedded models."""
    columns = [(data, calls) for data in MODELS for calls in settings["model_calls"]]
    found = {n: [rows[f"{data}/{n}/{calls}"] for data, calls in columns] for n in labels}
    kept = {n: [row["fd"] for row in of] for n, of in found.items()}
    cells = {n: [f"{v:.2f} ± {se:.2f}" for v, se in of] for n, of in kept.items()}
    images = " and ".join(f"{settings[data]:,} {data}" for data in MODELS)
    title = f"**Fréchet distance in the classifier's features**, embedded models, grid uniform, {images} a row"
    return table(
        title, columns, kept, cells, labels, {n: of[: len(settings["model_calls"])] for n, of in found.items()}
    )


def table(
    title: str,
    columns: Sequence[tuple[str, int]],
    values: dict[str, list[list[float]]],
    cells: dict[str, list[str]],
    labels: dict[str, str],
    made: dict[str, list[dict[str, Any]]],
) -> str:
    """Rows of solvers with the calls that they really make, the best of each column in bold, and what prints the same."""
    best = [cells[min(values, key=lambda n: values[n][i][0])][i] for i in range(len(columns))]
    body = []
    for n, line in cells.items():
        shown = [f"**{cell}**" if cell == top else cell for cell, top in zip(line, best, strict=True)]
        body.append([labels[n], " ".join(str(row["calls"]) for row in made[n]), *shown])
    return f"{title}\n\n{markdown(['', 'calls', *(f'{name} {calls}' for name, calls in columns)], body)}"


def number(value: float) -> str:
    """Two digits."""
    if value < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:#.2g}" if value < 9.95 else f"{value:.0f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], text: Sequence[int] = (0, 1)) -> str:
    """A table whose columns are numbers but for those of ``text``."""
    rule = ["---" if i in text else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in (head, rule, *body))


def plot(results: dict[str, Any], file: Path) -> bytes:
    """Draws the error on the flow path against the calls that were made.

    Returns:
        The picture, of the kind that the file's name ends in.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rows, budgets = results["rows"], results["settings"]["calls"]
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained", facecolor="white")
    for axes, name in zip(figure.subplots(1, 2), MIXTURES, strict=True):
        for solver, (colour, marker) in DRAWN.items():
            found = [rows[f"{name}/flow/{solver}/{calls}"] for calls in budgets]
            axes.plot([r["calls"] for r in found], [r["rmse"][0] for r in found], color=colour, marker=marker, label=solver,
                      markersize=5, linewidth=1.5)  # fmt: skip
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="network calls (flow path, uniform grid)",
            title=f"{name}: {MIXTURES[name]}",
        )
        axes.set_xticks(budgets, [str(n) for n in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("RMSE to the probability-flow ODE")
    figure.axes[0].legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix.lstrip("."))
    return buffer.getvalue()

"""Markdown tables and the picture of `benchmarks/samplers.json`; `benchmarks/samplers.py` is the command line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowkit.solvers import SOLVERS

Rows = dict[str, dict[str, Any]]

MIXTURES = {"smooth": "five wide Gaussians in 4-D", "clusters": "eight narrow Gaussians in 2-D"}
MODELS = ("digits", "shapes")
FIGURES = {"rmse": "RMSE to the probability-flow ODE", "w2": "sliced Wasserstein-2 distance to the data"}
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
    parts = [facts()]
    for name, figure in ((name, figure) for name in MIXTURES for figure in FIGURES):
        parts.append(mixture(name, figure, rows, settings, labels))
    parts.append(models(rows, settings, labels))
    return "\n".join(parts)


def facts() -> str:
    """One line a solver, from `Solver.facts`."""
    body = []
    for name, solver in SOLVERS.items():
        order, calls, kind, limit, stored, *remark = solver.facts.split("; ", 5)
        numbers = (order.replace("order ", ""), calls.split()[0], stored.split()[1])
        body.append((f"`{name}`", *numbers, kind, limit.removeprefix("converges to the "), *(remark or [""])))
    head = ("`solver=`", "order", "calls a step", "stores", "", "converges to the", "")
    return f"**Solvers**\n\n{markdown(head, body, text=(0, 4, 5, 6))}"


def mixture(name: str, figure: str, rows: Rows, settings: dict[str, Any], labels: dict[str, str]) -> str:
    """One figure of all solvers on one mixture: a column for each path and number of calls."""
    kinds, budgets = list(settings["paths"]), settings["calls"]
    columns = [(kind, calls) for kind in kinds for calls in budgets]
    body: list[list[str]] = []
    kept = [n for n in labels if all(figure in rows[f"{name}/{k}/{n}/{c}"] for k, c in columns)]
    best = {c: min(rows[f"{name}/{c[0]}/{n}/{c[1]}"][figure][0] for n in kept) for c in columns}
    for n in kept:
        cells = []
        for c in columns:
            value, error = rows[f"{name}/{c[0]}/{n}/{c[1]}"][figure]
            cell = number(value) + (f" ± {error:.1g}" if error > 0.1 * value else "")
            cells.append(f"**{cell}**" if value == best[c] else cell)
        body.append([labels[n], made(n, name, kinds[0], budgets, rows), *cells])
    bounds = [rows[f"{name}/{kind}"] for kind in kinds]
    if figure == "w2":
        for label, key in (("fine solution", "ode"), ("exact samples", "exact")):
            body.append([f"*{label}*", "", *(f"{b[key][0]:.3f} ± {b[key][1]:.1g}" for b in bounds for _ in budgets)])
        note = f"{settings['samples']:,} samples, mean of {settings['seeds']} seeds"
    else:
        note = f"fine solution good to {max(b['reference_error'] for b in bounds):.0e}"
    head = ["", "calls", *(f"{k} {c}" for k, c in columns)]
    title = f"**{FIGURES[figure].capitalize() if figure == 'w2' else FIGURES[figure]}**, *{name}*, {MIXTURES[name]} ({note})"
    return f"{title}\n\n{markdown(head, body)}"


def models(rows: Rows, settings: dict[str, Any], labels: dict[str, str]) -> str:
    """Frechet distances of the embedded models."""
    budgets = settings["model_calls"]
    columns = [(data, calls) for data in MODELS for calls in budgets]
    best = {c: min(rows[f"{c[0]}/{n}/{c[1]}"]["fd"][0] for n in labels) for c in columns}
    body = []
    for n in labels:
        cells = []
        for c in columns:
            value, error = rows[f"{c[0]}/{n}/{c[1]}"]["fd"]
            cell = f"{value:.2f} ± {error:.2f}"
            cells.append(f"**{cell}**" if value == best[c] else cell)
        body.append([labels[n], made(n, "digits", None, budgets, rows), *cells])
    images = " and ".join(f"{settings[data]:,} {data}" for data in MODELS)
    title = f"**Fréchet distance in the classifier's features**, embedded models ({images} a row, the same seeds in every row)"
    return f"{title}\n\n{markdown(['', 'calls', *(f'{d} {c}' for d, c in columns)], body)}"


def made(row: str, where: str, kind: str | None, budgets: Sequence[int], rows: Rows) -> str:
    """The calls that a solver really makes."""
    place = f"{where}/{kind}" if kind else where
    return " ".join(str(rows[f"{place}/{row}/{calls}"]["calls"]) for calls in budgets)


def number(value: float) -> str:
    """Two digits, without an exponent where that is short."""
    return f"{value:.2g}" if value >= 0.001 else f"{value:.1e}".replace("e-0", "e-")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], text: Sequence[int] = (0, 1)) -> str:
    """A table whose columns are numbers but for those of ``text``."""
    rule = ["---" if i in text else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


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
        axes.set(xscale="log", yscale="log", xlabel="network calls", title=f"{name}: {MIXTURES[name]}")
        axes.set_xticks(budgets, [str(n) for n in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("RMSE to the probability-flow ODE")
    figure.axes[0].legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix.lstrip("."))
    return buffer.getvalue()

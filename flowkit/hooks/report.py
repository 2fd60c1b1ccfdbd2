"""What an attachment did, step by step: as text and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowkit.hooks.steps import Step

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe & Ito 2008
_PALE = "#d9e6ef"
MOST_LINES = 32


class Report(str):
    """A text that shows itself as it is, in a shell and a notebook too."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def report(steps: Sequence[Step], rows: int, asked: int) -> Report:
    """Returns the table of the latest call of a pipeline, and the rows of all of them.

    Args:
        steps: of the latest call.
        rows: network rows run in all calls.
        asked: network rows that the pipeline asked for in all calls.
    """
    names = list(dict.fromkeys(name for step in steps for name in step.report))
    table = [["step", "sigma", "run", "of", *names]]
    for step in steps:
        table.append([str(step.evaluation.step), f"{step.sigma:.4g}", str(step.rows), str(step.asked),
                      *(_spread(step.report.get(name)) for name in names)])  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    if not steps:
        lines.append("no step yet: attach a part and call the pipeline")
    saved = f", {1 - rows / asked:.1%} saved" if asked else ""
    return Report("\n".join([*lines, f"network rows, all calls: {rows} of {asked}{saved}"]))


def _numbers(figure: Any) -> list[float]:  # noqa: ANN401
    """A figure of a step: one number a sample, or one for all, or None."""
    if figure is None:
        return []
    return torch.as_tensor(figure).detach().double().flatten().tolist()


def _spread(figure: Any) -> str:  # noqa: ANN401
    numbers = [number for number in _numbers(figure) if math.isfinite(number)]
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    mean = f"{sum(numbers) / len(numbers):.4g}"
    return mean if low == high else f"{mean} ({low:.4g} to {high:.4g})"


def plot(steps: Sequence[Step], file: str | os.PathLike[str] | None = None) -> Any:  # noqa: ANN401
    """Draws rows, and the figures of the guidance method for each sample, against the step.

    Args:
        steps: of the latest call of a pipeline.
        file: where to save the picture, its folder is made if missing; its ending says the format. None: nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: without a step, or for an ending of no picture.
        ImportError: without matplotlib.
    """
    if not steps:
        raise ValueError("there is nothing to draw yet; attach a part and call the pipeline")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "flowkit-diffusion[report]"') from error
    names = list(dict.fromkeys(name for step in steps for name in step.report))
    figure = Figure(figsize=(7, 1.9 + 1.9 * len(names)), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
    at = [step.evaluation.step for step in steps]
    axes[0].bar(at, [step.asked for step in steps], color=_PALE, label="asked for")
    axes[0].bar(at, [step.rows for step in steps], color=_COLOURS[0], label="run")
    axes[0].set_ylabel("network rows")
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    for axis, name, colour in zip(axes[1:], names, _COLOURS[1:] * len(names), strict=False):
        lines: dict[int, list[tuple[int, float]]] = {}
        for step in steps:
            for sample, value in enumerate(_numbers(step.report.get(name))[:MOST_LINES]):
                if math.isfinite(value):
                    lines.setdefault(sample, []).append((step.evaluation.step, value))
        for points in lines.values():
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1, alpha=0.7)
        axis.set_ylabel(name)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color="#dddddd", linewidth=0.6, axis="y")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(file))
    return figure

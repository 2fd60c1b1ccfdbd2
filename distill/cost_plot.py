"""The picture of a cost matrix: what a step between any two anchors costs, and the steps of grids in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flowkit.distill.costs import Costs

# Told apart by colour, by width, and by the legend's order; readable with the usual colour blindness (Okabe & Ito 2008).
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def plot_costs(costs: Costs, paths: Mapping[str, Sequence[int]], file: str | os.PathLike[str] | None = None) -> Any:  # noqa: ANN401
    """Draws the cost of every step on a logarithmic scale, and the path of each grid as stairs on the anchors that it visits.

    Args:
        costs: of the steps.
        paths: label -> anchors of a grid, such as ``about["indices"]``.
        file: where to save the picture, its folder is made if missing; its ending says the format. None: nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: for anchors that the costs do not have.
        ImportError: without matplotlib.
    """
    last = len(costs.grid)
    for label, path in paths.items():
        if list(path) != sorted(set(path)) or path[0] != 0 or path[-1] != last:
            raise ValueError(
                f"{label} is no path over {last + 1} anchors: {list(path)!r:.80}; give about['indices'] of a grid"
            )
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "flowkit-diffusion[report]"') from error
    mean = costs.mean().numpy()
    largest = float(mean.max())
    # The smallest are rounding, of no interest to anyone.
    shown = np.where(mean > 1e-8 * largest, mean, np.nan) if largest else np.full_like(mean, np.nan)
    figure = Figure(figsize=(6.4, 5.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    norm = LogNorm(float(np.nanmin(shown)), largest) if largest else None
    image = axes.imshow(shown, norm=norm, cmap="Greys", origin="upper", interpolation="nearest")
    for i, (label, path) in enumerate(paths.items()):
        corners = [(k, j) for a, b in pairwise(path) for k, j in ((a, a), (b, a))] + [(last, last)]
        axes.plot(*zip(*corners, strict=True), color=_COLOURS[i % len(_COLOURS)], linewidth=1.6, label=label)
        axes.plot(path[1:], path[:-1], ".", color=_COLOURS[i % len(_COLOURS)], markersize=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("anchor where the step ends")
    axes.set_ylabel("anchor where the step begins")
    if paths:
        axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.colorbar(image, label="cost (mean squared error, summed over elements)", shrink=0.8)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(file), bbox_inches="tight")  # axes of equal scale: the layout alone cuts their label
    return figure

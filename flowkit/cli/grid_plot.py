"""The picture of ``flowkit grid --plot``: sigma and log-SNR against the step."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path as FilePath

from flowkit.paths import Path, log_snr

FORMATS = ("png", "svg", "pdf")
# Told apart by colour, by marker, and by the legend's order; readable with the usual colour blindness (Okabe & Ito 2008).
_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v"), ("#e69f00", "P"))


def draw(grids: Sequence[tuple[str, Sequence[float], Path]], file: FilePath) -> bytes:
    """Draws grids against their steps.

    Args:
        grids: of each its label, its N + 1 levels, and their path.
        file: where the picture will go; its ending says the format.

    Returns:
        The picture. Infinite values, such as the log-SNR at sigma 0, are left out.

    Raises:
        ValueError: for a file of another kind.
        ImportError: without matplotlib.
    """
    kind = file.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ValueError(f"cannot draw {file.name!r}; end the name in {', '.join('.' + f for f in FORMATS)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "flowkit-diffusion[report]"') from error
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharex=True)
    flows = {path.name == "flow" for _, _, path in grids}
    for i, (label, levels, path) in enumerate(grids):
        colour, marker = _STYLES[i % len(_STYLES)]
        look = {
            "color": colour,
            "marker": marker,
            "markersize": 4,
            "linewidth": 1.4,
            "label": f"{label} ({path.name})".replace("$", r"\$"),
        }
        for axes, values in ((left, levels), (right, [log_snr(path.at_level(v)) for v in levels])):
            finite = [(n, v) for n, v in enumerate(values) if math.isfinite(v)]
            axes.plot([n for n, _ in finite], [v for _, v in finite], **look)
    if flows == {True}:
        left.set_ylabel("sigma (flow time)")
    else:
        left.set_yscale("symlog", linthresh=min(v for _, levels, _ in grids for v in levels if v > 0))
        left.set_ylabel("sigma" if flows == {False} else "sigma (flow time on flow, sigma/alpha elsewhere)")
    right.set_ylabel("log-SNR, log(alpha / sigma)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()

"""The diagnosis of a training: one picture of how it goes, and what looks wrong in it, in words.

The rules of `notes` compare the first and the last third of what was logged; a change counts where it is above twice its standard
error, from the scatter of the rows, and three times where any of many bands may make a note. They are rules of thumb: each names
what it saw, so that a reader can look.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowkit.weights import write_bytes

_LEAST = 9  # logged rows, three in a third
_DRIFT = 0.2  # standard deviations of the teacher's samples
_VARIANCE = 0.8, 1.25
_CURVED = 0.01  # S relative to the transport cost: what is straighter need not improve
# Readable with the usual colour blindness (Okabe & Ito 2008).
_BLUE, _RED, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#bbbbbb"


def notes(
    history: Sequence[Mapping[str, Any]], watched: Sequence[Mapping[str, float]], clip: float | None = None
) -> list[str]:
    """Returns what looks wrong in a training, with the cure; nothing where nothing does.

    A note is made where

    - the loss has not fallen from the first third to the last;
    - the loss of a band of flow times has risen, by a twentieth at least, while that of others fell;
    - the gradient was cut at ``clip`` in nineteen of twenty rows of the last third;
    - the last mean is 0.2 standard deviations or more off that of the samples to compare with;
    - the last variance is less than 0.8 or more than 1.25 times theirs;
    - the last Frechet distance lies above the lowest by twice the standard error of their difference (a twentieth where errors are
      not known);
    - S of the last look is above 0.95 times that of the first, at three looks or more, and above a hundredth of the transport cost.

    Args:
        history: rows of the training, by rising "step": "loss", "gradient_norm", "rate", and "bands", a list of (low, high, mean
            loss or None) by flow time; low = high is that time alone.
        watched: rows of `flowkit.distill.watch.rows`.
        clip: norm that the gradient was cut at; None means that it was not, or is not judged.
    """
    found = []
    if len(history) >= _LEAST:
        found += _of_loss(history) + _of_bands(history) + ([] if clip is None else _of_gradient(history, clip))
    return found + _of_samples(watched) + _of_distance(watched) + _of_straightness(watched)


def _thirds(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Means of the first and the last third of what is known, and the standard error of their difference."""
    known = [v for v in values if v is not None]
    size = len(known) // 3
    if len(known) < _LEAST:
        return None
    first, last = np.array(known[:size]), np.array(known[-size:])
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / size)
    return float(first.mean()), float(last.mean()), error


def _of_loss(history: Sequence[Mapping[str, Any]]) -> list[str]:
    change = _thirds([row["loss"] for row in history])
    if change is None or change[0] - change[1] > 2 * change[2]:
        return []
    return [f"the loss does not fall: {change[0]:.4g} over the first third, {change[1]:.4g} over the last; try a third and three "
            "times the learning rate, and check that each noise is paired with its own sample"]  # fmt: skip


def _of_bands(history: Sequence[Mapping[str, Any]]) -> list[str]:
    bands = [(low, high) for low, high, _ in history[0]["bands"]]
    changes = [_thirds([row["bands"][k][2] for row in history]) for k in range(len(bands))]
    known = {band: change for band, change in zip(bands, changes, strict=True) if change is not None}
    if not any(first - last > 2 * error for first, last, error in known.values()):
        return []
    return [f"the loss at {_name(low, high)} rises, {first:.4g} to {last:.4g}, while others fall: the network gives it up for "
            "them; draw more of these times, or lower the learning rate"
            for (low, high), (first, last, error) in known.items()
            if last - first > max(3 * error, 0.05 * first)]  # fmt: skip


def _of_gradient(history: Sequence[Mapping[str, Any]], clip: float) -> list[str]:
    norms = [row["gradient_norm"] for row in history[-(len(history) // 3) :]]
    cut = sum(norm >= clip for norm in norms)
    if cut < 0.95 * len(norms):
        return []
    return [f"the gradient is cut to norm {clip:g} in {cut} of the last {len(norms)} rows (its median is "
            f"{float(np.median(norms)):.3g}), so the learning rate is not what steps are made of; raise clip, or take larger "
            "batches"]  # fmt: skip


def _of_samples(watched: Sequence[Mapping[str, float]]) -> list[str]:
    found = []
    last = watched[-1] if watched else {}
    if last.get("mean_drift", 0.0) >= _DRIFT:
        found.append(f"the mean of the samples is {last['mean_drift']:.2f} standard deviations off where it should be; lower the "
                     "learning rate, or train on more pairs")  # fmt: skip
    ratio = last.get("variance_ratio", 1.0)
    if ratio < _VARIANCE[0]:
        found.append(f"the samples vary {ratio:.2f} times as much as they should: they collapse towards their mean, as blurred "
                     "ones do; train longer, on more pairs, with another metric, or give the student more steps")  # fmt: skip
    if ratio > _VARIANCE[1]:
        found.append(f"the samples vary {ratio:.2f} times as much as they should; lower the learning rate, and sample with "
                     "guidance_scale=1 where guidance is baked in")  # fmt: skip
    return found


def _of_distance(watched: Sequence[Mapping[str, float]]) -> list[str]:
    rows = [row for row in watched if "fd" in row]
    if len(rows) < 2:
        return []
    best, last = min(rows, key=lambda row: row["fd"]), rows[-1]
    known = "fd_se" in best and "fd_se" in last
    margin = 2 * math.hypot(best["fd_se"], last["fd_se"]) if known else 0.05 * best["fd"]
    if last["fd"] - best["fd"] <= margin:
        return []
    return [f"the Frechet distance rises since step {best['step']:.0f}, {best['fd']:.4g} to {last['fd']:.4g}: the student is "
            f"trained too long; take the average at step {best['step']:.0f}, or train on more pairs"]  # fmt: skip


def _of_straightness(watched: Sequence[Mapping[str, float]]) -> list[str]:
    rows = [row for row in watched if "straightness" in row]
    if len(rows) < 3 or rows[-1]["straightness_relative"] <= _CURVED:
        return []
    first, last = rows[0]["straightness"], rows[-1]["straightness"]
    if last <= 0.95 * first:
        return []
    return [f"the paths do not become straighter: S is {first:.4g} at step {rows[0]['step']:.0f} and {last:.4g} at step "
            f"{rows[-1]['step']:.0f}; train longer, draw uniform times, or add a round of reflow"]  # fmt: skip


def _name(low: float, high: float) -> str:
    return f"s = {low:g}" if low == high else f"{low:g} <= s < {high:g}"


def draw(
    history: Sequence[Mapping[str, Any]],
    watched: Sequence[Mapping[str, float]],
    file: Path,
    clip: float | None = None,
) -> None:
    """Draws loss, loss by flow time, gradient and learning rate, and what was watched, with the `notes` below them.

    Args:
        history: as for `notes`, as are the others.
        watched: drawn as far as it was measured.
        file: PNG, written whole or not at all.
        clip: drawn with the gradient's norm.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "flowkit-diffusion[report]"') from error
    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained", facecolor="white")
    loss, bands, gradient, drift, paths, distance = figure.subplots(2, 3).flat
    steps = [row["step"] for row in history]
    _draw_loss(loss, steps, [row["loss"] for row in history])
    _draw_bands(bands, history)
    _draw_gradient(gradient, history, clip)
    _draw_looks(drift, watched, [("mean_drift", "drift of the mean, in standard deviations", _RED),
                                 ("variance_ratio", "variance, over what it should be", _BLUE)])  # fmt: skip
    _draw_looks(paths, watched, [("straightness_relative", "S over transport cost (0: straight)", _GREEN),
                                 ("rmse", "RMSE to the teacher's sample", _BLUE)])  # fmt: skip
    _draw_looks(distance, watched, [("fd", "Frechet distance, with its standard error", _BLUE)])
    if drift.lines:
        drift.axhline(1.0, color=_BLUE, linewidth=0.8, linestyle=":")
    for axes in (loss, bands, gradient, drift, paths, distance):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if axes is bands else {}
            axes.legend(fontsize=8, facecolor="white", edgecolor="none", **beside)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", color="#777777", transform=axes.transAxes)
    said = [textwrap.fill(f"- {note}", 170, subsequent_indent="  ") for note in notes(history, watched, clip)]
    text = "\n".join(said) or "nothing looks wrong"
    figure.supxlabel(text.replace("$", r"\$"), x=0.01, horizontalalignment="left", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(file, buffer.getvalue())


def _draw_loss(axes: Any, steps: Sequence[int], values: Sequence[float]) -> None:  # noqa: ANN401
    if not values:
        return
    width = min(max(1, len(values) // 20), (len(values) - 1) // 2)
    ones = np.ones(2 * width + 1)
    smooth = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    axes.plot(steps, values, color=_GREY, linewidth=0.8, label="loss")
    axes.plot(steps, smooth, color=_BLUE, linewidth=1.6, label=f"mean of {len(ones)} rows")
    _logarithmic(axes, values)


def _draw_bands(axes: Any, history: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    from matplotlib import colormaps

    bands = history[0]["bands"] if history else []
    groups = np.array_split(np.arange(len(history)), min(20, len(history)) or 1)
    drawn: list[float] = []
    for k, (low, high, _) in enumerate(bands):
        points = []
        for group in groups:
            values = [history[i]["bands"][k][2] for i in group if history[i]["bands"][k][2] is not None]
            if values:
                points.append((history[group[-1]]["step"], float(np.mean(values))))
        if points:
            # Pure noise, which one-step samplers ask for, stands out.
            look = {"color": colormaps["viridis_r"](high)} if low < high else {"color": _RED, "linestyle": "--"}
            axes.plot(*zip(*points, strict=True), linewidth=1.2, label=_name(low, high), **look)
            drawn += [value for _, value in points]
    axes.set_title("loss by flow time (s = 1 is noise)", fontsize=9)
    _logarithmic(axes, drawn)


def _draw_gradient(axes: Any, history: Sequence[Mapping[str, Any]], clip: float | None) -> None:  # noqa: ANN401
    if not history:
        return
    steps, norms = [row["step"] for row in history], [row["gradient_norm"] for row in history]
    axes.plot(steps, norms, color=_BLUE, linewidth=1.0, label="gradient norm")
    if clip is not None:
        axes.axhline(clip, color=_BLUE, linewidth=0.8, linestyle=":", label=f"cut at {clip:g}")
    _logarithmic(axes, norms)
    right = axes.twinx()
    right.plot(steps, [row["rate"] for row in history], color=_RED, linewidth=1.2)
    right.set_ylabel("learning rate", color=_RED)
    right.ticklabel_format(axis="y", scilimits=(-2, 2))
    right.spines[["top"]].set_visible(False)


def _draw_looks(axes: Any, watched: Sequence[Mapping[str, float]], parts: Sequence[tuple[str, str, str]]) -> None:  # noqa: ANN401
    for key, label, colour in parts:
        rows = [row for row in watched if key in row]
        if rows:
            errors = [row.get(f"{key}_se", 0.0) for row in rows]
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            axes.errorbar(
                steps, values, errors, color=colour, marker="o", markersize=3, linewidth=1.4, capsize=2, label=label
            )


def _logarithmic(axes: Any, values: Sequence[float]) -> None:  # noqa: ANN401
    if values and min(values) > 0:
        axes.set_yscale("log")

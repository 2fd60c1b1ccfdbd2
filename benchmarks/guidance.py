"""What guidance costs and what it can do without: network rows against the distance to full guidance, on the same noise.

    python benchmarks/guidance.py            # a quarter of an hour on one core; prints tables, writes benchmarks/guidance.json
    python benchmarks/guidance.py --table    # prints the tables of docs/guidance.md from the committed JSON
    python benchmarks/guidance.py --plot docs/guidance.png    # draws them

Every method is set to save a share of the network rows of full guidance, on samples of its own, and then measured on others. The
distance is the RMS difference of final samples, all elements of all samples together; its standard error is over samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch
from rich.progress import Progress
from torch import Tensor

import flowkit
from flowkit import assets
from flowkit.guidance import AdaptiveGuidance, IntervalGuidance, LinearAdaptiveGuidance
from flowkit.hooks import Part
from flowkit.pipelines.sampling import blocks, sample_outputs
from flowkit.weights import write_bytes

STEPS, SAMPLES, FITTED, SCALES = 16, 240, 60, (2.0, 5.0)
SAVINGS = (0.125, 0.25, 0.375, 0.4, 0.4375)
ROUNDS = 60
STYLES = {
    "AG": ("#0072b2", "o"),
    "LinearAG": ("#009e73", "^"),
    "cutoff": ("#d55e00", "s"),
    "interval": ("#cc79a7", "D"),
    "fewer steps": ("#777777", "v"),
}  # Okabe & Ito 2008


@dataclass(frozen=True)
class Case:
    """A pipeline and the labels that it is asked for."""

    name: str
    pipe: Any
    labels: list[int]


def cases() -> list[Case]:
    """The embedded models, and exact networks of Gaussian mixtures with the same labels."""
    found = []
    for name in assets.NAMES:
        found.append(Case(name, flowkit.load_demo(name), list(range(assets.num_classes(name)))))
    images, labels = assets.images("digits")
    means = torch.stack([images[labels == k].float().div(127.5).sub(1).mean(0) for k in range(10)])
    exact = flowkit.MixtureDenoiser.of(means, 0.25, labels=torch.arange(10))
    found.append(Case("mixture of digits", _around(exact), list(range(10))))
    angle = torch.arange(8) * torch.pi / 4
    ring = torch.stack([angle.cos(), angle.sin()], 1).view(8, 2, 1, 1)
    found.append(
        Case(
            "mixture on a ring", _around(flowkit.MixtureDenoiser.of(ring, 0.2, labels=torch.arange(8))), list(range(8))
        )
    )
    return found


def _around(network: flowkit.MixtureDenoiser) -> Any:  # noqa: ANN401
    pipe = flowkit.ClassConditionalPipeline(network.float(), flowkit.RectifiedFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(case: Case, scale: float, *parts: Part, steps: int = STEPS, seed: int = 1) -> tuple[Tensor, float]:
    """Final samples, and network rows a sample."""
    call = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "latent"}
    done = []
    with flowkit.attach(case.pipe, *parts, flowkit.Recorder("state")) as attached:
        for _, output in sample_outputs(
            case.pipe, blocks(case.pipe, SAMPLES, inputs=case.labels), seed=seed, inputs=case.labels, call=call
        ):
            done.append(output.images)
    return torch.cat(done), attached.rows / SAMPLES


def distance(x: Tensor, full: Tensor) -> tuple[float, float]:
    """RMSE and its standard error."""
    squares = (x - full).double().square().flatten(1).mean(1)
    rmse = float(squares.mean().sqrt())
    return rmse, float(squares.std() / len(squares) ** 0.5) / (2 * rmse) if rmse else 0.0


def cutoff(steps: int, saving: float) -> IntervalGuidance:
    """Guidance in the first steps of a uniform flow grid only, as many as save a share of the rows."""
    guided = round(steps - 2 * steps * saving)
    return IntervalGuidance(1 - (guided - 0.5) / steps, 1.0)


def middle(steps: int, saving: float) -> IntervalGuidance:
    """Guidance in an interval in the middle: as many steps without it at the noisy end as at the clean one."""
    cut = round(2 * steps * saving)
    return IntervalGuidance(1 - (steps - (cut - cut // 2) - 0.5) / steps, 1 - (cut // 2 - 0.5) / steps)


def curve(case: Case, scale: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every method at every saving, for one pipeline and scale."""
    call = {"guidance_scale": scale, "num_inference_steps": STEPS}
    fit: dict[str, Any] = {"call": call, "samples": FITTED, "progress": False}
    full, asked = run(case, scale)
    rows: list[dict[str, Any]] = []

    def add(method: str, saving: float, result: tuple[Tensor, float]) -> None:
        rmse, se = distance(result[0], full)
        rows.append({"method": method, "target": saving, "saved": 1 - result[1] / asked, "rmse": rmse, "se": se})
        tell(f"{case.name}, w = {scale:g}: {method}")

    add("no guidance", 0.5, run(case, 1.0))
    for saving in SAVINGS:
        adaptive = AdaptiveGuidance.calibrate(case.pipe, case.labels, saving=saving, **fit)
        add("AG", saving, run(case, scale, adaptive))
        add(
            "LinearAG",
            saving,
            run(case, scale, LinearAdaptiveGuidance.calibrate(case.pipe, case.labels, saving=saving, **fit)),
        )
        add("cutoff", saving, run(case, scale, cutoff(STEPS, saving)))
        add("interval", saving, run(case, scale, middle(STEPS, saving)))
        add("fewer steps", saving, run(case, scale, steps=round(STEPS * (1 - saving))))
    return {"case": case.name, "scale": scale, "rows": rows}


def overhead() -> dict[str, float]:
    """CPU time of a guided step of the digits pipeline, one sample, and what hooks add to it, in microseconds."""
    pipe = flowkit.load_demo("digits")
    pipe.set_progress_bar_config(disable=True)
    kinds: dict[str, Sequence[Part]] = {
        "nothing": (),
        "adaptive, never cut": (AdaptiveGuidance(2.0),),
        "recorder": (flowkit.Recorder(),),
    }
    times: dict[str, list[float]] = {name: [] for name in ("plain", *kinds)}

    def one() -> float:
        start = time.thread_time()
        pipe(class_labels=[3], guidance_scale=2.0, num_inference_steps=STEPS, output_type="latent")
        return 1e6 * (time.thread_time() - start) / STEPS

    for round_ in range(ROUNDS + 3):
        for name in times:
            if name == "plain":
                took = one()
            else:
                with flowkit.attach(pipe, *kinds[name]):
                    took = one()
            if round_ >= 3:
                times[name].append(took)
    plain = times.pop("plain")
    return {"plain": round(statistics.median(plain), 1)} | {
        name: round(statistics.median(a - b for a, b in zip(own, plain, strict=True)), 1) for name, own in times.items()
    }


def table(found: dict[str, Any]) -> str:
    """The tables of docs/guidance.md."""
    lines = []
    methods = list(STYLES)
    for part in found["curves"]:
        rows = part["rows"]
        nothing = next(row["rmse"] for row in rows if row["method"] == "no guidance")
        lines += [f"**{part['case']}, w = {part['scale']:g}** (no guidance: RMSE {nothing:.3f})", ""]
        lines += [f"| rows saved | {' | '.join(methods)} |", f"| ---: |{' ---: |' * len(methods)}"]
        for saving in SAVINGS:
            cells = {row["method"]: row for row in rows if row["target"] == saving}
            shown = [f"{cells[m]['rmse'] / nothing:.2f} ± {cells[m]['se'] / nothing:.2f}" for m in methods]
            shown = [
                text if abs(cells[m]["saved"] - saving) < 0.02 else f"{text} ({cells[m]['saved']:.0%})"
                for m, text in zip(methods, shown, strict=True)
            ]
            lines.append(f"| {saving:.1%} | {' | '.join(shown)} |")
        lines.append("")
    times = found["overhead"]
    lines += [
        f"A guided step of the digits network, one sample, takes {times['plain'] / 1000:.2f} ms of CPU time; attached, "
        + ", ".join(
            f"{name} {value:+.0f} us ({value / times['plain']:+.1%})"
            for name, value in times.items()
            if name != "plain"
        )
        + "."
    ]
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws the distance to full guidance, as a share of that of no guidance, against the rows saved."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(part["case"] for part in found["curves"]))
    figure = Figure(figsize=(3 * len(names), 5.6), dpi=150, layout="constrained", facecolor="white")
    grid = figure.subplots(len(SCALES), len(names), sharex=True, sharey=True)
    for part in found["curves"]:
        axes = grid[SCALES.index(part["scale"])][names.index(part["case"])]
        nothing = next(row["rmse"] for row in part["rows"] if row["method"] == "no guidance")
        for method, (colour, marker) in STYLES.items():
            rows = sorted((row for row in part["rows"] if row["method"] == method), key=lambda row: row["saved"])
            x, y, se = zip(*((100 * r["saved"], r["rmse"] / nothing, r["se"] / nothing) for r in rows), strict=True)
            axes.errorbar(x, y, se, color=colour, marker=marker, markersize=4, linewidth=1.3, label=method)
        axes.set_title(f"{part['case']}, w = {part['scale']:g}", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("network rows saved, %", fontsize=9)
    figure.supylabel("RMSE to full guidance / that of no guidance", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=len(labels), loc="outside upper center")
    figure.savefig(file)


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description="Measure guidance methods against full guidance.")
    parser.add_argument("--table", action="store_true", help="print the tables of the committed JSON, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the committed JSON, measure nothing")
    parser.add_argument("--overhead", action="store_true", help="measure the cost of the hooks alone; the curves stay")
    given, file = parser.parse_args(), Path(__file__).with_suffix(".json")
    if given.table or given.plot:
        found: dict[str, Any] = json.loads(file.read_text())
        if given.plot:
            plot(found, given.plot)
        if given.table:
            print(table(found))
        return
    torch.set_num_threads(1)
    if given.overhead:
        found = {**json.loads(file.read_text()), "overhead": overhead()}
        print(table(found))
        write_bytes(file, (json.dumps(found, indent=1) + "\n").encode())
        return
    found = {"curves": []}
    pipelines = cases()
    with Progress() as display:
        task = display.add_task("guidance", total=len(pipelines) * len(SCALES) * (1 + 5 * len(SAVINGS)))
        for case in pipelines:
            for scale in SCALES:
                found["curves"].append(
                    curve(case, scale, lambda text: display.update(task, advance=1, description=text))
                )
    found["overhead"] = overhead()
    found["made_on"] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "steps": STEPS,
        "samples": SAMPLES,
    }
    print(table(found))
    write_bytes(file, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

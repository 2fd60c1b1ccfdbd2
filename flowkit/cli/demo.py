"""``flowkit demo``: the three uses of flowkit on an embedded model, each of them measured."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.logging import disable_progress_bar
from PIL import Image, ImageDraw
from rich import box
from rich.console import Console
from rich.table import Table

from flowkit import distill
from flowkit.eval.harness import Result, evaluate
from flowkit.eval.pictures import mosaic, picture, save_png
from flowkit.eval.report import write_report
from flowkit.grids import Grid
from flowkit.pipelines import load_demo
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.weights import write_bytes

STEPS = 4
PICTURES = 20  # images of a row's picture
STUDENT = (2000, 400)  # pairs and updates of the student
FAST = (1000, 120)


@dataclass
class Row:
    """One line of the table: a pipeline, how it is called, and what came out."""

    name: str
    note: str
    pipe: Any
    steps: int
    result: Result | None = None


def run(data: str, output: Path, fast: bool = False, samples: int = 2000, seed: int = 0) -> None:
    """Swaps the scheduler, optimises steps, distils a student; writes pictures, ``results.json`` and ``report.html``.

    Args:
        data: "digits" or "shapes".
        output: folder, made if missing. Every file in it is written whole or not at all, the report last.
        fast: a quarter of the images and a third of the training.
        samples: images of each row, at least `PICTURES`.
        seed: of all noise; every row starts from the same.

    Raises:
        ValueError: for too few samples.
        OSError: for a folder that cannot be written.
    """
    if samples < PICTURES:
        raise ValueError(f"--samples {samples} is fewer than the {PICTURES} images of a picture; ask for more")
    # So small a network gains little from a second thread, and two wait for each other endlessly on a busy machine.
    torch.set_num_threads(1)
    disable_progress_bar()  # of loading a model
    console, began = Console(), time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    if fast:
        samples = max(PICTURES, samples // 4)
    classes = load_demo(data).num_classes
    labels = list(range(classes))

    console.print(f"[bold]flowkit demo[/bold] on the embedded {data}, {samples} images a row; results go to {output}")
    console.print(f"1. Optimising {STEPS} steps (Bellman) on 100 fine trajectories")
    teacher = with_scheduler(data, RectifiedFlowScheduler(solver="euler"))
    grid = distill.optimize_steps(teacher, steps=[STEPS], inputs=labels, objective="local", seed=seed)[STEPS]
    grid.save(output / "four-steps.json")
    console.print("2. Distilling a one-step student (reflow)")
    pairs, updates = FAST if fast else STUDENT
    student = distill.run(
        "reflow",
        load_demo(data),
        inputs=labels,
        output=output / "student",
        samples=pairs,
        steps=updates,
        resume=False,  # an earlier demo may have had other settings
        seed=seed,
    )
    console.print("3. Sampling and measuring every row on the same seeds and labels")
    rows = table_rows(data, grid, student)
    for number, row in enumerate(rows, 1):
        console.print(f"   {number}/{len(rows)} {row.name}")
        row.result = measure(row, data, samples, seed, labels)
    write(rows, output, data, samples, seed, fast)
    console.print(terminal_table(rows))
    console.print(f"Report: {output / 'report.html'} ({time.perf_counter() - began:.0f} s in all)")


def with_scheduler(data: str, scheduler: Any, grid: Grid | None = None) -> Any:  # noqa: ANN401
    """The embedded pipeline under another scheduler, and a grid of ours."""
    pipe = load_demo(data)
    pipe.unet.to(memory_format=torch.channels_last)  # a third faster on CPUs
    pipe.scheduler = scheduler
    if grid is not None:
        scheduler.set_grid(grid)
    return pipe


def table_rows(data: str, grid: Grid, student: Any) -> list[Row]:  # noqa: ANN401
    """The rows of the table, teacher and student."""
    stock = FlowMatchEulerDiscreteScheduler()
    ours, euler = RectifiedFlowScheduler, {"solver": "euler"}
    return [
        Row(
            "diffusers FlowMatchEuler",
            "its last step goes from sigma 0.001 to 0: three steps do the work",
            with_scheduler(data, stock),
            STEPS,
        ),
        Row(
            "flowkit from its config",
            "the same solver and grid: the parity row",
            with_scheduler(data, ours.from_config(stock)),
            STEPS,
        ),
        Row("flowkit Euler, uniform", "no wasted step", with_scheduler(data, ours(**euler)), STEPS),
        Row("flowkit Euler, Bellman", "steps optimised above", with_scheduler(data, ours(**euler), grid), STEPS),
        Row("flowkit defaults", "UniPC in flow time, uniform grid", with_scheduler(data, ours()), STEPS),
        Row("teacher, one step", "Euler: the mean of the class", with_scheduler(data, ours(**euler)), 1),
        Row("student, one step", "one quick round of reflow, distilled above", student, 1),
        Row("teacher, 16 steps", "Euler, uniform grid", with_scheduler(data, ours(**euler)), 16),
    ]


def measure(row: Row, data: str, samples: int, seed: int, labels: list[int]) -> Result:
    """FD in the classifier's features and in pixels, from one sampling pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
        return evaluate(
            row.pipe,
            data,
            samples,
            extractor=["classifier", "pixels"],
            seed=seed,
            inputs=labels,
            call={"num_inference_steps": row.steps},
            batch_size=250,
            keep=PICTURES,
        )


def write(rows: list[Row], output: Path, data: str, samples: int, seed: int, fast: bool) -> None:
    """Pictures, ``results.json`` and the report."""
    entries = []
    for number, row in enumerate(rows, 1):
        result = row.result
        if result is None:
            continue
        name = f"row-{number}.png"
        save_png(output / name, mosaic([picture(image) for image in result.images]))
        metrics = {
            key: {"value": value, "se": result.se[key], "left_out": result.figure(key).details["left_out"]}
            for key, value in result.items()
        }
        drawn = result.spec["samples"]
        entries.append(
            {
                "name": row.name,
                "note": row.note,
                "steps": row.steps,
                "evaluations": result.spec["network_evaluations"],
                "seconds": result.spec["seconds"]["sampling"],
                "metrics": metrics,
                "pairs": f"seed {drawn['seed']}, {drawn['count']} images, inputs {drawn['inputs_sha256']}",
                "spec": provenance(row),
                "image": name,
            }
        )
    save_png(output / "compare.png", side_by_side(rows))
    first = rows[0].result
    spec = dict(first.spec) if first else {}
    results = {
        "title": f"flowkit demo: {data}",
        "summary": (
            f"A class-conditional rectified flow trained on {data}, sampled with {samples} images a row from the same seeds and "
            f"labels. FD is the Fréchet distance to held-out images in the features of a small classifier; the second FD is in "
            f"pixels. Lower is better; standard errors are jackknife estimates."
        ),
        "spec": {
            "data": data,
            "images": samples,
            "seed": seed,
            "fast": fast,
            "versions": spec.get("versions", {}),
        },
        "baseline": rows[0].name,
        "rows": entries,
        "pictures": [{"image": "compare.png", "caption": "The same seeds and labels, row by row."}],
    }
    write_bytes(output / "table.md", markdown_table(rows).encode())
    write_bytes(output / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_report(output)


def provenance(row: Row) -> dict[str, Any]:
    """What repeats one row."""
    if row.result is None:
        return {}
    spec = row.result.spec
    pipeline = {key: value for key, value in spec["pipeline"].items() if key != "source"}  # a path of this machine
    features = {  # the delete-one values stand beside the figures
        key: {part: value for part, value in facts.items() if part != "left_out"}
        for key, facts in spec["features"].items()
    }
    return {"samples": spec["samples"], "pipeline": pipeline, "features": features}


HEADER = ("", "steps", "calls", "FD", "FD (pixels)", "time")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    if row.result is None:
        return (row.name, str(row.steps))
    spec, result = row.result.spec, row.result
    figures = (f"{result[k]:.2f} ± {result.se[k]:.2f}" for k in ("fid", "fid/pixels"))
    seconds = f"{spec['seconds']['sampling']:.1f} s"
    return (row.name, str(row.steps), f"{spec['network_evaluations']:g}", *figures, seconds)


def terminal_table(rows: list[Row]) -> Table:
    """The table for the terminal."""
    table = Table(
        *HEADER, title="calls: network evaluations for one image; lower FD is better", box=box.SIMPLE, pad_edge=False
    )
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown_table(rows: list[Row]) -> str:
    """The table for a README."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def side_by_side(rows: list[Row], margin: int = 12) -> Image.Image:
    """The first images of every row, one row under the other, with its name."""
    strips = [
        (row, mosaic([picture(image) for image in row.result.images[:10]])) for row in rows if row.result is not None
    ]
    width, height, line = strips[0][1].width, strips[0][1].height, 22
    sheet = Image.new("RGB", (width + 2 * margin, margin + len(strips) * (line + height + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, strip) in enumerate(strips):
        top = margin + i * (line + height + margin)
        figure = f"FD {row.result['fid']:.2f}" if row.result else ""
        draw.text((margin, top), f"{row.name}: {row.steps} step{'s' * (row.steps > 1)}, {figure}", "#222", font_size=14)
        sheet.paste(strip, (margin, top + line))
    return sheet

"""Distilled students of the embedded models: Fréchet distances at a few steps beside their teacher's, over seeds of the training.

    python benchmarks/distill.py                          # trains and measures what benchmarks/distill.json does not have yet
    python benchmarks/distill.py --data digits --seeds 0  # a part of it
    python benchmarks/distill.py --table                  # prints the tables of docs/distill.md from it
    python benchmarks/distill.py --picture                # draws docs/distill.png from the students of seed 0

Every row has the same seed of its samples, which is none of a recording, and as many images of every class. A student lies in
``--work`` as soon as it is trained; a call that was killed goes on from there. "Seconds" are processor time of one thread: what
recording and training took, of a student that was made without a stop. They are those of one machine, and so are the last digits
of the distances.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from sampler_tables import MODELS, markdown

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, load_demo
from flowkit.distill import run
from flowkit.distill.runs import METHODS
from flowkit.eval import evaluate
from flowkit.eval.pictures import mosaic, picture
from flowkit.pipelines.sampling import sample_images
from flowkit.weights import write_bytes

ROOT = Path(__file__).parents[1]
RESULTS, WORK = Path(__file__).with_suffix(".json"), ROOT / "runs" / "distill"
SEEDS, TEACHER_STEPS = (0, 1, 2), (1, 4, 16)
FULL: dict[str, dict[str, int]] = {
    "digits": {"pairs": 2000, "updates": 400, "images": 2000},
    "shapes": {"pairs": 10_000, "updates": 3000, "images": 2000},
}
FAST = {data: {"pairs": 64, "updates": 2, "images": 60} for data in FULL}

Record = dict[str, Any]


@dataclass(frozen=True)
class Student:
    """A way to a student.

    Attributes:
        method: name of the distillation.
        steps: that the student is measured at.
        options: of the method.
        teacher: the student that it is distilled from; None means the embedded model.
        everywhere: on both models and from every seed, or on digits from the first alone.
    """

    method: str
    steps: tuple[int, ...]
    options: Record = field(default_factory=dict)
    teacher: str | None = None
    everywhere: bool = True


STUDENTS = {
    "reflow": Student("reflow", (1, 2, 4)),
    "one step, after reflow": Student("onestep", (1,), teacher="reflow"),
    "one step": Student("onestep", (1,)),
    "two steps": Student("onestep", (2,), {"steps": 2}, everywhere=False),
    "four steps": Student("onestep", (4,), {"steps": 4}, everywhere=False),
    "BOSS": Student("boss", (4,), {"steps": 4}, everywhere=False),
    "rectified diffusion": Student("rectified-diffusion", (1, 4), everywhere=False),
}
ON_GRID = "teacher on the grid of BOSS"
OF_TEACHER = "of teacher's 16"


@dataclass(frozen=True)
class Bench:
    """Where the students lie, and how large they are trained."""

    settings: dict[str, dict[str, int]]
    work: Path

    def student(self, data: str, seed: int, name: str) -> tuple[ClassConditionalPipeline, float | None]:
        """Returns a student, trained where that is yet to be done, and the processor time of it, None where a part was there."""
        how, sizes = STUDENTS[name], self.settings[data]
        teacher = pipeline(data) if how.teacher is None else self.student(data, seed, how.teacher)[0]
        folder = self.work / f"{data}-{sizes['pairs']}-{sizes['updates']}" / str(seed)
        output = folder / name.replace(",", "").replace(" ", "-")
        fresh = not output.exists() and not output.with_name(f"{output.name}.unfinished").exists()
        began = time.thread_time()
        method = METHODS[how.method](**how.options)
        made = run(method, teacher, output=output, samples=sizes["pairs"], steps=sizes["updates"], seed=seed)
        seconds = time.thread_time() - began if fresh else None
        made.unet.to(memory_format=torch.channels_last)
        made.set_progress_bar_config(disable=True)
        return made, seconds

    def row(self, data: str, seed: int | None, name: str) -> Record:
        """Trains and measures one student, or the teacher: figures by number of steps."""
        images, made = self.settings[data]["images"], pipeline(data)
        if seed is None:
            return {"figures": figures(made, data, images, TEACHER_STEPS)}
        if name == ON_GRID:
            made.scheduler = self.student(data, seed, "BOSS")[0].scheduler
            return {"figures": figures(made, data, images, STUDENTS["BOSS"].steps)}
        made, seconds = self.student(data, seed, name)
        return {"seconds": seconds and round(seconds, 1), "figures": figures(made, data, images, STUDENTS[name].steps)}


def pipeline(data: str) -> ClassConditionalPipeline:
    """An embedded model under Euler on even steps."""
    pipe = load_demo(data)
    pipe.scheduler = RectifiedFlowScheduler(solver="euler")
    pipe.unet.to(memory_format=torch.channels_last)  # a third faster on CPUs
    pipe.set_progress_bar_config(disable=True)
    return pipe


def figures(pipe: ClassConditionalPipeline, data: str, images: int, steps: Sequence[int]) -> Record:
    """Fréchet distances with their standard errors, in the classifier's features and in pixels, at each number of steps."""
    found = {}
    for k in steps:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
            result = evaluate(
                pipe, data, images, extractor=["classifier", "pixels"], inputs=range(pipe.num_classes),
                call={"num_inference_steps": k}, batch_size=250, progress=False,
            )  # fmt: skip
        found[str(k)] = {
            name: [float(f"{result[key]:.4g}"), float(f"{result.se[key]:.2g}")]
            for name, key in (("fd", "fid"), ("pixels", "fid/pixels"))
        }
    return found


def wanted(data: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, tuple[str, int | None, str]]]:
    """The keys of some rows, and what they are of."""
    for one in data:
        yield f"{one}/teacher", (one, None, "teacher")
        extra = [*(name for name, how in STUDENTS.items() if not how.everywhere), ON_GRID]
        everywhere = [name for name in STUDENTS if name not in extra]
        chosen = [(seed, name) for seed in seeds for name in everywhere]
        if one == MODELS[0] and SEEDS[0] in seeds:
            chosen += [(SEEDS[0], name) for name in extra]
        yield from ((f"{one}/{seed}/{name}", (one, seed, name)) for seed, name in chosen)


def measure(file: Path, bench: Bench, data: Sequence[str], seeds: Sequence[int]) -> Record:
    """Makes what a file does not hold yet, and writes it after each row.

    Raises:
        ValueError: for a file of other settings.
    """
    results = read(file)
    for one in data:
        if results["settings"].get(one, bench.settings[one]) != bench.settings[one]:
            raise ValueError(f"{file} holds rows of {one} with other settings; name another file with --output")
    todo = {key: what for key, what in wanted(data, seeds) if key not in results["rows"]}
    print(f"{len(todo)} rows to measure: {'; '.join(todo) or 'none'}", flush=True)
    for i, (key, what) in enumerate(todo.items(), 1):
        print(f"{i} of {len(todo)}: {key}", flush=True)
        row = bench.row(*what)
        results = read(file)  # another process may have added to it
        results["settings"][what[0]] = bench.settings[what[0]]
        results["rows"][key] = row
        write_bytes(file, encoded(results))
    return results


def read(file: Path) -> Record:
    """What a file holds; nothing where there is none."""
    found: Record = {"settings": {}, "rows": {}}
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else found


def encoded(results: Record) -> bytes:
    """A file of results: a row a line, in the order of `wanted`."""
    rows, settings = results["rows"], json.dumps(results["settings"])
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(rows[k])}" for k, _ in wanted(MODELS, SEEDS) if k in rows)
    return f'{{\n "settings": {settings},\n "rows": {{\n{lines}\n }}\n}}\n'.encode()


def tables(results: Record) -> str:
    """The tables of docs/distill.md: a line for each student and number of steps, a seed of the training beside the other."""
    parts = []
    for data, sizes in results["settings"].items():
        rows = {k.removeprefix(f"{data}/"): row for k, row in results["rows"].items() if k.startswith(f"{data}/")}
        if "teacher" not in rows:
            continue
        base = rows["teacher"]["figures"]["16"]
        body = []
        for name in ("teacher", ON_GRID, *STUDENTS):
            found = [row for key, row in rows.items() if key.rpartition("/")[2] == name]
            for k in found[0]["figures"] if found else ():
                fd, pixels = ([row["figures"][k][kind] for row in found] for kind in ("fd", "pixels"))
                seconds = [row["seconds"] for row in found if row.get("seconds")]
                body.append([
                    name, k, ", ".join(f"{v:.2f}" for v, _ in fd), f"{max(se for _, se in fd):.2f}",
                    ratio(fd, base["fd"]), f"{fmean(v for v, _ in pixels):.2f}", ratio(pixels, base["pixels"]),
                    f"{fmean(seconds):.0f}" if seconds else "",
                ])  # fmt: skip
        head = ["", "steps", "FD, each seed", "largest SE", OF_TEACHER, "pixel FD", OF_TEACHER, "CPU-seconds"]
        title = f"**{data}**: {sizes['pairs']:,} pairs, {sizes['updates']:,} updates, {sizes['images']:,} images a row"
        parts.append(f"{title}\n\n{markdown(head, body, text=(0,))}")
    return "\n".join(parts)


def ratio(found: Sequence[Sequence[float]], base: Sequence[float]) -> str:
    """The mean over seeds as a multiple of the teacher's."""
    return f"{fmean(v for v, _ in found) / base[0]:.2f}"


def draw(bench: Bench, file: Path, data: Sequence[str]) -> None:
    """Draws samples of the same noise and classes: the teacher in one step, its students in one, the teacher in many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.5 * len(data)), dpi=100, facecolor="white")
    columns = 12
    for axes, one in zip(figure.subplots(len(data), 1, squeeze=False)[:, 0], data, strict=True):
        teacher = pipeline(one)
        students = [bench.student(one, SEEDS[0], name)[0] for name in ("reflow", "one step, after reflow")]
        shown = {"teacher, 1 step": teacher, "reflow, 1 step": students[0], "one step, after reflow": students[1]}
        drawn = [(pipe, 1) for pipe in shown.values()] + [(teacher, 16)]
        tiles = []
        for pipe, k in drawn:
            call = {"num_inference_steps": k}
            (block,) = sample_images(pipe, columns, inputs=range(pipe.num_classes), call=call, batch_size=columns)
            tiles += [picture(image) for image in block]
        axes.imshow(mosaic(tiles, columns))
        axes.set_yticks([24 + 50 * i for i in range(len(drawn))], [*shown, "teacher, 16 steps"])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    write_bytes(file, buffer.getvalue())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Distilled students of the embedded models.")
    parser.add_argument("--data", nargs="+", choices=MODELS, default=MODELS, help="models")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="of recording and training")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the students")
    parser.add_argument("--fast", action="store_true", help="a smoke run, to another --output and --work")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows that are there")
    parser.add_argument("--picture", action="store_true", help="draw docs/distill.png")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    disable_progress_bar()  # of loading a model
    bench = Bench(FAST if options.fast else FULL, options.work)
    if options.picture:
        draw(bench, ROOT / "docs" / "distill.png", options.data)
        return
    results = read(options.output) if options.table else measure(options.output, bench, options.data, options.seeds)
    print(tables(results), end="")


if __name__ == "__main__":
    main()

"""What a sweep costs beyond its sampling, and what happens to its cells when a worker is killed.

    python benchmarks/sweep.py                   # some fifteen minutes on one core; prints tables, writes benchmarks/sweep.json
    python benchmarks/sweep.py --text-to-image   # network evaluations of examples/sweep_text_to_image.yaml, from a tiny model
    python benchmarks/sweep.py --picture DIR     # docs/sweep.png from the report of examples/sweep_digits.yaml in DIR

Cost: 24 cells of the embedded model by `flowkit.eval.run_sweep`, and the same cells by `flowkit.eval.evaluate`, one after the
other, with the same loaded pipeline; one process, one thread, interleaved, medians of three rounds, in seconds. Other processes
hardly move the CPU time of the thread, so one more sweep has its cells timed by that. Kill: two workers on a PostgreSQL server
of their own share 40 cells, and one is killed with ``kill -9`` in a cell.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import diffusers
import optuna
import torch
import yaml
from optuna.trial import TrialState
from PIL import Image

import flowkit
from flowkit.eval import collect, run_sweep
from flowkit.eval.features import PixelExtractor
from flowkit.eval.pictures import save_png
from flowkit.eval.statistics import FeatureStats
from flowkit.eval.sweep import cells, planning
from flowkit.eval.sweep.config import read
from flowkit.eval.sweep.storage import storage_url
from flowkit.eval.sweep.study import Entry, Study
from flowkit.pipelines import swap
from flowkit.progress import bar
from flowkit.weights import write_bytes

ROOT, ROUNDS = Path(__file__).resolve().parents[1], 3
EXAMPLE = ROOT / "examples" / "sweep_text_to_image.yaml"
COMMON = {"model": "digits", "reference": "digits", "labels": "0-9"}
COST = {
    **COMMON,
    "name": "cost",
    "images": 500,
    "axes": {"solver": ["euler", "dpm++2m", "unipc"], "steps": [2, 3, 4, 5, 6, 8, 10, 12]},
}
KILL = {
    **COMMON,
    "name": "kill",
    "images": 100,
    "axes": {"solver": ["euler", "unipc"], "steps": list(range(1, 11)), "guidance_scale": [1.0, 1.5]},
}
# The scheduler of Stable Diffusion 1.5.
PNDM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}
PICTURE = (1280, 960)  # pixels of docs/sweep.png
Seconds = dict[str, float]


def timed(call: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What a call returns, its seconds, and those of the processor in this thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    found = call()
    return found, {"wall": time.perf_counter() - wall, "cpu": time.thread_time() - cpu}


def cost() -> dict[str, Any]:
    """Seconds of 24 cells: by a sweep, by calls of `flowkit.eval.evaluate`, and of their sampling and features alone."""
    config = read(COST)
    pipe = flowkit.load_demo("digits")
    own, ours, theirs = pipe.scheduler, list[Seconds](), list[Seconds]()

    def one_by_one() -> float:
        spent = []
        for cell in config.cells():
            pipe.scheduler = swap.make(own, "flowkit", cells.knobs(config, cell))
            result = flowkit.eval.evaluate(
                pipe, "digits", config.images, inputs=range(10), call=cells.call(config, cell), batch_size=config.batch_size,
                keep=config.keep, progress=False,
            )  # fmt: skip
            spent.append(sampling_and_features(result.spec))
        return math.fsum(spent)

    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            entries, seconds = timed(lambda number=number: run_sweep(COST, Path(folder) / str(number), progress=False))
            cell_seconds = math.fsum(sampling_and_features(done(entry)["spec"]) for entry in entries)
            ours.append({**seconds, "cells": cell_seconds})
            cell_seconds, seconds = timed(one_by_one)
            theirs.append({**seconds, "cells": cell_seconds})
            print(f"round {number + 1} of {ROUNDS}: sweep {ours[-1]}, evaluate {theirs[-1]}")
    return {
        "cells": len(config.cells()),
        "images": config.images,
        "sweep": ours,
        "evaluate": theirs,
        "sweep by CPU time": by_cpu_time(),
    }


def by_cpu_time() -> Seconds:
    """CPU seconds of the sweep, and of the sampling and features of its cells, which are otherwise timed by the clock."""
    clock = collect.time
    collect.time = types.SimpleNamespace(perf_counter=time.thread_time)
    try:
        with tempfile.TemporaryDirectory() as folder:
            entries, seconds = timed(lambda: run_sweep(COST, Path(folder) / "sweep", progress=False))
    finally:
        collect.time = clock
    return {**seconds, "cells": math.fsum(sampling_and_features(done(entry)["spec"]) for entry in entries)}


def sampling_and_features(spec: Any) -> float:  # noqa: ANN401
    """Seconds of a cell that went into samples and their features."""
    return float(spec["seconds"]["sampling"] + spec["seconds"]["features"])


def done(entry: Entry) -> Any:  # noqa: ANN401
    """The result of a cell that must be done."""
    if entry.result is None:
        raise RuntimeError(f"a cell is {entry.state}: {entry.error}")
    return entry.result


def kill() -> dict[str, Any]:
    """How 40 cells end that two workers share, of which one is killed in a cell after it has done five."""
    config = read(KILL)
    with helper("postgres").server() as url, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kill.yaml"
        write_bytes(file, yaml.safe_dump(KILL).encode())
        command = [
            sys.executable,
            "-m",
            "flowkit.cli",
            "sweep",
            "run",
            file,
            "--output",
            f"{folder}/out",
            "--storage",
            url,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) for _ in range(2)]
        victim = f"process {workers[0].pid}"
        study, opened = Study(config, storage_url(url, Path(folder))), False
        while True:  # until it has done five cells and is in another
            if not opened:
                try:
                    study.open(make=False)
                    opened = True
                except FileNotFoundError:
                    time.sleep(1)
                    continue
            mine = [entry.state for entry in study.entries() if (entry.worker or "").endswith(victim)]
            if mine.count("done") >= 5 and "running" in mine:
                workers[0].send_signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        workers[0].wait()
        if workers[1].wait() != 0:
            raise RuntimeError(f"the other worker ended with {workers[1].returncode}")
        entries = study.entries()
        there = optuna.load_study(study_name="kill", storage=storage_url(url, Path(folder)))
        finished = Counter(t.user_attrs["slot"] for t in there.trials if t.state == TrialState.COMPLETE)
        failed = [t.user_attrs for t in there.trials if t.state == TrialState.FAIL]
        cut = [attributes["slot"] for attributes in failed if "withdrawn" not in attributes]
    by = Counter("killed" if (entry.worker or "").endswith(victim) else "other" for entry in entries)
    return {
        "cells": len(entries),
        "done": sum(entry.state == "done" for entry in entries),
        "by the worker that was killed": by["killed"],
        "by the other": by["other"],
        "begun by the one, finished by the other": sum(finished[slot] == 1 for slot in cut),
        "done twice": sum(count > 1 for count in finished.values()),
        "lost": len(entries) - len(finished),
    }


def helper(name: str) -> Any:  # noqa: ANN401
    """A module of tests/, which is no package, and whose name a dependency has taken."""
    package = types.ModuleType("sweep_tests")
    package.__path__ = [str(ROOT / "tests")]
    sys.modules.setdefault("sweep_tests", package)
    return importlib.import_module(f"sweep_tests.{name}")


def table(found: dict[str, Any]) -> str:
    """The tables of docs/sweeps.md."""
    cost, killed = found["cost"], found["kill"]

    def row(name: str, times: list[Seconds], clock: str = "wall") -> str:
        whole = statistics.median(one[clock] for one in times)
        ratio = statistics.median(one[clock] / one["cells"] for one in times)
        return f"| {name} | {whole:.1f} | {ratio:.2f}x |"

    lines = [
        f"| {cost['cells']} cells of {cost['images']} images, one thread | seconds | of sampling and features |",
        "| --- | ---: | ---: |",
        row("`run_sweep`", cost["sweep"]),
        row("`evaluate`, cell after cell", cost["evaluate"]),
        row("`run_sweep`, CPU time", [cost["sweep by CPU time"]], "cpu"),
        "",
        "| two workers on PostgreSQL, one killed with `kill -9` in a cell | cells |",
        "| --- | ---: |",
        *(f"| {name} | {count} |" for name, count in killed.items()),
    ]
    return "\n".join(lines)


def text_to_image() -> str:
    """The table of what an image of each cell of the example costs: the example, with a tiny random model and features of pixels.

    Adaptive guidance decides by the outputs of the network, so its cells are tried twice, cut at once and never. Every cell is
    tried itself: a plan of all would tell those of more steps from those of the fewest.
    """
    diffusers.logging.set_verbosity_error()  # the tiny tokenizer cuts the prompts
    data, tiny = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")), helper("tiny")
    lines, ends, count = ["| cell | cells | evaluations for one image |", "| --- | ---: | ---: |"], [0.0, 0.0], 0
    with tempfile.TemporaryDirectory() as folder, bar(True) as shown:
        tiny.build("sd15", diffusers.PNDMScheduler(**PNDM)).save_pretrained(f"{folder}/model")
        pixels = PixelExtractor(3)
        reference = FeatureStats.empty(pixels.dim, pixels.identity)
        reference.update(torch.zeros(2, pixels.dim))
        reference.save(f"{folder}/reference.safetensors")
        content = {name: value for name, value in data.items() if name not in ("variant", "extractor", "dtype")} | {
            **{
                "model": f"{folder}/model",
                "reference": f"{folder}/reference.safetensors",
                "metrics": ["fid"],
                "images": 2,
            },
            **{"objectives": ["fid"], "call": {**data["call"], "height": 16, "width": 16}},
        }
        for axes, steps in ((given, steps) for given in data["axes"] for steps in given["steps"]):
            found = []
            for threshold in (-2.0, 2.0):
                config = read({**content, "axes": cut_at({**axes, "steps": [steps]}, threshold)}, EXAMPLE.parent)
                found.append(planning.costs(config, Path(folder) / "out", shown))
            kinds: dict[str, list[tuple[float, float]]] = {}
            for low, high in zip(*found, strict=True):
                name = [
                    low.cell.get("solver") or "PNDM",
                    f"{steps} steps",
                    *(low.cell.get("guidance") or {"method": "plain"}).values(),
                ]
                kinds.setdefault(", ".join(name[:3]), []).append((low.evaluations, high.evaluations))
            for kind, costs in kinds.items():
                lines.append(f"| {kind} | {len(costs)} | {span(*costs[0])} |")
                ends = [end + math.fsum(own) for end, own in zip(ends, zip(*costs, strict=True), strict=True)]
                count += len(costs)
    images = data["images"]
    lines.append(f"| all, {images} images each | {count} | {span(*(images * end for end in ends))} in all |")
    return "\n".join(lines)


def cut_at(axes: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Axes with another threshold of adaptive guidance."""
    if "guidance" not in axes:
        return axes
    return {**axes, "guidance": [m if m == "none" else {**m, "threshold": threshold} for m in axes["guidance"]]}


def picture(report: Path, target: Path) -> None:
    """Writes the top of a report as a PNG of few colours."""
    pages = helper("pages")
    with pages.chromium() as browser, pages.opened(browser, report.resolve(), *PICTURE, "light") as page:
        shot = Image.open(BytesIO(page.screenshot()))
    save_png(target, shot.convert("RGB").quantize(64))


def span(low: float, high: float) -> str:
    """A number, or two where they differ."""
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description="Measure what a sweep costs.")
    parser.add_argument("--table", action="store_true", help="print the tables of the committed JSON, measure nothing")
    parser.add_argument(
        "--text-to-image", action="store_true", help="only plan the text-to-image example, with a tiny model"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="DIR", help="only draw docs/sweep.png from the report of a sweep"
    )
    given, file = parser.parse_args(), Path(__file__).with_suffix(".json")
    if given.table:
        print(table(json.loads(file.read_text())))
        return
    if given.picture:
        picture(given.picture / "report.html", ROOT / "docs" / "sweep.png")
        return
    torch.set_num_threads(1)
    if given.text_to_image:
        print(text_to_image())
        return
    found = {"cost": cost(), "kill": kill()}
    found["made_on"] = {
        "torch": torch.__version__,
        "optuna": optuna.__version__,
        "machine": platform.machine(),
        "threads": 1,
    }
    print(table(found))
    write_bytes(file, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

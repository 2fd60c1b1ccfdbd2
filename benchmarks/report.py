"""What a report of many cells weighs, and how fast it opens, sorts and filters in headless Chromium.

    python benchmarks/report.py          # about a minute; writes benchmarks/report.json and prints its table

The results are made up: every cell has two metrics with delete-one values, a provenance, and a picture of 8 samples of 128 pixels
as a JPEG of about 40 kB; some cells have failed. Opening is timed from the navigation to the end of the load event, sorting and
filtering from the event to the second frame after it, which is drawn with the result; each is the median over fresh pages.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.progress import track

from flowkit.eval.report import write_report
from flowkit.weights import write_bytes

CELLS, REPEATS, CHUNKS = (24, 100, 300), 5, 20
SOLVERS = ("euler", "heun", "midpoint", "dpmpp2m", "unipc")
GUIDANCE = ("none", "AdaptiveGuidance(threshold=0.991)", "IntervalGuidance(low=0.2, high=0.8)")
STEPS = (4, 6, 8, 12, 16, 24, 32)

SORT = "document.querySelectorAll('th button')[6].click();"
FILTER = """const box = document.querySelector('[type=search]');
  box.value = 'heun';
  box.dispatchEvent(new Event('input', {bubbles: true}));"""
# Resolves with the milliseconds from an event to the second frame after it.
TIMED = """() => new Promise((done) => {
  const start = performance.now();
  %s
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""


def results(cells: int, folder: Path, pictures: bool = True) -> dict[str, Any]:
    """Writes ``results.json`` of so many made-up cells, with their pictures, and returns what it holds."""
    random = np.random.default_rng(0)
    chunks = random.normal(size=CHUNKS) * 0.05  # the noise that all cells share, as with equal seeds
    rows: list[dict[str, Any]] = []
    for i in range(cells):
        solver, steps = SOLVERS[i % 5], STEPS[i // 5 % 7]
        guidance, scale = GUIDANCE[i // 35 % 3], (1.5, 3.0, 5.0)[i // 105 % 3]
        settings = {"solver": solver, "steps": steps, "guidance": guidance, "guidance_scale": scale, "grid": "uniform"}
        row: dict[str, Any] = {
            "name": f"{solver}, {steps} steps" + f", {guidance.split('(')[0]}" * (guidance != "none"),
            "settings": settings,
            "spec": {
                "pipeline": {"class": "ClassConditionalPipeline", "settings": settings},
                "samples": {"count": 2000, "seed": 0, "inputs_sha256": "9f2c" * 16},
                "extractor": {"name": "classifier", "weights_sha256": "07ab" * 16, "dtype": "float32"},
                "versions": {"torch": "2.11.0", "diffusers": "0.42.1", "flowkit": "0.1.0"},
            },
        }
        rows.append(row)
        if i % 17 == 11:
            row["error"] = f"RuntimeError: out of memory in cell {i}\n  tried to allocate 2.0 GiB"
            continue
        order = {"euler": 1.0, "midpoint": 1.6}.get(solver, 2.0)
        evaluations = steps * (2 if solver in ("heun", "midpoint") else 1) * (1 if guidance == "none" else 1.6)
        fid = 2.1 + 60 * evaluations**-order + 0.15 * abs(scale - 3) + 0.3 * random.random()
        own = random.normal(size=CHUNKS) * 0.01
        row |= {
            "evaluations": round(evaluations, 1),
            "seconds": round(3.1 * evaluations + random.random(), 2),
            "pairs": "seed 0",
            "metrics": {
                "fid": jackknifed(fid, fid / 9 * (chunks + own)),
                "clip": jackknifed(0.24 + 0.07 * (1 - math.exp(-evaluations / 9)), 0.01 * (chunks - own)),
            },
        }
        if i % 13 == 5:
            del row["metrics"]["clip"]
        if pictures:
            row["image"] = f"cell-{i}.jpg"
            samples(random).save(folder / row["image"], quality=86)
    found = {
        "title": f"A sweep of {cells} cells",
        "summary": "Solvers, steps and guidance on made-up figures, to see what a report of this size weighs.",
        "spec": {"model": "none", "images": 2000, "seed": 0},
        "objectives": [{"key": "fid", "direction": "lower"}, {"key": "evaluations", "direction": "lower"}],
        "rows": rows,
    }
    write_bytes(folder / "results.json", json.dumps(found).encode())
    return found


def jackknifed(value: float, noise: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A metric with its delete-one values and their error."""
    left_out = [value + float(n) for n in noise]
    mean = statistics.fmean(left_out)
    se = math.sqrt((CHUNKS - 1) / CHUNKS * math.fsum((v - mean) ** 2 for v in left_out))
    return {"value": value, "se": se, "left_out": left_out}


def samples(random: np.random.Generator) -> Image.Image:
    """Eight smooth blobs side by side, with the grain that makes a JPEG as large as that of a photograph."""
    y, x = np.mgrid[0:128, 0:1024] / 128
    waves = [np.sin(a * x + b * y + c) for a, b, c in random.uniform(1, 7, size=(3, 3))]
    pixels = 128 + 90 * np.stack(waves, -1) + random.normal(size=(128, 1024, 3)) * 13
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def measure(browser: Browser, page_file: Path) -> dict[str, float]:
    """Milliseconds to open, to sort and to filter, on a fresh page."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    opened = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    found = {"open_ms": opened, "sort_ms": page.evaluate(TIMED % SORT), "filter_ms": page.evaluate(TIMED % FILTER)}
    page.close()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| cells | size | written in | opens in | sorts in | filters in |", f"|{' ---: |' * 6}"]
    for row in rows:
        times = " | ".join(f"{row[key]} ms" for key in ("open_ms", "sort_ms", "filter_ms"))
        lines.append(f"| {row['cells']} | {row['megabytes']} MB | {row['write_s']} s | {times} |")
    return "\n".join(lines)


def main() -> None:
    """Builds and opens reports of each size, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="Measure what a report weighs and how fast it is.")
    parser.add_argument("--table", action="store_true", help="print the table of the committed JSON, measure nothing")
    file = Path(__file__).with_suffix(".json")
    if parser.parse_args().table:
        print(table(json.loads(file.read_text())["rows"]))
        return
    rows = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or playwright.chromium.executable_path
        )
        for cells in track(CELLS, "reports"):
            results(cells, Path(folder))
            start = time.perf_counter()
            page = write_report(folder)
            row: dict[str, Any] = {"cells": cells, "write_s": round(time.perf_counter() - start, 2)}
            row |= {"megabytes": round(page.stat().st_size / 1e6, 2)}
            passes = [measure(browser, page) for _ in range(REPEATS)]
            row |= {key: round(statistics.median(p[key] for p in passes)) for key in passes[0]}
            rows.append(row)
        made_on = {"chromium": browser.version, "machine": platform.machine(), "python": platform.python_version()}
        browser.close()
    write_bytes(file, (json.dumps({"made_on": made_on, "rows": rows}, indent=1) + "\n").encode())
    print(table(rows))


if __name__ == "__main__":
    main()

"""What a guidance scale chosen at every step gives over static ones, on the 24 classes of examples/train_shapes24.py.

    python examples/train_shapes24.py                  # once: the model
    python benchmarks/dynamic_guidance.py              # minutes on one core; writes benchmarks/dynamic_guidance.json
    python benchmarks/dynamic_guidance.py --table      # prints the table of docs/guidance.md from the committed JSON

Trains the evaluators on pictures that the model has not seen, draws the same samples under each static scale and under dynamic
guidance, and compares them sample by sample: in the score that dynamic guidance optimises, and in figures that it knows nothing
of, the confidence and accuracy of the folder's own classifier and the Frechet distances to reference pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import diffusers
import torch
from rich.progress import Progress
from torch import Tensor
from train_shapes24 import CLASSES, HELD_OUT, Shapes24Extractor, extractors, pictures, references

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler
from flowkit.eval.frechet import frechet_distance, jackknife_distances
from flowkit.eval.intervals import jackknife_error
from flowkit.eval.statistics import FeatureStats, merged
from flowkit.guidance import DynamicGuidance, train_evaluators
from flowkit.guidance.latent_evaluators import LatentNetwork
from flowkit.hooks import attach
from flowkit.pipelines import sampling
from flowkit.weights import write_bytes

FILE = Path(__file__).with_suffix(".json")
SCALES, DEFAULT, STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5), 2.0, 16
TRAINED_ON, TRAINING_SEED, SAMPLES, SEED, CHUNK = 40 * CLASSES, 1, 22 * CLASSES, 0, 2 * CLASSES
CALL = {"guidance_scale": 2.0, "num_inference_steps": STEPS, "output_type": "latent"}


def draw(pipe: ClassConditionalPipeline, guidance: DynamicGuidance, samples: int, display: Progress) -> dict[str, Any]:
    """Samples, (N, 3, 16, 16) in [-1, 1], with network rows and CPU seconds a sample, and the mean scale at each step."""
    inputs = list(range(CLASSES))
    blocks = sampling.blocks(pipe, samples, inputs=inputs, batch_size=CHUNK)
    parts, chosen, start = [], [], time.process_time()
    with attach(pipe, guidance) as run:
        task = display.add_task(
            ", ".join(type(e).__name__ for e in guidance.evaluators) or f"w = {guidance.default:g}", total=len(blocks)
        )
        for _, output in sampling.sample_outputs(pipe, blocks, seed=SEED, inputs=inputs, call=CALL):
            parts.append(output.images)
            chosen.append([float(step.report["scale"].mean()) for step in run.steps])
            display.advance(task)
    return {
        "x": torch.cat(parts),
        "rows": run.rows / samples,
        "seconds": (time.process_time() - start) / samples,
        "scales": [sum(column) / len(column) for column in zip(*chosen, strict=True)],
    }


@torch.no_grad()
def judged(
    x: Tensor, labels: Tensor, evaluators: dict[str, LatentNetwork], sigma: float, classifier: Shapes24Extractor
) -> dict[str, Tensor]:
    """Scores of final samples, one a sample: by each evaluator at the last level, and by the folder's classifier."""
    found = {name: network(x, sigma, {"class_labels": labels}) for name, network in evaluators.items()}
    log_p = classifier.network(x.clamp(-1, 1)).log_softmax(1)
    return found | {
        "log p, independent": log_p.gather(1, labels[:, None])[:, 0],
        "accuracy": (log_p.argmax(1) == labels).float(),
    }


def distances(x: Tensor, folder: Path) -> dict[str, float]:
    """Frechet distances to the folder's references, with jackknife errors."""
    pixels, figures = sampling.as_uint8(x.clamp(-1, 1) / 2 + 0.5, range(len(x))), {}
    for extractor, file in zip(extractors(folder), references(folder), strict=True):
        reference, chunks = FeatureStats.load(file), []
        for batch in pixels.split(CHUNK):
            chunks.append(FeatureStats.empty(extractor.dim, extractor.identity))
            chunks[-1].update(extractor(batch))
        ours = merged(chunks)
        key = f"FD, {extractor.name}"
        figures[key] = frechet_distance(reference.mean, reference.covariance(), ours.mean, ours.covariance())
        figures[f"{key}, error"] = jackknife_error(jackknife_distances(chunks, reference))
    return figures


def paired(values: Tensor) -> tuple[float, float]:
    """Mean of differences, and its standard error."""
    return float(values.double().mean()), float(values.double().std() / math.sqrt(len(values)))


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/guidance.md."""
    lines = ["| method | score | log p | accuracy | FD, classifier | FD, pixels |", f"| --- |{' ---: |' * 5}"]
    for row in rows:
        cells = [
            f"{row[f'{key}, less w = {DEFAULT:g}']:+.3f} ± {row[f'{key}, error of the difference']:.3f}"
            for key in ("score", "log p, independent")
        ]
        cells += [f"{row['accuracy']:.3f}"]
        cells += [f"{row[key]:.2f} ± {row[f'{key}, error']:.2f}" for key in ("FD, classifier", "FD, pixels")]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains, samples, compares, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description="Compare dynamic guidance with static scales.")
    parser.add_argument(
        "--model", type=Path, default=Path("runs/shapes24"), help="what train_shapes24.py wrote (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="images a row, a multiple of 24 (default: %(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the committed JSON, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(FILE.read_text())["rows"]))
        return
    folder, samples = arguments.model, arguments.samples
    if samples < CLASSES or samples % CLASSES:
        parser.error(f"--samples {samples} is no multiple of {CLASSES}; give e.g. {SAMPLES}")
    if not (folder / "model_index.json").is_file():
        parser.error(f"{folder} holds no model; run python examples/train_shapes24.py --output {folder}")
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    pipe = ClassConditionalPipeline.from_pretrained(folder, scheduler=RectifiedFlowScheduler())
    labels = torch.arange(samples) % CLASSES
    with Progress() as display:
        tasks = {name: display.add_task(name, total=1.0) for name in ("predictions", "discriminator", "classifier")}
        data, classes = pictures(HELD_OUT, TRAINED_ON)
        discriminator, classifier = train_evaluators(
            pipe,
            data / 127.5 - 1,
            classes,
            call=CALL,
            scales=SCALES,
            seed=TRAINING_SEED,
            on_progress=lambda name, done: display.update(tasks[name], completed=done),
        )
        assert classifier is not None
        evaluators: dict[str, LatentNetwork] = {"discriminator": discriminator, "classifier": classifier}
        methods = {f"w = {w:g}": DynamicGuidance((), [w]) for w in SCALES} | {
            "dynamic": DynamicGuidance((discriminator, classifier), SCALES, DEFAULT),
            "dynamic, discriminator alone": DynamicGuidance(discriminator, SCALES, DEFAULT),
            "dynamic, classifier alone": DynamicGuidance(classifier, SCALES, DEFAULT),
        }
        drawn = {name: draw(pipe, method, samples, display) for name, method in methods.items()}
    sigma = float(pipe.scheduler.sigmas[STEPS - 1])
    independent = Shapes24Extractor(folder)
    scores = {name: judged(run["x"], labels, evaluators, sigma, independent) for name, run in drawn.items()}
    default = scores[f"w = {DEFAULT:g}"]
    # The score that is optimised, in units of the spread among samples of the default scale.
    worth = {name: network.reliability(sigma) for name, network in evaluators.items()}
    for found in scores.values():
        z = [worth[name] * (found[name] - default[name].mean()) / default[name].std() for name in evaluators]
        found["score"] = torch.stack(z).sum(0) / sum(worth.values())
    rows = []
    for name, run in drawn.items():
        row: dict[str, Any] = {
            "method": name,
            "network rows a sample": run["rows"],
            "CPU seconds a sample": run["seconds"],
        }
        row["mean scale at each step"] = run["scales"]
        for key, values in scores[name].items():
            row[key] = float(values.mean())
            row[f"{key}, less w = {DEFAULT:g}"], row[f"{key}, error of the difference"] = paired(values - default[key])
        rows.append(row | distances(run["x"], folder))
    result = {
        "made_on": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "machine": platform.machine(),
            "threads": 1,
        },
        "samples": samples,
        "steps": STEPS,
        "scales": SCALES,
        "default": DEFAULT,
        "reliability by flow time": {name: network.measured for name, network in evaluators.items()},
        "rows": rows,
    }
    print(table(rows))
    write_bytes(FILE, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

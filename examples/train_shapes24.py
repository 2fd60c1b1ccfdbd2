"""Trains a flow model of 24 classes, harder to keep apart than the embedded ones, and measures it with and without guidance.

    python examples/train_shapes24.py                                  # to runs/shapes24
    python examples/train_shapes24.py --output elsewhere --steps 8000

The pictures are a disc, square, triangle or cross in one of six colours, turned by any angle, on a coloured background. The
folder is a diffusers pipeline of a class-conditional rectified flow (model time 1000 s, the null class is 24), and beside it

    classifier.safetensors             the classifier, whose features the Frechet distances are taken in
    reference-classifier.safetensors   statistics of `REFERENCE_COUNT` held-out pictures in these features
    reference-pixels.safetensors       the same in the pixels, averaged over an 8x8 grid
    figures.json, samples.png          accuracy and distances by guidance scale; samples, a column for each class

Whoever measures the model elsewhere imports `references`, `extractors` and `label_accuracy` from here:

    pipe = ClassConditionalPipeline.from_pretrained(folder, scheduler=RectifiedFlowScheduler())
    evaluate(pipe, references(folder), 480, extractor=extractors(folder), inputs=list(range(24)), keep=480)

About half an hour on one core. It may be killed at any moment: called again it goes on, and ends with the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from build_assets import (
    BATCH,
    classifier_loss,
    flow_loss,
    flow_network,
    save_classifier,
    save_model,
    to_input,
)
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor, nn

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, rng, weights
from flowkit.distill import Training
from flowkit.distill.draw import Draw
from flowkit.distill.trainer import train
from flowkit.eval import (
    ClassifierExtractor,
    FeatureExtractor,
    FeatureStats,
    PixelExtractor,
    evaluate,
    frechet_distance,
)
from flowkit.eval.classifier import Classifier
from flowkit.eval.pictures import mosaic, picture, save_png
from flowkit.progress import bar

SIZE, CLASSES = 16, 24
# Red, yellow, green, cyan, blue, magenta.
COLOURS = np.array(
    [[1.0, 0.2, 0.2], [1.0, 0.85, 0.2], [0.2, 0.85, 0.3], [0.2, 0.85, 0.95], [0.25, 0.4, 1.0], [0.9, 0.3, 0.9]],
    dtype=np.float32,
)
# The three sets of pictures share no picture: each is drawn from a start of its own.
TRAIN, REFERENCE, HELD_OUT = range(3)
TRAIN_COUNT, REFERENCE_COUNT, HELD_OUT_COUNT = 48_000, 12_000, 4_800
CLASSIFIER = {"channels": 3, "size": SIZE, "width": 24, "dim": 64, "classes": CLASSES}
STEPS, CLASSIFIER_STEPS, SEED = 5000, 4000, 0
# Twenty rounds of the classes: each of the chunks that give the standard error holds one round.
SAMPLES, SAMPLE_STEPS, SCALES, SHOWN = 20 * CLASSES, 16, (1.0, 1.5, 2.0, 3.0), 1.5
DISTANCES = ("fid", "fid/pixels")
UNFINISHED, SETTINGS = "training", "training.json"
Array = np.ndarray[Any, np.dtype[Any]]
Network = TypeVar("Network", bound=nn.Module)
BatchLoss = Callable[[nn.Module, Tensor, Tensor, Generator], Tensor]


def draw(count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draws pictures; picture i depends on the generator's start and i, not on the count.

    A form is the set where its distance d is negative; a pixel's coverage is ``clip(1/2 - d, 0, 1)``. Only operations that
    IEEE 754 rounds correctly are used, so every machine draws the same bytes.

    Args:
        count: number of pictures, N.
        generator: fresh; gives nine uniform numbers a picture: centre (+-1.5 pixels in x and y), radius (4 to 6 pixels),
            brightness (0.7 to 1), turn (``2 atan t`` for t in +-0.577, every angle that a triangle or a square can have), grey
            level of the background (0 to 0.35) and what is added to its red, green and blue (0 to 0.15).

    Returns:
        Pictures, uint8 (N, 3, 16, 16), and labels ``i % 24 = 6 form + colour``, int64 (N,).
    """
    labels = np.arange(count, dtype=np.int64) % CLASSES
    u = generator.random((count, 9)).astype(np.float32).T[..., None, None]
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    across, down = grid[None, None, :] - (6.5 + 3 * u[0]), grid[None, :, None] - (6.5 + 3 * u[1])
    radius, brightness = 4 + 2 * u[2], 0.7 + 0.3 * u[3]
    t = np.float32(3**-0.5) * (2 * u[4] - 1)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    x, y = cosine * across - sine * down, sine * across + cosine * down

    disc = np.sqrt(x * x + y * y) - 0.9 * radius
    square = np.maximum(abs(x), abs(y)) - 0.8 * radius
    triangle = np.maximum(y, np.float32(0.75**0.5) * abs(x) - y / 2) - 0.6 * radius
    arm = np.float32(0.35) * radius
    cross = np.minimum(np.maximum(abs(x) - radius, abs(y) - arm), np.maximum(abs(x) - arm, abs(y) - radius))
    distance = np.choose((labels // len(COLOURS))[:, None, None], [disc, square, triangle, cross])
    coverage = np.clip(0.5 - distance, 0, 1)[:, None]
    colour = COLOURS[labels % len(COLOURS)][..., None, None] * brightness[:, None]
    background = (0.35 * u[5] + 0.15 * u[6:]).transpose(1, 0, 2, 3)
    return np.rint(255 * (background + coverage * (colour - background))).astype(np.uint8), labels


def pictures(which: int, count: int) -> tuple[Tensor, Tensor]:
    """Returns the first pictures of `TRAIN`, `REFERENCE` or `HELD_OUT`, uint8 (count, 3, 16, 16), and labels, int64 (count,)."""
    pixels, labels = draw(count, np.random.Generator(np.random.PCG64([CLASSES, which])))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


class Shapes24Extractor(ClassifierExtractor):
    """The penultimate layer of the classifier of a trained folder.

    Args:
        folder: what this script made.
        device: where to compute.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        path = Path(folder) / "classifier.safetensors"
        self.network = Classifier.load(path).to(device)
        self.dim = self.network.dim
        self.device = device
        self.identity = {
            "name": self.name,
            "dataset": "shapes24",
            "weights": hashlib.sha256(path.read_bytes()).hexdigest(),
            "preprocessing": "x / 127.5 - 1",
            "dtype": "float32",
        }


def extractors(folder: Path) -> list[FeatureExtractor]:
    """Returns the extractors of a trained folder, in the order of `references`."""
    return [Shapes24Extractor(folder), PixelExtractor(channels=3)]


def references(folder: Path) -> list[Path]:
    """Returns the files of statistics of a trained folder: those in classifier features, those in pixels."""
    return [folder / f"reference-{name}.safetensors" for name in ("classifier", "pixels")]


def statistics(pixels: Tensor, extractor: FeatureExtractor) -> FeatureStats:
    """Returns the statistics of an extractor's features of images, uint8 (N, C, H, W)."""
    stats = FeatureStats.empty(extractor.dim, extractor.identity)
    for batch in pixels.split(500):
        stats.update(extractor(batch))
    return stats


@torch.no_grad()
def label_accuracy(extractor: Shapes24Extractor, pixels: Tensor, labels: Tensor) -> float:
    """Returns the share of images, uint8 (N, C, H, W), that the classifier puts into their class."""
    return float((extractor.network(to_input(pixels)).argmax(dim=1) == labels).float().mean())


def fit(network: Network, loss: BatchLoss, steps: int, folder: Path, text: str) -> Network:
    """Trains by the recipe of build_assets.py, or goes on where the checkpoint stands; step k has its own random numbers.

    Args:
        network: trained in place.
        loss: (network, images, labels, generator) -> scalar; draws its batch with the generator.
        steps: number of steps.
        folder: of the checkpoint.
        text: what the progress bar says.

    Returns:
        The averaged network.
    """
    pixels, labels = pictures(TRAIN, TRAIN_COUNT)
    x = to_input(pixels)

    def step_loss(model: nn.Module, now: Draw) -> tuple[Tensor, None]:
        return loss(model, x, labels, Generator().manual_seed(rng.sample_seed(SEED, now.step)))[None], None

    how = Training(steps, learning_rate=2e-3, warmup=min(1.0, 100 / steps), ema=0.998)
    with bar(True) as display:
        task = display.add_task(text, total=steps)
        train(network.eval(), step_loss, how, folder, on_step=lambda done: display.update(task, completed=done))
    return network


def make_classifier(out: Path) -> None:
    """Trains and stores the classifier, where there is none."""
    if (out / "classifier.safetensors").exists():
        return
    torch.manual_seed(SEED)
    folder = out / f"classifier.{UNFINISHED}"
    network = fit(Classifier(**CLASSIFIER), classifier_loss, CLASSIFIER_STEPS, folder, "classifier")
    save_classifier(network, CLASSIFIER, out)


def make_references(out: Path) -> None:
    """Stores the statistics of the reference pictures, where there are none."""
    pixels, _ = pictures(REFERENCE, REFERENCE_COUNT)
    for extractor, file in zip(extractors(out), references(out), strict=True):
        if not file.exists():
            statistics(pixels, extractor).save(file)


def make_model(out: Path, steps: int) -> None:
    """Trains and stores the flow model, where there is none."""
    if (out / "model_index.json").exists():
        return
    torch.manual_seed(SEED)

    def loss(network: nn.Module, x: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return flow_loss(network, x, labels, CLASSES, generator)

    network = flow_network(channels=3, size=SIZE, classes=CLASSES)
    save_model(fit(network, loss, steps, out / f"model.{UNFINISHED}", "flow model"), out)


def measure(out: Path, steps: int) -> dict[str, Any]:
    """Returns the classifier's accuracy, and distances and accuracy of real pictures and of samples by guidance scale."""
    spaces, (pixels, labels) = extractors(out), pictures(HELD_OUT, HELD_OUT_COUNT)
    classifier = spaces[0]
    rows = [{"images": "held-out pictures", "accuracy": label_accuracy(classifier, pixels[:SAMPLES], labels[:SAMPLES])}]
    for key, extractor, file in zip(DISTANCES, spaces, references(out), strict=True):
        theirs, ours = FeatureStats.load(file), statistics(pixels[:SAMPLES], extractor)
        rows[0][key] = frechet_distance(theirs.mean, theirs.covariance(), ours.mean, ours.covariance())
    pipe = ClassConditionalPipeline.from_pretrained(out, scheduler=RectifiedFlowScheduler())
    for scale in SCALES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a Frechet distance of")  # every row has the same number of images
            result = evaluate(
                pipe,
                references(out),
                SAMPLES,
                extractor=spaces,
                inputs=list(range(CLASSES)),
                call={"num_inference_steps": SAMPLE_STEPS, "guidance_scale": scale},
                batch_size=120,
                keep=SAMPLES,
            )
        accuracy = label_accuracy(classifier, result.images, labels[:SAMPLES])
        row = {"images": f"samples, w = {scale:g}", "accuracy": accuracy, **result}
        rows.append(row | {f"{key} error": error for key, error in result.se.items()})
        if scale == SHOWN:
            tiles = [picture(image) for image in result.images[: 4 * CLASSES]]
            save_png(out / "samples.png", mosaic(tiles, columns=CLASSES))
    return {
        "training steps": steps,
        "held-out accuracy of the classifier": label_accuracy(classifier, pixels, labels),
        "images of a row": SAMPLES,
        "sampling steps": SAMPLE_STEPS,
        "rows": rows,
    }


def show(figures: dict[str, Any]) -> None:
    """Prints the figures."""
    table = Table(
        title=f"{figures['images of a row']} images a row, {figures['sampling steps']} steps, +- one standard error"
    )
    for heading in ("images", "label accuracy", "FD, classifier features", "FD, pixels"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    for row in figures["rows"]:
        distances = [
            f"{row[key]:.3f}" + (f" +- {row[f'{key} error']:.3f}" if f"{key} error" in row else "") for key in DISTANCES
        ]
        table.add_row(row["images"], f"{row['accuracy']:.3f}", *distances)
    console = Console()
    console.print(
        f"classifier: {figures['held-out accuracy of the classifier']:.4f} right on {HELD_OUT_COUNT:,} held-out pictures"
    )
    console.print(table)


def claim(out: Path, steps: int) -> None:
    """Notes the settings in the folder.

    Raises:
        ValueError: where it holds a run with other settings, or something else.
    """
    settings = {"steps": steps, "classifier steps": CLASSIFIER_STEPS, "batch": BATCH, "seed": SEED}
    file = out / SETTINGS
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored != settings:
            raise ValueError(f"{out} holds a run with {stored}, this one has {settings}; choose another --output")
        return
    # A run that was killed while it wrote its settings leaves a hidden temporary file.
    if out.exists() and (
        not out.is_dir() or any(not entry.name.startswith(f".{SETTINGS}.") for entry in out.iterdir())
    ):
        raise ValueError(f"{out} is not the folder of a training; choose another --output")
    weights.write_bytes(file, (json.dumps(settings, indent=1) + "\n").encode())


def main() -> None:
    """Reads the command line, trains what is missing and prints the figures."""
    parser = argparse.ArgumentParser(description="Train and measure a flow model of 24 classes of 16x16 pictures.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/shapes24"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of the flow model (default: %(default)s)")
    arguments = parser.parse_args()
    out, steps = arguments.output, arguments.steps
    if steps < 1:
        parser.error(f"--steps {steps} is no number of updates; give at least 1")
    try:
        claim(out, steps)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # so that a rerun on the same machine gives the same weights
    disable_progress_bar()  # of loading a model
    make_classifier(out)
    make_references(out)
    make_model(out, steps)
    file = out / "figures.json"
    if not file.exists():
        weights.write_bytes(file, (json.dumps(measure(out, steps), indent=1) + "\n").encode())
    for leftover in out.glob(f"*.{UNFINISHED}"):
        shutil.rmtree(leftover)
    for torn in out.glob(".*.safetensors.*"):
        torn.unlink()
    show(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()

"""Makes every file of the embedded data sets: images, classifier, reference statistics and the flow model.

    python examples/build_assets.py digits
    python examples/build_assets.py shapes --part model --out elsewhere

One thread, so that a rerun on the same machine gives the same weights. Ten minutes for digits and fifteen for shapes on a slow
core, a third of that on a fast one.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import diffusers
import numpy as np
import torch
from rich.progress import track
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flowkit import assets, weights
from flowkit.eval.classifier import Classifier

CLASSIFIERS = {
    "digits": {"channels": 1, "size": 8, "width": 32, "dim": 32, "classes": 10},
    "shapes": {"channels": 3, "size": 16, "width": 16, "dim": 48, "classes": 12},
}
MODEL_STEPS = {"digits": 3000, "shapes": 1500}
CLASSIFIER_STEPS = 3000
BATCH, LABEL_DROP, SEED = 64, 0.12, 0
# Digits have one held-out set; shapes are drawn with a seed that nothing else uses.
REFERENCE = {"digits": {"count": 500, "seed": 0}, "shapes": {"count": 12000, "seed": 1}}
Network = TypeVar("Network", bound=nn.Module)


def to_input(pixels: Tensor) -> Tensor:
    """Returns what the networks see, float32 in [-1, 1], of uint8 pixels."""
    return pixels.float() / 127.5 - 1


def train(network: Network, loss: Callable[[nn.Module], Tensor], steps: int, text: str) -> Network:
    """Minimises a loss by AdamW and returns the moving average of the weights over the second half (decay 0.998).

    Args:
        network: trained in place.
        loss: draws a batch and returns its scalar loss.
        steps: number of steps; the learning rate rises to 2e-3 over the first 100, then falls by a cosine to 2%.
        text: what the progress bar says.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    for step in track(range(steps), text):
        cosine = 0.51 + 0.49 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 100, cosine)
        optimizer.zero_grad()
        loss(network).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = 0.998 if step > steps // 2 else 0.0
        for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - decay)
    return average.eval()


def classifier_loss(network: nn.Module, x: Tensor, labels: Tensor, generator: Generator | None = None) -> Tensor:
    """Returns the cross entropy of a batch of images, a little bent and noisy, with smoothed labels.

    Smoothed labels bound the features, so that the Frechet distance in them is not ruled by the most certain images.

    Args:
        network: a classifier.
        x: all images, in [-1, 1], (N, C, H, W).
        labels: their classes, (N,).
        generator: draws the batch; None means torch's own.
    """
    pick = torch.randint(len(x), (BATCH,), generator=generator)
    affine = torch.eye(2, 3) + 0.1 * torch.randn(BATCH, 2, 3, generator=generator)
    grid = F.affine_grid(affine, [BATCH, *x.shape[1:]], align_corners=False)
    bent = F.grid_sample(x[pick], grid, padding_mode="border", align_corners=False)
    noisy = bent + 0.1 * torch.randn(bent.shape, generator=generator)
    device = next(network.parameters()).device
    return F.cross_entropy(network(noisy.to(device)), labels[pick].to(device), label_smoothing=0.1)


def flow_loss(network: nn.Module, x: Tensor, labels: Tensor, null: int, generator: Generator | None = None) -> Tensor:
    """Returns the loss of the rectified flow (Liu et al. 2022): velocity ``eps - x0`` at ``(1 - s) x0 + s eps``, model time 1000 s.

    The label is dropped (replaced by the null class) in 12% of the cases, for guidance; s is stratified over the batch.

    Args:
        network: a class-conditional UNet.
        x: all images, in [-1, 1], (N, C, H, W).
        labels: their classes, (N,).
        null: the null class.
        generator: draws the batch; None means torch's own.
    """
    pick = torch.randint(len(x), (BATCH,), generator=generator)
    x0, noise = x[pick], torch.randn(BATCH, *x.shape[1:], generator=generator)
    s = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    condition = labels[pick].masked_fill(torch.rand(BATCH, generator=generator) < LABEL_DROP, null)
    device = next(network.parameters()).device
    x0, noise, s, condition = (value.to(device) for value in (x0, noise, s, condition))
    velocity = network(x0.lerp(noise, s.view(-1, 1, 1, 1)), 1000 * s, condition).sample
    return F.mse_loss(velocity, noise - x0)


def flow_network(channels: int, size: int, classes: int) -> diffusers.UNet2DModel:
    """Returns an untrained UNet of 0.64 million weights for images (channels, size, size); its last label is the null class."""
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        norm_num_groups=8,
        num_class_embeds=classes + 1,
    )


def save_classifier(network: nn.Module, sizes: dict[str, int], out: Path) -> None:
    """Stores a classifier in float16, and the arguments that it was made with."""
    # One entry: safetensors writes several in random order, and the file's hash is the extractor's identity.
    metadata = {"sizes": json.dumps(sizes)}
    weights.write(out / "classifier.safetensors", network.half().state_dict(), metadata)


def save_model(network: diffusers.UNet2DModel, out: Path) -> None:
    """Stores a flow model in float16 as a diffusers pipeline; model_index.json comes last, so a folder that has it is whole."""
    network.half().save_pretrained(out / "unet")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).save_config(out / "scheduler")
    index = {
        "_class_name": "ClassConditionalPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    weights.write_bytes(out / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())


def build_images(name: str, out: Path) -> None:
    """Stores scikit-learn's digits, pixel v of 0..16 as ``floor((255 v + 8) / 16)``, and the split: 50 held out of each class."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = (255 * values.reshape(-1, 1, 8, 8).astype(np.int64) + 8) // 16
    held_out = np.zeros(len(labels), dtype=np.uint8)
    held_out[assets.deal(labels.astype(np.uint8), SEED)[:500]] = 1
    tensors = {"images": pixels, "labels": labels, "held_out": held_out}
    weights.write(
        out / "images.safetensors",
        {key: torch.from_numpy(value.astype(np.uint8)) for key, value in tensors.items()},
        {"attribution": "E. Alpaydin and C. Kaynak (1998), doi.org/10.24432/C50P49, CC BY 4.0; pixels rescaled"},
    )


def build_classifier(name: str, out: Path) -> None:
    """Trains the classifier on the training images and stores it in float16."""
    torch.manual_seed(SEED)
    pixels, labels = assets.images(name)
    x = to_input(pixels)
    network = train(
        Classifier(**CLASSIFIERS[name]),
        lambda network: classifier_loss(network, x, labels),
        CLASSIFIER_STEPS,
        f"{name}: classifier",
    )
    save_classifier(network, CLASSIFIERS[name], out)


def build_reference(name: str, out: Path) -> None:
    """Stores count, mean and centred second moment (a sum; covariance = m2 / (count - 1)) of held-out images in float64.

    Feature spaces: "classifier", and "pixels", the means over the blocks of an 8x8 grid, in [-1, 1], in (C, H, W) order.
    """
    file = out / "classifier.safetensors"
    x = to_input(assets.images(name, "held-out", **REFERENCE[name])[0])
    tensors: dict[str, Tensor] = {}
    for space, features in {
        "classifier": Classifier.load(file).features(x),
        "pixels": F.adaptive_avg_pool2d(x, 8).flatten(1),
    }.items():
        mean = features.double().mean(dim=0)
        centred = features.double() - mean
        tensors |= {f"{space}.mean": mean, f"{space}.m2": centred.T @ centred}
    metadata = {
        "count": str(len(x)),
        "images": f"{name} held-out, seed {REFERENCE[name]['seed']}",
        "classifier_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    weights.write(out / "reference.safetensors", tensors, metadata)


def build_model(name: str, out: Path) -> None:
    """Trains the rectified flow on the training images and stores it as a diffusers pipeline."""
    torch.manual_seed(SEED)
    pixels, labels = assets.images(name)
    x, null = to_input(pixels), assets.num_classes(name)
    network = train(
        flow_network(x.shape[1], x.shape[-1], null),
        lambda network: flow_loss(network, x, labels, null),
        MODEL_STEPS[name],
        f"{name}: flow model",
    )
    save_model(network, out)


PARTS = {"images": build_images, "classifier": build_classifier, "reference": build_reference, "model": build_model}


def main() -> None:
    """Reads the command line and builds."""
    parser = argparse.ArgumentParser(description="Make the files of an embedded data set.")
    parser.add_argument("name", choices=assets.NAMES)
    parser.add_argument("--part", choices=PARTS, help="only this; all of them if left out")
    parser.add_argument("--out", type=Path, help="folder to write; the embedded one if left out")
    arguments = parser.parse_args()
    if arguments.name == "shapes" and arguments.part == "images":
        parser.error("shapes are drawn when asked for and have no image file; leave --part images out")
    torch.set_num_threads(1)
    for part in [arguments.part] if arguments.part else PARTS:
        if (arguments.name, part) != ("shapes", "images"):
            PARTS[part](arguments.name, arguments.out or assets.folder(arguments.name))


if __name__ == "__main__":
    main()

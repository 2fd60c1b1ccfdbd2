"""The embedded data sets and models: real 8x8 digits and procedural 16x16 colour shapes.

Each folder is a diffusers pipeline of a class-conditional rectified flow (model time 1000 s, the null class is the last row of
the label embedding), with a classifier as feature extractor and the statistics of held-out images. Pixels are uint8; networks
take ``x / 127.5 - 1``. examples/build_assets.py makes every file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "held-out"]
NAMES = ("digits", "shapes")


def folder(name: str) -> Path:
    """Returns the folder of an embedded data set.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown embedded data set {name!r}; choose {' or '.join(NAMES)}")
    return Path(__file__).parent / name


def num_classes(name: str) -> int:
    """Returns the number of classes: 10 digits, or 12 shapes (3 forms x 4 colours)."""
    return {"digits": 10, "shapes": 12}[folder(name).name]


def images(name: str, split: Split = "train", count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns images of an embedded data set, dealt class by class: image i has label ``i % num_classes``.

    The digits come in a random order within each class; their training classes differ in size (124 to 133), so the last few of
    the training images break the rule. Shapes are drawn anew: image i is a function of (split, seed, i) alone.

    Args:
        name: "digits" or "shapes".
        split: "train" or "held-out"; no image is in both.
        count: number of images; None means all 1,297 or 500 digits, 24,000 or 6,000 shapes.
        seed: of the order of the digits, of the drawing of the shapes; >= 0.

    Returns:
        Images, uint8 (N, C, H, W), and labels, int64 (N,).

    Raises:
        ValueError: for an unknown name or split, a negative seed, or more images than there are.
    """
    import torch

    from flowkit import weights
    from flowkit.assets import procedural

    path = folder(name)
    if split not in ("train", "held-out"):
        raise ValueError(f"unknown split {split!r}; choose train or held-out")
    if seed < 0 or (count is not None and count < 1):
        raise ValueError(f"got count = {count}, seed = {seed}; count must be at least 1 and seed at least 0")
    held_out = split == "held-out"
    if name == "shapes":
        count = count or (6000 if held_out else 24000)
        pixels, labels = procedural.shapes(count, np.random.Generator(np.random.PCG64([held_out, seed])))
        return torch.from_numpy(pixels), torch.from_numpy(labels)
    tensors, _ = weights.read(path / "images.safetensors")
    members = np.flatnonzero(tensors["held_out"].numpy() == held_out)
    if count is not None and count > len(members):
        raise ValueError(
            f"there are {len(members)} {split} digits, got count = {count}; ask for fewer, or for None, all"
        )
    order = torch.from_numpy(members[deal(tensors["labels"].numpy()[members], seed)][:count])
    return tensors["images"][order], tensors["labels"][order].long()


def deal(labels: np.ndarray[tuple[int], np.dtype[np.uint8]], seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns a random order of items that deals the classes in turn: 0, 1, ..., 0, 1, ... while they last.

    Args:
        labels: class of each item, (N,).
        seed: of the order within the classes, >= 0.

    Returns:
        A permutation of 0 ... N-1.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty_like(order)
    for label in np.unique(labels):
        (places,) = np.nonzero(labels[order] == label)
        rank[places] = np.arange(len(places))
    return order[np.lexsort((labels[order], rank))]

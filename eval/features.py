"""Feature extractors: uint8 images in, feature vectors out, and the identity that every figure carries.

Two figures may be compared only if one extractor made the features, down to weights and preprocessing. So an extractor states
its `identity`, a dictionary of strings that goes into every file and result and is compared wherever two sets meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flowkit import assets
from flowkit.eval.classifier import Classifier


class FeatureExtractor(Protocol):
    """Anything that turns images into features."""

    @property
    def name(self) -> str:
        """Short name, used in results: ``"fid/pixels"``."""

    @property
    def dim(self) -> int:
        """Number of features d."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that changes the features, at least "name"; equal dictionaries mean comparable features."""

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, float32 (B, d), of images, uint8 (B, C, H, W)."""


class LayeredExtractor(FeatureExtractor, Protocol):
    """An extractor that can return several layers from one pass, so that metrics share it."""

    @property
    def layers(self) -> Mapping[str, int]:
        """The dimension of each layer, by name."""

    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Returns features, (B, d) by layer, of images, uint8 (B, C, H, W)."""


class Layer:
    """One layer of an extractor, as an extractor of its own that shares the network.

    Args:
        parent: the extractor.
        layer: of its `layers`.
    """

    def __init__(self, parent: LayeredExtractor, layer: str) -> None:
        check_layers((layer,), parent.layers)
        self.parent, self._layer = parent, layer
        self.name, self.dim = f"{parent.name}/{layer}", parent.layers[layer]
        self.identity = {**parent.identity, "layer": layer}

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, (B, dim), of images, uint8 (B, C, H, W)."""
        return self.parent.features(images, (self._layer,))[self._layer]


def check_layers(layers: Sequence[str], known: Mapping[str, int]) -> None:
    """Raises ValueError for no layer, or for one that is not known."""
    if not layers or isinstance(layers, str):
        raise ValueError(f"layers must be a list of names, got {layers!r}; choose of {', '.join(known)}")
    for layer in layers:
        if layer not in known:
            raise ValueError(f"unknown layer {layer!r}; choose {', '.join(known)}")


class ClassifierExtractor:
    """The penultimate layer of an embedded data set's classifier.

    Args:
        dataset: "digits" or "shapes".
        device: where to compute.
    """

    name = "classifier"

    def __init__(self, dataset: str, device: torch.device | str = "cpu") -> None:
        path = assets.folder(dataset) / "classifier.safetensors"
        self.network = Classifier.load(path).to(device)
        self.dim = self.network.dim
        self.device = device
        self.identity = {
            "name": self.name,
            "dataset": dataset,
            "weights": hashlib.sha256(path.read_bytes()).hexdigest(),
            "preprocessing": "x / 127.5 - 1",
            "dtype": "float32",
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, float32 (B, dim), of images, uint8 (B, C, H, W)."""
        with torch.no_grad(), full_float32():
            return self.network.features(check_images(images).to(self.device) / 127.5 - 1)


class PixelExtractor:
    """The pixels themselves, in [-1, 1], averaged over the blocks of a grid: what a classifier is blind to.

    Args:
        channels: of the images; 1 for digits, 3 for shapes.
        grid: blocks along each side; images must be squares of a multiple of it.
        device: where to compute.
    """

    name = "pixels"

    def __init__(self, channels: int, grid: int = 8, device: torch.device | str = "cpu") -> None:
        if channels < 1 or grid < 1:
            raise ValueError(f"channels and grid must be at least 1, got {channels} and {grid}")
        self.channels, self.grid, self.device = channels, grid, device
        self.dim = channels * grid * grid
        self.identity = {
            "name": self.name,
            "channels": str(channels),
            "grid": str(grid),
            "preprocessing": "x / 127.5 - 1",
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, float32 (B, dim) in (C, H, W) order, of images, uint8 (B, C, H, W)."""
        channels, height, width = check_images(images).shape[1:]
        if channels != self.channels or height != width or height % self.grid:
            raise ValueError(f"got images of shape {tuple(images.shape)}; pixel features take {self.channels} channels and squares "
                             f"of a multiple of {self.grid} pixels")  # fmt: skip
        return F.adaptive_avg_pool2d(images.to(self.device) / 127.5 - 1, self.grid).flatten(1)


def create(identity: Mapping[str, str], device: torch.device | str = "cpu") -> FeatureExtractor:
    """Returns the extractor that an identity describes; whether its weights are the same is for the caller to compare.

    Args:
        identity: with "name", and for "classifier" its "dataset", for "pixels" its "channels" and "grid".
        device: where the extractor shall compute.

    Raises:
        ValueError: for an extractor that is not one of flowkit's, or one that the identity does not describe in full.
        FileNotFoundError: for a network without its weights on this machine.
        ImportError: for DINOv2 or CLIP without transformers.
    """
    from flowkit.eval.clip import ClipExtractor
    from flowkit.eval.dino import DinoExtractor
    from flowkit.eval.inception import PRESETS, InceptionExtractor

    try:
        match identity["name"]:
            case "classifier":
                return ClassifierExtractor(identity["dataset"], device)
            case "pixels":
                return PixelExtractor(int(identity["channels"]), int(identity["grid"]), device)
            case "fd-dinov2":
                rounded = not identity.get("preprocessing", "").startswith("antialiased_bicubic")
                return DinoExtractor(device=device, rounded=rounded)
            case "cmmd" | "clip":
                return ClipExtractor(device=device, preset=identity["name"])
            case name if name in PRESETS:
                return InceptionExtractor(device=device, preset=name, layer=identity.get("layer", "2048"))
    except KeyError as missing:
        raise ValueError(f"the extractor {identity.get('name')!r} cannot be built by name alone (no {missing}); pass the "
                         "extractor itself, e.g. extractor=PixelExtractor(channels=3)") from None  # fmt: skip
    raise ValueError(
        f"unknown extractor {identity['name']!r}; choose classifier, pixels, {', '.join(PRESETS)}, fd-dinov2, cmmd or clip, or "
        "pass the extractor itself"
    )


# What may differ between comparable features: float32's rounding, which the record shows. Everything else is refused.
_NOTED = ("mode", "versions")


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """Returns what makes features of two identities incomparable, or None where they compare.

    Modes of one float32 computation and versions of libraries move features by rounding only: they are recorded, not compared.
    """
    keys = sorted(k for k in theirs.keys() | ours.keys() if k not in _NOTED and theirs.get(k) != ours.get(k))
    if not keys:
        return None
    key = "name" if "name" in keys else keys[0]
    return f"its {key} is {theirs.get(key)!r}, not {ours.get(key)!r}"


def library_versions(*packages: str) -> str:
    """Returns versions for an identity: ``"torch 2.11.0, onnxruntime 1.22.0"``."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def check_images(images: Tensor) -> Tensor:
    """Returns the images if they are uint8 (B, C, H, W).

    Raises:
        TypeError: for another dtype: floats would leave the rounding and the range open.
        ValueError: for another number of axes.
    """
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8, got {images.dtype}; convert [0, 1] with (x * 255).round().to(torch.uint8)"
        )
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    return images


@contextmanager
def full_float32() -> Iterator[None]:
    """Turns TF32, its like on CPUs and the search for algorithms off: features are float32 and repeat from run to run."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)

"""Extractors: what they compute, what they refuse, and what tells them apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit import assets, weights
from flowkit.eval.classifier import Classifier
from flowkit.eval.features import ClassifierExtractor, FeatureExtractor, PixelExtractor, create
from flowkit.eval.references import embedded

SIZES = {"digits": (1, 8, 8), "shapes": (3, 16, 16)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("dataset", assets.NAMES)
def test_classifier_features_are_the_networks(dataset: str) -> None:
    extractor = ClassifierExtractor(dataset)
    images = noise(20, *SIZES[dataset])
    network = Classifier.load(assets.folder(dataset) / "classifier.safetensors")
    features = extractor(images)
    assert (features.dtype, features.shape) == (torch.float32, (20, extractor.dim))
    assert torch.equal(features, network.features(images.float() / 127.5 - 1))
    assert not torch.equal(features, network.features(images.float() / 255))
    torch.testing.assert_close(torch.cat([extractor(part) for part in images.split(7)]), features, rtol=1e-5, atol=1e-5)


def test_pixel_features_are_the_pixels() -> None:
    digits, shapes = noise(5, 1, 8, 8), noise(5, 3, 16, 16)
    one, three = PixelExtractor(channels=1), PixelExtractor(channels=3)
    assert (one.dim, three.dim) == (64, 192)
    assert torch.equal(one(digits), digits.flatten(1).float() / 127.5 - 1)
    blocks = shapes.numpy().reshape(5, 3, 8, 2, 8, 2).mean(axis=(3, 5)).reshape(5, 192) / 127.5 - 1
    np.testing.assert_allclose(three(shapes).numpy(), blocks, atol=1e-6)
    extremes = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert one(extremes).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dataset", assets.NAMES)
def test_embedded_statistics_are_those_of_the_held_out_images(dataset: str) -> None:
    """Drawn again here; float16 weights and float32 features make equality one of 1e-5."""
    _, metadata = weights.read(assets.folder(dataset) / "reference.safetensors")
    count, seed = int(metadata["count"]), int(metadata["images"].split()[-1])
    images, _ = assets.images(dataset, "held-out", count, seed)
    extractors: list[FeatureExtractor] = [ClassifierExtractor(dataset), PixelExtractor(SIZES[dataset][0])]
    for stats, extractor in zip(embedded(dataset), extractors, strict=True):
        features = torch.cat([extractor(part) for part in images.split(1000)]).double().numpy()
        assert stats.count == count
        assert stats.identity == extractor.identity
        np.testing.assert_allclose(stats.mean, features.mean(axis=0), atol=1e-5)
        covariance = np.cov(features, rowvar=False)
        np.testing.assert_allclose(stats.covariance(), covariance, atol=1e-5 * np.abs(covariance).max())


def test_identities_tell_extractors_apart() -> None:
    extractors: list[FeatureExtractor] = [ClassifierExtractor(name) for name in assets.NAMES]
    extractors += [PixelExtractor(1), PixelExtractor(3), PixelExtractor(3, grid=4)]
    identities = [tuple(sorted(extractor.identity.items())) for extractor in extractors]
    assert len(set(identities)) == len(identities)
    for extractor in extractors:
        assert all(isinstance(value, str) for value in extractor.identity.values())
        assert create(extractor.identity).identity == extractor.identity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create({"name": "vgg"}), "unknown extractor 'vgg'; choose classifier, pixels, fid-tf"),
        (lambda: create({"name": "pixels"}), r"'pixels' cannot be built by name alone \(no 'channels'\)"),
        (lambda: create({"name": "classifier"}), r"'classifier' cannot be built by name alone \(no 'dataset'\)"),
        (lambda: ClassifierExtractor("cifar"), "unknown embedded data set 'cifar'"),
        (lambda: PixelExtractor(0), "at least 1, got 0 and 8"),
        (lambda: PixelExtractor(1)(noise(2, 3, 8, 8)), r"shape \(2, 3, 8, 8\)"),
        (lambda: PixelExtractor(1)(noise(2, 1, 12, 12)), r"shape \(2, 1, 12, 12\)"),
        (lambda: PixelExtractor(1)(noise(2, 1, 8, 16)), r"shape \(2, 1, 8, 16\)"),
        (lambda: ClassifierExtractor("digits")(noise(2, 3, 8, 8)), r"shape \(2, 3, 8, 8\)"),
        (lambda: ClassifierExtractor("digits")(noise(1, 8, 8)), r"shape \(B, C, H, W\), got \(1, 8, 8\)"),
    ],
)
def test_wrong_names_and_shapes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_float_images_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be uint8, got torch.float32; convert \[0, 1\] with"):
        PixelExtractor(1)(torch.zeros(2, 1, 8, 8))

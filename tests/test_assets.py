"""The embedded data sets: the images are the real ones, the split is clean, and the trained files are what they claim to be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from flowkit import assets, weights
from flowkit.eval.classifier import Classifier

NAMES = pytest.mark.parametrize("name", assets.NAMES)


def to_input(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn, the source of the digits, is not installed"
    )
    values, labels = datasets.load_digits(return_X_y=True)
    tensors, _ = weights.read(assets.folder("digits") / "images.safetensors")
    restored = (tensors["images"].double() * 16 / 255).round().flatten(1)
    assert torch.equal(restored, torch.from_numpy(values))
    assert torch.equal(tensors["labels"].long(), torch.from_numpy(labels))


def test_digits_split_is_stratified_and_disjoint() -> None:
    parts = {split: assets.images("digits", split) for split in ("train", "held-out")}
    assert {split: len(labels) for split, (_, labels) in parts.items()} == {"train": 1297, "held-out": 500}
    assert parts["held-out"][1].bincount().tolist() == [50] * 10
    train, held_out = ({image.numpy().tobytes() for image in pixels} for pixels, _ in parts.values())
    assert not train & held_out
    assert len(train) + len(held_out) == 1797


@NAMES
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_images_are_dealt_by_class_and_a_prefix_stays_the_same(name: str, split: assets.Split) -> None:
    pixels, labels = assets.images(name, split, count=240, seed=3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(labels, torch.arange(240) % assets.num_classes(name))
    fewer, _ = assets.images(name, split, count=50, seed=3)
    assert torch.equal(fewer, pixels[:50])
    assert not torch.equal(assets.images(name, split, count=50, seed=4)[0], fewer)


def test_shapes_of_the_two_splits_differ() -> None:
    train, held_out = (assets.images("shapes", split, 1200)[0].flatten(1) for split in ("train", "held-out"))
    assert not {row.numpy().tobytes() for row in train} & {row.numpy().tobytes() for row in held_out}


def test_shapes_are_the_same_bytes_everywhere() -> None:
    pixels, _ = assets.images("shapes", "held-out", 1200, seed=7)
    assert (
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        == "400d850879c7628989a301af886d988684d55174462951795278b102ee1529f3"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assets.folder("faces"), "'faces'; choose digits or shapes"),
        (lambda: assets.images("digits", "test"), "'test'; choose train or held-out"),  # type: ignore[arg-type]
        (lambda: assets.images("digits", "held-out", 501), "500 held-out digits"),
        (lambda: assets.images("shapes", count=0), "count = 0"),
        (lambda: assets.images("shapes", seed=-1), "seed = -1"),
        (lambda: Classifier(1, 8, 4, 4, 10)(torch.zeros(2, 1, 16, 16)), r"takes \(B, 1, 8, 8\)"),
        (lambda: Classifier.load(assets.folder("digits") / "images.safetensors"), "is not a classifier"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@NAMES
def test_classifier_knows_held_out_images(name: str) -> None:
    pixels, labels = assets.images(name, "held-out", 500)
    classifier = Classifier.load(assets.folder(name) / "classifier.safetensors")
    hits = classifier(to_input(pixels)).argmax(dim=1) == labels
    assert hits.float().mean() > 0.97
    assert classifier.features(to_input(pixels[:2])).shape == (2, classifier.dim)


@NAMES
def test_reference_statistics_are_those_of_held_out_images(name: str) -> None:
    folder = assets.folder(name)
    tensors, metadata = weights.read(folder / "reference.safetensors")
    file = folder / "classifier.safetensors"
    assert metadata["classifier_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    count, seed = int(metadata["count"]), int(metadata["images"].rpartition(" ")[2])
    pixels, labels = assets.images(name, "held-out", count, seed)
    assert labels.bincount().tolist() == [count // assets.num_classes(name)] * assets.num_classes(name)
    x = to_input(pixels)
    for space, features in {
        "classifier": Classifier.load(file).features(x),
        "pixels": F.adaptive_avg_pool2d(x, 8).flatten(1),
    }.items():
        expected = {"mean": features.double().mean(0), "m2": (count - 1) * features.double().T.cov()}
        for key, value in expected.items():
            assert (tensors[f"{space}.{key}"] - value).norm() <= 1e-6 * value.norm()


@NAMES
def test_model_predicts_the_velocity_of_held_out_images(name: str) -> None:
    """Against zero, against another class's label, and against images that are not from the data set."""
    folder = assets.folder(name)
    unet = UNet2DModel.from_pretrained(folder / "unet").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.shift == 1.0
    pixels, labels = assets.images(name, "held-out", 240)
    generator = torch.Generator().manual_seed(0)
    x0 = to_input(pixels)
    noise = torch.randn(x0.shape, generator=generator)
    s = torch.rand(len(x0), generator=generator)

    @torch.no_grad()
    def loss(x0: Tensor, labels: Tensor) -> float:
        x = x0.lerp(noise, s[:, None, None, None])
        return F.mse_loss(unet(x, 1000 * s, labels).sample, noise - x0).item()

    right = loss(x0, labels)
    assert right < 0.3 * (noise - x0).square().mean().item()
    assert right < 0.7 * loss(x0, labels.roll(1))
    assert right < 0.2 * loss(-x0, labels)


def test_everything_is_small_and_nothing_is_pickled() -> None:
    files = [path for name in assets.NAMES for path in assets.folder(name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) < 6e6

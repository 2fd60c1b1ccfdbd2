"""Extractors: what they compute, what they refuse, and that Inception is torch-fidelity's network without its loader."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from flowkit import assets, weights
from flowkit.eval import inception
from flowkit.eval.classifier import Classifier
from flowkit.eval.features import ClassifierExtractor, FeatureExtractor, PixelExtractor, create
from flowkit.eval.inception import FILES, InceptionExtractor
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
        (lambda: create({"name": "vgg"}), "unknown extractor 'vgg'; choose classifier, pixels or fid-tf"),
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


# Inception, with random weights: nothing is downloaded.


@pytest.fixture(scope="module")
def extractor() -> InceptionExtractor:
    return InceptionExtractor.random(seed=3)


@pytest.fixture(scope="module")
def state(extractor: InceptionExtractor) -> dict[str, Tensor]:
    return dict(extractor.network.state_dict())


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights: both caches moved to an empty folder, which is torch hub's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_inception_is_torch_fidelitys_network_bit_for_bit(
    extractor: InceptionExtractor, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    images = noise(2, 3, 40, 56)
    ours = extractor(images)
    assert (ours.dtype, ours.shape) == (torch.float32, (2, 2048))
    assert torch.equal(ours, theirs(images)[0])
    assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_greyscale_is_three_equal_channels(extractor: InceptionExtractor) -> None:
    grey = noise(1, 1, 8, 8)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="1 or 3 channels, got 4; composite alpha"):
        extractor(noise(1, 4, 8, 8))


def test_random_weights_follow_their_seed(extractor: InceptionExtractor, state: dict[str, Tensor]) -> None:
    again, other = inception.random_weights(3), inception.random_weights(4)
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert not torch.equal(other["Mixed_7c.branch1x1.conv.weight"], state["Mixed_7c.branch1x1.conv.weight"])


def test_weights_are_found_in_either_cache_under_either_name(
    extractor: InceptionExtractor, state: dict[str, Tensor], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    # The hash of the real file stands in every name; here it is that of our random one.
    monkeypatch.setattr(inception, "HASH", hashlib.sha256(content.getvalue()).hexdigest()[:8])
    snapshot = nowhere.parents[2] / "hub" / "models--a--b" / "snapshots" / "0"
    expected = extractor.identity
    for folder, name in ((nowhere, FILES[1]), (snapshot, FILES[0])):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content.getvalue())
        assert inception.find_weights() == folder / name
        assert InceptionExtractor().identity == expected
        (folder / name).unlink()
    # The same tensors in another format, without the counters that old files lack, are the same extractor.
    path = nowhere / FILES[0].replace(".pth", ".safetensors")
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert InceptionExtractor().identity == expected


def test_missing_weights_are_named_with_the_place_to_put_them(nowhere: Path) -> None:
    makers: list[Callable[[], object]] = [InceptionExtractor, lambda: create({"name": "fid-tf"})]
    for make in makers:
        with pytest.raises(FileNotFoundError) as caught:
            make()
        message = str(caught.value)
        assert "\n" not in message
        for part in (FILES[0], str(nowhere), "https://", "InceptionExtractor(path)"):
            assert part in message
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*gone.pth"):
        InceptionExtractor(nowhere / "gone.pth")


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Payload()}, "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth has sha256 .*, not 6726825d"):
        InceptionExtractor("bad.pth")
    # Even a file of the right hash is read without running code.
    monkeypatch.setattr(inception, "HASH", hashlib.sha256(Path("bad.pth").read_bytes()).hexdigest()[:8])
    with pytest.raises(Exception, match=r"[Uu]nsupported|weights_only"):
        InceptionExtractor("bad.pth")
    assert not Path("unpickled").exists()
    for suffix in ("bin", "pkl", "pt"):
        with pytest.raises(ValueError, match=f"bad.{suffix}: Inception weights are read from"):
            InceptionExtractor(f"bad.{suffix}")


def test_safetensors_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors does not hold TF-Inception's tensors"):
        InceptionExtractor(tmp_path / "other.safetensors")

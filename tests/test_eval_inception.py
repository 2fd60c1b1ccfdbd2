"""Inception: torch-fidelity's network bit for bit, its faster forms to rounding, and its weight files. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from flowkit import weights
from flowkit.eval import inception, resize, weight_files
from flowkit.eval.features import FeatureExtractor, Layer, create, difference
from flowkit.eval.inception import PRESETS, InceptionExtractor
from flowkit.eval.trunk import LAYERS
from flowkit.eval.weight_files import FILES, convert_weights

SEED = 3
THEIRS = [layer for layer in LAYERS if layer != "spatial"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


IMAGES = noise(2, 3, 40, 56)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights with batch norms that do something: folding a neutral one proves nothing."""
    found = inception.random_weights(SEED)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in found.items():
        if name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.7, 1.3, generator=generator)
        elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
            tensor.normal_(0, 0.1, generator=generator)
    return found


@pytest.fixture(scope="module")
def path(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def theirs(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    file = tmp_path_factory.mktemp("theirs") / "weights.pth"
    torch.save(state, file)
    network = FeatureExtractorInceptionV3("inception", THEIRS, feature_extractor_weights_path=str(file))
    return dict(zip(THEIRS, network(IMAGES), strict=True))


@pytest.fixture(scope="module")
def extractor(path: Path) -> InceptionExtractor:
    return InceptionExtractor(path)


def test_reference_mode_is_torch_fidelity_bit_for_bit(path: Path, theirs: Mapping[str, Tensor]) -> None:
    ours = InceptionExtractor(path, mode="reference").features(IMAGES, list(LAYERS))
    for layer in THEIRS:
        assert torch.equal(ours[layer], theirs[layer]), layer
    for layer, dim in LAYERS.items():
        assert (ours[layer].dtype, ours[layer].shape) == (torch.float32, (2, dim))
    assert (ours["2048"][0] - ours["2048"][1]).abs().max() > 1e-3


def test_fast_mode_is_the_same_to_rounding(extractor: InceptionExtractor, theirs: Mapping[str, Tensor]) -> None:
    ours = extractor.features(IMAGES, list(LAYERS))
    for layer in THEIRS:
        assert relative(ours[layer], theirs[layer]) < 1e-4, layer
    assert torch.equal(extractor(IMAGES), extractor.features(IMAGES, ["2048"])["2048"])
    assert extractor.dim == 2048


def test_onnx_mode_is_the_same_to_rounding(path: Path, theirs: Mapping[str, Tensor]) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    ours = InceptionExtractor(path, mode="onnx").features(IMAGES, list(LAYERS))
    for layer in THEIRS:
        assert relative(ours[layer], theirs[layer]) < 1e-4, layer


@pytest.mark.slow
def test_compiled_mode_is_the_same_to_rounding(
    path: Path, theirs: Mapping[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    extractor = InceptionExtractor(path, mode="compiled", cache=tmp_path)
    torch._dynamo.utils.counters.clear()
    ours = extractor(IMAGES)
    assert relative(ours, theirs["2048"]) < 1e-4
    # The compiled graph itself ran (torch-fidelity's flag compiles and then calls the eager forward), once for any batch.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # And its convolutions are fused with their ReLUs, which takes weights that were frozen before tracing.
    if torch.backends.mkldnn.is_available():
        assert any("_convolution_pointwise" in file.read_text() for file in tmp_path.rglob("*.py"))
    torch.testing.assert_close(extractor(IMAGES[:1]), ours[:1], rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dtypes_do_what_they_say(path: Path, extractor: InceptionExtractor) -> None:
    """torch-fidelity's float64 is float32, bit for bit; ours has its digits."""
    exact = InceptionExtractor(path, dtype="float64")
    features = exact(IMAGES)
    assert features.dtype == torch.float64
    assert not torch.equal(features, features.float().double())
    assert 1e-9 < relative(extractor(IMAGES), features) < 1e-4
    both = InceptionExtractor(path, mode="reference", dtype="float64").features(IMAGES, ["2048"])["2048"]
    # Their resize computes positions in float32 and ours rounds alike.
    assert relative(both, features) < 1e-5
    preview = InceptionExtractor(path, dtype="bfloat16")
    assert preview(IMAGES).dtype == torch.float32
    assert 1e-3 < relative(preview(IMAGES), features) < 0.5
    assert preview.identity["dtype"] == "bfloat16 (preview)"
    assert "dtype" in (difference(preview.identity, extractor.identity) or "")


def test_spatial_features_are_the_first_channels_of_mixed_6(path: Path) -> None:
    extractor = InceptionExtractor(path, mode="reference")
    seen: list[Tensor] = []
    handle = extractor.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.append(out))
    features = extractor.features(IMAGES, ["spatial"])["spatial"]
    handle.remove()
    assert torch.equal(features.reshape(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))


def test_layers_share_one_pass(extractor: InceptionExtractor) -> None:
    calls = []
    handle = extractor.network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    both = extractor.features(IMAGES, ["2048", "logits_unbiased"])
    assert calls == [2]
    handle.remove()
    logits = extractor.layer("logits_unbiased")
    assert isinstance(logits, Layer)
    assert (logits.name, logits.dim, logits.identity["layer"]) == ("fid-tf/logits_unbiased", 1008, "logits_unbiased")
    assert torch.equal(logits(IMAGES), both["logits_unbiased"])
    with pytest.raises(ValueError, match="unknown layer '1024'; choose 64"):
        extractor.layer("1024")
    with pytest.raises(ValueError, match="must be a list of names, got '2048'"):
        extractor.features(IMAGES, "2048")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_prepare_images_as_their_tools_do(path: Path, preset: str) -> None:
    ours = InceptionExtractor(path, preset=preset)
    x = IMAGES.float()
    expected = {
        "fid-tf": (resize.tf1(x, 299) - 128) / 128,
        "adm": (resize.tf1(x, 299) - 128) / 128,
        "fid-clean": (resize.clean(x, 299) - 128) / 128,
        "fid-pytorch": 2 * torch.nn.functional.interpolate(x / 255, (299, 299), mode="bilinear") - 1,
        "fid-torchmetrics": (
            torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False, antialias=True) - 128
        )
        / 128,
    }
    torch.testing.assert_close(ours.preprocess(IMAGES), expected[preset], rtol=0, atol=1e-5)


def test_identities_say_what_changes_features(extractor: InceptionExtractor, path: Path) -> None:
    identities = {preset: InceptionExtractor(path, preset=preset).identity for preset in PRESETS}
    for one in PRESETS:
        for other in PRESETS:
            same = one == other or {one, other} == {"fid-tf", "adm"}
            assert (difference(identities[one], identities[other]) is None) == same
    identity = extractor.identity
    assert set(identity) == {"name", "weights", "preprocessing", "layer", "dtype", "tf32", "mode", "versions"}
    assert all(isinstance(value, str) for value in identity.values())
    assert identity["versions"] == f"torch {torch.__version__.partition('+')[0]}"
    # Modes differ by rounding and are recorded; weights, layers and dtypes are refused.
    reference = InceptionExtractor(path, mode="reference").identity
    assert reference["mode"] != identity["mode"]
    assert difference(reference, identity) is None
    assert "its weights is" in str(difference({**identity, "weights": "0"}, identity))
    assert "its layer is" in str(difference({**identity, "layer": "64"}, identity))


def test_greyscale_is_three_equal_channels(extractor: InceptionExtractor) -> None:
    grey = noise(1, 1, 8, 8)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="1 or 3 channels, got 4; composite alpha"):
        extractor(noise(1, 4, 8, 8))


def test_float_images_are_refused_with_the_cure(extractor: InceptionExtractor) -> None:
    with pytest.raises(TypeError, match=r"must be uint8, got torch.float32; convert \[0, 1\] with"):
        extractor(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fid"}, "unknown preset 'fid'; choose fid-tf, adm"),
        ({"layer": "pool"}, "unknown layer 'pool'; choose 64"),
        ({"mode": "jit"}, "unknown mode 'jit'; choose reference, fast"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; choose float32"),
        (
            {"mode": "reference", "dtype": "bfloat16"},
            "'reference' does not compute in bfloat16; choose float32 or float64",
        ),
        ({"mode": "onnx", "dtype": "float64"}, "'onnx' does not compute in float64; choose float32"),
        ({"mode": "onnx", "device": "cuda"}, "'onnx' computes on the CPU, got device 'cuda'"),
        ({"cache": "folder"}, "cache='folder' is for compiled code, mode is 'fast'"),
    ],
)
def test_options_are_refused_before_weights_are_sought(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InceptionExtractor(**options)
    with pytest.raises(ValueError, match=message):
        InceptionExtractor.random(0, **options)


def test_onnx_without_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'flowkit-diffusion\[onnx\]'"):
        InceptionExtractor.random(mode="onnx")


def test_random_weights_follow_their_seed() -> None:
    first, again, other = (InceptionExtractor.random(seed).identity["weights"] for seed in (3, 3, 4))
    assert first == again != other


def test_pytorch_fid_has_the_same_trunk(path: Path, state: dict[str, Tensor]) -> None:
    peer = "pytorch_fid.inception"
    if importlib.util.find_spec("pytorch_fid") is None:
        pytest.skip("pytorch-fid is not installed")
    module = importlib.import_module(peer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: dict(state))
        network = module.InceptionV3([3]).eval()
    with torch.no_grad():
        features = network(IMAGES.float() / 255)[0].flatten(1)
    ours = InceptionExtractor(path, mode="reference", preset="fid-pytorch")
    assert relative(ours(IMAGES), features) < 1e-4


def test_torchmetrics_computes_the_same_bits(path: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed")
    module = importlib.import_module("torchmetrics.image.fid")
    torch.save(state, tmp_path / "weights.pth")
    weights_path = str(tmp_path / "weights.pth")
    network = module.NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights_path)
    ours = InceptionExtractor(path, mode="reference", preset="fid-torchmetrics")
    assert torch.equal(ours(IMAGES), network(IMAGES))


# Weight files.


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights: both caches moved to an empty folder, which is torch hub's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def pth(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Our random weights as a .pth file, whose hash takes the place of the real file's."""
    content = io.BytesIO()
    torch.save(state, content)
    monkeypatch.setattr(weight_files, "HASH", hashlib.sha256(content.getvalue()).hexdigest()[:8])
    return content.getvalue()


def test_weights_are_found_in_either_cache_under_either_name(
    extractor: InceptionExtractor, state: dict[str, Tensor], nowhere: Path, pth: bytes
) -> None:
    snapshot = nowhere.parents[2] / "hub" / "models--a--b" / "snapshots" / "0"
    expected = extractor.identity
    for folder, name in ((nowhere, FILES[1]), (snapshot, FILES[0])):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(pth)
        assert weight_files.find_weights() == folder / name
        assert InceptionExtractor().identity == expected
        (folder / name).unlink()
    # The same tensors in another format, without the counters that old files lack, are the same extractor.
    file = nowhere / FILES[0].replace(".pth", ".safetensors")
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
    assert InceptionExtractor().identity == expected
    made: FeatureExtractor = create({"name": "fid-clean", "layer": "768"})
    assert (made.name, made.dim, made.identity["layer"]) == ("fid-clean", 768, "768")


def test_missing_weights_are_named_with_the_place_to_put_them(nowhere: Path) -> None:
    makers: list[Callable[[], object]] = [InceptionExtractor, *(lambda p=p: create({"name": p}) for p in PRESETS)]
    for make in makers:
        with pytest.raises(FileNotFoundError) as caught:
            make()
        message = str(caught.value)
        assert "\n" not in message
        for part in (FILES[0], str(nowhere), "https://", "InceptionExtractor(path)"):
            assert part in message
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*gone.pth"):
        InceptionExtractor(nowhere / "gone.pth")


def test_converted_weights_are_the_same_extractor(
    extractor: InceptionExtractor, nowhere: Path, pth: bytes, tmp_path: Path
) -> None:
    source, target = tmp_path / FILES[0], nowhere / FILES[0].replace(".pth", ".safetensors")
    source.write_bytes(pth)
    digest = convert_weights(source, target)
    assert digest == extractor.identity["weights"] == weights.read(target)[1]["content_sha256"]
    assert InceptionExtractor().identity == extractor.identity
    with pytest.raises(ValueError, match=r"choose a name that ends with .safetensors"):
        convert_weights(source, tmp_path / "w.pth")
    source.write_bytes(pth[:-100])
    with pytest.raises(ValueError, match=r"has sha256 .*, not .*; it is cut short"):
        convert_weights(source, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_a_conversion_that_does_not_read_back_is_an_error(
    pth: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pth").write_bytes(pth)
    monkeypatch.setattr(weights, "read", lambda path: ({"fc.weight": torch.zeros(1)}, {}))
    with pytest.raises(OSError, match="does not read back as it was written"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Payload()}, "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth has sha256 .*, not 6726825d"):
        InceptionExtractor("bad.pth")
    # Even a file of the right hash is read without running code.
    monkeypatch.setattr(weight_files, "HASH", hashlib.sha256(Path("bad.pth").read_bytes()).hexdigest()[:8])
    with pytest.raises(ValueError, match=r"bad.pth holds more than tensors"):
        InceptionExtractor("bad.pth")
    assert not Path("unpickled").exists()
    for suffix in ("bin", "pkl", "pt"):
        with pytest.raises(ValueError, match=f"bad.{suffix}: Inception weights are read from"):
            InceptionExtractor(f"bad.{suffix}")


def test_safetensors_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors does not hold TF-Inception's tensors"):
        InceptionExtractor(tmp_path / "other.safetensors")

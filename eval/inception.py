"""TF-Inception, the extractor of the FID: torch-fidelity's network with weights found on this machine, never downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowkit import weights
from flowkit.eval.features import check_images, full_float32

# torch-fidelity and pytorch-fid publish the same tensors under two names; both end with the start of the file's hash.
HASH = "6726825d"
FILES = (f"weights-inception-2015-12-05-{HASH}.pth", f"pt_inception-2015-12-05-{HASH}.pth")


class _Network(fidelity.FeatureExtractorInceptionV3):
    """torch-fidelity's network and forward pass, without its constructor: that one downloads and unpickles."""

    def __init__(self) -> None:
        FeatureExtractorBase.__init__(self, "inception-v3-compat", ["2048"])
        self.feature_extractor_internal_dtype = torch.float32
        conv = fidelity.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = fidelity.InceptionA(192, pool_features=32)
        self.Mixed_5c = fidelity.InceptionA(256, pool_features=64)
        self.Mixed_5d = fidelity.InceptionA(288, pool_features=64)
        self.Mixed_6a = fidelity.InceptionB(288)
        self.Mixed_6b = fidelity.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = fidelity.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = fidelity.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = fidelity.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = fidelity.InceptionD(768)
        self.Mixed_7b = fidelity.InceptionE_1(1280)
        self.Mixed_7c = fidelity.InceptionE_2(2048)
        self.AvgPool = nn.AdaptiveAvgPool2d(output_size=(1, 1))
        self.fc = nn.Linear(2048, 1008)


class InceptionExtractor:
    """The 2048 pooled features of TF-Inception, as torch-fidelity and EDM compute them ("fid-tf").

    Images are resized to 299x299 by TensorFlow 1's bilinear rule and scaled by ``(x - 128) / 128``; greyscale images are
    repeated over the three channels.

    Args:
        path: the weight file: one of `FILES`, whose sha256 must begin with `HASH`, or the same tensors in a .safetensors file.
            None looks in torch hub's folder (TORCH_HOME) and in the Hugging Face cache.
        device: where to compute.

    Raises:
        FileNotFoundError: where there is no such file; names it and says where to put it. Nothing is downloaded.
        ValueError: for a file of another hash or format, or with other tensors.
    """

    name = "fid-tf"
    dim = 2048

    def __init__(self, path: str | PathLike[str] | None = None, device: torch.device | str = "cpu") -> None:
        path = find_weights() if path is None else Path(path)
        self._build(_read(path), str(path), device)

    @classmethod
    def random(cls, seed: int = 0, device: torch.device | str = "cpu") -> InceptionExtractor:
        """Returns the network with random weights (He et al. 2015), for tests and timing; its figures mean nothing else."""
        self = cls.__new__(cls)
        self._build(random_weights(seed), f"random, seed {seed}", device)
        return self

    def _build(self, state: Mapping[str, Tensor], source: str, device: torch.device | str) -> None:
        with torch.device("meta"):
            network = _Network()
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{source} does not hold TF-Inception's tensors ({' '.join(str(error).split())[:200]}); use "
                             f"{FILES[0]}") from error  # fmt: skip
        self.network = network.to(device, torch.float32).eval().requires_grad_(False)
        self.device = device
        self.identity = {
            "name": self.name,
            "weights": _content_hash(state),
            "preprocessing": "TF1 bilinear 299, (x - 128) / 128",
            "layer": "2048",
            "dtype": "float32",
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, float32 (B, 2048), of images, uint8 (B, 1 or 3, H, W)."""
        if check_images(images).shape[1] not in (1, 3):
            raise ValueError(
                f"Inception takes 1 or 3 channels, got {images.shape[1]}; composite alpha onto a background first"
            )
        with torch.no_grad(), full_float32():
            features: Tensor = self.network(images.expand(-1, 3, -1, -1).to(self.device))[0]
        return features


def weight_folders() -> list[Path]:
    """Returns the folders that are searched: torch hub's, then every snapshot of the Hugging Face cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(torch.hub.get_dir()) / "checkpoints", *sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*"))]


def find_weights() -> Path:
    """Returns the weight file.

    Raises:
        FileNotFoundError: where there is none.
    """
    folders = weight_folders()
    names = [name for file in FILES for name in (file, file.replace(".pth", ".safetensors"))]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"TF-Inception weights are not on this machine: put {FILES[0]} (from {fidelity.URL_INCEPTION_V3}) into {folders[0]}, "
        f"or pass InceptionExtractor(path); searched there and in {len(folders) - 1} snapshots of the Hugging Face cache"
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return weights.read(path)[0]
    if path.suffix != ".pth":
        raise ValueError(
            f"{path}: Inception weights are read from .safetensors or {FILES[0]} only; convert the file first"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}; check the path")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(HASH):
        raise ValueError(
            f"{path} has sha256 {found[:8]}..., not {HASH}...; it is cut short or another file, copy it again"
        )
    state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def random_weights(seed: int) -> dict[str, Tensor]:
    """Returns a state dict for the network: convolutions normal with variance 2 / fan-in, batch norms neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _Network().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("conv.weight", "fc.weight")):
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = torch.ones(shape)
        else:
            state[name] = torch.zeros(
                shape, dtype=torch.int64 if name.endswith("num_batches_tracked") else torch.float32
            )
    return state


def _content_hash(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values, so that .pth and .safetensors files of the same weights are the same extractor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + state[name].to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()

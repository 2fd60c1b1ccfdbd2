"""LPIPS, the perceptual distance of Zhang et al. 2018 (arXiv 1801.03924) on VGG-16, as torch-fidelity computes it.

Gradients go through, and it computes where the images are. Nothing is downloaded: the two weight files are found on this
machine or named.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional
from torch_fidelity import sample_similarity_lpips as theirs

from flowkit import weights
from flowkit.eval.weight_files import read_pickle, weight_folders

# Name of each file, the start of its sha256 where its publisher states one, and where it comes from.
TRUNK = ("vgg16-397923af", "397923af", torchvision.models.VGG16_Weights.IMAGENET1K_V1.url)
LINEAR = (Path(theirs.URL_VGG16_LPIPS).stem, "", theirs.URL_VGG16_LPIPS)
SIZE = 64


class LPIPS:
    """The distance of images: squared differences of normalised features of VGG-16, weighted and averaged over the image.

    Args:
        folder: holds the weights of VGG-16 and of LPIPS, `TRUNK` and `LINEAR`, as .pth or .safetensors. None searches torch hub's
            folder (TORCH_HOME) and the Hugging Face cache.

    Raises:
        FileNotFoundError: where a file is missing; names it, its address and where to put it.
        ValueError: for a file that is cut short, holds other tensors, or would run code.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        folders = weight_folders() if folder is None else [Path(folder)]
        trunk, linear = (_find(file, folders) for file in (TRUNK, LINEAR))
        with torch.device("meta"):
            features = torchvision.models.vgg16().features
        state = {k.removeprefix("features."): v for k, v in _read(trunk, TRUNK[1]).items() if k.startswith("features.")}
        _load(features, state, trunk)
        # Their class downloads both files; it gets ours instead.
        with (
            mock.patch.object(
                theirs, "torchvision_load_pretrained_vgg16", return_value=SimpleNamespace(features=features)
            ),
            mock.patch.object(theirs, "load_state_dict_from_url", return_value=_read(linear, LINEAR[1])),
        ):
            self._network = _make(linear)

    def __call__(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Returns the distance of each pair, (B,), float32.

        Args:
            found: images in [-1, 1], (B, C, H, W); greyscale is repeated, and small images are enlarged to `SIZE` pixels.
            wanted: likewise.

        Raises:
            ValueError: see `check`.
        """
        check(found.shape[1:])
        with torch.autocast(found.device.type, enabled=False):
            value: Tensor = self._network.to(found.device)(_levels(found), _levels(wanted))
        return value.flatten()


def fits(shape: Sequence[int]) -> bool:
    """Returns whether samples of a shape are images, (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def check(shape: Sequence[int]) -> None:
    """Refuses samples that are no images.

    Args:
        shape: of one sample.

    Raises:
        ValueError: for latents and others that do not have the shape (1 or 3, H, W).
    """
    if not fits(shape):
        raise ValueError(f"lpips compares images of shape (1 or 3, H, W), and samples here have the shape {tuple(shape)}; latents "
                         "need another distance, such as pseudo-huber")  # fmt: skip


def _levels(x: Tensor) -> Tensor:
    """What the network takes: 0 ... 255, three channels."""
    x = ((x.float() + 1) * 127.5).expand(-1, 3, -1, -1)
    factor = SIZE / min(x.shape[-2:])
    if factor <= 1:
        return x
    size = [max(SIZE, round(factor * side)) for side in x.shape[-2:]]
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def _make(linear: Path) -> Any:  # noqa: ANN401
    try:
        return theirs.SampleSimilarityLPIPS("lpips")
    except RuntimeError as error:
        raise _other(linear, error) from error


def _load(features: torch.nn.Module, state: dict[str, Tensor], file: Path) -> None:
    try:
        features.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise _other(file, error) from error


def _other(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} does not hold the tensors of LPIPS ({' '.join(str(error).split())[:200]}); get the file anew"
    )


def _find(file: tuple[str, str, str], folders: list[Path]) -> Path:
    name, _, url = file
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in (".safetensors", ".pth")):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"the weights of LPIPS are not on this machine: put {name}.pth (from {url}) into {folders[0]}; searched there"
        + (f" and in {len(folders) - 1} snapshots of the Hugging Face cache" if len(folders) > 1 else "")
    )


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    return weights.read(path)[0] if path.suffix == ".safetensors" else read_pickle(path, digest)

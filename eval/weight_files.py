"""Weight files of extractors: found on this machine, checked by their hash, converted to safetensors. Never downloaded."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from flowkit import weights

# torch-fidelity and pytorch-fid publish the same tensors under two names; both end with the start of the file's hash.
HASH = "6726825d"
FILES = (f"weights-inception-2015-12-05-{HASH}.pth", f"pt_inception-2015-12-05-{HASH}.pth")


def weight_folders() -> list[Path]:
    """Returns the folders that are searched: torch hub's, then every snapshot of the Hugging Face cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(torch.hub.get_dir()) / "checkpoints", *sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*"))]


def find_weights() -> Path:
    """Returns TF-Inception's weight file.

    Raises:
        FileNotFoundError: where there is none.
    """
    folders = weight_folders()
    names = [name for file in FILES for name in (file, file.replace(".pth", ".safetensors"))]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"TF-Inception weights are not on this machine: put {FILES[0]} (from {URL_INCEPTION_V3}) into {folders[0]}, "
        f"or pass InceptionExtractor(path); searched there and in {len(folders) - 1} snapshots of the Hugging Face cache"
    )


def read_weights(path: str | PathLike[str]) -> Mapping[str, Tensor]:
    """Reads TF-Inception's tensors.

    Args:
        path: one of `FILES`, whose sha256 must begin with `HASH`, or a .safetensors file.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file of another hash or format, or one that would run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return weights.read(path)[0]
    if path.suffix == ".pt":
        raise ValueError(f"{path}: Inception weights are read from .safetensors or {FILES[0]}; NVIDIA's TorchScript .pt is a "
                         "program with its weights under other names, take the .pth file, it holds the same ones")  # fmt: skip
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
    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors ({str(error).split(chr(10))[0]}); it was not read, get it anew"
        ) from error
    return state


def convert_weights(source: str | PathLike[str], target: str | PathLike[str]) -> str:
    """Converts TF-Inception's .pth file to safetensors, which is read without a pickle, and checks what was written.

    Args:
        source: see `read_weights`.
        target: the .safetensors file; put it into one of `weight_folders` under the name of the source to have it found.

    Returns:
        The hash of names and values, which is the extractor's identity["weights"] for either file.

    Raises:
        FileNotFoundError: where there is no source.
        ValueError: for another source, or a target that does not end with .safetensors.
        OSError: where the target does not read back as it was written.
    """
    from flowkit.eval.trunk import Trunk

    if Path(target).suffix != ".safetensors":
        raise ValueError(f"cannot write weights to {target}; choose a name that ends with .safetensors")
    state = read_weights(source)
    with torch.device("meta"):
        load(Trunk(), state, str(source))
    digest = content_hash(state)
    weights.write(target, state, {"format": "flowkit weights", "content_sha256": digest, "source": Path(source).name})
    if content_hash(weights.read(target)[0]) != digest:
        raise OSError(f"{target} does not read back as it was written; check the disk and convert again")
    return digest


def load(network: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Puts a state dict into TF-Inception's network.

    Raises:
        ValueError: where the tensors are not this network's.
    """
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not hold TF-Inception's tensors ({' '.join(str(error).split())[:200]}); use "
                         f"{FILES[0]}") from error  # fmt: skip


def content_hash(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values, so that .pth and .safetensors files of the same weights are the same extractor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            tensor = state[name].detach().to("cpu", torch.float32).contiguous()
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()

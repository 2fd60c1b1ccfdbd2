"""Weight files of extractors: found on this machine, checked by their hash, converted to safetensors. Never downloaded."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

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
    return read_pickle(path, HASH)


def read_pickle(path: Path, digest: str) -> dict[str, Tensor]:
    """Reads the tensors of a .pth file of a publisher, and nothing that could run.

    Args:
        path: the file.
        digest: what its sha256 must begin with; empty where its publisher does not say.

    Raises:
        ValueError: for a file of another hash, or one that is cut short or holds more than tensors.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(digest):
        raise ValueError(
            f"{path} has sha256 {found[:8]}..., not {digest}...; it is cut short or another file, copy it again"
        )
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        what = "holds" if digest else "is cut short or holds"  # of a known hash it is whole
        raise ValueError(
            f"{path} {what} more than tensors ({str(error).split(chr(10))[0]}); it was not read, get it anew"
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


def transformers() -> Any:  # noqa: ANN401
    """Returns the transformers library.

    Raises:
        ImportError: where it is not installed, with the line that installs it.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "DINOv2 and CLIP need transformers; pip install 'flowkit-diffusion[text]', or choose an Inception extractor"
        ) from error


def find_folder(path: str | PathLike[str] | None, repo: str, maker: str) -> Path:
    """Returns the folder of a model as transformers saves it.

    Args:
        path: the folder. None looks for ``repo`` in the Hugging Face cache.
        repo: the model's name on the hub.
        maker: the class to name in errors.

    Raises:
        FileNotFoundError: where there is none.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    folders = sorted(cache.glob("*")) if path is None else [Path(path)]
    for folder in folders:
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return folder
    searched = f"the Hugging Face cache ({cache})" if path is None else str(path)
    raise FileNotFoundError(
        f"the weights of {repo} are not in {searched}: put its config.json and model.safetensors into a folder and pass "
        f"{maker}(folder), or fetch them once with: hf download {repo}"
    )


def load_transformer(kind: str, path: str | PathLike[str] | None, repo: str, maker: str) -> Any:  # noqa: ANN401
    """Returns a model of transformers, float32, in inference mode, from local safetensors files.

    Args:
        kind: its class, "Dinov2Model".
        path: see `find_folder`, as are repo and maker.
        repo: the model's name on the hub.
        maker: the class to name in errors.

    Raises:
        FileNotFoundError: where there are no weights.
        ImportError: without transformers.
        ValueError: for a broken file, or weights of another model.
    """
    folder = find_folder(path, repo, maker)
    for file in folder.glob("*.safetensors"):
        weights.check(file)
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    wanted = getattr(transformers(), kind).config_class.model_type
    if found != wanted:
        raise ValueError(f"{folder} holds a model of type {found!r}, not {wanted!r}; use {repo}")
    model, report = getattr(transformers(), kind).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of {kind} (first: {missing[0]}); copy its files again")
    return model.eval().requires_grad_(False)


def content_hash(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values, so that .pth and .safetensors files of the same weights are the same extractor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            tensor = state[name].detach().to("cpu", torch.float32).contiguous()
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()

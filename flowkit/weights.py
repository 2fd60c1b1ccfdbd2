"""Reading and writing tensors: safetensors only, checked before use, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

PICKLES = {".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt"}
_MODELS = ("diffusion_pytorch_model", "pytorch_model", "model")  # not optimizer.bin and others that training leaves
_PIECE = 2**16


def check(path: str | os.PathLike[str]) -> Path:
    """Returns the path if it is a whole safetensors file.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a pickled weight file, or one that is corrupt or cut short.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickled weight file, which can run code when it is read; convert it to .safetensors first"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}; check the path, or make the file again")
    try:
        with safe_open(path, framework="pt"):
            return path
    except SafetensorError as error:
        raise ValueError(
            f"{path} is corrupt, cut short or not a safetensors file ({error}); copy or make it again"
        ) from error


def check_folder(folder: Path) -> list[Path]:
    """Reads the headers of the weight files of a pipeline's folder.

    Args:
        folder: as written by diffusers' ``save_pretrained``, a subfolder for each component.

    Returns:
        Its safetensors files, in order.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: for corrupt or truncated ones, and for a component with none but pickled ones.
    """
    files = sorted(folder.glob("*/*.safetensors"))
    whole = {file.parent for file in files}
    pickled = sorted(p for p in folder.glob("*/*") if p.suffix in PICKLES and p.name.startswith(_MODELS))
    for file in files + [p for p in pickled if p.parent not in whole]:
        check(file)
    if not files:
        raise FileNotFoundError(f"no .safetensors weights in {folder}; check the path, or save the pipeline again")
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """Returns a SHA-256 that tells apart sets of weight files without reading them through.

    It covers names, sizes, and 64 KiB at the start, in the middle and at the end of each: training moves every weight.

    Args:
        files: of one folder, each in its component's subfolder.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}".encode())
        with open(path, "rb") as file:
            for start in (0, size // 2, size - _PIECE):
                file.seek(max(0, start))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def digest(*tensors: Tensor) -> str:
    """Returns the SHA-256 of the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_bytes(tensor))
    return found.hexdigest()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file.

    Args:
        path: the file.

    Returns:
        Its tensors by name, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a pickled weight file, or one that is corrupt or cut short.
    """
    with safe_open(check(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the metadata of a safetensors file alone; errors as of `read`."""
    with safe_open(check(path), framework="pt") as file:
        return dict(file.metadata() or {})


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file whole or not at all, replacing an older one, a tensor after the other.

    Args:
        path: the file; its folder is made if missing.
        tensors: by name, on any device.
        metadata: strings kept in the header.
    """
    header, order = _header(tensors, metadata or {})
    with writing(path) as file:
        file.write(header)
        for name in order:
            file.write(_bytes(tensors[name]))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Header of a safetensors file, and the tensors in the order of the file: equal contents, equal bytes.

    safetensors itself tells the order, of tensors without elements; that of metadata it leaves to chance, and here it is sorted.
    """
    content = save({name: torch.empty(0, dtype=t.dtype) for name, t in tensors.items()}, dict(metadata))
    entries = json.loads(content[8:])
    entries["__metadata__"] = dict(sorted(metadata.items()))
    order, end = [name for name in entries if name != "__metadata__"], 0
    for name in order:
        first, end = end, end + tensors[name].nbytes
        entries[name] |= {"shape": list(tensors[name].shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; one that is contiguous on the CPU is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # one number of a larger tensor counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that is written whole or not at all: a temporary one beside it, which takes its name at the end.

    Args:
        path: the file; its folder is made if missing.

    Yields:
        The open file. After an error nothing is left of it, and an older file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all, see `writing`."""
    with writing(path) as file:
        file.write(content)


def check_writable(folder: Path) -> None:
    """Refuses, before anything is loaded, a folder that cannot be made or written.

    Raises:
        OSError: where a file has its name or that of a folder above it, or the place is read-only.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"output {folder}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"output {folder}: {place} cannot be written; choose another folder")

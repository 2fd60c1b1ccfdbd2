"""Files inside a folder, a zip or a tar, by index in the order of their names, whatever order they were stored in."""

from __future__ import annotations

import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowkit.eval.decoding import SUFFIXES


@dataclass(frozen=True)
class Files:
    """Image files of one place, and what was asked for beside them.

    Attributes:
        names: relative paths, sorted.
        read: returns the bytes of file i.
        describe: returns the name of file i for an error.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    describe: Callable[[int], str]


def kind(path: Path) -> str:
    """Returns "folder", "zip", "tar" or "npz".

    Raises:
        ValueError: for another kind of file.
    """
    if path.is_dir():
        return "folder"
    if path.suffix in (".zip", ".tar", ".npz"):
        return path.suffix[1:]
    raise ValueError(f"cannot read images from {path}; use a folder, .zip, .tar or .npz")


def open_files(path: Path, kind: str, beside: tuple[str, ...] = ()) -> Files:
    """Opens a folder or archive.

    Args:
        path: of it.
        kind: "folder", "zip" or "tar".
        beside: ends of the names of further files that are wanted, such as ".txt".

    Raises:
        ValueError: for a broken archive.
    """
    return {"folder": _folder, "zip": _zip, "tar": _tar}[kind](path, (*SUFFIXES, *beside))


def npz_images(path: Path) -> Tensor:
    """Returns the images of an .npz file, ``arr_0`` or its only uint8 array of four axes, in their stored order of axes.

    Raises:
        ValueError: for a broken file, or one without such an array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = ["arr_0"] if "arr_0" in file.files else file.files
            found = {name: file[name] for name in wanted}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a plain .npz file of arrays ({error}); copy or make it again") from error
    fitting = [array for array in found.values() if array.dtype == np.uint8 and array.ndim == 4]
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in found.items())
        raise ValueError(f"{path} must hold one array of images, uint8 with four axes (found: {shapes}); name it arr_0")
    return torch.from_numpy(fitting[0])


def _wanted(names: Iterable[str], ends: tuple[str, ...]) -> list[str]:
    # Hidden files, and what macOS adds to archives, are no images of the set.
    def shown(name: str) -> bool:
        return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))

    return sorted(name for name in names if name.lower().endswith(ends) and shown(name))


def _folder(path: Path, ends: tuple[str, ...]) -> Files:
    names = list[str]()
    for folder, _, files in os.walk(path, followlinks=True):
        inside = Path(folder).relative_to(path).as_posix()
        names += [name if inside == "." else f"{inside}/{name}" for name in files]
    # By relative path: where links lead does not change the order.
    names = _wanted(names, ends)
    return Files(names, lambda i: (path / names[i]).read_bytes(), lambda i: str(path / names[i]))


def _zip(path: Path, ends: tuple[str, ...]) -> Files:
    local = _Handles(path)
    try:
        with zipfile.ZipFile(path) as file:
            names = _wanted(file.namelist(), ends)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is broken or no zip file ({error}); copy it again") from error

    def read(index: int) -> bytes:
        try:
            return local.zip().read(names[index])
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path}: {names[index]} cannot be read ({error}); make the archive again") from error

    return Files(names, read, lambda i: f"{path}: {names[i]}")


def _tar(path: Path, ends: tuple[str, ...]) -> Files:
    try:
        with tarfile.open(path, "r:") as file:
            members = {member.name.removeprefix("./"): member for member in file if member.isfile()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is broken or no uncompressed tar file ({error}); copy it again") from error
    names = _wanted(members, ends)

    def read(index: int) -> bytes:
        member = members[names[index]]
        # Straight from the place of its bytes: a handle shared by threads would have to be locked.
        with open(path, "rb") as file:
            file.seek(member.offset_data)
            content = file.read(member.size)
        if len(content) < member.size:
            raise ValueError(f"{path}: {names[index]} is cut short; copy the archive again")
        return content

    return Files(names, read, lambda i: f"{path}: {names[i]}")


class _Handles:
    """An open archive for each thread and process: they must not share a position in the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.local = path, threading.local()

    def zip(self) -> zipfile.ZipFile:
        if getattr(self.local, "owner", None) != os.getpid():
            self.local.file, self.local.owner = zipfile.ZipFile(self.path), os.getpid()
        file: zipfile.ZipFile = self.local.file
        return file

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]

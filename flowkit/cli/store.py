"""The folder of ``flowkit sample``: its settings, the samples in it, and what is still missing.

Every file is written whole or not at all. PNG, video and sound are one file a sample, named by its index; NPZ is one file of all,
``samples.npz``, put together at the end from one part a block. So a killed run goes on with the blocks that lack a file, and a
file that is cut short is drawn again.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowkit.cli import media
from flowkit.eval.pictures import mosaic, picture, save_png
from flowkit.eval.provenance import first_difference
from flowkit.weights import write_bytes, writing

SETTINGS, OVERVIEW, NPZ, PARTS = "sample.json", "overview.png", "samples.npz", "parts"
PICTURES = 64  # of the overview, at most
_FORMAT = "flowkit.sample/1"
_LATER = ("versions", "device")  # what may change between a run and its resumption
_SAMPLE = re.compile(rf"\d{{6,}}\.({'|'.join(sorted({f for formats in media.FORMATS.values() for f in formats}))})")
_TORN = re.compile(r"\.(\d{6,}|sample|samples|overview)\.(\w+)\.\w+")  # what a killed write leaves


@dataclass(frozen=True)
class Store:
    """The samples of one run.

    Attributes:
        folder: where they lie.
        file_format: "png", "npz", "webp", "gif", "mp4" or "wav".
        indices: of all samples.
    """

    folder: Path
    file_format: str
    indices: range

    def name(self, index: int) -> str:
        """Returns the file of a sample."""
        return NPZ if self.file_format == "npz" else f"{index:06d}.{self.file_format}"

    def open(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Writes the settings of a run, or finds the same ones there.

        Args:
            settings: values of JSON.
            overwrite: remove samples of other settings, instead of refusing.

        Raises:
            ValueError: for a folder of something else, or with samples of other settings; names the first one that differs.
            OSError: for a folder that cannot be written.
        """
        settings = json.loads(json.dumps({"format": _FORMAT, **settings}))
        path = self.folder / SETTINGS
        _check_ours(self.folder)
        if path.is_file() and _samples(self.folder):
            found = first_difference(_compared(_read(path, overwrite)), _compared(settings))
            if found is None:
                return
            if not overwrite:
                place, old, new = found
                raise ValueError(f"{self.folder} holds samples with {place} {old!r:.80}, this run has {new!r:.80}; choose another "
                                 "--output, or start anew with --overwrite")  # fmt: skip
        for file in _samples(self.folder):
            file.unlink()
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        (self.folder / OVERVIEW).unlink(missing_ok=True)
        write_bytes(path, _json(settings).encode())

    def missing(self, blocks: Sequence[range]) -> list[range]:
        """Returns the blocks that lack a sample."""
        if self.file_format == "npz" and media.whole(self.folder / NPZ):
            return []
        return [block for block in blocks if not all(media.whole(path) for path in self._files(block))]

    def _files(self, block: range) -> list[Path]:
        if self.file_format == "npz":
            return [self.folder / PARTS / f"{block.start:06d}.npz"]
        return [self.folder / self.name(index) for index in block]

    def write(self, block: range, samples: Tensor, rate: int, notes: Sequence[Mapping[str, Any]]) -> None:
        """Writes the samples of a block that are not there yet.

        Args:
            block: their indices.
            samples: from `media.content`.
            rate: frames a second, or Hz of sound.
            notes: how each was made.
        """
        if self.file_format == "npz":
            buffer = BytesIO()
            np.savez(buffer, samples.movedim(-3, -1).contiguous().numpy())
            write_bytes(self._files(block)[0], buffer.getvalue())
            return
        for path, sample, note in zip(self._files(block), samples, notes, strict=True):
            if not media.whole(path):
                write_bytes(path, media.encode(sample, self.file_format, rate, note))

    def finish(self, blocks: Sequence[range], labels: Sequence[int] | None) -> Path | None:
        """Draws the overview, puts an NPZ together, and removes what killed writes left.

        Args:
            blocks: all of the run.
            labels: class of each sample for the NPZ; None where there are none.

        Returns:
            The overview; None for sound.

        Raises:
            ValueError: where samples are missing, or do not fit into one array.
        """
        if absent := self.missing(blocks):
            raise ValueError(f"{sum(map(len, absent))} of {len(self.indices)} samples are not in {self.folder}, the first being "
                             f"{absent[0][0]}; all processes must write into the same folder")  # fmt: skip
        overview = self.folder / OVERVIEW
        unfinished = self.file_format != "npz" or not (self.folder / NPZ).is_file()
        if self.file_format != "wav" and unfinished:
            pictures = list(self._pictures(blocks))
            save_png(overview, mosaic(pictures, columns=min(8, len(pictures)), size=128, gap=4))
        if self.file_format == "npz" and unfinished:
            files = [path for block in blocks for path in self._files(block)]
            _join(files, len(self.indices), self.folder / NPZ, labels)
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        for torn in self.folder.iterdir():
            if _TORN.fullmatch(torn.name):
                torn.unlink()
        return overview if self.file_format != "wav" else None

    def _pictures(self, blocks: Sequence[range]) -> Iterator[Image.Image]:
        """The first samples, as pictures."""
        left = PICTURES
        for block in blocks:
            if self.file_format == "npz":
                with np.load(self._files(block)[0]) as part:
                    array = part["arr_0"][:left]
                array = array[:, array.shape[1] // 2] if array.ndim == 5 else array
                yield from (picture(torch.from_numpy(one).movedim(-1, 0)) for one in array)
            else:
                yield from (media.still(path) for path in self._files(block)[:left])
            left -= len(block)
            if left <= 0:
                return


@contextmanager
def disk_full_told(folder: Path) -> Iterator[None]:
    """Says what a full disk means here."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space is left for {folder}; what is there is whole: free some and run the same command again"
        ) from error


def _check_ours(folder: Path) -> None:
    """Refuses a folder with anything that no run of ours left there."""
    if not folder.exists() or (folder / SETTINGS).is_file():
        return
    # A run that was killed while it wrote its settings leaves a hidden temporary file.
    if any(not _TORN.fullmatch(entry.name) for entry in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no {SETTINGS}, so it is no folder of samples; choose another --output"
        )


def _samples(folder: Path) -> list[Path]:
    """The files of samples in a folder, the parts of an NPZ among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _SAMPLE.fullmatch(path.name) or path.name == NPZ]
    return sorted((*found, *(folder / PARTS).glob("[0-9]*.npz")))


def _read(path: Path, overwrite: bool) -> dict[str, Any]:
    """The settings in a folder; none where they cannot be read and are to be overwritten."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if overwrite:
            return {}
        raise ValueError(f"{path} is not JSON ({error}); start anew with --overwrite") from error
    return stored if isinstance(stored, dict) else {}


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal between a run and its resumption."""
    return {key: value for key, value in settings.items() if key not in _LATER}


def _json(settings: Mapping[str, Any]) -> str:
    """The settings for people to read: one line a sample."""
    lines = ",\n".join(f"  {json.dumps(sample, ensure_ascii=False)}" for sample in settings["samples"])
    frame = json.dumps({**settings, "samples": []}, indent=1, ensure_ascii=False)
    return frame.replace('"samples": []', f'"samples": [\n{lines}\n ]') + "\n"


def _join(parts: Sequence[Path], count: int, path: Path, labels: Sequence[int] | None) -> None:
    """Writes the NPZ of all samples, holding one part at a time."""
    with np.load(parts[0]) as part:
        shape = part["arr_0"].shape[1:]
    with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for part_path in parts:
                with np.load(part_path) as part:
                    array = part["arr_0"]
                if array.shape[1:] != shape:
                    raise ValueError(f"samples of shapes {shape} and {array.shape[1:]} do not fit into one NPZ; draw them anew "
                                     "with another --format and --overwrite")  # fmt: skip
                member.write(array.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64))

"""The folder of an evaluation: its settings, and the features of its images in blocks, each there whole or not at all.

    run.json                what the run depends on; another run is refused by the name of what differs
    samples/NAME/           features of the samples by extractor, see `flowkit.eval.spool.FeatureSpool`
    samples/block-*.json    a block's images as a hash, seconds and network evaluations: written last, so its block is done
    reference-NAME/         the same of the reference's images, where a metric needs them
    result.json             figures, standard errors and the record

A block is a range of sample indices and a function of the number of images and the batch size alone. Whoever draws it, whenever,
leaves the same files; so processes need not talk, and a run that was killed goes on with the blocks that are missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit import weights
from flowkit.eval.provenance import first_difference
from flowkit.eval.spool import FeatureSpool
from flowkit.eval.statistics import Identity

SETTINGS, RESULT = "run.json", "result.json"
# A block is at most this many batches, so that little is lost, and a run has at least so many blocks to share.
_BATCHES, _BLOCKS = 8, 32


@dataclass(frozen=True)
class Kind:
    """What a folder holds.

    Attributes:
        name: with its article, for messages.
        settings: name of the file of its settings.
        format: of that file.
        torn: name of a file that a killed process left half written.
        added: settings that hold a mapping to which a later run may add.
    """

    name: str
    settings: str
    format: str
    torn: re.Pattern[str]
    added: Sequence[str] = ()


EVALUATION = Kind(
    "an evaluation",
    SETTINGS,
    "flowkit.evaluation/1",
    re.compile(r"\.(run|result|block-\d+|kept-\d+|features-\d+|chunk-\d+)\.(json|safetensors)\.\w+"),
    ("extractors", "references"),
)


class Spools:
    """What is kept of one set of images while it is collected.

    Args:
        folder: of the set.
        count: number of images.
        batch_size: images at a time.
        slots: dimension and identity of each kind of feature, by name.
        keep: of the first images to keep as they are.
    """

    def __init__(
        self, folder: Path, count: int, batch_size: int, slots: Mapping[str, tuple[int, Identity]], keep: int = 0
    ) -> None:
        self.folder, self._keep = folder, min(keep, count)
        size = batch_size * max(1, min(_BATCHES, count // (_BLOCKS * batch_size)))
        self.blocks = [range(low, min(low + size, count)) for low in range(0, count, size)]
        self.features = {
            name: FeatureSpool(folder / file_name(name), count, dim, size, identity)
            for name, (dim, identity) in slots.items()
        }

    def missing(self) -> list[int]:
        """Returns the blocks still to be collected.

        Raises:
            ValueError: for files of another run, or corrupt ones.
        """
        absent = {index for spool in self.features.values() for index in spool.missing()}
        absent |= {k for k in range(len(self.blocks)) if not (self._ledger(k).is_file() and self._kept_whole(k))}
        return sorted(absent)

    def write(self, index: int, features: Mapping[str, Tensor], kept: Tensor, entry: Mapping[str, Any]) -> None:
        """Writes a block.

        Args:
            index: of the block.
            features: of its images in order, by slot.
            kept: its first `kept_of` images, uint8.
            entry: of the ledger.
        """
        for name, spool in self.features.items():
            spool.write(index, features[name])
        if self.kept_of(index):
            weights.write(self._kept(index), {"images": kept})
        write_json(self._ledger(index), entry)

    def entries(self) -> list[dict[str, Any]]:
        """Returns the ledger, block by block."""
        return [json.loads(self._ledger(k).read_text(encoding="utf-8")) for k in range(len(self.blocks))]

    def kept(self) -> Tensor:
        """Returns the first images, uint8 (keep, C, H, W)."""
        parts = [weights.read(self._kept(k))[0]["images"] for k in range(len(self.blocks)) if self.kept_of(k)]
        return torch.cat(parts) if parts else torch.empty(0, *self.entries()[0]["shape"], dtype=torch.uint8)

    def kept_of(self, index: int) -> int:
        """Returns how many images of a block are kept as they are."""
        return max(0, min(self._keep, self.blocks[index].stop) - self.blocks[index].start)

    def _kept_whole(self, index: int) -> bool:
        wanted = self.kept_of(index)
        return not wanted or (
            self._kept(index).is_file() and len(weights.read(self._kept(index))[0]["images"]) >= wanted
        )

    def _kept(self, index: int) -> Path:
        return self.folder / f"kept-{index:06d}.safetensors"

    def _ledger(self, index: int) -> Path:
        return self.folder / f"block-{index:06d}.json"


def file_name(name: str) -> str:
    """Returns a name of an extractor as one of a folder: layers are written ``adm/spatial``."""
    return re.sub(r"[^\w.=-]", "+", name)


def open_run(folder: Path, settings: Mapping[str, Any], resume: bool, kind: Kind = EVALUATION) -> None:
    """Writes the settings of a run, or finds the same ones there, and removes what a killed process left half written.

    Args:
        folder: made if missing.
        settings: values of JSON.
        resume: whether a run that is there may be gone on with.
        kind: what the folder holds.

    Raises:
        ValueError: for a folder of something else, with a run of other settings (the first that differs is named), or with any
            run where it shall not be resumed.
    """
    settings = json.loads(json.dumps({"format": kind.format, **settings}))
    path = folder / kind.settings
    if not path.is_file():
        if folder.exists() and any(not kind.torn.fullmatch(entry.name) for entry in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no {kind.settings}, so it is no folder of {kind.name}; choose another"
            )
        write_json(path, settings)
        return
    if not resume:
        raise ValueError(
            f"{folder} holds {kind.name} already; pass resume=True to go on with it, or choose another folder"
        )
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another folder") from error
    # What may be added to a run must be the same where it is in both.
    new = {**settings, **{key: {**old.get(key, {}), **settings[key]} for key in kind.added}}
    if found := first_difference({**old, **{key: {**new[key], **old.get(key, {})} for key in kind.added}}, new):
        place, before, now = found
        raise ValueError(f"{folder} holds {kind.name} with {place} {before!r:.80}, this one has {now!r:.80}; choose another "
                         "folder")  # fmt: skip
    if new != old:
        write_json(path, new)
    for torn in folder.rglob(".*"):
        if kind.torn.fullmatch(torn.name):
            torn.unlink(missing_ok=True)
    if kind is EVALUATION:
        shutil.rmtree(folder / "chunks", ignore_errors=True)


class NoRoomError(OSError):
    """The disk has no room for the features of a run."""


def check_space(folder: Path, spools: Sequence[Spools]) -> None:
    """Refuses a disk that cannot hold the features still to come, before anything is drawn.

    Raises:
        NoRoomError: says how much is needed and how much there is.
    """
    check_room(
        folder, sum(len(s.blocks[k]) * f.shape[1] * 4 for s in spools for f in s.features.values() for k in f.missing())
    )


def check_room(folder: Path, needed: int) -> None:
    """Refuses a disk without room for so many bytes; errors as of `check_space`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoomError(f"the features take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left; choose another "
                          "folder (output=, or TMPDIR without one)")  # fmt: skip


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Writes JSON, whole or not at all."""
    weights.write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

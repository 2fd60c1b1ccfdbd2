"""Training images by index, with their labels or captions: folders, archives, webdataset shards, `datasets`, tensors.

Every source is read by index, so an order of training is a permutation, and a training that was stopped goes on at the very image.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from flowkit import assets
from flowkit.distill import sidecars
from flowkit.eval import archives
from flowkit.eval.archives import Files
from flowkit.eval.decoding import SUFFIXES, Decoding
from flowkit.weights import digest

WANTED = (None, "label", "caption")
_HEADERS = 10_000
Conditions = Sequence[int] | Sequence[str] | None


class Examples(Dataset[Tensor]):
    """Training images by index, float32 (C, H, W) in [-1, 1].

    Args:
        count: how many there are.
        read: returns image i, uint8, or floating point as the network shall see it.
        conditions: label or caption of each; None where there are none.
        description: what a training depends on.
        classes: names of the labels.
        name: what an error calls image i.
        content: bytes of the file of image i, for `check`; None where there is none.

    Raises:
        ValueError: for no images, or another number of conditions.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int], Tensor],
        conditions: Conditions,
        description: dict[str, Any],
        *,
        classes: Sequence[str] | None = None,
        name: Callable[[int], str] = lambda index: f"image {index}",
        content: Callable[[int], bytes] | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"there are no images in {description.get('path', 'the data')}; check the path")
        if conditions is not None and len(conditions) != count:
            raise ValueError(f"there are {count} images and {len(conditions)} labels or captions; give one for each")
        self._count, self._read, self._name, self._content = count, read, name, content
        self.conditions, self.classes = conditions, classes
        told = hashlib.sha256(json.dumps([list(conditions or ()), list(classes or ())]).encode()).hexdigest()
        self.description = {**description, "count": count, "conditions_sha256": told}

    def __len__(self) -> int:
        """Returns how many images there are."""
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Returns image i.

        Raises:
            ValueError: for a file that is broken; it is named.
        """
        image = self._read(index)
        return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image

    def check(self, decoding: Decoding) -> None:
        """Reads the headers of the files, of 10,000 evenly at most, and whole those that may need a choice.

        Args:
            decoding: that they will be read with.

        Raises:
            ValueError: for a file that is broken or no image, named.
        """
        if self._content is None:
            return
        for index in np.unique(
            np.linspace(0, self._count - 1, min(self._count, _HEADERS)).round().astype(int)
        ).tolist():
            content = self._content(index)
            try:
                with Image.open(io.BytesIO(content)) as image:
                    plain = image.mode in ("L", "RGB")[: decoding.channels] and "transparency" not in image.info
            except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
                plain = False
            if not plain:
                decoding(content, self._name(index))


def tensors(images: Tensor, conditions: Conditions = None, **description: Any) -> Examples:  # noqa: ANN401
    """Returns images in memory.

    Args:
        images: (N, C, H, W), uint8, or floating point as the network shall see them.
        conditions: label or caption of each.
        description: facts for the record.
    """
    told = {"kind": "tensor", **description, "sha256": digest(images)}
    return Examples(len(images), lambda i: images[i], conditions, told)


def open_examples(
    source: Any,  # noqa: ANN401
    wanted: str | None,
    decoding: Decoding,
    *,
    split: str = "train",
    image_column: str | None = None,
    condition_column: str | None = None,
) -> Examples:
    """Opens training data.

    Args:
        source: "digits" or "shapes" (the embedded training images); a folder or .zip of images (see `flowkit.distill.sidecars` for
            their labels and captions); webdataset shards: a .tar, a folder of them, or a pattern such as "data/*.tar" or
            "data/{000..063}.tar"; an .npz (arr_0 images, arr_1 labels); a folder of `datasets` or a name on the hub, or a
            ``datasets.Dataset``; or `Examples`.
        wanted: what is read beside images: "label", "caption" or None.
        decoding: of image files.
        split: of `datasets`.
        image_column: of `datasets`; None means the one column of images.
        condition_column: of `datasets`; None means "label", or "text", "caption" or "prompt".

    Returns:
        The examples; of the images themselves nothing has been read, except in memory.

    Raises:
        FileNotFoundError: for a path that is not there.
        ImportError: without the extra that the source needs.
        TypeError: for a source of another kind.
        ValueError: for an empty source, or images without what is wanted.
    """
    if wanted not in WANTED:
        raise ValueError(f"unknown condition {wanted!r}; choose label, caption or None")
    if isinstance(source, Examples):
        return source
    if isinstance(source, str) and source in assets.NAMES:
        pixels, labels = assets.images(source)
        return tensors(pixels, _only(labels.tolist(), wanted, f"the embedded data {source!r}"), path=source)
    columns = (image_column, condition_column)
    if not isinstance(source, (str, PathLike)):
        return _dataset(source, wanted, decoding, {"kind": "datasets"}, columns)
    path = Path(source)
    if path.is_dir() and (path / "state.json").is_file():
        found = _datasets().load_from_disk(str(path))
        return _dataset(found, wanted, decoding, {"kind": "datasets", "path": str(path)}, columns)
    if any(path.glob("**/*.parquet")) or (not path.exists() and _is_name(str(source))):
        found = _datasets().load_dataset(str(source), split=split)
        told = {"kind": "datasets", "path": str(source), "split": split}
        return _dataset(found, wanted, decoding, told, columns)
    return _npz(path, wanted) if path.suffix == ".npz" else _files(path, wanted, decoding)


def _only(values: Sequence[int], wanted: str | None, name: str) -> Sequence[int] | None:
    if wanted == "caption":
        raise ValueError(f"{name} has labels and no captions; train a class-conditional model on it")
    return values if wanted else None


def _npz(path: Path, wanted: str | None) -> Examples:
    if not path.is_file():
        raise FileNotFoundError(f"no images at {path}; check the path")
    pixels = archives.npz_images(path)
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    with np.load(path, allow_pickle=False) as file:
        labels = file["arr_1"].tolist() if "arr_1" in file.files else None
    if wanted and labels is None:
        raise ValueError(f"{path} has no labels; name them arr_1")
    return tensors(pixels, _only(labels or (), wanted, str(path)), path=str(path))


def _files(path: Path, wanted: str | None, decoding: Decoding) -> Examples:
    """Images of a folder or zip, or of shards one after the other."""
    shards = _shards(path)
    places: list[tuple[Files, int]] = []
    values: list[int | str] = []
    names = hashlib.sha256()
    for shard in shards:
        files = archives.open_files(shard, archives.kind(shard), sidecars.BESIDE)
        inside = [i for i, name in enumerate(files.names) if name.lower().endswith(SUFFIXES)]
        places += [(files, i) for i in inside]
        if wanted and inside:
            values += sidecars.read(files, inside, wanted)
        names.update(json.dumps([shard.name, [files.names[i] for i in inside]]).encode())
    labels, classes = sidecars.numbered(values) if wanted == "label" else (values, None)

    def content(index: int) -> bytes:
        files, place = places[index]
        return files.read(place)

    def name(index: int) -> str:
        files, place = places[index]
        return files.describe(place)

    told = {"kind": archives.kind(shards[0]), "path": str(path), "names_sha256": names.hexdigest()}
    return Examples(
        len(places),
        lambda i: decoding(content(i), name(i)),
        labels if wanted else None,  # type: ignore[arg-type]
        told | asdict(decoding),
        classes=classes,
        name=name,
        content=content,
    )


def _shards(path: Path) -> list[Path]:
    """The places that a path names, in order."""
    if path.exists():
        tars = sorted(path.glob("*.tar")) if path.is_dir() else []
        return tars or [path]
    text = str(path)
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        if "{" in text:
            raise ImportError(
                f"{text} has braces: pip install 'flowkit-diffusion[data]', or write a * there"
            ) from error
        patterns = [text]
    else:
        patterns = list(braceexpand(text))
    found = [Path(name) for pattern in patterns for name in sorted(glob.glob(pattern)) or [pattern]]
    for place in found:
        if not place.exists():
            raise FileNotFoundError(f"no images at {place}; check the path")
    return found


def _is_name(text: str) -> bool:
    """Whether a text can be a data set of the hub, and no path or pattern."""
    return not any(mark in text for mark in "*{\\") and not text.startswith((".", "/", "~")) and not Path(text).suffix


def _datasets() -> Any:  # noqa: ANN401
    try:
        import datasets
    except ImportError as error:
        raise ImportError("this data needs datasets: pip install 'flowkit-diffusion[data]'") from error
    return datasets


def _dataset(
    found: Any,  # noqa: ANN401
    wanted: str | None,
    decoding: Decoding,
    told: dict[str, Any],
    columns: tuple[str | None, str | None],
) -> Examples:
    """A ``datasets.Dataset``."""
    features = getattr(found, "features", None)
    if features is None or not hasattr(found, "select_columns") or not hasattr(found, "__len__"):
        raise TypeError(
            f"cannot train on {type(found).__name__}; pass a path, a name, one split of datasets, or Examples"
        )
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    image, condition = columns
    if image is None and len(images) != 1:
        raise ValueError(f"there are {len(images)} columns of images among {', '.join(features)}; pass image_column=")
    image = image or images[0]
    if wanted and condition is None:
        condition = next((key for key in sidecars.KEYS[wanted] if key in features), None)
    for column in (image, *([condition] if wanted else [])):
        if column not in features:
            raise ValueError(f"no column {column or wanted!r} among {', '.join(features)}; pass image_column= or "
                             "condition_column=")  # fmt: skip
    values = list(found[condition]) if wanted else None
    classes = getattr(features[condition], "names", None) if wanted else None
    if wanted == "label" and classes is None:
        values, classes = sidecars.numbered(values or ())
    if wanted == "caption" and not all(isinstance(value, str) for value in values or ()):
        raise ValueError(f"the column {condition!r} is not all text; pass condition_column=, the captions")
    pictures = found.select_columns([image])

    def read(index: int) -> Tensor:
        name = f"image {index} of {told.get('path', 'the data')}"
        try:
            return decoding.image(pictures[index][image], name)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{name} is broken ({error}); remove it") from error

    told = {**told, **asdict(decoding), "image": image, "condition": condition}
    return Examples(len(pictures), read, values, told, classes=classes)

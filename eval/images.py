"""Images from wherever they are: folders, archives, arrays, batches, data sets and functions, as blocks of uint8 tensors.

A source with a fixed order and length is read by index, so that ranks and restarts agree on what image i is; an iterable is read
once, in order. Pipelines are sampled by `flowkit.pipelines.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit.eval import archives
from flowkit.eval.decoding import Decoding

ROUNDINGS = ("nearest", "truncate")


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
        description: for the record: kind, place, count and how pixels were made.
        count: how many there are; None where only reading to the end tells.
        read: returns image i, uint8 (C, H, W); None for a source that is read once, in order.
        stream: batches in order, uint8 (B, C, H, W), where ``read`` is None.
    """

    description: dict[str, Any]
    count: int | None
    read: Callable[[int], Tensor] | None = None
    stream: Iterable[Tensor] | None = None
    name: Callable[[int], str] = lambda index: f"image {index}"

    def __len__(self) -> int:
        """Returns how many there are.

        Raises:
            TypeError: where that is not known.
        """
        if self.count is None:
            raise TypeError("the number of these images is not known before they are read; pass count= to images()")
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Returns image i, uint8 (C, H, W).

        Raises:
            IndexError: beyond the end.
            TypeError: for a source that is read once, in order.
        """
        if self.read is None:
            raise TypeError("these images are read once, in order, and have no index; iterate over blocks()")
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}; indices start at 0")
        return self.read(index)

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yields images ``start`` ... ``stop`` - 1 in order, in blocks of ``size`` but the last.

        Args:
            size: images in a block.
            start: the first index; a source without indices reads up to it.
            stop: the end. None means all.

        Yields:
            uint8 (B, C, H, W).

        Raises:
            ValueError: for a size below 1, images of different shapes, or fewer images than asked for.
        """
        if size < 1 or start < 0 or (stop is not None and stop < start):
            raise ValueError(
                f"got size={size}, start={start}, stop={stop}; blocks hold at least 1 image, 0 <= start <= stop"
            )
        if self.count is not None and max(start, stop or 0) > self.count:
            raise ValueError(
                f"images up to {max(start, stop or 0)} are asked for, there are {self.count}; ask for fewer"
            )
        if self.read is None:
            yield from self._streamed(size, start, self.count if stop is None else stop)
            return
        stop = len(self) if stop is None else stop
        shape: torch.Size | None = None
        for low in range(start, stop, size):
            block = []
            for index in range(low, min(low + size, stop)):
                image = self.read(index)
                shape = image.shape if shape is None else shape
                if image.shape != shape:
                    raise ValueError(f"{self.name(index)} is of shape {tuple(image.shape)}, those before of {tuple(shape)}; "
                                     "pass size= to bring all to one size")  # fmt: skip
                block.append(image)
            yield torch.stack(block)

    def _streamed(self, size: int, start: int, stop: int | None) -> Iterator[Tensor]:
        held: list[Tensor] = []
        seen, shape = 0, None
        for batch in self.stream or ():
            shape = batch.shape[1:] if shape is None else shape
            if batch.shape[1:] != shape:
                raise ValueError(f"the batch from image {seen} is of shape {tuple(batch.shape[1:])}, those before of "
                                 f"{tuple(shape)}; resize all to one size")  # fmt: skip
            low, high = max(0, start - seen), len(batch) if stop is None else min(len(batch), stop - seen)
            seen += len(batch)
            held.append(batch[low : max(low, high)])
            ready = torch.cat(held)
            while len(ready) >= size:
                yield ready[:size]
                ready = ready[size:]
            held = [ready]
            if stop is not None and seen >= stop:
                break
        if seen < max(start, stop or 0):
            raise ValueError(f"the images ended after {seen}, {max(start, stop or 0)} were promised; pass their number")
        if held and len(held[0]):
            yield held[0]


def images(
    source: Any,  # noqa: ANN401
    *,
    count: int | None = None,
    size: int | None = None,
    channels: int = 3,
    alpha: str = "refuse",
    deep: str = "refuse",
    value_range: tuple[float, float] | None = None,
    rounding: str = "nearest",
    clip: bool = False,
) -> Images:
    """Opens a source of images.

    Args:
        source: a folder (all images below it, sorted by relative path), a .zip or a webdataset .tar (sorted alike); an .npz
            (``arr_0`` or its only uint8 array, (N, H, W, C) or (N, C, H, W)); a tensor or array of one batch; a torch Dataset
            (tensors, PIL images, or tuples and dictionaries that begin with one or have it as "image"); a function of an index
            (``count`` says of how many); or an iterable of batches (B, C, H, W).
        count: the number of images of a function or iterable. None means unknown for the latter, all for the others.
        size: for files, see `flowkit.eval.decoding.Decoding`, as are channels, alpha and deep.
        channels: 3 or 1.
        alpha: "refuse", "white", "black" or "drop".
        deep: "refuse" or "scale".
        value_range: what black and white are in floating-point images: (0, 1) or (-1, 1); must be given for them.
        rounding: of floats to levels: "nearest" (half to even) or "truncate", as EDM does (with -1 ... 1: 127.5 x + 128).
        clip: bring floats outside the range into it, as samplers' images need; they are refused otherwise.

    Returns:
        The images; nothing but names and headers has been read.

    Raises:
        FileNotFoundError: for a path that is not there.
        TypeError: for a source of another kind.
        ValueError: for options that do not fit the source, an empty source, or an unknown option.
    """
    decoding = Decoding(channels, size, alpha, deep)
    if rounding not in ROUNDINGS or value_range not in (None, (0, 1), (-1, 1)):
        raise ValueError(f"got rounding={rounding!r}, value_range={value_range}; choose {' or '.join(ROUNDINGS)}, and (0, 1) or "
                         "(-1, 1)")  # fmt: skip

    def levels(x: Any, name: str) -> Tensor:  # noqa: ANN401
        return to_uint8(x, value_range, rounding, clip, name)

    floats = {"value_range": value_range, "rounding": rounding, "clip": clip}
    if isinstance(source, (str, PathLike)):
        if value_range is not None or clip or rounding != "nearest":
            raise ValueError(f"value_range, rounding and clip are for floats, and {source} holds bytes; leave them out")
        found = _open(Path(source), decoding)
    elif isinstance(source, (Tensor, np.ndarray)):
        batch = _batch(levels(source, "the batch"), "the batch")
        found = Images({"kind": "tensor", **floats}, len(batch), lambda i: batch[i])
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (list, tuple, dict)):
        found = Images(
            {"kind": type(source).__qualname__, **floats}, len(source), _item_reader(source, decoding, levels)
        )
    elif callable(source):
        if count is None:
            raise ValueError("a function of an index has no end; pass count=, the number of images")
        found = Images({"kind": "function", **floats}, count, _item_reader(_Called(source), decoding, levels))
    elif isinstance(source, Iterable):
        found = Images({"kind": "batches", **floats}, count, stream=_Batches(source, levels))
    else:
        raise TypeError(
            f"cannot read images from {type(source).__name__}; pass a path, tensor, Dataset, function or batches"
        )
    if size is not None and found.description["kind"] in ("tensor", "batches", "npz"):
        raise ValueError(
            f"size={size} is for image files, the source is of kind {found.description['kind']}; leave it out"
        )
    if found.count == 0:
        raise ValueError(f"there are no images in {found.description.get('path', 'the source')}; check the path")
    if count is not None and found.count is not None and count > found.count:
        raise ValueError(f"count={count} images are asked for, there are {found.count}; ask for fewer")
    chosen = found.count if count is None else count
    return Images({**found.description, "count": chosen}, chosen, found.read, found.stream, found.name)


def to_uint8(
    x: Any,  # noqa: ANN401
    value_range: tuple[float, float] | None = None,
    rounding: str = "nearest",
    clip: bool = False,
    name: str = "the batch",
) -> Tensor:
    """Returns levels 0 ... 255 of images.

    Args:
        x: tensor or array, uint8 (returned as it is) or floating point, any shape.
        value_range: (0, 1) or (-1, 1), what black and white are; must be given for floats.
        rounding: "nearest" (half to even) or "truncate" (EDM's: with -1 ... 1, the integer part of 127.5 x + 128).
        clip: bring values outside the range into it.
        name: what an error calls the images.

    Raises:
        TypeError: for other integers.
        ValueError: for floats without a range, outside of it, or not finite.
    """
    given: Tensor = x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))
    if given.dtype == torch.uint8:
        return given
    if not given.is_floating_point():
        raise TypeError(f"{name} is {given.dtype}; images are uint8, or floating point with value_range=")
    if value_range is None:
        raise ValueError(f"{name} is {given.dtype}; say what black and white are: value_range=(0, 1) or (-1, 1)")
    y = given.detach().float() if given.dtype in (torch.float16, torch.bfloat16) else given.detach()
    if not y.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; look at those images first")
    low, high = value_range
    # Half a level is where rounding begins to tell.
    slack = (high - low) / 510
    if not clip and y.numel() and (y.min() < low - slack or y.max() > high + slack):
        raise ValueError(f"{name} has values from {float(y.min()):.3g} to {float(y.max()):.3g}, outside {low} ... {high}; check "
                         "value_range, or pass clip=True")  # fmt: skip
    if rounding == "truncate":
        scaled = y * 127.5 + 128 if low == -1 else y * 255
        return scaled.clamp(0, 255).to(torch.uint8)
    return ((y - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


class _Called:
    """A function of an index under the name of a sequence."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        return self.function(index)


@dataclass(frozen=True)
class _Batches:
    """An iterable's batches as levels; read again where the iterable can be."""

    source: Iterable[Any]
    levels: Callable[[Any, str], Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.source):
            name = f"batch {number}"
            yield _batch(self.levels(_unwrapped(batch, name), name), name)


def _unwrapped(item: Any, name: str) -> Any:  # noqa: ANN401
    """The image of what data sets return: the first of a tuple or list, or "image" of a dictionary."""
    if isinstance(item, dict):
        if "image" not in item:
            raise ValueError(
                f"{name} is a dictionary of {', '.join(map(str, item))}, with no 'image'; return the image"
            )
        return item["image"]
    return item[0] if isinstance(item, (tuple, list)) else item


def _item_reader(source: Any, decoding: Decoding, levels: Callable[[Any, str], Tensor]) -> Callable[[int], Tensor]:  # noqa: ANN401
    def read(index: int) -> Tensor:
        name = f"image {index}"
        item = _unwrapped(source[index], name)
        if hasattr(item, "convert") and hasattr(item, "mode"):
            return decoding.image(item, name)
        x = levels(item, name)
        if x.ndim != 3 or x.shape[0] not in (1, 3):
            raise ValueError(f"{name} is of shape {tuple(x.shape)}; images are (C, H, W) with 1 or 3 channels")
        return x

    return read


def _batch(x: Tensor, name: str) -> Tensor:
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return x
    if x.ndim == 4 and x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2)
    raise ValueError(
        f"{name} is of shape {tuple(x.shape)}; images are (B, C, H, W) or (B, H, W, C) with 1 or 3 channels"
    )


def _open(path: Path, decoding: Decoding) -> Images:
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}; check the path")
    kind = archives.kind(path)
    if kind == "npz":
        batch = _batch(archives.npz_images(path), str(path))
        return Images({"kind": "npz", "path": str(path)}, len(batch), lambda i: batch[i], name=lambda i: f"{path}: {i}")
    files = archives.open_files(path, kind)
    options = {"channels": decoding.channels, "size": decoding.size, "alpha": decoding.alpha, "deep": decoding.deep}
    return Images(
        {"kind": kind, "path": str(path), **options},
        len(files.names),
        lambda i: decoding(files.read(i), files.describe(i)),
        name=files.describe,
    )

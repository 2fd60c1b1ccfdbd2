"""The data of each update: images in an order that is a function of the seed alone, decoded ahead by other processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from flowkit import rng
from flowkit.distill.data import Examples

_ORDER = 2**62  # updates are numbered from 0, and their seeds with them
_AHEAD = 4
_Picked = tuple[list[int], list[bool]]


class Order:
    """Which image stands in which row of which update.

    Row r of update k is number ``k batch + r`` of the epochs, one after the other; each is a new permutation of all images. So a
    training that goes on at update k reads what one that never stopped would, and so does any number of processes.

    Args:
        count: number of images.
        batch: rows of the global batch.
        seed: of the permutations and the flips.
        flip: whether half of the images are mirrored, others in each epoch.
    """

    def __init__(self, count: int, batch: int, seed: int, flip: bool) -> None:
        self._count, self._batch, self._flip = count, batch, flip
        self._seed = rng.sample_seed(seed, _ORDER)
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, step: int, rows: range) -> _Picked:
        """Returns the numbers of the images of some rows of an update, and which of them are mirrored."""
        chosen = [divmod(step * self._batch + row, self._count) for row in rows]
        # Those of a batch are kept, and no others.
        self._epochs = {epoch: self._epochs.get(epoch) or self._draw(epoch) for epoch in sorted({e for e, _ in chosen})}
        return [int(self._epochs[e][0][i]) for e, i in chosen], [bool(self._epochs[e][1][i]) for e, i in chosen]

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        generator = Generator().manual_seed(rng.sample_seed(self._seed, epoch))
        order = torch.randperm(self._count, generator=generator)
        return order, torch.rand(self._count, generator=generator) < (0.5 if self._flip else 0.0)


class Feed:
    """Images of the rows of any update.

    Args:
        examples: the images.
        batch: rows of the global batch.
        seed: of order and flips, see `Order`.
        parts: the rows of every update that this process asks for, in order.
        flip: whether half of the images are mirrored.
        workers: processes that decode ahead. 0 decodes when asked, as on systems that cannot fork.
    """

    def __init__(
        self, examples: Examples, batch: int, seed: int, parts: Sequence[range], *, flip: bool = False, workers: int = 0
    ) -> None:
        self._rows, self._parts = _Rows(examples), list(parts)
        self._order = (len(examples), batch, seed, flip)
        self._picked = Order(*self._order)
        self._workers = workers if "fork" in multiprocessing.get_all_start_methods() else 0
        self._running: Iterator[Tensor | Exception] = iter(())
        self._due: tuple[int, range] | None = None

    def __call__(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Returns the images of one of the parts of an update, float32 (b, C, H, W), and their numbers, int64 (b,).

        Raises:
            ValueError: for a file that is broken, or images of different shapes.
        """
        place = self._parts.index(rows)
        if self._due != (step, rows):
            self._running = self._start(step, place)
        found = next(self._running)
        place = (place + 1) % len(self._parts)
        self._due = (step + (place == 0), self._parts[place])
        if isinstance(found, Exception):
            raise found
        return found, torch.tensor(self._picked(step, rows)[0])

    def close(self) -> None:
        """Ends the processes."""
        self._running, self._due = iter(()), None

    def _start(self, step: int, place: int) -> Iterator[Tensor | Exception]:
        ahead, parts = Order(*self._order), self._parts

        class Sampler:
            def __iter__(self) -> Iterator[_Picked]:
                now, first = step, place
                while True:
                    for part in parts[first:]:
                        yield ahead(now, part)
                    now, first = now + 1, 0

        # A generator of its own: the loader draws a seed from it, which nobody reads.
        loader: DataLoader[Tensor | Exception] = DataLoader(
            self._rows,
            batch_size=None,
            sampler=Sampler(),
            generator=Generator(),
            num_workers=self._workers,
            prefetch_factor=_AHEAD if self._workers else None,
            multiprocessing_context="fork" if self._workers else None,
        )
        return iter(loader)


class _Rows(Dataset["Tensor | Exception"]):
    """Images by their numbers and flips, stacked; an error is returned, or the loader would wrap it in its traceback."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, picked: _Picked) -> Tensor | Exception:
        try:
            images = [
                self._examples[i].flip(-1) if flip else self._examples[i] for i, flip in zip(*picked, strict=True)
            ]
            shapes = sorted({tuple(image.shape) for image in images})
            if len(shapes) > 1:
                raise ValueError(
                    f"images {picked[0]} are of different shapes, {' and '.join(map(str, shapes))}; pass size="
                )
            return torch.stack(images)
        except (ValueError, OSError) as error:
            return error


def default_workers() -> int:
    """Returns how many processes decode ahead where nothing is said: one for each other core, 8 at most."""
    return min(8, (os.cpu_count() or 1) - 1)

"""The randomness of one update of a training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from flowkit import rng

Times = Callable[[int, Generator], Tensor]  # (B, generator) -> flow times (B,)


class Draw:
    """Some rows of the global batch of an update, and the random numbers that belong to them.

    Every number is a function of (seed, step) and of a row's place in the batch: how the batch is cut among processes and
    accumulated parts, and where a stopped training goes on, changes nothing.

    Args:
        seed: of the training.
        step: number of the update, from 0.
        batch: rows of the global batch.
        rows: those of them that are wanted; None means all.

    Attributes:
        step: number of the update.
        batch: rows of the global batch.
        rows: those that are wanted, b of them.
    """

    def __init__(self, seed: int, step: int, batch: int, rows: range | None = None) -> None:
        self.step, self.batch, self.rows = step, batch, range(batch) if rows is None else rows
        self._seed, self._own = seed, rng.sample_seed(seed, step)
        self._generator = Generator().manual_seed(self._own)
        self._normals = 0

    def whole(self) -> Draw:
        """Returns the same draw for all rows of the batch, before anything was drawn."""
        return Draw(self._seed, self.step, self.batch)

    def indices(self, count: int) -> Tensor:
        """Returns the numbers of samples, even in 0 ... count - 1 with replacement, int64 (b,)."""
        return self._mine(torch.randint(count, (self.batch,), generator=self._generator))

    def times(self, sampling: Times) -> Tensor:
        """Returns flow times of a sampling, (b,)."""
        return self._mine(sampling(self.batch, self._generator))

    def uniform(self) -> Tensor:
        """Returns numbers even in [0, 1), (b,)."""
        return self._mine(torch.rand(self.batch, generator=self._generator))

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal noise, (b, *shape); the rows of other processes are not drawn."""
        self._normals += 1
        tag = self._normals * self.batch
        seeds = (rng.sample_seed(self._own, tag + row) for row in self.rows)
        return torch.stack([torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in seeds])

    def _mine(self, values: Tensor) -> Tensor:
        return values[self.rows.start : self.rows.stop]

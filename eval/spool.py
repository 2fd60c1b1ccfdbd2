"""Features and statistics of chunks on disk: fixed blocks of sample indices, each written whole or not at all.

A run that is killed finds the blocks it wrote and does the others; who writes which block, and when, does not matter, so
processes share a folder without talking. Reading maps the files into memory: what is not looked at is not loaded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol, overload

import torch
from safetensors import safe_open
from torch import Tensor

from flowkit import weights
from flowkit.eval.exact import ExactStats
from flowkit.eval.statistics import Accumulator, FeatureStats, Identity, check_features

_OPEN = 64


class Rows(Protocol):
    """Feature vectors by row: a tensor (n, d), or a `FeatureSpool` on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor, /) -> Tensor: ...


class FeatureSpool:
    """Feature vectors of a run on disk, float32, in safetensors files of fixed blocks of sample indices.

    Args:
        folder: of the run's features of one extractor and layer; made when the first block is written.
        count: number of samples N.
        dim: number of features d.
        block: samples in a file; the last may hold fewer. A thousand or more keeps files few and reading fast.
        identity: what makes the features (`flowkit.eval.features.FeatureExtractor.identity`); None where it is not known.

    Raises:
        ValueError: for numbers below 1.
    """

    def __init__(
        self, folder: str | PathLike[str], count: int, dim: int, block: int = 1000, identity: Identity | None = None
    ) -> None:
        if min(count, dim, block) < 1:
            raise ValueError(f"count, dim and block must be at least 1, got {count}, {dim} and {block}")
        self.folder, self.block, self.shape = Path(folder), block, (count, dim)
        self.identity = None if identity is None else dict(identity)
        kind = {"count": count, "dim": dim, "block": block, "identity": self.identity}
        self._kind = json.dumps(kind, sort_keys=True)
        self._mapped = functools.lru_cache(_OPEN)(self._map)

    def __len__(self) -> int:
        """Returns the number of samples N."""
        return self.shape[0]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-len(self) // self.block)

    def span(self, index: int) -> range:
        """Returns the sample indices of a block."""
        if not 0 <= index < self.blocks:
            raise ValueError(f"block {index} is not one of 0 to {self.blocks - 1}; {len(self)} samples have no more")
        return range(index * self.block, min((index + 1) * self.block, len(self)))

    def path(self, index: int) -> Path:
        """Returns the file of a block."""
        return self.folder / f"features-{index:06d}.safetensors"

    def write(self, index: int, features: Tensor) -> None:
        """Writes a block, in the place of an older one.

        Args:
            index: of the block.
            features: of its samples in order, (len(span(index)), d), floating point.

        Raises:
            TypeError: for features that are not floating point.
            ValueError: for another shape, or numbers that are not finite.
        """
        size = len(self.span(index))
        x = check_features(features, self.shape[1])
        if len(x) != size:
            raise ValueError(f"block {index} holds {size} samples, got features of {len(x)}; write whole blocks")
        weights.write(self.path(index), {"features": x.float()}, {"format": "flowkit features", "kind": self._kind})
        self._mapped.cache_clear()

    def missing(self) -> list[int]:
        """Returns the blocks still to be written.

        Raises:
            ValueError: for a file of another run in the folder, or a corrupt one.
        """
        return [index for index in range(self.blocks) if not (self.path(index).exists() and len(self._mapped(index)))]

    def _map(self, index: int) -> Tensor:
        path = weights.check(self.path(index))
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("kind")
            if kind != self._kind:
                raise ValueError(f"{path} holds features of another run ({kind}, not {self._kind}); use another folder")
            features: Tensor = file.get_tensor("features")
            return features

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """Returns rows: of a slice, or of a tensor of sample indices in any order; float32 (n, d).

        Raises:
            FileNotFoundError: where a block is missing.
        """
        wanted = torch.arange(len(self))[index] if isinstance(index, slice) else index
        rows = torch.empty(len(wanted), self.shape[1])
        home = wanted.div(self.block, rounding_mode="floor")
        for block in home.unique().tolist():
            here = home == block
            rows[here] = self._mapped(block)[wanted[here] - block * self.block]
        return rows


class StatsSpool(Sequence["FeatureStats | ExactStats"]):
    """Statistics of a run's chunks on disk, one safetensors file each; a sequence that loads a chunk when it is asked for.

    Args:
        folder: of the run's statistics of one extractor; made when the first chunk is written.
        chunks: how many there are.

    Raises:
        ValueError: for fewer than one chunk.
    """

    def __init__(self, folder: str | PathLike[str], chunks: int) -> None:
        if chunks < 1:
            raise ValueError(f"there must be at least 1 chunk, got {chunks}")
        self.folder, self._chunks = Path(folder), chunks

    def __len__(self) -> int:
        """Returns the number of chunks."""
        return self._chunks

    def path(self, index: int) -> Path:
        """Returns the file of a chunk."""
        return self.folder / f"chunk-{index:04d}.safetensors"

    def write(self, index: int, sums: Accumulator) -> None:
        """Writes a chunk, in the place of an older one.

        Raises:
            ValueError: for an index beyond the chunks.
        """
        if not 0 <= index < self._chunks:
            raise ValueError(f"chunk {index} is not one of 0 to {self._chunks - 1}")
        weights.write(self.path(index), *sums.state())

    def missing(self) -> list[int]:
        """Returns the chunks still to be written."""
        return [index for index in range(self._chunks) if not self.path(index).exists()]

    @overload
    def __getitem__(self, index: int) -> FeatureStats | ExactStats: ...

    @overload
    def __getitem__(self, index: slice) -> list[FeatureStats | ExactStats]: ...

    def __getitem__(self, index: int | slice) -> FeatureStats | ExactStats | list[FeatureStats | ExactStats]:
        """Loads a chunk, or those of a slice.

        Raises:
            FileNotFoundError: for a chunk not written yet.
            ValueError: for a file that holds no statistics.
        """
        numbers = range(self._chunks)[index]
        return read_stats(self.path(numbers)) if isinstance(numbers, int) else [self[k] for k in numbers]

    def __iter__(self) -> Iterator[FeatureStats | ExactStats]:
        """Loads one chunk after the other."""
        return (self[k] for k in range(self._chunks))


def read_stats(path: str | PathLike[str]) -> FeatureStats | ExactStats:
    """Reads statistics of either kind, as the file says.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that holds no statistics.
    """
    tensors, metadata = weights.read(path)
    kind = ExactStats if "products" in tensors else FeatureStats
    return kind.from_state(tensors, metadata, str(path))

"""Mergeable statistics of features: count, mean and centred second moment, always in float64.

Two sets with (n, m, M2) and (n', m', M2') and d = m' - m join into

    n + n',   m + d n'/(n + n'),   M2 + M2' + d d^T n n'/(n + n')

(Chan, Golub & LeVeque 1983, equations 2.1). Nothing large is subtracted, so a large common mean costs no digits and any split
into batches, ranks or restarts gives the same numbers to a few units in the last place; the same bits only where the same
batches come in the same order. So work that is cut into fixed blocks of sample indices, each summed alone and all merged in
the order of their indices, gives the same bits on any number of processes. `flowkit.eval.exact.ExactStats` gives them for any
split and order.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowkit import weights

Identity = Mapping[str, str]
# What flowkit.weights.write takes after the path and read returns: tensors and metadata.
State = tuple[dict[str, Tensor], dict[str, str]]
_FORMAT = "flowkit statistics"
_STRIP = 64


class Accumulator(Protocol):
    """Sums of features that can be added to, merged and taken apart again: `FeatureStats` or `flowkit.eval.exact.ExactStats`."""

    @property
    def count(self) -> int | None:
        """Number of features n."""

    @property
    def dim(self) -> int:
        """Their dimension d."""

    def update(self, features: Tensor) -> None:
        """Adds a batch (B, d), in place."""

    def merge(self, other: Self) -> None:
        """Adds another set, in place."""

    def without(self, part: Self) -> Self:
        """Returns the sums without those of a part."""

    def copy(self) -> Self:
        """Returns an independent copy."""

    def state(self) -> State:
        """Returns tensors and metadata for `flowkit.weights.write`."""

    def stats(self) -> FeatureStats:
        """Returns count, mean and centred second moment."""


AnyAccumulator = TypeVar("AnyAccumulator", bound=Accumulator)


@dataclass(eq=False)
class FeatureStats:
    """Sufficient statistics of n feature vectors for the Frechet distance.

    Attributes:
        count: n. None where it is not known (a foreign npz); ``m2`` is then the covariance itself, and nothing can be added.
        mean: float64 (d,).
        m2: float64 (d, d), the sum of ``(x - mean)(x - mean)^T``.
        identity: what made the features (`flowkit.eval.features.FeatureExtractor.identity`); None where it is not known.
    """

    count: int | None
    mean: Tensor
    m2: Tensor
    identity: Identity | None = None

    @classmethod
    def empty(
        cls, dim: int, identity: Identity | None = None, device: torch.device | str | None = None
    ) -> FeatureStats:
        """Returns the statistics of no features of dimension ``dim``."""
        if dim < 1:
            raise ValueError(f"features need at least one dimension, got dim={dim}")
        zeros = torch.zeros(dim + 1, dim, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros[1:].clone(), identity)

    @property
    def dim(self) -> int:
        """The dimension d of the features."""
        return len(self.mean)

    def update(self, features: Tensor) -> None:
        """Adds a batch, in place.

        Args:
            features: (B, d), floating point; no rows change nothing.

        Raises:
            TypeError: for features that are not floating point.
            ValueError: for another dimension, or features that are not finite; the statistics are then unchanged.
        """
        x = check_features(features, self.dim).to(self.mean)
        if len(x):
            mean = x.mean(dim=0)
            self._add(len(x), mean, x - mean)

    def merge(self, other: FeatureStats) -> None:
        """Adds another set of features, in place; ``other`` is unchanged.

        Raises:
            ValueError: for another dimension or another extractor.
        """
        check_mergeable(self, other)
        if other._known_count():
            self._add(other._known_count(), other.mean.to(self.mean), self.mean.new_empty(0, self.dim))
            self.m2 += other.m2.to(self.m2)

    def without(self, part: FeatureStats) -> FeatureStats:
        """Returns the statistics of the features that are not in ``part``, by the joining equations solved for the rest.

        They carry the rounding of the whole, about 1e-16 of its second moment: a direction in which only ``part`` varies keeps
        that much variance of either sign, which the Frechet distance tells from a variance (`flowkit.eval.frechet`).

        Args:
            part: of the features in these statistics; unchanged.

        Raises:
            ValueError: for another dimension or extractor, or a part of more features than there are.
        """
        check_mergeable(self, part)
        own, less = self._known_count(), part._known_count()
        if less > own:
            raise ValueError(f"cannot take {less} features out of {own}; pass a part of them")
        if less == own:
            return FeatureStats.empty(self.dim, self.identity, self.mean.device)
        rest = self.mean + (self.mean - part.mean.to(self.mean)) * (less / (own - less))
        shift = part.mean.to(self.mean) - rest
        m2 = torch.sub(self.m2, part.m2.to(self.m2)).addr_(shift, shift, alpha=-less * (own - less) / own)
        return FeatureStats(own - less, rest, m2, self.identity)

    def _add(self, count: int, mean: Tensor, centred: Tensor) -> None:
        own = self._known_count()
        shift = mean - self.mean
        rows = torch.cat([centred, shift[None] * math.sqrt(own * count / (own + count))])
        self.m2.addmm_(rows.T, rows)
        self.mean.add_(shift, alpha=count / (own + count))
        self.count = own + count

    def _known_count(self) -> int:
        if self.count is None:
            raise ValueError("statistics without a count cannot be added to or merged; make them again from the images")
        return self.count

    def covariance(self) -> Tensor:
        """Returns the unbiased covariance, ``m2 / (n - 1)``, float64 (d, d).

        Raises:
            ValueError: for fewer than two features.
        """
        if self.count is None:
            return self.m2
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}; add images")
        return self.m2 / (self.count - 1)

    def stats(self) -> FeatureStats:
        """Returns the statistics themselves, as `flowkit.eval.exact.ExactStats` returns its own."""
        return self

    def copy(self) -> FeatureStats:
        """Returns an independent copy."""
        return FeatureStats(self.count, self.mean.clone(), self.m2.clone(), self.identity)

    def sha256(self) -> str:
        """Returns the hash of count, mean and second moment: which statistics a figure was measured against."""
        digest = hashlib.sha256(str(self.count).encode())
        for tensor in (self.mean, self.m2):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def state(self) -> State:
        """Returns the tensors "mean" and "m2", and count, identity and torch version as metadata, for `flowkit.weights.write`."""
        metadata = {"format": _FORMAT, "count": json.dumps(self.count), "torch": str(torch.__version__)}
        if self.identity is not None:
            metadata["identity"] = json.dumps(dict(self.identity), sort_keys=True)
        return {"mean": self.mean, "m2": self.m2}, metadata

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str = "the state", prefix: str = ""
    ) -> FeatureStats:
        """Returns the statistics of a `state`.

        Args:
            tensors: as `flowkit.weights.read` returns them.
            metadata: likewise.
            source: what an error calls it, e.g. the file's name.
            prefix: what the tensors' names begin with.

        Raises:
            ValueError: for a state that is not one of statistics, or whose numbers cannot be a covariance.
        """
        try:
            mean, m2 = tensors[f"{prefix}mean"], tensors[f"{prefix}m2"]
            count = json.loads(metadata["count"])
        except KeyError as missing:
            raise ValueError(
                f"{source} is not a file of statistics (no {missing}); make one with FeatureStats.save"
            ) from None
        mean, m2 = as_moments(mean, m2, f"{source}: ", "m2")
        identity = json.loads(metadata["identity"]) if "identity" in metadata else None
        return cls(count, mean, m2, identity)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a .safetensors file of the `state`, atomically."""
        weights.write(path, *self.state())

    @classmethod
    def load(cls, path: str | PathLike[str], prefix: str = "") -> FeatureStats:
        """Reads what `save` wrote.

        Args:
            path: the .safetensors file.
            prefix: what the tensors' names begin with, where one file holds several ("classifier." in the embedded ones).

        Raises:
            FileNotFoundError: where there is no file.
            ValueError: for a file that is not one of statistics, or whose numbers cannot be a covariance.
        """
        return cls.from_state(*weights.read(path), str(path), prefix)

    def to_npz(self, path: str | PathLike[str]) -> None:
        """Writes "mu" and "sigma" (float64) as pytorch-fid, clean-fid and EDM read them, and our count and identity beside."""
        buffer = io.BytesIO()
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance().cpu().numpy()}
        if self.count is not None:
            # The moment itself too: sigma (n - 1) / (n - 1) is sigma to the last bit but one.
            arrays |= {"count": np.array(self.count), "m2": self.m2.cpu().numpy()}
        if self.identity is not None:
            arrays["identity"] = np.array(json.dumps(dict(self.identity), sort_keys=True))
        np.savez(buffer, allow_pickle=False, **arrays)
        weights.write_bytes(path, buffer.getvalue())

    @classmethod
    def from_npz(cls, path: str | PathLike[str]) -> FeatureStats:
        """Reads "mu" and "sigma" from an .npz file of pytorch-fid, clean-fid, EDM, ADM or `to_npz`; nothing is unpickled.

        Raises:
            FileNotFoundError: where there is no file.
            ValueError: for a file without these arrays, one that holds Python objects, or numbers that cannot be a covariance.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no statistics at {path}; check the path")
        arrays = _read_npz(path)
        missing = {"mu", "sigma"} - arrays.keys()
        if missing:
            raise ValueError(f"{path} has no array {' or '.join(sorted(missing))} (found: {', '.join(sorted(arrays))}); "
                             "FID statistics hold mu and sigma")  # fmt: skip
        mean, sigma = as_moments(arrays["mu"], arrays["sigma"], f"{path}: ")
        identity = json.loads(str(arrays["identity"])) if "identity" in arrays else None
        if "count" not in arrays:
            return cls(None, mean, sigma, identity)
        count = int(arrays["count"])
        m2 = as_moments(mean, arrays["m2"], f"{path}: ", "m2")[1] if "m2" in arrays else sigma * (count - 1)
        return cls(count, mean, m2, identity)


def _read_npz(path: str | PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    wanted = ("mu", "sigma", "count", "m2", "identity")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in wanted}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a plain .npz file of arrays ({error}); copy or make it again") from error


def leave_one_out(chunks: Sequence[AnyAccumulator]) -> Iterator[AnyAccumulator]:
    """Yields, for each chunk, the sums of all the others: those of all without its own.

    Args:
        chunks: at least two; each is read twice, so they may lie on disk (`flowkit.eval.spool.StatsSpool`).

    Raises:
        ValueError: for fewer than two chunks.
    """
    if len(chunks) < 2:
        raise ValueError(f"leaving one of {len(chunks)} chunks out leaves nothing; make at least 2 chunks")
    total = merged(chunks)
    for k in range(len(chunks)):
        yield total.without(chunks[k])  # without a name for the chunk, which would keep it in memory


def merged(parts: Sequence[AnyAccumulator]) -> AnyAccumulator:
    """Returns the sums of all parts together, merged in their order, as a new object."""
    total = parts[0].copy()
    for part in itertools.islice(parts, 1, None):
        total.merge(part)
    return total


def check_features(features: Tensor, dim: int) -> Tensor:
    """Returns features, detached, if they are floating point, (B, dim) and finite.

    Raises:
        TypeError: for features that are not floating point.
        ValueError: for another shape, or numbers that are not finite.
    """
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}; convert with .float()")
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must have shape (B, {dim}), got {tuple(features.shape)}")
    x = features.detach()
    broken = ~x.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(f"{int(broken.sum())} of {len(x)} feature vectors hold NaN or infinity (first: row "
                         f"{int(broken.nonzero()[0])} of the batch); look at those images first")  # fmt: skip
    return x


def check_mergeable(own: Any, other: Any) -> None:  # noqa: ANN401
    """Raises ValueError unless two sets of sums have one dimension and one extractor."""
    if other.dim != own.dim:
        raise ValueError(f"cannot merge statistics of dimension {other.dim} into {own.dim}; use one extractor")
    if other.identity != own.identity:
        raise ValueError(f"cannot merge features of different extractors: {other.identity} into {own.identity}")


def as_moments(mean: Any, covariance: Any, source: str = "", name: str = "sigma") -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Returns a mean (d,) and a matrix (d, d), symmetric to rounding, in float64, after the checks that both need.

    Args:
        mean: tensor, array or list with d numbers; axes of length 1 are dropped.
        covariance: the same with d * d numbers.
        source: what an error begins with, e.g. the file's name.
        name: what an error calls the matrix.

    Raises:
        TypeError: for complex numbers or objects.
        ValueError: for shapes that do not fit, numbers that are not finite, or a matrix that is not symmetric.
    """
    # By way of numpy, since torch reads Python's floats as float32.
    mu, sigma = (
        (value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).detach().squeeze()
        for value in (mean, covariance)
    )
    if mu.device.type == "mps":  # has no float64
        mu, sigma = mu.cpu(), sigma.cpu()
    if mu.is_complex() or sigma.is_complex():
        raise TypeError(f"{source}mean and {name} must be real, got {mu.dtype} and {sigma.dtype}")
    dim = mu.numel()
    if mu.ndim > 1 or sigma.numel() != dim * dim or (dim > 1 and sigma.ndim != 2) or dim == 0:
        raise ValueError(f"{source}a mean of shape (d,) and a {name} of shape (d, d) are needed, got {tuple(mu.shape)} and "
                         f"{tuple(sigma.shape)}")  # fmt: skip
    mu, sigma = mu.reshape(dim).to(torch.float64), sigma.reshape(dim, dim).to(torch.float64)
    # In strips, for the memory: a whole difference of the size of Inception's takes 32 MiB.
    strips = [(sigma[i : i + _STRIP], sigma.T[i : i + _STRIP]) for i in range(0, dim, _STRIP)]
    if not (mu.isfinite().all() and all(rows.isfinite().all() for rows, _ in strips)):
        raise ValueError(f"{source}mean or {name} holds NaN or infinity; make the statistics again")
    asymmetry = max(float((rows - columns).abs().max()) for rows, columns in strips)
    size = max(float(rows.abs().max()) for rows, _ in strips)
    if asymmetry > 1e-5 * size:
        raise ValueError(f"{source}{name} is not symmetric (largest difference {asymmetry:.3g}, largest entry {size:.3g}); "
                         "make the statistics again")  # fmt: skip
    return mu, sigma

"""Sums of features without rounding: the same bits for any batches, any number of processes, any order and resume point.

Each feature is first rounded to a whole number q of steps g = bound / 2^20, |q| <= 2^20. Sums of q and of products q q' are then
whole numbers: the products of up to 1024 rows stay below 2^51, where float64 is exact, and all together, with fewer than 2^21
rows, below 2^61, inside int64. Addition of whole numbers has no rounding, so no order can show, and a part can be taken out
again without a trace. Mean and second moment are made from the sums at the end, centred in whole numbers first.

The one approximation is the rounding of the features: it adds g^2 / 12 to each variance, 2e-13 of it for features that fill the
bound's range evenly, and at Inception's d = 2048 with the default bound 6e-7 to the trace. What is exact are the sums: features of
one image must be the same wherever they are computed, and networks round differently in batches of different size. So run
the extractor on fixed blocks of sample indices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowkit.eval.statistics import FeatureStats, Identity, State, check_features, check_mergeable

BOUND = 64.0
_STEPS = 2**20
_MOST = 2**21
_ROWS = 1024
_STRIP = 256  # of products: wide enough for fast multiplication
_THIN = 64  # of other work: little memory
_FORMAT = "flowkit exact statistics"


@dataclass(eq=False)
class ExactStats:
    """Whole-number sums of n feature vectors; `stats` gives their mean and second moment.

    Attributes:
        count: n, fewer than 2^21.
        sums: int64 (d,), the sum of ``q = round(x / grid)``.
        products: int64 (d, d), the upper triangle of the sum of ``q q^T``; below it, anything.
        bound: largest absolute value a feature may have, a power of two.
        identity: what made the features; None where it is not known.
    """

    count: int
    sums: Tensor
    products: Tensor
    bound: float = BOUND
    identity: Identity | None = None
    _rows: Tensor = field(init=False, repr=False)
    _held: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if not self.bound > 0 or math.frexp(self.bound)[0] != 0.5:
            raise ValueError(f"bound must be a power of two, got {self.bound}; take the next above the largest feature")
        # float32 holds whole numbers up to 2^24.
        self._rows = torch.empty(0, self.dim, dtype=torch.float32, device=self.sums.device)

    @classmethod
    def empty(
        cls,
        dim: int,
        identity: Identity | None = None,
        device: torch.device | str | None = None,
        bound: float = BOUND,
    ) -> ExactStats:
        """Returns the sums of no features of dimension ``dim``, on a device with float64.

        Args:
            dim: number of features d.
            identity: of the extractor.
            device: of the sums; None means the default one.
            bound: largest absolute value a feature may have, a power of two. It sets the grid, so sums of different bounds do
                not mix: fix it once for an extractor. 64 suits pooled features and logits, 1 pixels and unit embeddings.

        Raises:
            ValueError: for a dimension below 1, or a bound that is no power of two.
        """
        if dim < 1:
            raise ValueError(f"features need at least one dimension, got dim={dim}")
        sums = torch.zeros(dim, dtype=torch.int64, device=device)
        return cls(0, sums, torch.zeros(dim, dim, dtype=torch.int64, device=device), bound, identity)

    @property
    def dim(self) -> int:
        """The dimension d of the features."""
        return len(self.sums)

    @property
    def grid(self) -> float:
        """The step that features are rounded to, ``bound / 2^20``."""
        return self.bound / _STEPS

    def update(self, features: Tensor) -> None:
        """Adds a batch, in place.

        Args:
            features: (B, d), floating point; no rows change nothing.

        Raises:
            TypeError: for features that are not floating point.
            ValueError: for another dimension, features that are not finite or beyond the bound, or too many of them; the sums
                are then unchanged.
        """
        x = check_features(features, self.dim)
        x = x.to(self.sums.device, torch.promote_types(x.dtype, torch.float32))
        beyond = x.abs() > self.bound
        if beyond.any():
            row, column = beyond.nonzero()[0].tolist()
            raise ValueError(f"feature {column} of row {row} is {float(x[row, column]):.6g}, beyond the bound {self.bound:g} of "
                             "the exact statistics; give them a larger bound, a power of two")  # fmt: skip
        self._check_count(len(x))
        self.count += len(x)
        for piece in torch.round(x * (1 / self.grid)).float().split(_ROWS):  # a power of two: the product is exact
            if not len(self._rows):
                self._rows = self._rows.new_empty(_ROWS, self.dim)
            free = _ROWS - self._held
            for part in (piece[:free], piece[free:]):
                self._rows[self._held : self._held + len(part)] = part
                self._held += len(part)
                if self._held == _ROWS:
                    self._flush()

    def _check_count(self, more: int) -> None:
        if self.count + more >= _MOST:
            raise ValueError(
                f"exact statistics hold fewer than {_MOST:,} images, got {self.count + more:,}; use FeatureStats"
            )

    def _flush(self) -> None:
        """Adds the rows held back; strips of the upper triangle, for half the work and little memory."""
        if self._held:
            q = self._rows[: self._held].double()
            self.sums += q.sum(dim=0).long()
            for i in range(0, self.dim, _STRIP):
                self.products[i : i + _STRIP, i:] += (q[:, i : i + _STRIP].T @ q[:, i:]).long()
            self._held = 0

    def _checked(self, other: ExactStats) -> ExactStats:
        check_mergeable(self, other)
        if other.bound != self.bound:
            raise ValueError(
                f"cannot merge exact statistics of bound {other.bound:g} into {self.bound:g}; use one bound"
            )
        self._flush()
        other._flush()
        return other

    def merge(self, other: ExactStats) -> None:
        """Adds another set of features, in place; ``other`` keeps its features.

        Raises:
            ValueError: for another dimension, extractor or bound, or too many features.
        """
        self._checked(other)
        self._check_count(other.count)
        self.count += other.count
        self.sums += other.sums.to(self.sums)
        self.products += other.products.to(self.products)

    def without(self, part: ExactStats) -> ExactStats:
        """Returns the sums of the features that are not in ``part``: bit for bit those of never having added them.

        Raises:
            ValueError: for another dimension, extractor or bound, or a part of more features than there are.
        """
        self._checked(part)
        if part.count > self.count:
            raise ValueError(f"cannot take {part.count} features out of {self.count}; pass a part of them")
        sums, products = self.sums - part.sums.to(self.sums), self.products - part.products.to(self.products)
        return ExactStats(self.count - part.count, sums, products, self.bound, self.identity)

    def copy(self) -> ExactStats:
        """Returns an independent copy."""
        self._flush()
        return ExactStats(self.count, self.sums.clone(), self.products.clone(), self.bound, self.identity)

    def state(self) -> State:
        """Returns the tensors "sums" and "products", and count, bound and identity as metadata, for `flowkit.weights.write`.

        The tensors may be added over processes (an all-reduce of int64), the counts likewise.
        """
        self._flush()
        self._rows = self._rows.new_empty(0, self.dim)  # writing the state takes memory enough
        metadata = {"format": _FORMAT, "count": json.dumps(self.count), "bound": json.dumps(self.bound)}
        if self.identity is not None:
            metadata["identity"] = json.dumps(dict(self.identity), sort_keys=True)
        return {"sums": self.sums, "products": self.products.triu_()}, metadata

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str = "the state"
    ) -> ExactStats:
        """Returns the sums of a `state`.

        Args:
            tensors: as `flowkit.weights.read` returns them.
            metadata: likewise.
            source: what an error calls it, e.g. the file's name.

        Raises:
            ValueError: for a state that is not one of exact statistics.
        """
        sums, products = tensors.get("sums"), tensors.get("products")
        if sums is None or products is None or metadata.get("format") != _FORMAT:
            raise ValueError(f"{source} does not hold exact statistics; make it with ExactStats.state")
        if sums.dtype != torch.int64 or products.dtype != torch.int64 or products.shape != (len(sums), len(sums)):
            raise ValueError(f"{source} holds {sums.dtype} {tuple(sums.shape)} and {products.dtype} {tuple(products.shape)}, not "
                             "int64 sums (d,) and products (d, d); make it again")  # fmt: skip
        identity = json.loads(metadata["identity"]) if "identity" in metadata else None
        return cls(json.loads(metadata["count"]), sums, products, json.loads(metadata["bound"]), identity)

    def stats(self) -> FeatureStats:
        """Returns count, mean and second moment, float64: the same bits for the same set of features.

        With c the mean rounded down to whole steps and r = sums - n c, the second moment in steps is

            products - c sums^T - r c^T - r r^T / n,

        where all but the last term are whole numbers.
        """
        self._flush()
        n, s = max(self.count, 1), self.sums
        c = torch.div(s, n, rounding_mode="floor")
        r = s - n * c
        m2 = torch.empty_like(self.products, dtype=torch.float64)
        for i in range(0, self.dim, _THIN):
            j = min(i + _THIN, self.dim)
            whole = self.products[i:j, i:] - torch.outer(c[i:j], s[i:]) - torch.outer(r[i:j], c[i:])
            strip = (whole.double() - torch.outer(r[i:j].double(), r[i:].double()) / n) * self.grid**2
            m2[i:j, i:] = strip
            m2[j:, i:j] = strip[:, j - i :].T
            corner = m2[i:j, i:j].triu()
            m2[i:j, i:j] = corner + corner.triu(1).T
        return FeatureStats(self.count, (c.double() + r.double() / n) * self.grid, m2, self.identity)

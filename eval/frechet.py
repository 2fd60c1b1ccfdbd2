"""The Frechet distance between two Gaussians, from their means and covariances.

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                     (Dowson & Landau 1982, equation 16)

The product under the root is not symmetric, and taking its root or its eigenvalues turns round-off of 1e-16 into 1e-8 for
every direction that has no variance. With any factors ``S = F F^T`` the cross term is the sum of the singular values of
``F1^T F2``, which has no such square root:

    cholesky  both safely positive definite: S1 = L L^T, and the singular values squared are the eigenvalues of L^T S2 L;
    eigen     otherwise: F = V sqrt(W) of the directions that carry variance, and the singular values themselves;
    features  fewer features than dimensions: F = Xc^T / sqrt(n - 1), the centred features, without a covariance at all.

Nothing is added to the diagonal and everything is float64, on the device of the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.eval.statistics import Accumulator, FeatureStats, as_moments, check_features, leave_one_out

# Below this ratio of the smallest squared pivot to the largest variance, a covariance counts as singular.
_SAFE = 1e-10
# Above this share of the largest eigenvalue, a negative one is not rounding of the input (float16 statistics reach 1e-3).
_INDEFINITE = 1e-2
_BLOCK = 256


class FrechetTerms(NamedTuple):
    """The parts of a Frechet distance.

    Attributes:
        mean: ``|m1 - m2|^2``.
        trace1: ``tr S1``.
        trace2: ``tr S2``.
        cross: ``tr (S1 S2)^(1/2)``.
        rank1: numerical rank of S1.
        rank2: numerical rank of S2.
        route: "cholesky", "eigen" or "features".
        condition1: how near to singular S1 is: its smallest variance over its largest, of squared pivots where S1 has a safe
            Cholesky factor (an upper bound of the eigenvalues' ratio up to a factor d), else of eigenvalues, where rounding may
            leave it below zero; 0 for features fewer than dimensions.
        condition2: the same of S2.
    """

    mean: float
    trace1: float
    trace2: float
    cross: float
    rank1: int
    rank2: int
    route: str
    condition1: float
    condition2: float

    @property
    def distance(self) -> float:
        """The distance. Both matrices are positive semidefinite, so below zero there is only round-off: that reads 0."""
        return max(self.mean + self.trace1 + self.trace2 - 2 * self.cross, 0.0)


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:  # noqa: ANN401
    """Returns the Frechet distance between N(mu1, sigma1) and N(mu2, sigma2); FID where the features are Inception's.

    Args:
        mu1: mean, d numbers: tensor or array of any float dtype, (d,) or with axes of length 1.
        sigma1: covariance, (d, d).
        mu2: second mean, (d,).
        sigma2: second covariance, (d, d).

    Returns:
        The distance, >= 0, in the features' squared unit.

    Raises:
        ValueError: for shapes that differ, numbers that are not finite, or a matrix that cannot be a covariance.
    """
    return frechet_terms(mu1, sigma1, mu2, sigma2).distance


def frechet_terms(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> FrechetTerms:  # noqa: ANN401
    """Returns the terms of the distance one by one; arguments and errors as in `frechet_distance`."""
    return FrechetReference(mu1, sigma1, "sigma1").terms(mu2, sigma2, "sigma2")


class _Factor(NamedTuple):
    """F of ``S = F F^T``, and what it tells about S."""

    matrix: Tensor
    rank: int
    condition: float
    route: str


class FrechetReference:
    """One side of the distance, factored once: for many samples against one reference.

    Args:
        mean: d numbers, as in `frechet_distance`.
        covariance: (d, d).
        name: what an error calls the covariance.

    Raises:
        ValueError: for numbers that cannot be the moments of a Gaussian.
    """

    def __init__(self, mean: Any, covariance: Any, name: str = "the reference's covariance") -> None:  # noqa: ANN401
        m, s = as_moments(mean, covariance, name=name)
        self._set(m, float(s.trace()), _cholesky(s) or _eigen(s, 1, name))

    def _set(self, mean: Tensor, trace: float, factor: _Factor) -> None:
        self.mean, self.trace, self._factor = mean, trace, factor

    @classmethod
    def of(cls, stats: FeatureStats) -> FrechetReference:
        """Returns the reference of statistics."""
        return cls(stats.mean, stats.covariance())

    @classmethod
    def from_features(cls, x: Tensor) -> FrechetReference:
        """Returns the reference of features (n, d), n >= 2; for n <= d no covariance is formed.

        Raises:
            TypeError: for features that are not floating point.
            ValueError: for another shape, fewer than two rows, or numbers that are not finite.
        """
        self = cls.__new__(cls)
        self._set(*_from_features(x))
        return self

    @property
    def rank(self) -> int:
        """Numerical rank of the covariance."""
        return self._factor.rank

    def terms(self, mean: Any, covariance: Any, name: str = "sigma") -> FrechetTerms:  # noqa: ANN401
        """Returns the terms of the distance to N(mean, covariance), which is side 2.

        Raises:
            ValueError: for numbers that cannot be the moments of a Gaussian, or another dimension.
        """
        m, s = as_moments(mean, covariance, name=name)
        # The work is done in place, but not in the caller's matrix.
        return self._terms(m.to(self.mean.device), s.to(self.mean.device, copy=True), 1, name)

    def terms_of(self, stats: FeatureStats, overwrite: bool = False) -> FrechetTerms:
        """Returns the terms of the distance to statistics.

        Args:
            stats: of the samples.
            overwrite: work inside ``stats.m2``, which then holds nothing of use: at d = 2048 this saves 64 MiB.
        """
        if not overwrite or stats.count is None:
            return self.terms(stats.mean, stats.covariance())
        if stats.count < 2:
            stats.covariance()  # raises
        return self._terms(stats.mean.to(self.mean.device), stats.m2.to(self.mean.device), stats.count - 1, "m2")

    def terms_of_features(self, x: Tensor) -> FrechetTerms:
        """Returns the terms of the distance to the moments of features (n, d), n >= 2.

        For n <= d the covariance is never formed: the factors are multiplied and their singular values summed, which costs
        O(n^2 d) against a reference of few features and is exact where eigenvalues of a product of covariances are not.
        """
        mean, trace, factor = _from_features(x)
        mean = self._same_dim(mean.to(self.mean.device))
        matrix = factor.matrix.to(self.mean.device)
        if self._factor.route == factor.route == "cholesky":
            # In the order of `terms`: the eigenvalues of L1^T (L2 L2^T) L1.
            cross = _root_sum(_congruence(self._factor.matrix, matrix @ matrix.T), 1)
        else:
            cross = float(torch.linalg.svdvals(self._factor.matrix.T @ matrix).sum())
        return self._joined(mean, trace, factor, cross)

    def distance(self, stats: FeatureStats, overwrite: bool = False) -> float:
        """Returns the distance to statistics; arguments as in `terms_of`."""
        return self.terms_of(stats, overwrite).distance

    def _terms(self, mean: Tensor, matrix: Tensor, divisor: int, name: str) -> FrechetTerms:
        """The terms for the covariance ``matrix / divisor``; overwrites the matrix."""
        self._same_dim(mean)
        trace, factor = float(matrix.trace()) / divisor, _cholesky(matrix)
        if factor is not None and self._factor.route == "cholesky":
            factor = factor._replace(matrix=mean)  # frees L2, which only the check needed
            cross = _root_sum(_congruence(self._factor.matrix, matrix), divisor)
        else:
            if factor is not None:
                factor = factor._replace(matrix=factor.matrix / math.sqrt(divisor))
            factor = factor or _eigen(matrix, divisor, name)
            cross = float(torch.linalg.svdvals(self._factor.matrix.T @ factor.matrix).sum())
        return self._joined(mean, trace, factor, cross)

    def _same_dim(self, mean: Tensor) -> Tensor:
        if len(mean) != len(self.mean):
            raise ValueError(
                f"features have {len(self.mean)} and {len(mean)} dimensions; compare statistics of one extractor"
            )
        return mean

    def _joined(self, mean: Tensor, trace: float, factor: _Factor, cross: float) -> FrechetTerms:
        own, routes = self._factor, {self._factor.route, factor.route}
        route = next(r for r in ("features", "eigen", "cholesky") if r in routes)
        shift = float((self.mean - mean).square().sum())
        return FrechetTerms(
            shift, self.trace, trace, cross, own.rank, factor.rank, route, own.condition, factor.condition
        )


def _cholesky(sigma: Tensor) -> _Factor | None:
    """L of ``sigma = L L^T``, or None where sigma is singular or nearly so."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(sigma)
    condition = math.nan if failed else float(lower.diagonal().min().square() / sigma.diagonal().max())
    return _Factor(lower, len(lower), condition, "cholesky") if condition >= _SAFE else None


def _eigen(sigma: Tensor, divisor: int, name: str) -> _Factor:
    """F (d, rank) of ``sigma / divisor = F F^T``, without the directions whose variance is round-off."""
    values, vectors = torch.linalg.eigh(sigma)
    largest = float(values.abs().max())
    if values[0] < -_INDEFINITE * largest:
        raise ValueError(f"{name} has a negative eigenvalue ({float(values[0]):.3g}, largest {float(values[-1]):.3g}), so it is "
                         "not a covariance; make the statistics again")  # fmt: skip
    kept = values > len(values) * torch.finfo(torch.float64).eps * largest
    matrix = vectors[:, kept] * (values[kept] / divisor).sqrt()
    return _Factor(matrix, matrix.shape[1], float(values[0]) / largest if largest else 0.0, "eigen")


def _from_features(x: Tensor) -> tuple[Tensor, float, _Factor]:
    """Mean, trace of the covariance, and its factor, of features."""
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"features must have shape (n, d) with n >= 2, got {tuple(x.shape)}; add images")
    x = check_features(x, x.shape[1]).double()
    mean = x.mean(dim=0)
    centred = (x - mean) / math.sqrt(len(x) - 1)
    trace = float(centred.square().sum())
    if len(x) > x.shape[1]:
        covariance = centred.T @ centred
        return mean, trace, _cholesky(covariance) or _eigen(covariance, 1, "the covariance")
    # The eigenvalues of the small Gram matrix are the covariance's; only the rank needs them.
    values = torch.linalg.eigvalsh(centred @ centred.T)
    rank = int((values > len(values) * torch.finfo(torch.float64).eps * values[-1]).sum())
    return mean, trace, _Factor(centred.T, rank, 0.0, "features")


def _congruence(lower: Tensor, sigma: Tensor) -> Tensor:
    """The lower triangle of ``L^T S L``, in place of S: a third of the multiplications of two full products."""
    for i in range(0, len(sigma), _BLOCK):
        j = i + _BLOCK
        sigma[:, i:j] = sigma[:, i:] @ lower[i:, i:j]
    for i in range(0, len(sigma), _BLOCK):
        j = i + _BLOCK
        sigma[i:j, :j] = lower[i:, i:j].T @ sigma[i:, :j]
    return sigma


def _root_sum(matrix: Tensor, divisor: int) -> float:
    """The sum of the roots of the eigenvalues of ``matrix / divisor``, of which the lower triangle is read."""
    return float((torch.linalg.eigvalsh(matrix).clamp_min(0) / divisor).sqrt().sum())


def jackknife_distances(chunks: Sequence[Accumulator], reference: FeatureStats | FrechetReference) -> Iterator[float]:
    """Yields the distance to the reference with each chunk of the samples left out in turn.

    With chunks on disk (`flowkit.eval.spool.StatsSpool`) and a `FrechetReference`, memory is four matrices (d, d) whatever
    their number.

    Args:
        chunks: at least two, of nearly equal count; together all samples.
        reference: what they are compared with; taken as exact.

    Raises:
        ValueError: for fewer than two chunks.
    """
    if isinstance(reference, FeatureStats):
        reference = FrechetReference.of(reference)
    for rest in leave_one_out(chunks):
        stats = rest.stats()
        del rest  # the memory of both is needed
        distance = reference.distance(stats, overwrite=True)
        del stats
        yield distance

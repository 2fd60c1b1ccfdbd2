"""The Frechet distance between two Gaussians, from their means and covariances.

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                     (Dowson & Landau 1982, equation 16)

The product under the root is not symmetric, and taking its root or its eigenvalues turns round-off of 1e-16 into 1e-8 for
every direction that has no variance. With any factors ``S = F F^T`` the cross term is the sum of the singular values of
``F1^T F2``, which has no such square root:

    cholesky  both safely positive definite: S1 = L L^T, and the singular values squared are the eigenvalues of L^T S2 L;
    eigen     otherwise: F = V sqrt(W) of the directions that carry variance, and the singular values themselves.

Nothing is added to the diagonal and everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.eval.statistics import FeatureStats, as_moments, leave_one_out

# Below this ratio of the smallest squared pivot to the largest variance, a covariance counts as singular.
_SAFE = 1e-10
# Above this share of the largest eigenvalue, a negative one is not rounding of the input (float16 statistics reach 1e-3).
_INDEFINITE = 1e-2


class FrechetTerms(NamedTuple):
    """The parts of a Frechet distance.

    Attributes:
        mean: ``|m1 - m2|^2``.
        trace1: ``tr S1``.
        trace2: ``tr S2``.
        cross: ``tr (S1 S2)^(1/2)``.
        rank1: numerical rank of S1.
        rank2: numerical rank of S2.
        route: "cholesky" or "eigen".
    """

    mean: float
    trace1: float
    trace2: float
    cross: float
    rank1: int
    rank2: int
    route: str

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
    m1, s1 = as_moments(mu1, sigma1, name="sigma1")
    m2, s2 = as_moments(mu2, sigma2, name="sigma2")
    if len(m1) != len(m2):
        raise ValueError(f"features have {len(m1)} and {len(m2)} dimensions; compare statistics of one extractor")
    m2, s2 = m2.to(m1.device), s2.to(s1.device)
    lower = _cholesky(s1)
    if lower is not None and _cholesky(s2) is not None:
        squares = torch.linalg.eigvalsh(lower.T @ s2 @ lower)
        singular, rank1, rank2, route = squares.clamp_min(0).sqrt(), len(m1), len(m1), "cholesky"
    else:
        f1, f2 = _factor(s1, "sigma1"), _factor(s2, "sigma2")
        singular, rank1, rank2, route = torch.linalg.svdvals(f1.T @ f2), f1.shape[1], f2.shape[1], "eigen"
    mean = float((m1 - m2).square().sum())
    return FrechetTerms(mean, float(s1.trace()), float(s2.trace()), float(singular.sum()), rank1, rank2, route)


def _cholesky(sigma: Tensor) -> Tensor | None:
    """L of ``sigma = L L^T``, or None where sigma is singular or nearly so."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(sigma)
    if failed or lower.diagonal().min().square() < _SAFE * sigma.diagonal().max():
        return None
    return lower


def _factor(sigma: Tensor, name: str) -> Tensor:
    """F (d, rank) of ``sigma = F F^T``, without the directions whose variance is round-off."""
    values, vectors = torch.linalg.eigh(sigma)
    largest = float(values.abs().max())
    if values[0] < -_INDEFINITE * largest:
        raise ValueError(f"{name} has a negative eigenvalue ({float(values[0]):.3g}, largest {float(values[-1]):.3g}), so it is "
                         "not a covariance; make the statistics again")  # fmt: skip
    kept = values > len(values) * torch.finfo(torch.float64).eps * largest
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def jackknife_distances(chunks: Sequence[FeatureStats], reference: FeatureStats) -> Iterator[float]:
    """Yields the distance to the reference with each chunk of the samples left out in turn.

    Args:
        chunks: at least two, of nearly equal count; together all samples.
        reference: what they are compared with; taken as exact.
    """
    mean, covariance = reference.mean, reference.covariance()
    for rest in leave_one_out(chunks):
        yield frechet_distance(mean, covariance, rest.mean, rest.covariance())


def jackknife_error(distances: Iterable[float]) -> float:
    """Returns the standard error from delete-one values, ``sqrt((K-1)/K sum (d_k - mean d)^2)`` (Efron & Stein 1981).

    It is cautious: on average not below the true one (their inequality), and above it where terms of second order matter,
    that is where the distance is small (up to 1.9 times on the embedded digits).

    Args:
        distances: the distance with each chunk left out in turn, d_1 ... d_K.

    Returns:
        The standard error of the sampling noise; the bias of a finite N is not in it. NaN for fewer than two values.
    """
    values = list(distances)
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in values))

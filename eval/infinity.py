"""FID-infinity: the Frechet distance without the bias of a finite number of samples, by extrapolation.

The distance of N samples is on average ``F + c / N`` to first order, with a c that depends on the model (Chong & Forsyth 2020,
section 3), so figures of one N can order two models wrongly. A line through distances of several N gives F at 1/N = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flowkit.eval.frechet import FrechetReference
from flowkit.eval.intervals import Figure
from flowkit.eval.statistics import Accumulator


def fid_infinity(chunks: Sequence[Accumulator], reference: FrechetReference, se: float = math.nan) -> Figure:
    """Extrapolates the distances of growing numbers of chunks, 1, 2, ..., K of them, to infinitely many samples.

    Only prefixes of at least ``max(N / 10, 2 d)`` samples count: with fewer the covariance is singular or nearly so, and the
    bias is no longer c / N.

    Args:
        chunks: of the samples, in order; they may lie on disk.
        reference: what they are compared with; its own finite count leaves a bias that no N of samples removes.
        se: standard error of the distance of all samples, e.g. of the jackknife; NaN gives NaN.

    Returns:
        The distance at 1/N = 0, see `extrapolate`.

    Raises:
        ValueError: where fewer than 3 prefixes are long enough.
    """
    sizes = [chunk.count or 0 for chunk in chunks]
    smallest = max(sum(sizes) / 10, 2 * len(reference.mean))
    counts, distances = [], []
    total = chunks[0].copy()
    for k in range(len(chunks)):
        if k:
            total.merge(chunks[k])
        if (total.count or 0) >= smallest:
            counts.append(total.count or 0)
            distances.append(reference.distance(total.copy().stats(), overwrite=True))
    if len(counts) < 3:
        raise ValueError(f"FID-infinity needs 3 prefixes of at least {math.ceil(smallest):,} images (twice the dimension, a "
                         f"tenth of all), got {len(counts)} from {sum(sizes):,} images in {len(sizes)} chunks; "
                         "draw more")  # fmt: skip
    return extrapolate(counts, distances, se)


def extrapolate(counts: Sequence[int], distances: Sequence[float], se: float = math.nan) -> Figure:
    """Fits ``F + c / N`` to distances of nested sets by least squares with weights N, and returns F.

    The distances share samples, so the fit's residuals say nothing about its error. To first order each is F + c / N plus the
    mean of a function of its samples; the fitted F is a weighted sum of such means and so of the samples, whose weights give

        se(F)^2 = se^2 N sum_i w_i^2,   w_i = sum over the sets that hold sample i of (coefficient / count).

    Args:
        counts: numbers of samples, growing; each set holds the one before.
        distances: of these sets.
        se: standard error of the last.

    Returns:
        F and its standard error; the details hold "slope" (c), "counts" and "distances".

    Raises:
        ValueError: for fewer than 3 sets, or counts that do not grow.
    """
    n, f = (torch.tensor(list(v), dtype=torch.float64) for v in (counts, distances))
    if len(n) < 3 or len(f) != len(n) or n[0] < 1 or (n.diff() <= 0).any():
        raise ValueError(f"a line needs at least 3 growing counts and their distances, got {list(counts)}")
    u, weights = 1 / n, n / n.sum()
    centre = (weights * u).sum()
    slopes = weights * (u - centre) / (weights * (u - centre).square()).sum()
    coefficients = weights - centre * slopes
    # Samples that joined with set k are in sets k, k + 1, ...
    shares = (coefficients / n).flip(0).cumsum(0).flip(0)
    joined = n.diff(prepend=n.new_zeros(1))
    inflation = float((n[-1] * (joined * shares.square()).sum()).sqrt())
    details = {"slope": float(slopes @ f), "counts": list(counts), "distances": list(distances)}
    return Figure(float(coefficients @ f), se * inflation, details)

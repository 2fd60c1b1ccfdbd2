"""Maximum mean discrepancy between two sets of features, for any kernel, in blocks: memory does not grow with their product.

With x_1 ... x_n samples, y_1 ... y_m reference and kernel k (Gretton et al. 2012, equations 3 and 5),

    unbiased  sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 sum_ij k(x_i, y_j) / (n m)
    biased    the same with the diagonals and n^2, m^2.

Products of features are taken in their own precision (float32 for a network's), everything else is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.eval.spool import Rows

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 1000


@dataclass(frozen=True)
class Discrepancy:
    """Squared MMD and its standard errors.

    Attributes:
        unbiased: the U-statistic; below zero by chance where the sets are alike.
        biased: the V-statistic, never below zero.
        se: standard error by the delete-one jackknife over samples, the reference taken as it is. Cautious where the sets are
            alike: there it is on average sqrt(2) times too large.
        se_both: with the reference's own noise as well.
    """

    unbiased: float
    biased: float
    se: float
    se_both: float


def mmd(x: Rows, y: Rows, kernel: Kernel, block: int = BLOCK) -> Discrepancy:
    """Returns the squared MMD between samples and reference.

    Args:
        x: samples (n, d), n >= 2.
        y: reference (m, d), m >= 2.
        kernel: of (a, d) and (b, d), symmetric; returns float64 (a, b).
        block: rows of a block; memory is a few block^2 numbers.

    Raises:
        ValueError: for sets that are too small, or of unequal dimension.
    """
    check_pair(x, y)
    n, m = len(x), len(y)
    with full_precision():
        xx, x_diagonal = _own_sums(x, kernel, block)
        yy, y_diagonal = _own_sums(y, kernel, block)
        xy, yx = _cross_sums(x, y, kernel, block)
    cross = 2 * float(xy.sum()) / (n * m)
    unbiased = float(xx.sum()) / (n * (n - 1)) + float(yy.sum()) / (m * (m - 1)) - cross
    biased = (float(xx.sum()) + x_diagonal) / n**2 + (float(yy.sum()) + y_diagonal) / m**2 - cross
    # What leaving sample i out changes, to first order in 1/n.
    se = 2 * float((xx / (n - 1) - xy / m).std()) / math.sqrt(n)
    se_reference = 2 * float((yy / (m - 1) - yx / n).std()) / math.sqrt(m)
    return Discrepancy(unbiased, biased, se, math.hypot(se, se_reference))


def check_pair(x: Rows, y: Rows, least: int = 2) -> None:
    """Raises ValueError unless both are (n, d) with one d and at least ``least`` rows."""
    if len(x.shape) != 2 or len(y.shape) != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(f"two sets of features (n, d) with one d and n >= {least} are needed, got {tuple(x.shape)} and "
                         f"{tuple(y.shape)}")  # fmt: skip


def blocks(rows: Rows, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the slices of ``size`` rows, the last maybe shorter, and the rows: checked, in at least float32.

    Raises:
        ValueError: for features that are not finite.
    """
    for start in range(0, len(rows), size):
        span = slice(start, min(start + size, len(rows)))
        part = rows[span]
        if not part.isfinite().all():
            row = start + int((~part.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"feature vector {row} holds NaN or infinity; look at that image first")
        yield span, part.to(torch.promote_types(part.dtype, torch.float32))


@contextmanager
def full_precision() -> Iterator[None]:
    """Keeps float32 products in float32, whatever `torch.set_float32_matmul_precision` was told."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _own_sums(x: Rows, kernel: Kernel, block: int) -> tuple[Tensor, float]:
    """Sums of k(x_i, x_j) over j != i, float64 (n,), and of the diagonal; each pair of blocks is done once."""
    sums, diagonal = torch.zeros(len(x), dtype=torch.float64), 0.0
    for i, a in blocks(x, block):
        values = kernel(a, a)
        diagonal += float(values.diagonal().sum())
        sums[i] += (values.fill_diagonal_(0)).sum(dim=1).cpu()
        for start in range(i.stop, len(x), block):
            j = slice(start, min(start + block, len(x)))
            values = kernel(a, x[j].to(a.dtype))
            sums[i] += values.sum(dim=1).cpu()
            sums[j] += values.sum(dim=0).cpu()
    return sums, diagonal


def _cross_sums(x: Rows, y: Rows, kernel: Kernel, block: int) -> tuple[Tensor, Tensor]:
    """Sums of k(x_i, y_j) over j, (n,), and over i, (m,), float64."""
    xy, yx = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(y), dtype=torch.float64)
    for i, a in blocks(x, block):
        for j, b in blocks(y, block):
            values = kernel(a, b.to(a))
            xy[i] += values.sum(dim=1).cpu()
            yx[j] += values.sum(dim=0).cpu()
    return xy, yx

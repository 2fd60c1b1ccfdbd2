"""Kernel Inception distance: squared MMD with the kernel ``(x . y / d + 1)^3`` (Binkowski et al. 2018, section 4)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkit.eval.intervals import Figure
from flowkit.eval.mmd import check_pair, mmd
from flowkit.eval.spool import Rows

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``(a . b / d + 1)^3``, float64 (len(a), len(b))."""
    inner = (a @ b.T).double() / a.shape[1] + 1
    return inner * inner * inner


def kid(x: Rows, y: Rows) -> Figure:
    """Returns the KID from all pairs: unbiased, and of less variance than any subsets give.

    Args:
        x: features of the samples (n, d), n >= 2.
        y: of the reference (m, d), m >= 2.

    Returns:
        The U-statistic and its standard error; the details hold "se_both", with the reference's noise, and "estimator".

    Raises:
        ValueError: for sets that are too small, of unequal dimension, or with numbers that are not finite.
    """
    found = mmd(x, y, polynomial)
    return Figure(found.unbiased, found.se, {"se_both": found.se_both, "estimator": "all pairs"})


def kid_subsets(x: Rows, y: Rows, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED) -> Figure:
    """Returns the KID as torch-fidelity and clean-fid estimate it: the mean over random subsets.

    The subsets are torch-fidelity's for the same seed, and so is the precision, the features' own: float32 sums of kernels move
    the figure by about 1e-7, which `kid` avoids.

    Args:
        x: features of the samples (n, d), n >= size.
        y: of the reference (m, d), m >= size.
        subsets: how many.
        size: vectors in a subset of each set, at least 2.
        seed: of the choice.

    Returns:
        The mean; its standard error is NaN, since subsets share vectors. The details hold "std", the subsets' spread (the number
        that torch-fidelity prints behind the sign +-), "subsets", "size", "seed" and "estimator".

    Raises:
        ValueError: for sets smaller than a subset, of unequal dimension, or with numbers that are not finite.
    """
    if subsets < 1 or size < 2:
        raise ValueError(f"got subsets={subsets} and size={size}; at least 1 subset of 2 vectors is needed")
    check_pair(x, y, size)
    choices = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        a, b = (rows[torch.from_numpy(choices.choice(len(rows), size, replace=False))] for rows in (x, y))
        values.append(_unbiased(a.cpu().numpy(), b.to(a.dtype).cpu().numpy()))
    if not all(map(math.isfinite, values)):
        raise ValueError("features hold NaN or infinity; look at those images first")
    details = {"std": float(np.std(values)), "subsets": subsets, "size": size, "seed": seed, "estimator": "subsets"}
    return Figure(math.fsum(values) / subsets, math.nan, details)


def _unbiased(a: NDArray[Any], b: NDArray[Any]) -> float:
    size, cross = len(a), _kernel(a, b).sum(axis=0).sum()
    own_a, own_b = ((k.sum(axis=1) - k.diagonal()).sum() for k in (_kernel(a, a), _kernel(b, b)))
    return float((own_a + own_b) / (size * (size - 1)) - 2 * cross / size**2)


def _kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    kernel: NDArray[Any] = (a @ b.T * (1 / a.shape[1]) + 1) ** 3
    return kernel

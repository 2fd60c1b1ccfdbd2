"""The variance of DDPM's noise: the posterior's, the forward step's, or one that the network learned.

With ``beta = 1 - alpha_s^2 / alpha_t^2`` for a step from time s to t on the VP path and ``beta' = beta sigma_t^2 / sigma_s^2``, the
variance of an ancestral step:

    fixed_small     beta'                              Ho et al. 2020, section 3.2
    fixed_large     beta                               the same
    learned         what the network says
    learned_range   exp(f log beta + (1 - f) log beta'), f = (v + 1) / 2 for the network's v (Nichol & Dhariwal 2021, eq. 15)

Networks with a learned variance return twice the channels of the sample; other solvers drop the second half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkit.paths import Path
from flowkit.table import Row

# "fixed_small_log" is fixed_small by way of its logarithm, "fixed_large_log" in diffusers the root of a negative number.
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")


def split(output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
    """Splits a network's output into the prediction and the channels of a learned variance, or None where there are none.

    Raises:
        ValueError: where the output has neither the sample's shape nor twice its channels.
    """
    if output.shape == sample.shape:
        return output, None
    twice = sample.ndim > 1 and output.shape == (len(sample), 2 * sample.shape[1], *sample.shape[2:])
    if not twice:
        raise ValueError(
            f"a model output of shape {tuple(output.shape)} does not fit a sample of shape {tuple(sample.shape)}; "
            "they must be equal, or the output have twice the channels (learned variance)"
        )
    mean, variance = output.split(sample.shape[1], dim=1)
    return mean, variance


def fixed(kind: str, path: Path, row: Row) -> Row:
    """Returns the row of an ancestral step with noise at every model time above 0, as in Ho et al. 2020, algorithm 2.

    A step that ends at sigma 0 before time 0 has the variance 0, which stock keeps at 1e-20.
    """
    c = 0.0 if row.time <= 0 else max(row.c, 1e-10)
    return row._replace(c=math.sqrt(_beta(path, row)) if c and kind == "fixed_large" else c)


def scaled(kind: str, path: Path, row: Row, noise: Tensor, variance: Tensor | None) -> Tensor:
    """Returns a row's noise, which is to be multiplied with ``row.c``, for the variance that the network learned.

    Raises:
        ValueError: where the network's output had none.
    """
    if kind not in ("learned", "learned_range"):
        return noise
    if variance is None:
        raise ValueError(f"variance_type={kind!r} needs a model output with twice the channels of the sample, and this "
                         "pipeline hands on the mean alone; set variance_type='fixed_small'")  # fmt: skip
    if kind == "learned":
        return noise * variance.sqrt() / row.c
    return noise * torch.pow(_beta(path, row) / row.c**2, (variance + 1) / 4)


def _beta(path: Path, row: Row) -> float:
    return 1.0 - (path.alpha(row.s) / path.alpha(row.t)) ** 2

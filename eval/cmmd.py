"""CMMD: 1000 times the squared MMD of CLIP embeddings with a Gaussian kernel (Jayasumana et al. 2024, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkit.eval.intervals import Figure
from flowkit.eval.mmd import Discrepancy, blocks, check_pair, mmd
from flowkit.eval.spool import Rows

SIGMA, SCALE = 10.0, 1000.0


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``exp(-|a - b|^2 / (2 sigma^2)) - 1``, float64: one less than the kernel, which the MMD does not see.

    Between unit vectors the kernel lies in [0.98, 1]; without the 1 its sums keep two digits more.
    """
    squares = a.double().square().sum(dim=1)[:, None] + b.double().square().sum(dim=1)
    return torch.expm1((2 * (a @ b.T).double() - squares) / (2 * SIGMA**2))


def cmmd(x: Rows, y: Rows, unbiased: bool = False) -> Figure:
    """Returns the CMMD of embeddings of unit length.

    Args:
        x: of the samples (n, d), n >= 2.
        y: of the reference (m, d), m >= 2.
        unbiased: False gives the figure as published, the V-statistic, which stays above about ``8 / N`` even for equal
            distributions; True the U-statistic, without that floor.

    Returns:
        The figure with the standard error of the U-statistic (see `flowkit.eval.mmd.Discrepancy`); the details hold "biased",
        "unbiased" and "se_both".

    Raises:
        ValueError: for sets that are too small, of unequal dimension, or embeddings that are not of unit length.
    """
    check_pair(x, y)
    for rows in (x, y):
        _check_unit(rows)
    found: Discrepancy = mmd(x, y, gaussian)
    details = {
        "biased": SCALE * found.biased,
        "unbiased": SCALE * found.unbiased,
        "se_both": SCALE * found.se_both,
    }
    return Figure(details["unbiased" if unbiased else "biased"], SCALE * found.se, details)


def _check_unit(rows: Rows) -> None:
    for span, part in blocks(rows, 4096):
        length = torch.linalg.vector_norm(part.double(), dim=1)
        if ((length - 1).abs() > 1e-2).any():
            row = int((length - 1).abs().argmax())
            raise ValueError(f"embedding {span.start + row} has length {float(length[row]):.4g}; CMMD is defined for unit length: "
                             "divide each by its norm")  # fmt: skip

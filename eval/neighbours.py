"""Precision, recall, density and coverage from balls around features that reach to their k-th nearest neighbour.

With samples x_i, reference y_j and R_j the distance of y_j to its k-th nearest other reference (likewise for the samples),

    precision  share of x_i inside the ball of any y_j                     (Kynkaanniemi et al. 2019, equations 1 and 2)
    recall     share of y_j inside the ball of any x_i
    density    mean over x_i of the number of balls of y_j around it, / k  (Naeem et al. 2020, equations 3 and 4)
    coverage   share of y_j whose ball holds any x_i

One pass over the distances inside each set and one over those between them, in blocks: memory is O(n + m) beside the features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.eval.intervals import Figure
from flowkit.eval.mmd import blocks, check_pair, full_precision
from flowkit.eval.spool import Rows

BLOCK = 1000
# Squared distances below this share of the vectors' squared lengths lose digits as a difference and are computed anew.
_NEAR = 1e-3
_PAIRS = 4096


@dataclass(frozen=True)
class Protocol:
    """Which balls.

    Attributes:
        k: neighbours that a ball reaches to, the centre not counted.
        closed: whether a point at the very edge is inside.
    """

    k: int
    closed: bool


# Figures quoted with "adm" are of 50,000 samples against 10,000 references.
PROTOCOLS: Mapping[str, Protocol] = {
    "torch-fidelity": Protocol(3, closed=True),
    "kynkaanniemi": Protocol(3, closed=True),
    "adm": Protocol(3, closed=True),
    "prdc": Protocol(5, closed=False),
}


def neighbours(x: Rows, y: Rows, protocol: str | Protocol = "torch-fidelity", block: int = BLOCK) -> dict[str, Figure]:
    """Returns precision, recall, density and coverage.

    Distances come from products of features in their own precision, those of near neighbours from differences in float64: a
    vector and its copy are exactly 0 apart.

    Args:
        x: features of the samples (n, d), n > k.
        y: of the reference (m, d), m > k.
        protocol: one of `PROTOCOLS`, or another k and edge.
        block: rows of a block; memory is a few block^2 numbers.

    Returns:
        The four figures. The errors of precision and density are of the samples' noise inside the reference's balls; those of
        recall and coverage are NaN, since each sample moves many balls.

    Raises:
        ValueError: for an unknown protocol, sets of k vectors or fewer, of unequal dimension, or with numbers that are not finite.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; choose {', '.join(PROTOCOLS)}, or pass a Protocol")
        protocol = PROTOCOLS[protocol]
    if protocol.k < 1:
        raise ValueError(f"k must be at least 1, got {protocol.k}")
    check_pair(x, y, protocol.k + 1)
    with full_precision():
        centre = _mean(y)
        x_radii, y_radii = (_radii(rows, protocol.k, centre, block) for rows in (x, y))
        balls, recalled, covered = torch.zeros(len(x)), torch.zeros(len(y)), torch.zeros(len(y))
        for i, a in blocks(x, block):
            for j, b in blocks(y, block):
                squares = _squares(a, b.to(a), centre)
                in_y, in_x = y_radii[j].to(squares), x_radii[i].to(squares)[:, None]
                inside = squares <= in_y if protocol.closed else squares < in_y
                around = squares <= in_x if protocol.closed else squares < in_x
                balls[i] += inside.sum(dim=1).cpu()
                covered[j] += inside.any(dim=0).cpu()
                recalled[j] += around.any(dim=0).cpu()
    precise, density = (balls > 0).double(), balls.double() / protocol.k
    details = {"k": protocol.k, "closed": protocol.closed}
    figures = {"precision": (precise, True), "recall": ((recalled > 0).double(), False),
               "density": (density, True), "coverage": ((covered > 0).double(), False)}  # fmt: skip
    return {
        name: Figure(float(values.mean()), float(values.std()) / math.sqrt(len(values)) if own else math.nan, details)
        for name, (values, own) in figures.items()
    }


def _mean(rows: Rows) -> Tensor:
    """The mean of float64 sums; distances of vectors near it keep more digits than of those far from 0."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _, part in blocks(rows, 4096):
        total += part.double().sum(dim=0).cpu()
    return total / len(rows)


def _squares(a: Tensor, b: Tensor, centre: Tensor) -> Tensor:
    """Squared distances (len(a), len(b)), in the features' precision."""
    u, v = ((t - centre.to(t.device)).to(t.dtype) for t in (a, b))
    lengths = u.square().sum(dim=1)[:, None] + v.square().sum(dim=1)
    squares = torch.addmm(lengths, u, v.T, alpha=-2)
    for pairs in (squares < _NEAR * lengths).nonzero().split(_PAIRS):
        i, j = pairs.T
        squares[i, j] = (a[i].double() - b[j].double()).square().sum(dim=1).to(squares)
    return squares


def _radii(rows: Rows, k: int, centre: Tensor, block: int) -> Tensor:
    """Squared distance of each vector to its k-th nearest other, (n,); each pair of blocks is done once."""
    nearest = torch.full((len(rows), k), math.inf, dtype=torch.promote_types(rows[:1].dtype, torch.float32))

    def add(span: slice, squares: Tensor) -> None:
        few = squares.topk(min(k, squares.shape[1]), dim=1, largest=False, sorted=False).values
        both = torch.cat([nearest[span], few.cpu()], dim=1)
        nearest[span] = both.topk(k, dim=1, largest=False, sorted=False).values

    for i, a in blocks(rows, block):
        add(i, _squares(a, a, centre).fill_diagonal_(math.inf))
        for start in range(i.stop, len(rows), block):
            j = slice(start, min(start + block, len(rows)))
            squares = _squares(a, rows[j].to(a), centre)
            add(i, squares)
            add(j, squares.T)
    return nearest.amax(dim=1)

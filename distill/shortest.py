"""Shortest paths over anchors: the dynamic programme of Bellman optimal step sizes (Nguyen et al. 2024, arXiv 2312.16414).

With c[j, k] the cost of a step from anchor j to anchor k, the cheapest way from anchor j to the last, A, in K steps costs

    W_1(j) = c[j, A],        W_K(j) = min_{l > j}  c[j, l] + W_{K-1}(l),

and one pass gives every K. The choices are stored, not found again by comparing sums.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Nodes = tuple[int, ...]  # anchors of a grid, from 0 to A


def shortest_paths(
    costs: Tensor | NDArray[np.float64],
    steps: Iterable[int],
    *,
    forbidden: Iterable[int] = (),
    forced: Iterable[int] = (),
) -> dict[int, Nodes]:
    """Finds the cheapest path of each number of edges from the first node to the last, all from one pass.

    Among equally cheap paths the most even one wins, that of least ``sum (edge length)^2``; among those the first in
    lexicographic order.

    Args:
        costs: edge costs, (n + 1, n + 1), finite above the diagonal; the rest is not read.
        steps: numbers of edges K, each in [1, n].
        forbidden: inner nodes that no path may visit.
        forced: inner nodes that every path must visit.

    Returns:
        K -> K + 1 strictly increasing nodes, from 0 to n.

    Raises:
        ValueError: for a K out of range or that the forced and forbidden nodes leave no path for, nodes that are not inner ones, a
            matrix that is not square, or costs that are not finite.
    """
    matrix = np.asarray(costs, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"edge costs must be a square matrix of two nodes or more, got shape {matrix.shape}")
    last = len(matrix) - 1
    nodes = np.arange(last + 1)
    allowed = nodes[:, None] < nodes
    if not np.isfinite(matrix[allowed]).all():
        raise ValueError("edge costs hold NaN or infinity; look for it in the states that they were measured on")
    wanted = check_steps(steps, last)
    without, through = check_nodes(wanted, last, forbidden, forced)
    allowed[without] = allowed[:, without] = False
    for node in through:
        allowed[:node, node + 1 :] = False
    matrix = np.where(allowed, matrix, np.inf)
    squares = np.where(allowed, (nodes - nodes[:, None]) ** 2.0, np.inf)
    value, spread, best = matrix[:, last], squares[:, last], [np.full(last + 1, last)]
    for _ in range(max(wanted) - 1):
        values, spreads = matrix + value, squares + spread
        value = values.min(1)
        spreads[values > value[:, None]] = np.inf
        best.append(spreads.argmin(1))
        spread = spreads.min(1)
    paths = {}
    for count in wanted:
        path = [0]
        for left in range(count, 0, -1):
            path.append(int(best[left - 1][path[-1]]))
        paths[count] = tuple(path)
    return paths


def uniform_path(anchors: int, steps: int) -> Nodes:
    """Returns the path of evenly spaced anchors, ``round(i A / K)``."""
    return tuple(round(i * anchors / steps) for i in range(steps + 1))


def nearest_path(times: Sequence[float], wanted: Sequence[float]) -> Nodes:
    """Returns the anchors nearest to the levels of another grid, moved apart where two would share one.

    Args:
        times: flow times of the A + 1 anchors, falling.
        wanted: K + 1 flow times, falling, K <= A; the first and the last become the ends whatever they are.

    Returns:
        K + 1 strictly increasing anchors, from 0 to A.
    """
    last, count = len(times) - 1, len(wanted) - 1
    found = [int(np.abs(np.asarray(times) - s).argmin()) for s in wanted]
    found[0], found[-1] = 0, last
    for i in range(1, count):
        found[i] = min(max(found[i], found[i - 1] + 1), last - (count - i))
    return tuple(found)


def check_steps(steps: Iterable[int], anchors: int) -> list[int]:
    """Returns the numbers of steps.

    Raises:
        ValueError: for anything but whole numbers from 1 to the number of anchors.
    """
    given = list(steps) if isinstance(steps, Iterable) else []
    wanted = [operator.index(k) for k in given if hasattr(k, "__index__") and not isinstance(k, bool)]
    if not wanted or len(wanted) < len(given) or not all(1 <= k <= anchors for k in wanted):
        raise ValueError(f"steps must be a list of whole numbers from 1 to {anchors} (the anchors), got {given or steps!r:.80}; "
                         "pass steps=[4, 6, 8]")  # fmt: skip
    return wanted


def check_nodes(
    steps: Sequence[int], anchors: int, forbidden: Iterable[int], forced: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Returns the forbidden and the forced anchors in order.

    Raises:
        ValueError: for anchors that are not inner ones, that are both, or that leave no path of one of the numbers of steps.
    """
    without, through = _numbers("forbidden", forbidden), _numbers("forced", forced)
    for name, given in (("forbidden", without), ("forced", through)):
        if wrong := [node for node in given if not 0 < node < anchors]:
            raise ValueError(f"{name} holds anchor {wrong[0]}; give anchors between the ends, from 1 to {anchors - 1}")
    if both := sorted(set(without) & set(through)):
        raise ValueError(f"anchor {both[0]} is forbidden and forced; take it out of one of them")
    least, most = len(through) + 1, anchors - len(without)
    if wrong := [k for k in steps if not least <= k <= most]:
        raise ValueError(f"{wrong[0]} steps cannot visit {len(through)} forced anchors and avoid {len(without)} forbidden ones of "
                         f"{anchors}; ask for {least} to {most} steps")  # fmt: skip
    return without, through


def _numbers(name: str, given: Iterable[int]) -> list[int]:
    """Anchors in order."""
    try:
        return sorted({operator.index(node) for node in given})
    except TypeError as error:
        raise ValueError(f"{name} must be a list of anchors, whole numbers, got {given!r:.80}") from error

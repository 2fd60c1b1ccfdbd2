"""A guess at the best grid from those that were measured: errors as sums of a cost for each step, and the shortest path over them.

The error of a grid is nearly the sum of what its steps add. With x_n the steps of grid n and prior costs z ~ N(0, 1/K), the costs
given the errors y, brought to mean 0 and variance 1, are Gaussian. One draw of them (Matheron's rule) is

    w = z + X' (X X' + lambda I)^-1 (y - X z),

and z = 0 gives their mean. The shortest path over a draw tries each grid about as often as it may be the best one (Thompson
sampling; Thompson 1933): steps that nobody has measured are tried, those known to be dear are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from flowkit.distill.shortest import Nodes, shortest_paths

_RIDGE = 0.01  # variance of what is no sum


def likely_path(
    paths: Sequence[Nodes],
    errors: Sequence[float],
    draw: np.random.Generator | None = None,
    forbidden: Iterable[int] = (),
    forced: Iterable[int] = (),
) -> Nodes:
    """Returns a path that may be the best of all, the measured ones among them.

    Args:
        paths: N >= 1 measured paths of K steps from the first to the last anchor.
        errors: their errors.
        draw: of the costs; None takes their mean.
        forbidden: inner anchors that it may not visit.
        forced: inner anchors that it must visit.
    """
    last, count = paths[0][-1], len(paths[0]) - 1
    edges = np.array([[j * (last + 1) + k for j, k in pairwise(path)] for path in paths])
    seen, columns = np.unique(edges, return_inverse=True)
    rows = np.zeros((len(paths), len(seen)))
    np.put_along_axis(rows, columns.reshape(edges.shape), 1.0, axis=1)
    costs = np.zeros((last + 1) ** 2) if draw is None else draw.normal(scale=math.sqrt(1 / count), size=(last + 1) ** 2)
    values = np.asarray(errors)
    left = (values - values.mean()) / (values.std() or 1.0) - rows @ costs[seen]
    costs[seen] += rows.T @ np.linalg.solve(rows @ rows.T + _RIDGE * np.eye(len(paths)), left)
    return shortest_paths(costs.reshape(last + 1, -1), [count], forbidden=forbidden, forced=forced)[count]

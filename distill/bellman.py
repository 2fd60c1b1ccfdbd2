"""Step optimisation by dynamic programming: Bellman optimal step sizes (BOSS; Nguyen et al. 2024, arXiv 2312.16414).

The pipeline runs once with many fine steps, the anchors s_0 > ... > s_A. A coarse step of the solver from anchor j to anchor k,
begun on the fine trajectory, misses it by

    c[j, k] = E || step(x_j, M_j; s_j -> s_k) - x_k ||^2        (section 3.1 of the paper; sum over elements, j < k)

in the path's own coordinates, for the very row of the table that the solver will execute. The grid of K steps with the least
summed cost is a shortest path with K edges from anchor 0 to anchor A:

    W_1(j) = c[j, A],        W_K(j) = min_{l > j}  c[j, l] + W_{K-1}(l).

One pass gives every K. The cost is each step's own error, not that of the final sample, to which earlier errors spread.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkit import rng, table
from flowkit.distill.record import recording
from flowkit.grids import Grid
from flowkit.pipelines.sampling import Inputs, sample_images
from flowkit.progress import bar
from flowkit.schedulers import RectifiedFlowScheduler, clipping
from flowkit.schedulers.plans import Plan

METHODS, OBJECTIVES = ("bellman",), ("local",)
_GROUPS = 20
# Index of the run's own seed: beyond every sample's, so that no search shares noise with an evaluation under the same seed.
_SEARCH = 2**63


class Costs:
    """Costs of all steps between two anchors, in float64, over any number of trajectories.

    Trajectories are dealt into at most `_GROUPS` groups whose sums are kept, so that memory is bounded and the sum of any edges
    still has its standard error, however they are correlated.

    Args:
        plan: the run on the anchors: path, prediction type, levels, times and a first-order solver.
        samples: number of trajectories that will be added, >= 2.
    """

    def __init__(self, plan: Plan, samples: int) -> None:
        self.plan = plan
        levels = [plan.path.at_level(v) for v in plan.levels]
        self.rows = [
            [table.build(plan.method, plan.path, plan.prediction, [s, t], times=[time])[0] for t in levels[j + 1 :]]
            for j, (s, time) in enumerate(zip(levels, plan.times, strict=False))
        ]
        groups = min(samples, _GROUPS)
        self.sums = torch.zeros(groups, len(levels), len(levels), dtype=torch.float64)
        self.counts = torch.zeros(groups, dtype=torch.float64)

    def add(self, states: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Adds a batch of trajectories: A + 1 states and A network outputs, each (B, ...)."""
        group = (torch.arange(len(states[0])) + int(self.counts.sum())) % len(self.counts)
        self.sums.index_add_(0, group, self.each(states, outputs))
        self.counts.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))

    def each(self, states: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """Returns the costs of each trajectory, (B, A + 1, A + 1), zero on and below the diagonal."""
        plan, wide = self.plan, [x.double() for x in states]
        costs = torch.zeros(len(wide[0]), len(wide), len(wide), dtype=torch.float64)
        for j, (rows, raw) in enumerate(zip(self.rows, outputs, strict=True)):
            x, raw = wide[j], raw.double()
            if plan.limit:
                x, raw = clipping.apply(plan.limit, plan.path, plan.prediction, rows[0].s, x, raw, keep_eps=True)
            for k, row in enumerate(rows, j + 1):
                costs[:, j, k] = (table.step(row, x, raw)[0] - wide[k]).flatten(1).square().sum(1)
        return costs

    def mean(self) -> Tensor:
        """Returns the cost matrix, (A + 1, A + 1); but for rounding, a step to the next anchor costs nothing."""
        return self.sums.sum(0) / self.counts.sum()

    def total(self, path: Sequence[int]) -> tuple[float, float]:
        """Returns the summed cost of a path of anchors, and its standard error."""
        edges = self.sums[:, path[:-1], path[1:]].sum(1)
        error = (edges / self.counts).std() / math.sqrt(len(edges))
        return float(edges.sum() / self.counts.sum()), float(error)


def shortest_paths(costs: Tensor | NDArray[np.float64], steps: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """Finds the cheapest path of each number of edges from the first node to the last, all from one pass.

    Among equally cheap paths the most even one wins, that of least ``sum (edge length)^2``; among those the first in
    lexicographic order.

    Args:
        costs: edge costs, (n + 1, n + 1), finite above the diagonal; the rest is not read.
        steps: numbers of edges K, each in [1, n].

    Returns:
        K -> K + 1 strictly increasing nodes, from 0 to n.

    Raises:
        ValueError: for a K out of range, a matrix that is not square, or costs that are not finite.
    """
    matrix = np.asarray(costs, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"edge costs must be a square matrix of two nodes or more, got shape {matrix.shape}")
    last = len(matrix) - 1
    nodes = np.arange(last + 1)
    forward = nodes[:, None] < nodes
    if not np.isfinite(matrix[forward]).all():
        raise ValueError("edge costs hold NaN or infinity; look for it in the states that they were measured on")
    wanted = _steps(steps, last)
    matrix = np.where(forward, matrix, np.inf)
    squares = np.where(forward, (nodes - nodes[:, None]) ** 2.0, np.inf)
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


def uniform_path(anchors: int, steps: int) -> tuple[int, ...]:
    """Returns the path of evenly spaced anchors, ``round(i A / K)``."""
    return tuple(round(i * anchors / steps) for i in range(steps + 1))


def optimize_steps(
    pipe: Any,  # noqa: ANN401
    steps: Iterable[int],
    *,
    method: str = "bellman",
    objective: str = "local",
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    anchors: int = 100,
    samples: int = 100,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[int, Grid]:
    """Finds the best levels for a few Euler (DDIM) steps of a pipeline, without training.

    The pipeline runs on fine, evenly spaced steps (in model time; Karras spacing on VE and EDM), guidance and all, with a
    scheduler of ours in place of its own. The noise is not that of `flowkit.eval.evaluate` under the same seed.

    Args:
        pipe: any diffusers pipeline that returns images, on any path; it is left as it was.
        steps: numbers of steps K wanted, each from 1 to ``anchors``; all come from one run.
        method: "bellman".
        objective: "local", the paper's: the summed squared error of each step by itself.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all samples, such as ``dict(guidance_scale=5.0)``.
        anchors: fine steps A, among whose A + 1 levels a grid chooses.
        samples: number of trajectories, >= 2.
        seed: of the noise.
        batch_size: samples at a time; memory holds ``2 A + 1`` states of each.
        progress: show a bar with the time left.

    Returns:
        K -> grid. ``about`` holds the predicted cost and that of the uniform grid, each with its standard error, and the settings.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for a bad number, an unknown method or objective, a scheduler that has no path of ours, or a pipeline that
            does not simply take ``anchors`` steps.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r} of {method}; choose {', '.join(OBJECTIVES)}")
    if anchors < 1 or samples < 2:
        raise ValueError(f"got anchors={anchors}, samples={samples}; at least 1 and 2 are needed, 100 of both is usual")
    wanted = _steps(steps, anchors)
    call = dict(call or {})
    if given := {"num_inference_steps", "timesteps", "sigmas"} & call.keys():
        raise TypeError(
            f"{', '.join(sorted(given))} cannot be in call: the search takes its own steps; pass anchors={anchors}"
        )
    scheduler = RectifiedFlowScheduler.from_config(getattr(pipe, "scheduler", None), solver="euler", grid="karras")
    fine = _anchor_grid(scheduler, anchors)
    scheduler.set_grid(fine)
    costs = Costs(scheduler.plan(anchors, None, None, None), samples)
    call["num_inference_steps"] = anchors
    batches = sample_images(
        pipe, samples, seed=rng.sample_seed(seed, _SEARCH), inputs=inputs, call=call, batch_size=batch_size
    )
    with bar(progress) as display:
        task = display.add_task("fine steps", total=samples * anchors)
        with recording(pipe, scheduler, lambda rows: display.advance(task, rows)) as take:
            for _ in batches:
                run = take()
                if len(run.outputs) != anchors:
                    raise ValueError(f"{type(pipe).__name__} took {len(run.outputs)} of {anchors} steps; call it so that it "
                                     "starts from pure noise (strength=1)")  # fmt: skip
                costs.add(run.states, run.outputs)
    shared = {"method": method, "objective": objective, "anchors": anchors, "samples": samples, "seed": seed}
    grids = {}
    for count, path in shortest_paths(costs.mean(), wanted).items():
        about: dict[str, Any] = {**shared, "indices": list(path)}
        about["cost"], about["cost_se"] = costs.total(path)
        about["uniform_cost"], about["uniform_cost_se"] = costs.total(uniform_path(anchors, count))
        grids[count] = Grid(tuple(fine.sigmas[i] for i in path), fine.path, "euler", about=about)
    return grids


def _steps(steps: Iterable[int], anchors: int) -> list[int]:
    """The numbers of steps, checked."""
    given = list(steps) if isinstance(steps, Iterable) else []
    wanted = [operator.index(k) for k in given if hasattr(k, "__index__") and not isinstance(k, bool)]
    if not wanted or len(wanted) < len(given) or not all(1 <= k <= anchors for k in wanted):
        raise ValueError(f"steps must be a list of whole numbers from 1 to {anchors} (the anchors), got {given or steps!r:.80}; "
                         "pass steps=[4, 6, 8]")  # fmt: skip
    return wanted


def _anchor_grid(scheduler: RectifiedFlowScheduler, anchors: int) -> Grid:
    path = scheduler.path
    if path.name in ("ve", "edm"):  # unbounded noise: the scheduler's own limits
        return Grid(tuple(scheduler.plan(anchors, None, None, None).levels), path.name)
    return Grid.uniform(anchors, path)

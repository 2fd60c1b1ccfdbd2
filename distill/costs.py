"""The cost of a step between any two anchors of a fine trajectory (BOSS; Nguyen et al. 2024, arXiv 2312.16414, section 3.1).

A coarse step from anchor j to anchor k, begun on the fine trajectory, misses it by

    c[j, k] = E || step(x_j, M_j; s_j -> s_k) - x_k ||^2        (sum over elements, j < k)

in the path's own coordinates. It is each step's own error, not that of the final sample, to which earlier errors spread.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit import solvers, table, weights
from flowkit.distill.shortest import Nodes, shortest_paths
from flowkit.grids import Grid
from flowkit.schedulers import clipping
from flowkit.schedulers.plans import Plan

GROUPS = 20
_FORMAT = "flowkit.costs/1"


class StepErrors:
    """The squared error of every step between two anchors, trajectory by trajectory.

    The step is the very row of the table that a one-call solver of first order executes. A solver that looks back, or calls the
    network within a step, has no error of a step by itself: it depends on the steps before, or on states that the fine trajectory
    does not hold. Its own first step, of first order, stands in for all.

    Args:
        plan: the run on the anchors.
    """

    def __init__(self, plan: Plan) -> None:
        method = plan.method if plan.method.first_order else solvers.solver("euler", plan.path)
        self.plan = plan = replace(plan, method=method)
        levels = [plan.path.at_level(v) for v in plan.levels]
        self.rows = [
            [table.build(method, plan.path, plan.prediction, [s, t], times=[time])[0] for t in levels[j + 1 :]]
            for j, (s, time) in enumerate(zip(levels, plan.times, strict=False))
        ]

    def __call__(self, states: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """Returns the errors of each trajectory, (B, A + 1, A + 1) in float64, zero on and below the diagonal.

        Args:
            states: at the A + 1 anchors, each (B, ...).
            outputs: of the network at the first A, likewise.
        """
        plan, wide = self.plan, [x.double() for x in states]
        wide[-1] = wide[-1] / plan.finish
        errors = torch.zeros(len(wide[0]), len(wide), len(wide), dtype=torch.float64)
        for j, (rows, raw) in enumerate(zip(self.rows, outputs, strict=True)):
            x, raw = wide[j], raw.double()
            if plan.limit:
                keep = plan.method.gauge != "x0"
                x, raw = clipping.apply(plan.limit, plan.path, plan.prediction, rows[0].s, x, raw, keep_eps=keep)
            for k, row in enumerate(rows, j + 1):
                errors[:, j, k] = (table.step(row, x, raw)[0] - wide[k]).flatten(1).square().sum(1)
        return errors


class Costs:
    """Costs of all steps between two anchors, in float64, over any number of trajectories.

    Trajectories are dealt into at most `GROUPS` groups whose sums are kept, so that memory is bounded and the sum of any edges
    still has its standard error, however they are correlated.

    Args:
        grid: the anchors.
        samples: number of trajectories that will be added, >= 2.
        about: how they came about; any JSON values.
    """

    def __init__(self, grid: Grid, samples: int, about: dict[str, Any] | None = None) -> None:
        self.grid, self.about, groups = grid, about or {}, min(samples, GROUPS)
        self.sums = torch.zeros(groups, len(grid) + 1, len(grid) + 1, dtype=torch.float64)
        self.counts = torch.zeros(groups, dtype=torch.float64)

    def add(self, errors: Tensor, first: int | None = None) -> None:
        """Adds trajectories.

        Args:
            errors: from `StepErrors`, (B, A + 1, A + 1).
            first: number of the first of them; None means that they follow those that are there.
        """
        group = (torch.arange(len(errors)) + (int(self.counts.sum()) if first is None else first)) % len(self.counts)
        self.sums.index_add_(0, group, errors)
        self.counts.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))

    def mean(self) -> Tensor:
        """Returns the cost matrix, (A + 1, A + 1); on a first-order solver's own trajectory a step to the next anchor is free."""
        return self.sums.sum(0) / self.counts.sum()

    def errors(self) -> Tensor:
        """Returns the standard errors of the cost matrix, (A + 1, A + 1), from the spread between groups."""
        return (self.sums / self.counts[:, None, None]).std(0) / math.sqrt(len(self.counts))

    def total(self, path: Sequence[int]) -> tuple[float, float]:
        """Returns the summed cost of a path of anchors, and its standard error."""
        edges = self.sums[:, path[:-1], path[1:]].sum(1)
        error = (edges / self.counts).std() / math.sqrt(len(edges))
        return float(edges.sum() / self.counts.sum()), float(error)

    def stability(
        self,
        paths: dict[int, Nodes],
        resamples: int = 200,
        seed: int = 0,
        forbidden: Iterable[int] = (),
        forced: Iterable[int] = (),
    ) -> dict[int, tuple[float, list[float]]]:
        """Returns how often the search finds the same on resampled trajectories (bootstrap over the groups; Efron 1979).

        Args:
            paths: K -> the path found on all trajectories.
            resamples: draws of as many groups, with replacement.
            seed: of the draws.
            forbidden: nodes that no path may visit, as in the search.
            forced: nodes that every path must visit, likewise.

        Returns:
            K -> the share of the resamples that choose the same path, and for each of its K edges the share that choose it.
        """
        draw, groups = np.random.default_rng(seed), len(self.counts)
        same, edges = dict.fromkeys(paths, 0), {k: [0] * k for k in paths}
        for _ in range(resamples):
            times = torch.from_numpy(draw.multinomial(groups, [1 / groups] * groups)).double()
            mean = torch.einsum("g,gjk->jk", times, self.sums) / (times @ self.counts)
            for k, path in shortest_paths(mean, paths, forbidden=forbidden, forced=forced).items():
                same[k] += path == paths[k]
                chosen = set(pairwise(path))
                edges[k] = [n + (edge in chosen) for n, edge in zip(edges[k], pairwise(paths[k]), strict=True)]
        return {k: (same[k] / resamples, [n / resamples for n in edges[k]]) for k in paths}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the costs as safetensors, whole or not at all."""
        metadata = {"format": _FORMAT, "grid": json.dumps(self.grid.to_dict()), "about": json.dumps(self.about)}
        weights.write(path, {"sums": self.sums, "counts": self.counts}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Costs:
        """Reads what `save` wrote: another search needs no other run of the pipeline.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: for a file of something else.
        """
        tensors, metadata = weights.read(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} holds no costs of steps; write them with Costs.save")
        costs = cls(Grid.from_dict(json.loads(metadata["grid"])), len(tensors["counts"]), json.loads(metadata["about"]))
        costs.sums, costs.counts = tensors["sums"], tensors["counts"]
        return costs

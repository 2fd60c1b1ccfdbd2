"""BOSS, Bellman optimal step sizes and straightening (Nguyen et al. 2024, arXiv 2312.16414).

The teacher's Euler trajectories are recorded on many anchors. The grid of K steps of least summed cost among them is a shortest
path, see `flowkit.distill.costs`, and on it the student learns the chords, whose K steps end where the teacher's many do,

    min_v  E_k || v(x_{tau_k}, tau_k) - u_k ||^2,        u_k the output whose one step leads from x_{tau_k} to x_{tau_{k+1}},

(section 4) with k even over the steps and the states those of the teacher. A student is made for its grid, which it carries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from flowkit.distill import objective
from flowkit.distill.conditions import Conditions
from flowkit.distill.fine import Runs, coarse
from flowkit.distill.method import Method, Recording, check_objective, check_whole, sampler
from flowkit.distill.pairs import PairLoss, check_start
from flowkit.distill.shards import Trajectories
from flowkit.distill.shortest import Nodes, shortest_paths, uniform_path
from flowkit.distill.trainer import Loss
from flowkit.distill.trajectories import recorded_costs
from flowkit.grids import Grid
from flowkit.schedulers import RectifiedFlowScheduler


@dataclass(frozen=True)
class Boss(Method):
    """Options of BOSS.

    Attributes:
        steps: number K of the student's steps, >= 1.
        anchors: steps of the recorded trajectories, >= K, among whose levels the grid is chosen. Every sample is kept at all of
            them.
        search: number of trajectories that the costs are measured on, >= 2.
        metric: between outputs, "l2" or "pseudo-huber", see `flowkit.distill.objective.metric`.

    Raises:
        ValueError: for numbers out of range and unknown names.
    """

    name: ClassVar[str] = "boss"
    steps: int = 4
    anchors: int = 100
    search: int = 100
    metric: str = "l2"

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, anchors=self.anchors, search=self.search)
        if self.steps > self.anchors or self.search < 2:
            raise ValueError(f"got steps={self.steps}, anchors={self.anchors}, search={self.search}; at most one step an anchor, "
                             "and search on 2 trajectories at least")  # fmt: skip
        if self.metric.startswith("lpips"):
            raise ValueError(
                f"{self.metric} compares images, and BOSS learns velocities; use metric='l2' or 'pseudo-huber'"
            )
        check_objective("uniform", self.metric, "model")

    @property
    def of_ends(self) -> bool:
        """Whether the student learns from first states and last alone: from all on the grid."""
        return False

    @property
    def solver(self) -> str:
        """Solver that the teacher is recorded with: the one whose steps the chords are."""
        return "euler"

    def check(self, predict: Conditions) -> None:
        """Refuses a prediction that does not tell the sample at pure noise."""
        check_start(predict)

    def recording(self, runs: Runs, guided: bool) -> Recording:
        """Returns what is recorded of the teacher: states and outputs at all anchors."""
        return Recording(runs.anchors(self.anchors), None, ("state", "output"))

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> Loss:
        """Returns the loss on the chords."""
        nodes = self._nodes(data)
        return PairLoss(predict, data, samples, objective.times([1.0]), objective.Comparison(self.metric), edges=nodes)

    def scheduler(self, teacher: Any, data: Trajectories) -> RectifiedFlowScheduler:  # noqa: ANN401
        """Returns the student's scheduler: Euler on the grid that was found."""
        made = sampler(teacher)
        made.set_grid(self.grid(data))
        return made

    def grid(self, data: Trajectories) -> Grid:
        """Returns the grid of K steps of least summed cost over recorded trajectories.

        Its ``about`` holds the cost and that of even steps, each with its standard error.

        Args:
            data: states and outputs at all levels.

        Raises:
            ValueError: where less was recorded, or fewer levels than steps.
        """
        return _search(data.folder, data.run, min(self.search, len(data)), self.steps)

    def _nodes(self, data: Trajectories) -> Nodes:
        return tuple(self.grid(data).about["indices"])


@functools.lru_cache
def _search(folder: Path, run: str, samples: int, steps: int) -> Grid:
    """The grid of some trajectories of a recording, of this run."""
    data = Trajectories(folder)
    costs = recorded_costs(data, samples=samples)
    if steps > len(data.grid):
        raise ValueError(
            f"{folder} was recorded on {len(data.grid)} steps, too few for a grid of {steps}; record with more anchors"
        )
    nodes, even = shortest_paths(costs.mean(), [steps])[steps], uniform_path(len(data.grid), steps)
    about: dict[str, Any] = {"method": "boss", "anchors": len(data.grid), "samples": samples, "indices": list(nodes)}
    about["cost"], about["cost_se"] = costs.total(nodes)
    about["uniform_cost"], about["uniform_cost_se"] = costs.total(even)
    return replace(coarse(data.grid, nodes), solver="euler", about=about)

"""Step straightening, the second stage of BOSS (Nguyen et al. 2024, arXiv 2312.16414, section 4): training on one's own chords.

On a grid tau_0, ..., tau_K over the anchors of a recorded trajectory x, the K-step solver is right where the network returns the
chord to the next level instead of the tangent. The student learns

    min_v  E_k || v(x_{tau_k}, tau_k) - u_k ||^2,        u_k = (x_{tau_{k+1}} - x_{tau_k}) / (tau_{k+1} - tau_k),

k even over the K steps, the states those of the trajectory. That is for velocities on the flow path. On any path and for any
prediction u_k is the output whose one first-order step, ``x' = a x + b u``, ends at x_{tau_{k+1}}; on the flow path they are equal.
Limits on x0_hat (clip_sample) are no part of that step.
A student is made for its grid: with other steps it is worse than its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowkit import solvers, table
from flowkit.distill.shards import Trajectories
from flowkit.distill.shortest import Nodes
from flowkit.grids import Grid


class Chords(Dataset[dict[str, Any]]):
    """The chords of recorded trajectories on a grid, one item for each sample and step.

    Item ``i K + k`` is a dict: "x", the state at the start of step k of sample i, "target", the output wanted there, both of the
    shape of one sample; "time", the model's; "step", k; "index", that of the sample; "inputs", its arguments.

    Args:
        trajectories: with states at all levels of the grid.
        grid: of K steps, over the recorded levels, made for a first-order solver.
        samples: indices of the samples that are used; None means all.

    Attributes:
        nodes: numbers of the recorded levels that the grid visits.

    Raises:
        ValueError: for a grid of another path, with levels that were not recorded, or made for a solver that looks back or draws
            noise; for trajectories that drew noise; where a network's output does not determine a step.
    """

    def __init__(self, trajectories: Trajectories, grid: Grid, samples: Sequence[int] | None = None) -> None:
        self.trajectories, self.grid = trajectories, grid
        self.samples = range(len(trajectories)) if samples is None else samples
        self.nodes = _nodes(trajectories, grid)
        trajectories.check_deterministic()
        scheduler = trajectories.scheduler()
        scheduler.set_grid(None)
        path, prediction = scheduler.path, scheduler.prediction
        method = solvers.solver(grid.solver or "euler", path)
        if not method.first_order or method.noise:
            raise ValueError(f"the grid was made for {method.name!r}, whose steps hang on those before or draw noise, so that a "
                             "chord is no step of it; search one with solver='euler'")  # fmt: skip
        fine = trajectories.grid
        self.times = [
            fine.timesteps[i] if fine.timesteps else path.time(path.at_level(fine.sigmas[i])) for i in self.nodes[:-1]
        ]
        levels = [path.at_level(v) for v in grid.sigmas]
        rows = table.build(method, path, prediction, levels, times=self.times)
        self._steps = [(row.a + row.b[0] * row.p, row.b[0] * row.q) for row in rows]
        if not all(weight for _, weight in self._steps):
            raise ValueError(f"a network that predicts {prediction!r} has no say in a step of {list(grid.sigmas)!r:.80}; start "
                             "below pure noise")  # fmt: skip

    def __len__(self) -> int:
        """Returns the number of samples times K."""
        return len(self.samples) * len(self.grid)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one chord.

        Raises:
            IndexError: for an index beyond the chords.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"chord {index} is not one of {len(self)}")
        place, k = divmod(index, len(self.grid))
        item = self.trajectories[self.samples[place]]
        x, end = (item["states"][self.trajectories.at.index(node)] for node in self.nodes[k : k + 2])
        a, b = self._steps[k]
        target = ((end.double() - a * x.double()) / b).to(x.dtype)
        return {
            "x": x,
            "target": target,
            "time": self.times[k],
            "step": k,
            "index": item["index"],
            "inputs": item["inputs"],
        }

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[Chords, Chords]:
        """Returns the chords of most samples, and those of the others: no trajectory is in both.

        Args:
            held_out: share of the samples in the second part, in (0, 1).
            seed: of the choice.

        Raises:
            ValueError: where one part would be empty.
        """
        count = round(held_out * len(self.samples))
        if not 0 < count < len(self.samples):
            raise ValueError(f"held_out={held_out} of {len(self.samples)} samples leaves one part empty; record more, or choose "
                             "another share")  # fmt: skip
        order = np.random.default_rng(seed).permutation(len(self.samples))
        parts = (sorted(self.samples[i] for i in order[cut]) for cut in (slice(count, None), slice(count)))
        rest, held = (Chords(self.trajectories, self.grid, part) for part in parts)
        return rest, held


def loss(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, time: Tensor, target: Tensor) -> Tensor:
    """Returns the mean of ``(v(x_{tau_k}, tau_k) - u_k)^2`` over batch and elements.

    Args:
        network: (x (B, ...), model time (B,)) -> output (B, ...).
        x: states, (B, ...), as is ``target``.
        time: the model's, (B,).
        target: the chords.
    """
    return (network(x, time) - target).square().mean()


def _nodes(trajectories: Trajectories, grid: Grid) -> Nodes:
    """Numbers of the recorded levels of a grid."""
    fine = trajectories.grid
    if grid.path != fine.path:
        raise ValueError(
            f"the grid belongs to the path {grid.path!r}, the trajectories walk {fine.path!r}; search one on them"
        )
    found = []
    for level in grid.sigmas:
        node = next((i for i, v in enumerate(fine.sigmas) if math.isclose(v, level, abs_tol=1e-12)), None)
        if node is None or node not in trajectories.at:
            raise ValueError(f"the grid's level {level:g} is not among the {len(trajectories.at)} recorded ones; record with the "
                             "anchors that it was chosen from")  # fmt: skip
        found.append(node)
    return tuple(found)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns a batch of chords for a DataLoader: tensors stacked, times as float32, inputs as they are, in a list."""
    return {
        "x": torch.stack([item["x"] for item in items]),
        "target": torch.stack([item["target"] for item in items]),
        "time": torch.tensor([item["time"] for item in items]),
        "inputs": [item["inputs"] for item in items],
    }

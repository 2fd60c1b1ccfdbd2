"""Reflow: straight paths, so that one step is enough (Liu, Gong & Liu 2022, arXiv 2209.03003).

The teacher's own pairs of noise and sample, ``x_0 = ODE(x_1)``, are a coupling with the right marginals. On the lines between them
the student v learns

    min_v  E || v(x_s, s) - (eps - x_0) ||^2                 (equation 1 of the paper, in diffusers' direction of time)

and likewise on other paths and for other predictions, see `flowkit.distill.pairs`. The pairs being deterministic, the same v is
best for every distribution of s and every metric. By default most of each batch goes to pure noise, the one time that a one-step
sampler asks for, and the rest keeps the paths in between. The paper's own choice is ``times="uniform"``; that of Lee, Lin & Fanti
2024 (arXiv 2405.20320) ``times="u-shaped", metric="lpips-huber-1/t"``, beside pairs of real images (``real`` of
`flowkit.distill.run`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flowkit.distill import objective
from flowkit.distill.conditions import Conditions
from flowkit.distill.fine import Runs
from flowkit.distill.method import Method, Recording, check_objective, check_whole, ends, sampler
from flowkit.distill.pairs import PairLoss, check_metric, check_start
from flowkit.distill.shards import Trajectories
from flowkit.distill.trainer import Loss
from flowkit.schedulers import RectifiedFlowScheduler


@dataclass(frozen=True)
class Reflow(Method):
    """Options of reflow.

    Attributes:
        rounds: how often the student becomes the teacher of the next, >= 1. One is enough for most; each loses a little.
        evaluations: of the teacher for each pair, >= 1; None means 8 without and 25 with classifier-free guidance.
        solver: that the teacher is recorded with, a deterministic one.
        times: distribution of the flow times of a batch, see `flowkit.distill.objective.times`.
        metric: "l2", "pseudo-huber" or "lpips", see `flowkit.distill.objective.metric`; "lpips-huber" or "lpips-huber-1/t", see
            `flowkit.distill.objective.Comparison`. Those with LPIPS are for pixels alone.
        space: "model" compares the network's output, "x0" its prediction of the sample, as "lpips" always does.

    Raises:
        ValueError: for numbers out of range and unknown names.
    """

    name: ClassVar[str] = "reflow"
    rounds: int = 1
    evaluations: int | None = None
    solver: str = "unipc"
    times: str | tuple[float, ...] = "noise"
    metric: str = "l2"
    space: str = "model"

    def __post_init__(self) -> None:
        check_whole(rounds=self.rounds, evaluations=1 if self.evaluations is None else self.evaluations)
        check_objective(self.times, self.metric, self.space)

    def check(self, predict: Conditions) -> None:
        """Refuses a prediction that does not tell the sample at pure noise, and latents where pixels are needed."""
        check_start(predict)
        check_metric(predict, self.metric)

    def recording(self, runs: Runs, guided: bool) -> Recording:
        """Returns what is recorded of the teacher: the first state and the last."""
        return ends(runs, self.evaluations, guided)

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> Loss:
        """Returns the loss on the pairs."""
        return PairLoss(
            predict, data, samples, objective.times(self.times), objective.Comparison(self.metric, self.space)
        )

    def scheduler(self, teacher: Any, data: Trajectories) -> RectifiedFlowScheduler:  # noqa: ANN401
        """Returns the student's scheduler: Euler on an even grid."""
        return sampler(teacher)

"""Reverse distillation: the noise of a sample in one step, a fast encoder (Liu, Gong & Liu 2022, arXiv 2209.03003, section 3.2).

On recorded pairs of noise and sample the student learns, at the samples themselves, flow time 0, the noise that they come from:

    min_v  E D( v(x_0, 0), the output that says x_0 and eps )

On the flow path that is ``eps - x_0``, and ``x_1 = x_0 + v(x_0, 0)``; at flow time 0 every prediction but that of the sample tells
the noise, epsilon by being it. A discrete diffusion is called at its first time, and one of Karras et al., whose time ends nowhere,
at a noise level of 1e-6. `flowkit.distill.invert` with ``steps=1`` takes the step. A student is an encoder and samples no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flowkit.distill import objective
from flowkit.distill.conditions import Conditions
from flowkit.distill.fine import Runs
from flowkit.distill.invert import check_noise
from flowkit.distill.method import Method, Recording, check_objective, check_whole, ends, sampler
from flowkit.distill.pairs import PairLoss
from flowkit.distill.shards import Trajectories
from flowkit.distill.trainer import Loss
from flowkit.schedulers import RectifiedFlowScheduler


@dataclass(frozen=True)
class Reverse(Method):
    """Options of reverse distillation.

    Attributes:
        evaluations: of the teacher for each pair, >= 1; None means 8 without and 25 with classifier-free guidance.
        solver: that the teacher is recorded with, a deterministic one.
        metric: between outputs, "l2" or "pseudo-huber", see `flowkit.distill.objective.metric`.

    Raises:
        ValueError: for numbers out of range and unknown names.
    """

    name: ClassVar[str] = "reverse"
    encodes: ClassVar[bool] = True
    evaluations: int | None = None
    solver: str = "unipc"
    metric: str = "l2"

    def __post_init__(self) -> None:
        check_whole(evaluations=1 if self.evaluations is None else self.evaluations)
        if self.metric.startswith("lpips"):
            raise ValueError(
                f"{self.metric} compares images, and reverse distillation learns noise; use metric='l2' or 'pseudo-huber'"
            )
        check_objective("uniform", self.metric, "model")

    @property
    def steps(self) -> int:
        """Network evaluations that the student is made for."""
        return 1

    def check(self, predict: Conditions) -> None:
        """Refuses a prediction that does not tell the noise of a sample."""
        check_noise(predict)

    def recording(self, runs: Runs, guided: bool) -> Recording:
        """Returns what is recorded of the teacher: the first state and the last."""
        return ends(runs, self.evaluations, guided)

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> Loss:
        """Returns the loss on the pairs."""
        return PairLoss(predict, data, samples, objective.times([0.0]), objective.Comparison(self.metric))

    def scheduler(self, teacher: Any, data: Trajectories) -> RectifiedFlowScheduler:  # noqa: ANN401
        """Returns the student's scheduler, which holds its path."""
        return sampler(teacher)

"""One step, or a few: distillation on pairs (Liu, Gong & Liu 2022, arXiv 2209.03003, section 3.2; InstaFlow, arXiv 2309.06380).

On recorded pairs of noise and sample ``x_0 = ODE(x_1)`` the student learns the sample itself, at the flow times alone that its k
steps ask for:

    min_v  E_i D( x0_hat(x_{s_i}, s_i), x_0 ),        s_i one of the k levels of the student's grid,

with states on the line between the pair, see `flowkit.distill.pairs`. For k = 1 that is the noise, to the bit the state that a
sampler starts from. Pairs of a teacher whose paths are straight are learnt best: reflow first, and then one step from its student.
A student is made for its number of steps: with others it is worse than its teacher, and its grid refuses them.
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
from flowkit.grids import Grid
from flowkit.paths import Path
from flowkit.schedulers import RectifiedFlowScheduler


@dataclass(frozen=True)
class OneStep(Method):
    """Options of distillation to one step or a few.

    Attributes:
        steps: number k of the student's steps, >= 1.
        evaluations: of the teacher for each pair, >= 1; None means 8 without and 25 with classifier-free guidance.
        solver: that the teacher is recorded with, a deterministic one.
        metric: between the predicted sample and the teacher's: "l2", "pseudo-huber", or "lpips" (pixels alone), see
            `flowkit.distill.objective.metric`.

    Raises:
        FileNotFoundError: for "lpips" without its weights.
        ValueError: for numbers out of range and unknown names.
    """

    name: ClassVar[str] = "onestep"
    steps: int = 1
    evaluations: int | None = None
    solver: str = "unipc"
    metric: str = "pseudo-huber"

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, evaluations=1 if self.evaluations is None else self.evaluations)
        check_objective("noise", self.metric, "x0")

    def check(self, predict: Conditions) -> None:
        """Refuses a prediction that does not tell the sample at pure noise, and latents where pixels are needed."""
        check_start(predict)
        check_metric(predict, self.metric)

    def recording(self, runs: Runs, guided: bool) -> Recording:
        """Returns what is recorded of the teacher: the first state and the last."""
        return ends(runs, self.evaluations, guided)

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> Loss:
        """Returns the loss on the pairs."""
        grid = even_grid(predict.path, data.grid.sigmas[0], self.steps)
        levels = [predict.path.at_level(level) for level in grid.sigmas[:-1]]
        times = objective.times([s / levels[0] for s in levels])
        return PairLoss(predict, data, samples, times, objective.Comparison(self.metric, "x0"))

    def scheduler(self, teacher: Any, data: Trajectories) -> RectifiedFlowScheduler:  # noqa: ANN401
        """Returns the student's scheduler: Euler on its own levels."""
        made = sampler(teacher)
        made.set_grid(even_grid(made.path, data.grid.sigmas[0], self.steps))
        return made


def even_grid(path: Path, first: float, steps: int) -> Grid:
    """Returns k levels even in flow time, ``s = s_1 i / k``, and 0.

    Args:
        path: of the model.
        first: level where the sampler starts, of flow time s_1.
        steps: k >= 1.
    """
    start = path.at_level(first)
    return Grid((first, *(path.level(start * i / steps) for i in range(steps - 1, -1, -1))), path.name, "euler")

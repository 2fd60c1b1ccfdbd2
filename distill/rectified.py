"""Rectified Diffusion (Wang et al. 2024, arXiv 2410.07303): first-order paths, the teacher's path and prediction kept.

What lets a diffusion be sampled in few steps is not a straight path but one on which x_0 and eps do not change, along which DDIM
of any number of steps is the same. With the teacher's pairs of noise and sample the student learns

    min  E D( x0_hat(x_s, s), x_0 ),        x_s = alpha_s x_0 + sigma_s eps,        s even over the path,

(section 3.2), whatever it predicts: see `flowkit.distill.pairs`. On the flow path this is reflow with another weight.

With k phases (section 3.4) the teacher's path is cut at k - 1 levels; within a phase, between the states x_a and x_b at its ends,
the student learns the first-order path through both,

    min  E D( x_b_hat(x_s, s), x_b ),        s even between a and b,

and is sampled in k steps, one a phase: the DDIM step, which is Euler's in every gauge. A phase is easier to learn than the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flowkit.distill import objective
from flowkit.distill.conditions import Conditions
from flowkit.distill.fine import Runs, coarse
from flowkit.distill.method import Method, Recording, check_objective, check_whole, ends, sampler
from flowkit.distill.pairs import PairLoss, check_metric, check_start
from flowkit.distill.shards import Trajectories
from flowkit.distill.trainer import Loss
from flowkit.schedulers import RectifiedFlowScheduler


@dataclass(frozen=True)
class RectifiedDiffusion(Method):
    """Options of Rectified Diffusion.

    Attributes:
        phases: number k of parts that the path is cut into, >= 1; the student takes k steps, and any number where k = 1.
        evaluations: of the teacher for each sample, a multiple of the phases; None means 8 without and 25 with classifier-free
            guidance, rounded up to one.
        solver: that the teacher is recorded with, a deterministic one.
        times: distribution of the flow times over each phase, see `flowkit.distill.objective.times`.
        metric: between states, "l2", "pseudo-huber", or, with one phase and pixels alone, "lpips".

    Raises:
        FileNotFoundError: for "lpips" without its weights.
        ValueError: for numbers out of range and unknown names.
    """

    name: ClassVar[str] = "rectified-diffusion"
    phases: int = 1
    evaluations: int | None = None
    solver: str = "unipc"
    times: str | tuple[float, ...] = "uniform"
    metric: str = "pseudo-huber"

    def __post_init__(self) -> None:
        check_whole(phases=self.phases, evaluations=1 if self.evaluations is None else self.evaluations)
        if self.evaluations is not None and self.evaluations % self.phases:
            raise ValueError(f"evaluations={self.evaluations} cannot be cut into {self.phases} phases; take a multiple")
        if self.metric.startswith("lpips") and self.phases > 1:
            raise ValueError(
                f"{self.metric} compares images, and those between {self.phases} phases are noisy; use metric='pseudo-huber'"
            )
        check_objective(self.times, self.metric, "x0")

    @property
    def of_ends(self) -> bool:
        """Whether the student learns from first states and last alone: with one phase."""
        return self.phases == 1

    @property
    def steps(self) -> int:
        """Network evaluations that the student is made for; 0, any number, with one phase."""
        return self.phases if self.phases > 1 else 0

    def check(self, predict: Conditions) -> None:
        """Refuses a prediction that does not tell the sample at pure noise, and latents where pixels are needed."""
        check_start(predict)
        check_metric(predict, self.metric)

    def recording(self, runs: Runs, guided: bool) -> Recording:
        """Returns what is recorded of the teacher: the states at the ends of the phases."""
        whole = ends(runs, self.evaluations, guided)
        count = -(-len(whole.grid) // self.phases) * self.phases
        return Recording(runs.anchors(count), self._edges(count))

    def _edges(self, count: int) -> list[int]:
        """Numbers of the levels between the phases, of so many steps."""
        return list(range(0, count + 1, count // self.phases))

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> Loss:
        """Returns the loss on the phases.

        Raises:
            ValueError: for a recording without states between the phases.
        """
        edges = self._recorded(data)
        compare = objective.Comparison(self.metric, "x0")
        return PairLoss(predict, data, samples, objective.times(self.times), compare, edges)

    def _recorded(self, data: Trajectories) -> list[int]:
        count = len(data.grid)
        if count % self.phases or not set(self._edges(count)) <= set(data.at):
            raise ValueError(f"{self.phases} phases need states at {self.phases + 1} even levels, and {data.folder} holds those at "
                             f"{data.at!r:.80} of {count} steps; record with more, or leave out pairs")  # fmt: skip
        return self._edges(count)

    def scheduler(self, teacher: Any, data: Trajectories) -> RectifiedFlowScheduler:  # noqa: ANN401
        """Returns the student's scheduler: Euler, with more than one phase on their levels.

        Raises:
            ValueError: for a recording without states between the phases.
        """
        made = sampler(teacher)
        if self.phases > 1:
            made.set_grid(replace(coarse(data.grid, self._recorded(data)), solver="euler"))
        return made

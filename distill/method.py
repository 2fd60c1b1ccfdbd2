"""What a distillation method is: what it needs to have recorded, its loss, and the sampler of its student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from flowkit.distill import objective
from flowkit.distill.conditions import Conditions
from flowkit.distill.fine import Runs
from flowkit.distill.shards import Trajectories
from flowkit.distill.trainer import Loss
from flowkit.grids import Grid
from flowkit.schedulers import RectifiedFlowScheduler

# UniPC is at the embedded teachers' own FD after 6 steps, Euler after 32; guidance bends paths.
PLAIN, GUIDED = 8, 25


@dataclass(frozen=True)
class Recording:
    """What is recorded of a teacher, see `flowkit.distill.record`.

    Attributes:
        grid: the levels that it walks.
        at: numbers of those whose states are kept; None means all.
        keep: what is kept.
    """

    grid: Grid
    at: Sequence[int] | None
    keep: Sequence[str] = ("state",)


class Method(Protocol):
    """A distillation method: a frozen dataclass of its options.

    Attributes:
        name: on the command line and in files.
        encodes: whether the student maps samples to noise, and draws none.
        solver: that the teacher is recorded with.
        rounds: how often the student becomes the teacher, >= 1.
        steps: network evaluations that the student is made for; 0 where any number will do.
        of_ends: whether it learns from first states and last alone.
        training: settings of `flowkit.distill.Training` that it trains with unless told otherwise.
    """

    name: ClassVar[str]
    encodes: ClassVar[bool] = False

    @property
    def solver(self) -> str:
        """Solver that the teacher is recorded with."""

    @property
    def rounds(self) -> int:
        """How often the student becomes the teacher: once."""
        return 1

    @property
    def steps(self) -> int:
        """Network evaluations that the student is made for: any number will do."""
        return 0

    @property
    def of_ends(self) -> bool:
        """Whether the student learns from first states and last alone, so that real images can be among them."""
        return True

    @property
    def training(self) -> Mapping[str, Any]:
        """Settings of the training unless told otherwise."""
        return {"steps": 3_000}

    def check(self, predict: Conditions) -> None:
        """Refuses a teacher that the method cannot be used on, before anything is recorded.

        Raises:
            ValueError: for a path or a prediction.
        """

    def recording(self, runs: Runs, guided: bool) -> Recording:
        """Returns what is recorded of the teacher.

        Args:
            runs: of the teacher under `solver`.
            guided: whether it uses classifier-free guidance.
        """

    def loss(self, predict: Conditions, data: Trajectories, samples: Sequence[int]) -> Loss:
        """Returns the loss of the student.

        Args:
            predict: a network with the conditioning of each sample.
            data: what was recorded.
            samples: numbers of those that are trained on.

        Raises:
            ValueError: where the model's path or prediction do not allow it.
        """

    def scheduler(self, teacher: Any, data: Trajectories) -> RectifiedFlowScheduler:  # noqa: ANN401
        """Returns the student's scheduler, with its grid.

        Args:
            teacher: the teacher's scheduler.
            data: what was recorded.
        """


def sampler(teacher: Any, grid: Grid | None = None) -> RectifiedFlowScheduler:  # noqa: ANN401
    """Returns the scheduler of a student: Euler, on the teacher's path.

    Args:
        teacher: the teacher's scheduler.
        grid: levels that the student is made for; None means any number of even ones, shifted as the teacher's.
    """
    # With one step there is no stretch that makes the last one end at a level of its own, and all spacings of diffusers but
    # "trailing" begin a single step where the noise is least; so does plain diffusers with what is saved.
    own: dict[str, Any] = {"shift_terminal": None} if teacher.config.get("shift_terminal") else {}
    own |= {"timestep_spacing": "trailing"} if teacher.config.get("timestep_spacing") else {}
    made: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(teacher, solver="euler", **own)
    name = "karras" if made.path.name in ("ve", "edm") else "uniform"
    made = RectifiedFlowScheduler.from_config(teacher, solver="euler", grid=name, **own)
    if grid is not None:
        made.set_grid(grid)
    return made


def ends(runs: Runs, evaluations: int | None, guided: bool) -> Recording:
    """Returns the recording of first and last states.

    Args:
        runs: of the teacher.
        evaluations: of the teacher for each pair; None means 8 without and 25 with guidance.
        guided: whether it is.
    """
    count = evaluations or (GUIDED if guided else PLAIN)
    return Recording(runs.anchors(count), (0, count))


def check_whole(**numbers: Any) -> None:  # noqa: ANN401
    """Refuses what is no whole number of at least 1.

    Raises:
        ValueError: quoting name and value.
    """
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} must be a whole number of at least 1, got {value!r}; leave it out for the default"
            )


def check_objective(times: str | Sequence[float], metric: str, space: str) -> None:
    """Refuses unknown distributions of times, metrics and spaces.

    Raises:
        ValueError: quoting the value.
    """
    objective.times(times)
    objective.Comparison(metric, space)

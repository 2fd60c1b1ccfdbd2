"""What `flowkit.attach` takes: the interface of guidance, gradients, recorders and correctors, and what they are told of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowkit import predictions
from flowkit.paths import Path

Space = Literal["model", "x0", "eps", "velocity"]
SPACES = ("model", "x0", "eps", "velocity")
_TARGETS = {"x0": "sample", "eps": "epsilon", "velocity": "flow_prediction"}

Plan = str | Tensor  # "both", "cond", "uncond", or a bool tensor (B,): which samples need the unconditional pass
State = Mapping[str, Any]


@dataclass(frozen=True)
class Level:
    """The noise level of a network call, on the path of the model.

    Attributes:
        path: the model's path.
        s: flow time in [0, 1].
        prediction: what the network predicts, one of `flowkit.predictions.PREDICTIONS`.
        sign: -1 where the pipeline negates the network's output before it is that prediction, otherwise 1.
    """

    path: Path
    s: float
    prediction: str
    sign: int = 1

    @property
    def alpha(self) -> float:
        """The signal level."""
        return self.path.alpha(self.s)

    @property
    def sigma(self) -> float:
        """The noise level."""
        return self.path.sigma(self.s)

    def row(self, space: str) -> tuple[float, float]:
        """Returns (p, q) such that the prediction in ``space`` is ``p x + q raw``.

        Args:
            space: "x0", "eps" or "velocity" (``eps - x0``).

        Raises:
            ValueError: where the network's output does not determine it at this level.
        """
        wanted = predictions.pair(_TARGETS[space], self.alpha, self.sigma)
        p, q = predictions.row(self.prediction, wanted, self.alpha, self.sigma, self.path.sigma_data)
        return p, q * self.sign


@dataclass(frozen=True)
class Evaluation:
    """What is known when the network's outputs of one step are combined; the hook puts it into ``state["evaluation"]``.

    Attributes:
        x: the noisy sample in the path's coordinates, in the shape of the network's output, (B, C, ...).
        level: its noise level; None where the scheduler's path is not known.
        step: number of the evaluation in this run of the pipeline, from 0.
        steps: number of evaluations of the run.
        conditioning: the network's arguments by name, for the conditional rows alone: prompts, labels, ...
    """

    x: Tensor
    level: Level | None
    step: int
    steps: int
    conditioning: Mapping[str, Any]

    def to(self, raw: Tensor, space: str) -> Tensor:
        """Returns a network output as a prediction of x0, eps or the velocity ``eps - x0``.

        Args:
            raw: the output, shape of ``x``.
            space: "model" (as it is), "x0", "eps" or "velocity".

        Raises:
            ValueError: for an unknown space, or a level that is not known.
        """
        if space == "model":
            return raw
        p, q = self._row(space)
        wide = torch.promote_types(raw.dtype, torch.float32)
        return p * self.x.to(wide) + q * raw.to(wide)

    def delta(self, change: Tensor, space: str) -> Tensor:
        """Returns the change of the network's output that changes the prediction in ``space`` by ``change``."""
        return change if space == "model" else change / self._row(space)[1]

    def _row(self, space: str) -> tuple[float, float]:
        if space not in SPACES:
            raise ValueError(f"unknown space {space!r}; choose one of {', '.join(SPACES)}")
        if self.level is None:
            raise ValueError(f"space={space!r} needs the scheduler's path, which is not known; use space='model', or swap in a "
                             "RectifiedFlowScheduler")  # fmt: skip
        return self.level.row(space)


def check_space(space: str) -> str:
    """Returns a space, or refuses an unknown one.

    Raises:
        ValueError: for an unknown space.
    """
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose one of {', '.join(SPACES)}")
    return space


def to_space(raw: Tensor, space: str, state: State) -> Tensor:
    """Returns a network output in a space; without an `Evaluation` in ``state`` it is taken to be in that space already."""
    evaluation: Evaluation | None = state.get("evaluation")
    return raw if evaluation is None else evaluation.to(raw, space)


def from_space(change: Tensor, space: str, state: State) -> Tensor:
    """Returns the change of the network's output for a change of the prediction in a space; the inverse of `to_space`."""
    evaluation: Evaluation | None = state.get("evaluation")
    return change if evaluation is None else evaluation.delta(change, space)


def reported(state: State, **values: Tensor | float) -> dict[str, Any]:
    """Returns a state with figures of this step for `Attachment.report`, ``cosine`` or ``scale``, each (B,) or one number."""
    return {**state, "report": values}


def column(values: Tensor, like: Tensor) -> Tensor:
    """Returns one number a sample, (B,), in a shape that broadcasts to ``like``, (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.device)


class Part:
    """What `flowkit.attach` takes. A part that is not guidance overrides what it needs of these.

    Attributes:
        needs_guidance: whether it is of use only where the pipeline asks for an unconditional output.
        through_network: whether `edit` takes a gradient through the network.
    """

    needs_guidance: bool = False
    through_network: bool = False

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Called before the first network call of a run of the pipeline.

        Args:
            run: the `flowkit.hooks.Attachment`.
        """

    def edit(self, evaluation: Evaluation, cond: Tensor) -> Tensor | None:
        """Called with the network's conditional output; what it returns is added to every output that the pipeline sees.

        Args:
            evaluation: of the current step; with ``through_network`` its ``x`` requires a gradient.
            cond: conditional output before guidance, (B, C, ...); with ``through_network`` a function of ``evaluation.x``.

        Returns:
            The change, shape of ``cond``; None means none.
        """
        return None

    def before_step(self, run: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:  # noqa: ANN401
        """Called before ``scheduler.step``, with its arguments."""

    def after_step(self, run: Any, sample: Tensor) -> Tensor | None:  # noqa: ANN401
        """Called with the next sample; what it returns takes its place, None leaves it."""
        return None

    def end(self) -> None:
        """Called when it is detached."""


class Guidance(Part, ABC):
    """A guidance method: two pure functions.

    ``w`` is diffusers' guidance scale, ``D = u + w (c - u)`` of the conditional output c and the unconditional u; w = 1 is c.
    *Selecting* methods (``combines = False``) return (c', u') and leave w to the pipeline; *combining* ones return D and have a
    scale of their own, since the pipeline's is not seen from the network. Both take and return network outputs; `to_space` and
    `from_space` convert them where a method measures in x0, eps or velocity.

    ``state`` is a mapping that starts empty with every run of the pipeline. Beside what the method keeps there, the hook puts in
    ``state["evaluation"]``, an `Evaluation` of the current step. Figures of the step go into ``state["report"]`` (see `reported`).

    Attributes:
        combines: whether `combine` returns D.
        second: None; "uncond" or "cond" of methods with a network of their own (`uncond`), which is then called apart, with the
            arguments of the unconditional or of the conditional rows.
    """

    combines: ClassVar[bool] = False
    needs_guidance: bool = True
    second: str | None = None

    def uncond(self, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs what gives the unconditional output; methods with ``second`` override it.

        Args:
            network: the pipeline's.
            *args: the network's.
            **kwargs: the network's.

        Returns:
            What the network returns.
        """
        return network(*args, **kwargs)

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns which network rows this step needs.

        Args:
            step: number of the evaluation, from 0.
            sigma: its noise level in diffusers' ``sigmas``: flow time on the flow path, sigma/alpha on every other.
            state: of the run so far.

        Returns:
            "both", "cond", "uncond", or a bool tensor (B,), true for samples that need the unconditional output as well.
        """
        return "both"

    @abstractmethod
    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the outputs to go on with.

        Args:
            cond: conditional output, (B, C, ...).
            uncond: unconditional output, same shape; None where the plan was "cond". Where only some samples have one, the others
                hold ``cond``.
            step: number of the evaluation, from 0.
            sigma: its noise level.
            state: of the run so far; it is not changed.

        Returns:
            The result, (c', u') of a selecting method and D of a combining one, and the next state.
        """

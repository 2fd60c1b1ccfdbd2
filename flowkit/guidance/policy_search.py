"""The search behind `PolicyGuidance`: full guidance imitated by a mixture of options at each evaluation, sharpened by gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowkit.hooks import DenoiserCall, Guidance, Part, Trajectory
from flowkit.hooks.parts import State
from flowkit.schedulers.base import TableScheduler

Option = str | float  # "cond", "uncond", or a guidance scale

_LEARNING_RATE = 0.1
_REPEATS = (
    1e-3  # of the squared distance between no and full guidance: rounding in half precision, far from other noise
)


def rows(options: Sequence[Option]) -> int:
    """Returns the network rows that a sample costs: two for a guidance scale, one otherwise."""
    return sum(1 if isinstance(option, str) else 2 for option in options)


class FixedScale(Guidance):
    """Full guidance with one scale, whatever the pipeline's own.

    Args:
        scale: w of ``u + w (c - u)``.
    """

    combines = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns ``u + w (c - u)``."""
        return (cond if uncond is None else uncond + self.scale * (cond - uncond)), dict(state)


class Snapshot(Part):
    """Keeps a copy of the pipeline's scheduler as it is before the first step of a run."""

    scheduler: Any = None

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Copies the scheduler, without what is attached to it."""
        self.scheduler = _copied(run.pipe.scheduler)


@dataclass
class Rollout:
    """A recorded batch, to run again with other guidance through the same scheduler.

    Attributes:
        call: the network as it was called.
        scheduler: at the start of the run.
        timesteps: of the N evaluations.
        start: the sample before the first, (B, ...).
        target: the sample after the last, with full guidance, (B, ...).
        scaled: whether ``call`` scales the network's input itself.
    """

    call: DenoiserCall
    scheduler: Any
    timesteps: list[Any]
    start: Tensor
    target: Tensor
    scaled: bool
    base: float = 0.0

    @classmethod
    def of(cls, run: Trajectory, scheduler: Any, scale: float) -> Rollout:  # noqa: ANN401
        """Prepares a run with full guidance, recorded with "state".

        Args:
            run: the run.
            scheduler: a copy made at its start.
            scale: guidance scale of the run.

        Raises:
            ValueError: where the run cannot be repeated, or guidance changes nothing.
        """
        call, name = run.denoiser(), run.identity["pipeline"]
        device = next(call.network.parameters()).device
        count = len(run.timesteps)
        path = None if run._level is None else run._level.path.name
        made = cls(
            call,
            scheduler,
            list(scheduler.timesteps)[-count:],
            run.states[0].to(device),
            run.states[-1].to(device),
            path == "edm",
        )
        if not scale > 0 or "uncond" not in call.roles:
            raise ValueError(f"{name} was recorded without guidance; pass a guidance_scale above 1 in call")
        with torch.no_grad():
            again, plain = made([scale] * count), made(["cond"] * count)
        made.base = float((plain - made.target).float().square().mean())
        if not made.base > 0:
            raise ValueError(
                f"guidance at scale {scale} changes nothing in {name}; use guidance_scale=1, which needs no policy"
            )
        if not float((again - made.target).float().square().mean()) <= _REPEATS * made.base:
            raise ValueError(
                f"{name} does not end where it did when its network and scheduler are run again, so gradients would be "
                "of another run; use a deterministic solver, without masks, callbacks or a rescaled guidance"
            )
        return made

    def __call__(self, weights: Sequence[Option | Tensor]) -> Tensor:
        """Runs the batch.

        Args:
            weights: for each evaluation an option, or a guidance scale as a tensor, through which gradients go.

        Returns:
            The last sample, (B, ...).
        """
        scheduler, x = _copied(self.scheduler), self.start
        for weight, t in zip(weights, self.timesteps, strict=True):
            own = x if self.scaled or not hasattr(scheduler, "scale_model_input") else scheduler.scale_model_input(x, t)
            if isinstance(weight, Tensor):  # keeps one evaluation in memory, whatever their number
                output = checkpoint(self._output, own, float(t), weight, use_reentrant=False)
            else:
                output = self._output(own, float(t), weight)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def distance(self, weights: Sequence[Option | Tensor]) -> Tensor:
        """Returns the mean squared distance from full guidance at the end, as a part of that without guidance."""
        return (self(weights) - self.target).float().square().mean() / self.base

    def _output(self, x: Tensor, t: float, weight: Option | Tensor) -> Tensor:
        if isinstance(weight, str):
            return self.call(x, t, rows=weight)
        cond, uncond = self.call(x, t, rows="cond"), self.call(x, t, rows="uncond")
        return uncond + weight * (cond - uncond)


def descend(
    rollouts: Sequence[Rollout],
    options: Sequence[Option],
    penalty: float,
    iterations: int,
    on_iteration: Callable[[], object] = lambda: None,
) -> list[Option]:
    """Finds a policy by gradient descent on the weights of a mixture.

    At evaluation t the prediction is ``sum_k softmax(a_t)_k F_k`` of the options' predictions F_k, and Adam minimises over a

        distance of the last samples + penalty * expected rows / rows of full guidance,

    one batch an iteration. Since every F_k is ``u + w_k (c - u)``, the mixture is guidance with the mean of the w_k.

    Args:
        rollouts: recorded batches with full guidance.
        options: to choose from at each evaluation.
        penalty: weight of the rows, >= 0.
        iterations: updates of a.
        on_iteration: called after each.

    Returns:
        The most likely option of each evaluation.
    """
    count, device = len(rollouts[0].timesteps), rollouts[0].start.device
    strengths = torch.tensor([strength(option) for option in options], device=device)
    costs = torch.tensor([rows([option]) for option in options], device=device) / 2.0
    logits = torch.zeros(count, len(options), device=device, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    with torch.enable_grad():
        for iteration in range(iterations):
            shares = logits.softmax(1)
            loss = rollouts[iteration % len(rollouts)].distance(list(shares @ strengths))
            loss = loss + penalty * (shares @ costs).mean()
            (logits.grad,) = torch.autograd.grad(loss, [logits])
            optimiser.step()
            on_iteration()
    return [options[k] for k in logits.argmax(1).tolist()]


def strength(option: Option) -> float:
    """Returns w of an option as ``u + w (c - u)``."""
    return {"uncond": 0.0, "cond": 1.0}[option] if isinstance(option, str) else option


def _copied(scheduler: Any) -> Any:  # noqa: ANN401
    return scheduler.fork() if isinstance(scheduler, TableScheduler) else copy.deepcopy(scheduler)

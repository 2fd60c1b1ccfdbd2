"""The search behind `PolicyGuidance`: full guidance imitated by a mixture of options at each evaluation, sharpened by gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowkit.hooks import DenoiserCall, Part, Trajectory
from flowkit.schedulers.base import TableScheduler

Option = str | float  # "cond", "uncond", or a guidance scale

_LEARNING_RATE = 0.1
_COLDEST = 0.05  # temperature of the last update
ROUNDS = 6  # descents of a search for a number of rows
# Of the squared distance between no and full guidance: rounding in half precision, far from other noise.
_REPEATS = 1e-3


def rows(options: Sequence[Option]) -> int:
    """Returns the network rows that a sample costs: two for a guidance scale, one otherwise."""
    return sum(1 if isinstance(option, str) else 2 for option in options)


class Snapshot(Part):
    """Keeps a copy of the pipeline's scheduler as it is before the first step of a run.

    Attributes:
        scheduler: the copy, without what is attached to the original.
        edm: whether it scales the network's input on the EDM path, as a repeated call does too.
    """

    scheduler: Any = None
    edm: bool = False

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Copies the scheduler."""
        self.scheduler = _copied(run.pipe.scheduler)
        self.edm = run.clock.path is not None and run.clock.path.name == "edm"


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
        scale: guidance scale of that.
        base: mean squared distance of ``target`` from the last sample without guidance.
    """

    call: DenoiserCall
    scheduler: Any
    timesteps: list[Any]
    start: Tensor
    target: Tensor
    scaled: bool
    scale: float
    base: float = 0.0

    @classmethod
    def of(cls, run: Trajectory, snapshot: Snapshot, scale: float) -> Rollout:
        """Prepares a run with full guidance, recorded with "state".

        Args:
            run: the run.
            snapshot: of its start.
            scale: guidance scale of the run.

        Raises:
            ValueError: where the run cannot be repeated, or guidance changes nothing.
        """
        call, name = run.denoiser(), run.identity["pipeline"]
        device = next(call.network.parameters()).device
        count = len(run.timesteps)
        times, (start, target) = (
            list(snapshot.scheduler.timesteps)[-count:],
            (run.states[i].to(device) for i in (0, -1)),
        )
        made = cls(call, snapshot.scheduler, times, start, target, snapshot.edm, scale)
        with torch.no_grad():
            again, plain = made([scale] * count), made(["cond"] * count)
        made.base = float(_distance(plain, made.target))
        if not made.base > 0:
            raise ValueError(
                f"guidance at scale {scale} changes nothing in {name}; use guidance_scale=1, which needs no policy"
            )
        if not float(_distance(again, made.target)) <= _REPEATS * made.base:
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
        return _distance(self(weights), self.target) / self.base

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

    At evaluation t the prediction is ``sum_k softmax(a_t / T)_k F_k`` of the options' predictions F_k, and Adam minimises over a

        distance of the last samples + penalty * expected rows / rows of full guidance,

    one batch an iteration. Since every F_k is ``u + w_k (c - u)``, the mixture is guidance with the mean of the w_k. The
    temperature T falls from 1, so that in the end one option acts: otherwise the mixture imitates full guidance, and its likeliest
    options do not.

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
            shares = (logits / _COLDEST ** (iteration / iterations)).softmax(1)
            loss = rollouts[iteration % len(rollouts)].distance(list(shares @ strengths))
            loss = loss + penalty * (shares @ costs).mean()
            (logits.grad,) = torch.autograd.grad(loss, [logits])
            optimiser.step()
            on_iteration()
    return [options[k] for k in logits.argmax(1).tolist()]


def refine(
    rollouts: Sequence[Rollout],
    options: Sequence[Option],
    found: Sequence[Option],
    penalty: float,
    on_evaluation: Callable[[], object] = lambda: None,
) -> list[Option]:
    """Improves a policy option by option: each evaluation in turn takes the option that makes the objective of `descend` least.

    The likeliest options of a mixture need not go together. Where full guidance, cut off anywhere, is better, it begins with that.
    It takes a run of every batch for each evaluation and option.

    Args:
        rollouts: recorded batches with full guidance.
        options: to choose from.
        found: the policy to begin with.
        penalty: weight of the rows.
        on_evaluation: called after each evaluation.

    Returns:
        A policy that is no worse, by distance and rows on these batches.
    """

    def objective(policy: Sequence[Option]) -> float:
        return missed(rollouts, policy) + penalty * rows(policy) / (2 * len(policy))

    starts, scale = [list(found)], rollouts[0].scale
    if scale in options:
        starts += [[*[scale] * k, *["cond"] * (len(found) - k)] for k in range(len(found) + 1)]
    least, best = min(((objective(start), start) for start in starts), key=lambda entry: entry[0])
    for k in range(len(best)):
        for option in options:
            trial = [*best[:k], option, *best[k + 1 :]]
            if option != best[k] and (value := objective(trial)) < least:
                best, least = trial, value
        on_evaluation()
    return best


def within(
    rollouts: Sequence[Rollout],
    options: Sequence[Option],
    most: int,
    iterations: int,
    on_iteration: Callable[[], object] = lambda: None,
) -> tuple[list[Option], float]:
    """Finds a policy of at most so many rows: bisects the penalty of `descend` and `refine` in its logarithm.

    Args:
        rollouts: recorded batches with full guidance.
        options: to choose from, "cond" among them.
        most: rows a sample, at least one an evaluation.
        iterations: updates of each descent.
        on_iteration: called after each, and after each evaluation of `refine`.

    Returns:
        The policy of least distance among those found that cost no more, and its penalty.
    """
    low, high, penalty = 0.0, math.inf, 0.1
    best: tuple[float, list[Option], float] = (math.inf, ["cond"] * len(rollouts[0].timesteps), math.inf)
    for _ in range(ROUNDS):
        found = descend(rollouts, options, penalty, iterations, on_iteration)
        found = refine(rollouts, options, found, penalty, on_iteration)
        if rows(found) <= most:
            best, high = min(best, (missed(rollouts, found), found, penalty), key=lambda entry: entry[0]), penalty
            if rows(found) == most:
                break
        else:
            low = penalty
        penalty = math.sqrt(low * high) if low and high < math.inf else penalty * 4 if high == math.inf else penalty / 4
    return best[1], best[2]


def missed(rollouts: Sequence[Rollout], options: Sequence[Option]) -> float:
    """Returns a policy's squared distance from full guidance at the end, as a part of that without guidance, over all batches."""
    with torch.no_grad():
        errors = [(float(r.distance(options)) * r.base * len(r.start), r.base * len(r.start)) for r in rollouts]
    return sum(e for e, _ in errors) / sum(b for _, b in errors)


def strength(option: Option) -> float:
    """Returns w of an option as ``u + w (c - u)``."""
    return {"uncond": 0.0, "cond": 1.0}[option] if isinstance(option, str) else option


def _distance(x: Tensor, other: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - other.to(wide)).square().mean()


def _copied(scheduler: Any) -> Any:  # noqa: ANN401
    return scheduler.fork() if isinstance(scheduler, TableScheduler) else copy.deepcopy(scheduler)

"""Recording a pipeline at ``scheduler.step``, the one point that every diffusers pipeline passes, guidance done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkit.schedulers import RectifiedFlowScheduler


@dataclass
class Trajectory:
    """One call of a pipeline, on the CPU.

    Attributes:
        states: the sample before each of N steps and after the last, N + 1 tensors (B, ...).
        outputs: the network's output at each step after guidance, without the channels of a learned variance, N tensors.
    """

    states: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def recording(
    pipe: Any,  # noqa: ANN401
    scheduler: RectifiedFlowScheduler,
    on_step: Callable[[int], None] = lambda rows: None,
) -> Iterator[Callable[[], Trajectory]]:
    """Puts a scheduler into a pipeline and records its steps; the pipeline's own is back afterwards, after an error too.

    Args:
        pipe: any diffusers pipeline.
        scheduler: the one to run; it is forked, not changed.
        on_step: called after each step with the number of samples in the batch.

    Yields:
        A function that returns what was recorded since its last call.

    Raises:
        ValueError: while the pipeline runs, if it changes the sample between two steps.
    """
    before, fork, current = pipe.scheduler, scheduler.fork(), Trajectory()
    step, result = fork.step, torch.empty(0)

    @functools.wraps(step)  # pipelines look for "eta" and "generator" in the signature
    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal result
        done = len(current.outputs)
        if done and not torch.equal(result.to(sample), sample):
            raise ValueError(f"{type(pipe).__name__} changes the sample after step {done}, so its states are not one "
                             "trajectory of the solver; leave out what does it (a mask, a callback)")  # fmt: skip
        output = step(model_output, timestep, sample, *args, **kwargs)
        result = output[0]
        current.states += [_kept(result)] if done else [_kept(sample), _kept(result)]
        current.outputs.append(_kept(model_output[:, : sample.shape[1]]))
        on_step(len(sample))
        return output

    def take() -> Trajectory:
        nonlocal current
        taken, current = current, Trajectory()
        return taken

    fork.step = recorded  # type: ignore[method-assign]
    pipe.scheduler = fork
    try:
        yield take
    finally:
        pipe.scheduler = before


def _kept(x: Tensor) -> Tensor:
    """A copy that no later step of the pipeline writes into."""
    return x.detach().to("cpu", copy=True)

"""Running a pipeline under a scheduler of ours, guidance done, and recording it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from flowkit.hooks import Part, Recorder, Trajectory, attach
from flowkit.hooks.layout import networks
from flowkit.schedulers import RectifiedFlowScheduler


class _Counting(Recorder):
    """A recorder that tells of every step."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        super().__init__("state", "output", limit=sys.maxsize)  # what is taken in time needs no bound
        self._on_step = on_step

    def after_step(self, run: Any, sample: Tensor) -> None:  # noqa: ANN401
        super().after_step(run, sample)
        self._on_step(len(sample))


class _Last(Part):
    """Keeps the latest sample, and counts the steps."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step, self._count = on_step, 0
        self._sample: Tensor | None = None

    def begin(self, run: Any) -> None:  # noqa: ANN401
        self._count = 0

    def after_step(self, run: Any, sample: Tensor) -> None:  # noqa: ANN401
        self._sample = sample if run.step is None else sample[: run.step.size]
        self._count += 1
        self._on_step(len(sample))

    def take(self) -> tuple[Tensor, int]:
        sample, self._sample = self._sample, None
        assert sample is not None
        return sample.detach().cpu(), self._count


class _Reached(Exception):
    """Ends a run of the pipeline before its first step."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class _First(Part):
    def before_step(self, run: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:  # noqa: ANN401
        raise _Reached(sample)


@contextmanager
def under(pipe: Any, scheduler: RectifiedFlowScheduler | None, *parts: Part) -> Iterator[None]:  # noqa: ANN401
    """Puts a scheduler and parts into a pipeline; the pipeline's own is back afterwards, after an error too.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes.
        scheduler: the one to run; it is forked, not changed. None means the pipeline's own.
        *parts: to attach.
    """
    before = pipe.scheduler
    # A pipeline that swaps attention for a call (PAG) does not put it back where the call ends early.
    swapped: list[Any] = [net for net in networks(pipe) if hasattr(net, "attn_processors")]
    attention = [(net, dict(net.attn_processors)) for net in swapped]
    if scheduler is not None:
        pipe.scheduler = scheduler.fork()
    try:
        with attach(pipe, *parts):
            yield
    finally:
        pipe.scheduler = before
        for net, processors in attention:
            if net.attn_processors != processors:
                net.set_attn_processor(processors)


@contextmanager
def recording(
    pipe: Any,  # noqa: ANN401
    scheduler: RectifiedFlowScheduler,
    on_step: Callable[[int], None] = lambda rows: None,
) -> Iterator[Callable[[], Trajectory]]:
    """Runs a pipeline under a scheduler, see `under`, and records it.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes.
        scheduler: the one to run; it is forked, not changed.
        on_step: called after each step with the number of samples in the batch.

    Yields:
        A function that returns what was recorded since its last call, states and outputs of one run of the pipeline.

    Raises:
        ValueError: from that function, where the pipeline changed the sample between two steps.
    """
    recorder = _Counting(on_step)

    def take() -> Trajectory:
        (run,) = recorder.take()
        if run.edited:
            raise ValueError(f"{type(pipe).__name__} changes the sample after step {run.edited[0]}, so its states are not one "
                             "trajectory of the solver; leave out what does it (a mask, a callback)")  # fmt: skip
        return run

    with under(pipe, scheduler, recorder):
        yield take


@contextmanager
def ending(
    pipe: Any,  # noqa: ANN401
    scheduler: RectifiedFlowScheduler | None,
    on_step: Callable[[int], None] = lambda rows: None,
) -> Iterator[Callable[[], tuple[Tensor, int]]]:
    """Runs a pipeline under a scheduler, see `under`, and keeps where it ends.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes.
        scheduler: the one to run; it is forked, not changed. None means the pipeline's own.
        on_step: called after each step with the number of samples in the batch.

    Yields:
        A function that returns the last sample, (B, ...) on the CPU, and the number of steps of the latest run.
    """
    last = _Last(on_step)
    with under(pipe, scheduler, last):
        yield last.take


def first_sample(pipe: Any, scheduler: RectifiedFlowScheduler, draw: Callable[[], object]) -> Tensor:  # noqa: ANN401
    """Returns the sample of a run before its first step, at the cost of one network evaluation.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes.
        scheduler: the one to run; it is forked, not changed.
        draw: calls the pipeline.

    Raises:
        ValueError: where it takes no step.
    """
    try:
        with under(pipe, scheduler, _First()):
            draw()
    except _Reached as reached:
        return reached.sample
    raise ValueError(f"{type(pipe).__name__} made a sample without a step of its scheduler; give it at least one step")

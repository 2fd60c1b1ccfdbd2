"""Recording runs of a pipeline under a scheduler of ours, guidance done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from flowkit.hooks import Recorder, Trajectory, attach
from flowkit.schedulers import RectifiedFlowScheduler


class _Counting(Recorder):
    """A recorder that tells of every step."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        super().__init__("state", "output", limit=sys.maxsize)  # what is taken in time needs no bound
        self._on_step = on_step

    def after_step(self, run: Any, sample: Tensor) -> None:  # noqa: ANN401
        super().after_step(run, sample)
        self._on_step(len(sample))


@contextmanager
def recording(
    pipe: Any,  # noqa: ANN401
    scheduler: RectifiedFlowScheduler,
    on_step: Callable[[int], None] = lambda rows: None,
) -> Iterator[Callable[[], Trajectory]]:
    """Puts a scheduler into a pipeline and records it; the pipeline's own is back afterwards, after an error too.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes.
        scheduler: the one to run; it is forked, not changed.
        on_step: called after each step with the number of samples in the batch.

    Yields:
        A function that returns what was recorded since its last call, states and outputs of one run of the pipeline.

    Raises:
        ValueError: from that function, where the pipeline changed the sample between two steps.
    """
    before, recorder = pipe.scheduler, _Counting(on_step)

    def take() -> Trajectory:
        (run,) = recorder.take()
        if run.edited:
            raise ValueError(f"{type(pipe).__name__} changes the sample after step {run.edited[0]}, so its states are not one "
                             "trajectory of the solver; leave out what does it (a mask, a callback)")  # fmt: skip
        return run

    pipe.scheduler = scheduler.fork()
    try:
        with attach(pipe, recorder):
            yield take
    finally:
        pipe.scheduler = before

"""Experiment trackers of a sweep, such as TensorBoard, through accelerate."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from accelerate import Accelerator  # type: ignore[import-untyped]

from flowkit.eval.sweep.config import SweepConfig
from flowkit.eval.sweep.study import Claim

FOLDER = "trackers"


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers that a sweep names; each worker is a run of its own, and a cell a step of it.

    Args:
        config: the sweep.
        output: its folder, where trackers that write files do so.

    Raises:
        ImportError: for one that is not installed.
    """

    def __init__(self, config: SweepConfig, output: Path) -> None:
        self._accelerator: Accelerator | None = None
        if not config.trackers:
            return
        accelerator = Accelerator(log_with=config.trackers, project_dir=str(output / FOLDER))
        there = [str(name) for name in accelerator.log_with]
        if absent := [name for name in config.trackers if name not in there]:
            raise ImportError(f"the tracker {absent[0]!r} is not installed: pip install {absent[0]}")
        accelerator.init_trackers(f"{config.name}-{socket.gethostname()}-{os.getpid()}")
        self._accelerator = accelerator

    def log(self, claim: Claim, values: Mapping[str, float]) -> None:
        """Notes the figures of a cell."""
        if self._accelerator is not None:
            self._accelerator.log({**values, "cell": claim.cell.name}, step=claim.slot)

    def __exit__(self, *_: object) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()

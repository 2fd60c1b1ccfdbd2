"""The processes of one evaluation: started by accelerate or torchrun, joined by torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState  # type: ignore[import-untyped]

_Result = TypeVar("_Result")


class PeerError(RuntimeError):
    """Another process of the evaluation failed, and says why itself."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the evaluation.

    Attributes:
        rank: its number, from 0, the main one.
        count: how many there are (the world size).
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Returns the processes that a launcher started together with this one, connected: gloo on CPUs, nccl on GPUs.

        Args:
            device: where this process computes.
        """
        launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if launched and not dist.is_initialized():
            # A process may wait long for the others' last blocks.
            PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def main(self) -> bool:
        """Whether this process prints, measures and writes the result."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Returns the values of all processes, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def share(self, value: _Result) -> _Result:
        """Returns the main process's value."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.gather(None)

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Does work in all processes; where it fails in any, it fails in all.

        Raises:
            PeerError: where it failed in another process only.
            Exception: what it raised in this one.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failures = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if error is not None:
            raise error
        if failures:
            raise PeerError(f"another process failed: {failures[0]}")
        return cast(_Result, result)

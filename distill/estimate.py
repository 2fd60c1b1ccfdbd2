"""What a training will take, before it starts: time, memory and disk.

Time is measured on what will be done again and again: one update, one call of the teacher. Memory is what training keeps of each
parameter (the weight; of a trained one also its gradient, AdamW's two moments and each average) and, where CUDA tells, what an
update needs beside that. The disk holds the pairs, two checkpoints (a new one is written before the old one goes), the snapshots
of averages and the student.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowkit.progress import duration

_MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    Attributes:
        drawing: seconds for the teacher's samples.
        training: seconds for the updates; looks at the student in between are not counted.
        updates: their number.
        memory: bytes on the device of one process, unsharded.
        activations: bytes of ``memory`` beside the parameters and what belongs to them; None where they are not known.
        disk: bytes in the end.
    """

    drawing: float
    training: float
    updates: int
    memory: int
    activations: int | None
    disk: int

    @classmethod
    def measure(
        cls,
        network: nn.Module,
        update: Callable[[], object],
        updates: int,
        draw: Callable[[], object] | None = None,
        draws: int = 0,
        *,
        averages: int = 1,
        snapshots: int = 0,
        pairs: int = 0,
        student: int = 0,
    ) -> Estimate:
        """Measures an update and a call of the teacher.

        Args:
            network: the student; parameters that require a gradient are trained.
            update: computes the loss of one update and its gradient; it is called twice, and the gradients are forgotten.
            updates: number of updates still to do.
            draw: one call of the teacher; it is called twice. None where nothing is drawn.
            draws: number of such calls still to do, by this process.
            averages: number of averages of the trained weights, the result and each profile.
            snapshots: number of averages of the trained weights that are kept on the disk.
            pairs: bytes of the recorded samples.
            student: bytes of the student's folder, see `weights_of`; of a LoRA those of the adapters.
        """
        trained = [p for p in network.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        device = next(network.parameters()).device
        seconds, activations = _timed(update, device) if updates else (0.0, None)
        network.zero_grad(set_to_none=True)
        drawing = _timed(draw, device)[0] if draw is not None and draws else 0.0
        wide = sum(p.numel() * 4 for p in trained)  # averages are float32
        held = weights_of(network) + (1 + _MOMENTS) * gradients + averages * wide
        checkpoint = (1 + _MOMENTS) * gradients + averages * wide
        own = None if activations is None else max(0, activations - gradients)
        return cls(
            drawing=drawing * draws,
            training=seconds * updates,
            updates=updates,
            memory=held + (own or 0),
            activations=own,
            disk=pairs + 2 * checkpoint + snapshots * wide + student,
        )

    def line(self) -> str:
        """Returns the estimate for people."""
        parts = [f"{duration(self.drawing)} for the teacher's samples"] if self.drawing else []
        parts.append(f"{duration(self.training)} for {self.updates:,} updates")
        least = "at least " if self.activations is None else ""
        return f"about {' and '.join(parts)}; {least}{size(self.memory)} of memory, {size(self.disk)} of disk"

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for JSON: seconds and bytes."""
        return asdict(self)

    def check(self, folder: Path, device: torch.device) -> None:
        """Refuses a disk without room, and warns of too little memory.

        Args:
            folder: of the run, there or not; what it holds already is not needed again.
            device: that trains.

        Raises:
            OSError: for a disk without room.
        """
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        place = folder
        while not place.exists() and place != place.parent:
            place = place.parent
        needed, free = max(0, self.disk - held), shutil.disk_usage(place).free
        if needed > free:
            raise OSError(f"the run takes {size(needed)} more on the disk, and {folder} has {size(free)} left; choose another "
                          "folder, fewer samples or fewer snapshots, or train a LoRA")  # fmt: skip
        there = machine_memory(device)
        if there is not None and self.memory > there:
            warnings.warn(f"the training takes {size(self.memory)} of memory, and {device} has {size(there)}; train a LoRA, or "
                          "share the network over processes (FSDP), with checkpointing, accumulate or a smaller batch",
                          stacklevel=2)  # fmt: skip


def weights_of(*networks: nn.Module) -> int:
    """Returns the bytes of parameters and buffers of networks, each counted once."""
    tensors = {id(t): t for network in networks for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def machine_memory(device: torch.device) -> int | None:
    """Returns the bytes of memory of a GPU, or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def size(count: float) -> str:
    """Returns a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _timed(work: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Seconds of the faster of two calls, and on CUDA the most memory that they took beside what was there."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before, seconds = torch.cuda.memory_allocated(device) if cuda else 0, []
    for _ in range(2):
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds), torch.cuda.max_memory_allocated(device) - before if cuda else None

"""How a network is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # type: ignore[import-untyped]

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Training:
    """The settings of a training.

    Attributes:
        steps: number of updates, >= 1.
        batch_size: rows of an update, over all processes and accumulated parts.
        learning_rate: highest rate of AdamW, > 0.
        warmup: share of the steps in which the rate rises from 0, in [0, 1].
        final: share of the highest rate that the cosine ends at, in [0, 1]; 1 keeps the rate.
        betas: of AdamW, each in [0, 1).
        weight_decay: of AdamW, >= 0.
        clip: largest norm of the gradient, > 0.
        ema: decay of the averaged weights, the result, in [0, 1); ``min(ema, (1 + n) / (10 + n))`` after n steps.
        profiles: relative lengths sigma_rel of power-function averages that are kept beside (Karras et al. 2024, arXiv
            2312.02696, section 3), each in (0, 0.28); any other can be put together from their snapshots afterwards.
        snapshots: how many of them are kept over the training, >= 1.
        precision: "no" (float32), "bf16" or "fp16" of the network's arithmetic; weights and their averages stay float32.
        accumulate: parts that each process takes its rows in, one after the other, >= 1: less memory, the same update.
        checkpointing: recompute activations in the backward pass: less memory, a third more time.
        every: updates between two looks at the student (pictures, distances), >= 1; 0 means at the end alone.
        tracker: of accelerate, such as "tensorboard" or "wandb"; None tracks nothing.

    Raises:
        ValueError: for a number out of range, quoting it.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99
    profiles: tuple[float, ...] = ()
    snapshots: int = 16
    precision: str = "no"
    accumulate: int = 1
    checkpointing: bool = False
    every: int = 0
    tracker: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("snapshots", 1), ("accumulate", 1), ("every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {value!r}; leave it out for the default"
                )
        for name in ("betas", "profiles"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or (name == "betas" and len(value) != 2):
                raise ValueError(f"{name} must be {'two numbers' if name == 'betas' else 'a list of numbers'}, got {value!r}; "
                                 "leave it out for the default")  # fmt: skip
        ranges = {
            "learning_rate": (0, math.inf, False), "clip": (0, math.inf, False), "weight_decay": (0, math.inf, True),
            "warmup": (0, 1, True), "final": (0, 1, True), "ema": (0, 1, True),
        }  # fmt: skip
        numbers = [(name, getattr(self, name), *span) for name, span in ranges.items()]
        numbers += [("betas", value, 0, 1, True) for value in self.betas]
        numbers += [("profiles", value, 0, 0.28, False) for value in self.profiles]
        for name, value, low, high, closed in numbers:
            real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            ends_at_1 = name in ("warmup", "final")
            if (
                not real
                or not (low < value or (closed and value == low))
                or not (value < high or (ends_at_1 and value == high))
            ):
                left, right = "[" if closed else "(", "]" if ends_at_1 else ")"
                raise ValueError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}; leave it out for the "
                                 "default")  # fmt: skip
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; choose {', '.join(PRECISIONS)}")

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, which depends on nothing else."""
        rise = min(1.0, (step + 1) / max(self.warmup * self.steps, 1.0))
        decay = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * rise * (self.final + (1 - self.final) * decay)

    def plain(self) -> dict[str, Any]:
        """Returns the settings in JSON's terms."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def result(self) -> dict[str, Any]:
        """Returns the settings that the trained weights depend on: a stopped training goes on only with the same."""
        return {k: v for k, v in self.plain().items() if k not in ("every", "tracker", "accumulate", "checkpointing")}

    def check_parts(self, processes: int) -> None:
        """Refuses a batch that processes cannot share evenly.

        Raises:
            ValueError: for it.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(f"a batch of {self.batch_size} rows cannot be cut into {parts} even parts ({processes} processes, "
                             f"accumulate={self.accumulate}); choose a multiple")  # fmt: skip

    def parts(self, processes: int, rank: int) -> list[range]:
        """Returns the rows of the global batch that one of so many processes takes, part by part."""
        size, first = self.batch_size // (processes * self.accumulate), rank * self.accumulate
        return [range((first + k) * size, (first + k + 1) * size) for k in range(self.accumulate)]

    def check_tracker(self) -> None:
        """Refuses a tracker that cannot be used.

        Raises:
            ValueError: for an unknown one.
            ImportError: for one that is not installed.
        """
        if self.tracker not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise ValueError(f"unknown tracker {self.tracker!r}; choose {known}")
        if self.tracker not in {str(getattr(name, "value", name)) for name in get_available_trackers()}:
            raise ImportError(f"the tracker {self.tracker} is not installed; pip install {self.tracker}")

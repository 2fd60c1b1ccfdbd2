"""One evaluation of a run, as the hooks see it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowkit.hooks.arguments import Arguments
from flowkit.hooks.parts import Evaluation


@dataclass
class Step:
    """The network calls between two calls of ``scheduler.step``.

    Attributes:
        evaluation: what parts are told of it.
        sigma: its level in the convention of diffusers' ``sigmas``.
        network: the module that was called.
        time: the model's time that it was told.
        calls: its arguments for the "cond" rows and, as far as the pipeline has them, for the "uncond" rows.
        plan: what the guidance asked for: "both", "cond", "uncond", or which samples need the unconditional output.
        cond: the network's conditional output, (B, C, ...); None where it was not run.
        uncond: its unconditional output; None where it was not run for every sample.
        rows: network rows run.
        asked: network rows that the pipeline asked for.
        report: figures of the guidance method.
    """

    evaluation: Evaluation
    sigma: float
    network: Any = None
    time: Any = None
    calls: dict[str, Arguments] = field(default_factory=dict)
    plan: str | list[bool] = "both"
    cond: Tensor | None = None
    uncond: Tensor | None = None
    rows: int = 0
    asked: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    # The halves that the pipeline sees; the second is None until there is one.
    seen: tuple[Tensor, Tensor | None] | None = None
    # What was added to every output, and by how much the conditional one differs from the network's in all.
    edit: Tensor | None = None
    shift: Tensor | None = None
    # Of two calls: what the first returned, and what the second is to return without being run.
    first: Any = None
    finished: Tensor | None = None
    passes: int = 0
    # Whether the pipeline adds a term of its own to what it combines.
    extra: bool = False

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.evaluation.x)

    def without_tensors(self) -> Step:
        """Returns what a report needs."""
        bare = replace(self.evaluation, x=torch.empty(0), conditioning={})
        return Step(bare, self.sigma, plan=self.plan, rows=self.rows, asked=self.asked, report=self.report)

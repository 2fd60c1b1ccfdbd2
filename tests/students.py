"""Small teachers, and what a short distillation takes."""

from __future__ import annotations

from typing import Any

import torch

from flowkit import ClassConditionalPipeline, MixtureDenoiser, RectifiedFlowScheduler

from .tiny_parts import grey

SMALL: dict[str, Any] = {"samples": 20, "steps": 6, "batch_size": 8, "progress": False}


def tiny(classes: int | None = 4, seed: int = 0) -> ClassConditionalPipeline:
    return ClassConditionalPipeline(grey(classes, seed), RectifiedFlowScheduler())


def weightless() -> ClassConditionalPipeline:
    model = MixtureDenoiser.of(torch.zeros(2, 1, 8, 8), 0.5, labels=torch.tensor([0, 1]))
    return ClassConditionalPipeline(model, RectifiedFlowScheduler())

"""Pipelines around exact networks: what a search or a distillation is measured against has no error of its own."""

from __future__ import annotations

import math

import torch

from flowkit import ClassConditionalPipeline, MixtureDenoiser, RectifiedFlowScheduler


def gaussian(std: float = 0.5, solver: str = "euler") -> ClassConditionalPipeline:
    """One-dimensional Gaussian data on the flow path: x_s = sqrt((1 - s)^2 std^2 + s^2) z, so samples are std times the noise."""
    network = MixtureDenoiser.of(torch.zeros(1, 1, 1, 1), std)
    return _quiet(ClassConditionalPipeline(network, RectifiedFlowScheduler(solver=solver)))


def ring(solver: str = "euler") -> ClassConditionalPipeline:
    """Eight narrow Gaussians on a circle in the plane, on the flow path."""
    angle = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angle.cos(), angle.sin()], 1)[:, :, None, None]
    return _quiet(ClassConditionalPipeline(MixtureDenoiser.of(means, 0.15), RectifiedFlowScheduler(solver=solver)))


def planes(solver: str = "euler") -> ClassConditionalPipeline:
    """Three flat Gaussians in 16 dimensions on the VP path of Stable Diffusion, predicting eps."""
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(3, 1, 4, 4, generator=draw)
    std = torch.rand(3, 1, 4, 4, generator=draw).square() + 0.02
    scheduler = RectifiedFlowScheduler(
        path="vp", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver=solver
    )
    return _quiet(ClassConditionalPipeline(MixtureDenoiser.of(means, std, path="vp"), scheduler))


def _quiet(pipe: ClassConditionalPipeline) -> ClassConditionalPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe

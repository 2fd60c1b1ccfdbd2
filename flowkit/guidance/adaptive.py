"""Adaptive guidance: drop the unconditional pass where it no longer tells anything."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowkit.guidance.checks import finite
from flowkit.hooks.parts import Guidance, Plan, State, check_space, reported, to_space


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of the angle between two batches of samples, ``<a, b> / (|a| |b|)``.

    Args:
        a: shape (B, ...).
        b: same shape.

    Returns:
        Shape (B,), in at least float32, within [-1, 1]; 0 where either is zero.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.flatten(1).to(wide), b.flatten(1).to(wide)
    norms = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(wide).tiny)
    result: Tensor = (a * b).sum(1) / norms
    return result.clamp(-1, 1)


class AdaptiveGuidance(Guidance):
    """Adaptive guidance (AG): guidance until the two outputs agree (Castillo et al. 2023, arXiv 2312.12487).

    With the conditional output c and the unconditional u, flattened for each sample,

        gamma = <c, u> / (|c| |u|);

    from the evaluation after the first one with ``gamma >= threshold`` on, the sample needs no unconditional pass, for good, and
    c takes the place of u. Until then nothing is changed, so the result is bit-equal to plain guidance up to there. A negative
    prompt has no effect after the cut.

    Gamma depends on the space: a threshold found for one does not hold in another, nor for another model.

    Args:
        threshold: any real number; above 1 nothing is ever cut, below -1 everything after the first evaluation.
        space: where gamma is measured, "model" (the network's output as it is), "x0", "eps" or "velocity".
        per_sample: whether each sample is cut for itself; False cuts the whole batch when its least gamma reaches the threshold,
            which keeps all calls of the network at one of two batch sizes.

    Raises:
        TypeError: for a threshold that is not one number.
        ValueError: for a threshold that is not finite, or an unknown space.
    """

    def __init__(self, threshold: float = 0.991, space: str = "x0", per_sample: bool = True) -> None:
        self.threshold = finite("threshold", threshold, "a cosine such as 0.991 cuts late, 2 never")
        self.space = check_space(space)
        self.per_sample = bool(per_sample)

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "both" while nothing is cut, then a bool tensor (B,) on the CPU, true where it is not, "cond" when all are."""
        guided: Tensor | None = state.get("guided")
        if guided is None or guided.all():
            return "both"
        return guided if guided.any() else "cond"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Returns the outputs as they are, c for u where u is None, and latches the samples that reached the threshold.

        The state gets ``guided``, a bool tensor (B,) on the CPU: which samples need another unconditional pass. The report has
        ``cosine``, (B,), NaN for the samples that were cut before.
        """
        if uncond is None:
            return (cond, cond), reported(state, cosine=torch.full((len(cond),), math.nan))
        gamma = cosine(to_space(cond, self.space, state), to_space(uncond, self.space, state))
        # One transfer a step, and none once all samples are cut; the plan needs the numbers on the host.
        gamma = gamma.detach().cpu()
        guided: Tensor = state.get("guided", torch.ones(len(cond), dtype=torch.bool))
        # In float64: a threshold just above 1 must not be rounded to it.
        left = ~(gamma.double() >= self.threshold)
        if not self.per_sample:
            left = left.any().expand_as(left)
        shown = gamma.masked_fill(~guided, math.nan)
        return (cond, uncond), reported({**state, "guided": guided & left}, cosine=shown)

"""What a pipeline makes of the two halves of a prediction, seen at ``scheduler.step``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CLOSE = 0.05  # of the norm: far above what conversions there and back cost in bfloat16, far below another prediction


@dataclass(frozen=True)
class Use:
    """How a pipeline uses a prediction.

    Attributes:
        sign: -1 where it negates it, 1 where it does not; None where that cannot be told.
        scale: w of its ``u + w (c - u)``; None where that cannot be told.
    """

    sign: int | None = None
    scale: float | None = None


def learned(output: Tensor, cond: Tensor, uncond: Tensor | None) -> Use | None:
    """Returns how the scheduler's model output comes from the halves.

    Args:
        output: what ``scheduler.step`` was given.
        cond: the conditional half that the pipeline was given.
        uncond: the unconditional one; None where there is none. Where they differ, w is fitted by least squares.

    Returns:
        What could be told: nothing of an output that fits with both signs, such as zero; None where the halves are one prediction
        and the output is not that, nor a rearrangement of it.
    """
    ours = aligned(cond, output)
    theirs = None if ours is None else aligned(output, ours)
    equal = uncond is None or uncond is cond or torch.equal(cond, uncond)
    if ours is not None and theirs is not None:
        found, c = theirs.double(), ours.double()
        u = c if equal or uncond is None else _of(uncond, output)
        apart = c - u
        energy, close = float(apart.square().sum()), _CLOSE * float(found.norm())
        fits = []
        for sign in (1, -1):
            rest = sign * found - u
            scale = 0.0 if equal else float((rest * apart).sum()) / energy
            fits.append((float((rest - scale * apart).norm()), sign, None if equal else scale))
        if all(fit[0] <= close for fit in fits):
            return Use()  # the output is zero, or all on one line with it
        best = min(fits, key=lambda fit: fit[0])
        if best[0] <= close:
            return Use(*best[1:])
    if not equal:
        return Use()  # the pipeline may rescale what it combined
    # Unpacked, or without the frames that are given: the same numbers in another order.
    for sign in (1, -1):
        if bool(torch.isin(sign * output, cond.to(output.dtype)).float().mean() > 1 - _CLOSE):
            return Use(sign)
    return None


def _of(x: Tensor, like: Tensor) -> Tensor:
    part = aligned(x, like)
    return x.double() if part is None else part.double()


def aligned(x: Tensor, like: Tensor) -> Tensor | None:
    """Returns the part of a prediction that a pipeline hands on: first rows, channels or tokens, or another shape; or None."""
    if x.numel() == like.numel():
        return x.reshape(like.shape)
    if x.ndim == like.ndim:
        for axis, size in enumerate(like.shape):
            x = x.narrow(axis, 0, min(size, x.shape[axis]))
        return x
    return None

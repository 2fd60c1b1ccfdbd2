"""Adaptive projected guidance: without the part of the update that saturates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkit.guidance.checks import finite
from flowkit.hooks.parts import Guidance, Plan, State, check_space, column, from_space, reported, to_space


class ProjectedGuidance(Guidance):
    """Adaptive projected guidance (APG; Sadat et al. 2024, arXiv 2410.02416).

    With the conditional output c and the unconditional u in ``space``, all norms and products for each sample,

        d = c - u + momentum d_before,
        d <- d min(1, norm_threshold / |d|),
        d = d_par + d_orth,  d_par = <d, c> / |c|^2 c,
        D = c + (w - 1) (d_orth + eta d_par).

    This w is that of diffusers: ``eta=1`` without threshold and momentum is ``u + w (c - u)``. ``d_before`` is the d of the
    evaluation before it, with its own momentum, before it is rescaled.

    Args:
        scale: guidance scale w; 1 is the conditional output, without an unconditional pass.
        eta: weight of the part of d that is parallel to c, which mainly raises the saturation; the paper's is 0.
        norm_threshold: upper bound r of |d| in ``space``, > 0, for the whole flattened sample; None means none.
        momentum: in (-1, 1); the paper's are negative, such as -0.5, which lets new directions through and damps old ones.
        space: "x0", as in the paper; "model", "eps" or "velocity" give another method.

    Raises:
        TypeError: for arguments that are not numbers.
        ValueError: for numbers that are not finite, a threshold that is not positive, or a momentum that would build up.
    """

    combines = True

    def __init__(
        self,
        scale: float,
        eta: float = 0.0,
        norm_threshold: float | None = None,
        momentum: float = 0.0,
        space: str = "x0",
    ) -> None:
        self.scale = finite("scale", scale, "give a guidance scale such as 7.5")
        self.eta = finite("eta", eta, "give a weight such as 0; 1 is no projection")
        self.momentum = finite("momentum", momentum, "give a number such as -0.5, or 0 for none")
        self.norm_threshold = None
        if norm_threshold is not None:
            self.norm_threshold = finite("norm_threshold", norm_threshold, "give a norm, or None for no threshold")
            if not self.norm_threshold > 0:
                raise ValueError(
                    f"norm_threshold must be positive, got {self.norm_threshold:g}; use None for no threshold"
                )
        if not abs(self.momentum) < 1:
            raise ValueError(f"momentum must lie in (-1, 1), got {self.momentum:g}; the paper's are about -0.5")
        self.space = check_space(space)

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "both", or "cond" where ``scale`` is 1."""
        return "cond" if self.scale == 1 else "both"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns D; c where u is None. With momentum the state gets ``running``, this evaluation's d before it is rescaled."""
        if uncond is None:
            return cond, reported(state, scale=1.0)
        c = to_space(cond, self.space, state)
        wide = torch.promote_types(c.dtype, torch.float32)
        c = c.to(wide)
        d = c - to_space(uncond, self.space, state).to(wide)
        kept = dict(state)
        if self.momentum:
            if "running" in state:
                d = d + self.momentum * state["running"]
            kept["running"] = d
        tiny = torch.finfo(wide).tiny
        if self.norm_threshold is not None:
            norm = d.flatten(1).norm(dim=1).clamp_min(tiny)
            d = d * column((self.norm_threshold / norm).clamp_max(1), d)
        if self.eta != 1:
            # d_orth + eta d_par = d - (1 - eta) d_par; a unit vector, since |c|^2 may overflow or vanish where |c| does not.
            unit = c / column(c.flatten(1).norm(dim=1).clamp_min(tiny), c)
            d = d - (1 - self.eta) * column((d * unit).flatten(1).sum(1), d) * unit
        change = from_space((self.scale - 1) * d, self.space, state)
        return (cond.to(wide) + change).to(cond.dtype), reported(kept, scale=self.scale)

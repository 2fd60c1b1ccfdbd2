"""CFG-Zero*: guidance for flow models whose velocity is not exact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowkit.guidance.checks import finite
from flowkit.hooks.parts import Evaluation, Guidance, Plan, State, column, from_space, reported, to_space


class ZeroStarGuidance(Guidance):
    """CFG-Zero* for flow models (Fan et al. 2025, arXiv 2503.18886).

    With the conditional velocity c and the unconditional u, for each sample,

        a = <c, u> / |u|^2,    D = a u + w (c - a u),

    and D = 0 in the first evaluations (zero-init), where an imperfect velocity does more harm than none. These need no
    unconditional pass.

    Args:
        scale: guidance scale w; 1 is the conditional output, without an unconditional pass.
        zero_init: a float in (0, 1) is the fraction of the run's evaluations whose velocity is zero, rounded down but at least
            one (0.04: one of 28 or 40, two of 50); an int is their number; 0 turns it off, as runs of few steps should.

    Raises:
        TypeError: for arguments that are not numbers.
        ValueError: for a scale that is not finite, or a zero_init that is neither a fraction nor a number of evaluations.
    """

    combines = True

    def __init__(self, scale: float, zero_init: float = 0.04) -> None:
        self.scale = finite("scale", scale, "give a guidance scale such as 5")
        cure = "give a fraction below 1 such as 0.04, a whole number of evaluations, or 0 for none"
        value = finite("zero_init", zero_init, cure)
        if value < 0 or (value >= 1 and value != int(value)):
            raise ValueError(f"zero_init={value:g} is neither a fraction nor a number of evaluations; {cure}")
        self.zero_init = value

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "cond" in the zeroed evaluations and where ``scale`` is 1, otherwise "both".

        Raises:
            ValueError: as `combine`, for a fraction.
        """
        return "cond" if self.scale == 1 or self._zeroed(step, state) else "both"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns D; c where u is None and the velocity is not zeroed.

        Raises:
            ValueError: for a model on another path than the flow path, one whose path is not known, or a fraction where the
                number of the run's evaluations is not known.
        """
        evaluation: Evaluation | None = state.get("evaluation")
        if evaluation is not None and evaluation.level is not None and evaluation.level.path.name != "flow":
            raise ValueError(f"ZeroStarGuidance is for flow models and this one is on the {evaluation.level.path.name!r} path; use "
                             "ProjectedGuidance or another method")  # fmt: skip
        wide = torch.promote_types(cond.dtype, torch.float32)
        c = to_space(cond, "velocity", state).to(wide)
        if self._zeroed(step, state):
            figures = {}
            change = -c
        elif uncond is None:
            return cond, reported(state, scale=1.0)
        else:
            figures = {"scale": self.scale}
            u = to_space(uncond, "velocity", state).to(wide)
            square = u.flatten(1).square().sum(1).clamp_min(torch.finfo(wide).tiny)
            a = (c * u).flatten(1).sum(1) / square
            # D = c + (w - 1) (c - a u)
            change = (self.scale - 1) * (c - column(a, u) * u)
        result = cond.to(wide) + from_space(change, "velocity", state)
        return result.to(cond.dtype), reported(state, **figures)

    def _zeroed(self, step: int, state: State) -> bool:
        # The first is zeroed by any fraction, so the plan of step 0 does not depend on how long the run is.
        if not self.zero_init or step == 0:
            return bool(self.zero_init)
        if self.zero_init >= 1:
            return step < self.zero_init
        evaluation: Evaluation | None = state.get("evaluation")
        if evaluation is None:
            raise ValueError(f"zero_init={self.zero_init:g} is a fraction of the run's evaluations, an unknown number; give "
                             "a number of them, such as zero_init=1")  # fmt: skip
        # The small number undoes the rounding of the product, as in 0.29 * 100.
        return step < max(1, math.floor(self.zero_init * evaluation.steps + 1e-9))

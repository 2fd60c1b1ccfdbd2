"""Guidance in an interval of noise levels."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from flowkit import paths
from flowkit.guidance.checks import number
from flowkit.hooks.parts import Evaluation, Guidance, Plan, State, reported


class IntervalGuidance(Guidance):
    """Guidance in a limited interval of noise levels (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Both passes where the level lies in the interval, the conditional one alone elsewhere. The interval is one of noise, not of
    step numbers, so it means the same for any number of steps and any grid.

    Args:
        low: lower end.
        high: upper end, above ``low``; may be infinite.
        unit: of ``low`` and ``high``:
            "sigma", diffusers' ``sigmas``: flow time in [0, 1] on the flow path and sigma/alpha on every other, EDM's sigma
            among them; guidance where ``low < sigma <= high``. A level r in sigma/alpha is ``r / (1 + r)`` in flow time.
            "log_snr", ``lambda = log(alpha / sigma)`` (half the log of alpha^2 / sigma^2), which means the same on every path;
            it falls with noise, so guidance is where ``low <= lambda < high``.

    Raises:
        TypeError: for bounds that are not numbers.
        ValueError: for an unknown unit, NaN, a negative sigma, or an interval that is empty.
    """

    def __init__(self, low: float, high: float, unit: Literal["sigma", "log_snr"] = "sigma") -> None:
        if unit not in ("sigma", "log_snr"):
            raise ValueError(f"unknown unit {unit!r}; choose sigma or log_snr")
        cure = "give the two ends of the interval, such as low=0.2, high=0.8"
        self.low, self.high, self.unit = number("low", low, cure), number("high", high, cure), unit
        if unit == "sigma" and self.low < 0:
            raise ValueError(f"a noise level must not be negative, got low={self.low:g}; use low=0 for no lower end")
        if not self.low < self.high:
            raise ValueError(f"the interval from {self.low:g} to {self.high:g} is empty; give low below high")

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "both" in the interval and "cond" outside.

        Raises:
            ValueError: for a level that is not known, and for unit "log_snr" where the path is not known, since ``sigma`` alone
                does not tell its unit.
        """
        if math.isnan(sigma):
            raise ValueError("IntervalGuidance needs the scheduler's noise levels, which are not known; swap in a "
                             "RectifiedFlowScheduler")  # fmt: skip
        if self.unit == "sigma":
            inside = self.low < sigma <= self.high
        else:
            evaluation: Evaluation | None = state.get("evaluation")
            if evaluation is None or evaluation.level is None:
                raise ValueError("unit='log_snr' needs the scheduler's path, which is not known; use unit='sigma', or swap in a "
                                 "RectifiedFlowScheduler")  # fmt: skip
            inside = self.low <= paths.log_snr(evaluation.level.path.at_level(sigma)) < self.high
        return "both" if inside else "cond"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Returns the outputs as they are, c for u where u is None."""
        return (cond, cond if uncond is None else uncond), reported(state)

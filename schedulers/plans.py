"""What a run needs: one plan, read from the configuration once, from which its table is filled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowkit import table
from flowkit.paths import Path, from_rho, rho
from flowkit.schedulers import clipping, variances
from flowkit.solvers import Solver
from flowkit.table import Row


@dataclass(frozen=True)
class Plan:
    """Everything a run needs.

    Attributes:
        path: of the sample.
        prediction: type of the network's output.
        method: the solver.
        levels: N + 1 levels as diffusers exports them, the last where the run ends.
        times: N model times.
        ends: N levels where the steps end, for a class whose steps do not end at the next call's level; None means levels[1:].
        orders: highest order of each step; None means the solver's.
        uncorrected: steps without corrector.
        eta: level of the solver's own noise; None means 1 for a stochastic solver, 0 for others.
        churned: whether noise leads from the end of each step to the next level (see `flowkit.table.build`).
        s_noise: factor on the noise.
        variance: of the noise of ancestral steps (see `flowkit.schedulers.variances`); None means their own.
        start: what pure noise is multiplied with.
        finish: what the last result is multiplied with, for a class that hands on another path's coordinates.
        limit: what is done to x0_hat, or None.
        keyed: noise from (seed, sample, step).
        seed: of keyed noise where no generator comes; None draws one.
        debug: look for NaN after every step.
    """

    path: Path
    prediction: str
    method: Solver
    levels: Sequence[float]
    times: Sequence[float]
    ends: Sequence[float] | None = None
    orders: Sequence[int] | None = None
    uncorrected: Sequence[int] = ()
    eta: float | None = None
    churned: bool = False
    s_noise: float = 1.0
    variance: str | None = None
    start: float = 1.0
    finish: float = 1.0
    limit: clipping.Limit | None = None
    keyed: bool = False
    seed: int | None = None
    debug: bool = False

    def rows(self, begin: int = 0, eta: float = 0.0) -> list[Row]:
        """The table from grid step ``begin`` on: the bootstrap belongs to the first executed row.

        Args:
            begin: number of the first step.
            eta: level of the noise where ``step`` asks for some; 0 means the plan's own.
        """
        rows = table.build(
            self.method,
            self.path,
            self.prediction,
            [self.path.at_level(v) for v in self.levels[begin:]],
            times=self.times[begin:],
            ends=None if self.ends is None else [self.path.at_level(v) for v in self.ends[begin:]],
            orders=None if self.orders is None else self.orders[begin:],
            uncorrected=[i - begin for i in self.uncorrected],
            eta=eta or self.eta,
            churned=self.churned,
            s_noise=1.0 if self.variance else self.s_noise,  # theirs is scaled last
        )
        if self.variance:
            rows = [variances.fixed(self.variance, self.path, row) for row in rows]
        last, k = rows[-1], self.finish
        rows[-1] = last._replace(a=k * last.a, b=tuple(k * b for b in last.b), c=k * last.c)
        return [row._replace(step=row.step + begin) for row in rows]


def repeated(plan: Plan) -> Plan:
    """The plan with its first step made again from its other end: a step of no length, whose corrector it is (PLMS)."""

    def twice(values: Sequence[float]) -> list[float]:
        return [*values[:2], *values[1:]]

    levels, times = twice(plan.levels), twice(plan.times)
    return replace(plan, levels=levels, times=times, orders=None, uncorrected=range(1, len(times)))


def churned(plan: Plan, config: Mapping[str, Any]) -> Plan:
    """The plan with calls at raised levels (Karras et al. 2022, algorithm 2).

    A step ends at the grid's next level, and noise leads up from there to the raised one, ``(1 + gamma) sigma`` with
    ``gamma = min(s_churn / N, sqrt(2) - 1)`` for s_tmin <= sigma <= s_tmax, never above the noisiest level that the model knows.

    Args:
        plan: without churn.
        config: with s_churn, s_tmin and s_tmax (None for no limit).
    """
    path = plan.path
    gamma = min(config["s_churn"] / len(plan.times), math.sqrt(2.0) - 1.0)
    high = math.inf if config["s_tmax"] is None else config["s_tmax"]
    levels, times = list(plan.levels), list(plan.times)
    for i, s in enumerate(map(path.at_level, plan.levels[:-1])):
        raised = min(from_rho(rho(s) * (1.0 + gamma)), max(path.start, s))
        if config["s_tmin"] <= rho(s) <= high and raised > s:
            levels[i], times[i] = path.level(raised), path.time(raised)
    start = plan.start
    if path.name in ("ve", "edm"):  # the noise that raises the first level has the factor too
        first, top = plan.levels[0], levels[0]
        start *= math.hypot(first, plan.s_noise * math.sqrt(top**2 - first**2)) / first
    return replace(plan, levels=levels, times=times, ends=plan.ends or plan.levels[1:], churned=True, start=start)

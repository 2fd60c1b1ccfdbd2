"""Every linear sampler as a table: one row of coefficients a network call.

A row is ``x' = a x + sum_k b_k M_k + c z``: x the sample handed in, M_0 the current prediction, M_1, ... stored ones, z noise.
Solvers are written once, for ``y = (1 - s) x0 + s eps`` (see `flowkit.paths`), in a gauge (see `flowkit.gauges`); the
interpolation weights of a multistep method and a Butcher tableau are all there is. Bootstrap, last step, final level and noise
are data in the table, so a step has no branch and no state beyond the stored predictions:

- a Runge-Kutta stage starts from the stage before it, ``y_{j+1} = y_j + du sum_k (A_{j+1,k} - A_{j,k}) M_k``;
- a corrector moves the sample that is handed in, ``y_c = y_p + D sum_k (q'_k - q_k) M_k``, so it fuses with the next row;
- a singlestep row finds its start in the sample, ``y_0 = (y - D sum_k q_k M_k) / a``;
- noise that the next call wants (churn) is added at the end of the step before it.

All coefficients are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkit import gauges, predictions
from flowkit.gauges import Array, clock, from_clock, increment, scale, weights
from flowkit.paths import Path, from_rho, log_snr, rho
from flowkit.solvers import Gauge, Solver


class Row(NamedTuple):
    """One network call: ``x' = a x + b[0] M_0 + b[1] M_1 + ... + c z`` with ``M_0 = p x + q raw``.

    ``s`` is the flow time of the call, ``t`` that of the result, ``time`` the model's time, ``step`` the grid step it belongs
    to and ``keep`` the number of predictions to hold after it.
    """

    s: float
    t: float
    time: float
    step: int
    p: float
    q: float
    a: float
    b: tuple[float, ...]
    c: float = 0.0
    keep: int = 0


def build(
    method: Solver,
    path: Path,
    prediction: str,
    levels: Sequence[float],
    *,
    times: Sequence[float] | None = None,
    ends: Sequence[float] | None = None,
    orders: Sequence[int] | None = None,
    uncorrected: Sequence[int] = (),
    eta: float | None = None,
    churned: bool = False,
    s_noise: float = 1.0,
) -> list[Row]:
    """Fills the table of a method on a grid.

    Args:
        method: the solver, from `flowkit.solvers.solver`.
        path: the path of the sample handed to `step`; its coordinates are those of the rows.
        prediction: what the network returns, one of `flowkit.predictions.PREDICTIONS`.
        levels: N + 1 flow times in [0, 1], falling; a repeated level is an identity row.
        times: N model times; None means the path's clock.
        ends: N flow times where the steps end; None means the next level.
        orders: highest order of each of the N steps; None means the method's own. Fewer stored predictions lower it.
        uncorrected: steps whose result is not corrected.
        eta: level of the noise, >= 0: in [0, 1] for ancestral steps (Song et al. 2021, equation 16, which is what a deterministic
            one-step method takes), any for an SDE. None means 1 for a stochastic method, 0 for others.
        churned: whether noise leads from the end of each step up to the next level (Karras et al. 2022, algorithm 2); needs ends.
        s_noise: factor on the noise.

    Returns:
        One row a network call.

    Raises:
        ValueError: for noise that the method cannot take, VE coordinates at infinite noise, or where the prediction does not
            determine the sample.
    """
    eta = (1.0 if method.noise else 0.0) if eta is None else eta
    check_noise(method, eta, churned)
    if path.name in ("ve", "edm") and levels[0] >= 1:
        raise ValueError(f"the path {path.name!r} cannot start at infinite sigma; give the grid a finite first level")
    times = [path.time(s) for s in levels[:-1]] if times is None else times
    draft = _Draft(
        method, path, prediction, levels, times, ends or levels[1:], orders, uncorrected, eta, churned, s_noise
    )
    rows = draft.stages() if method.tableau else draft.multistep()
    for i in range(len(rows) - 2, -1, -1):
        rows[i] = rows[i]._replace(keep=max(len(rows[i + 1].b) - 1, rows[i + 1].keep - 1))
    return rows


def check_noise(method: Solver, eta: float, churn: float = 0.0) -> None:
    """Refuses noise that a method cannot take.

    Raises:
        ValueError: for a negative level; noise in a multistep method that is not made for it, in a corrector, or of order 3; an
            ancestral level above 1; or both kinds at once.
    """
    if not (eta >= 0 and math.isfinite(eta)):
        raise ValueError(f"eta must be a number >= 0, got {eta}; 0 means deterministic, 1 full noise")
    if not eta and not churn:
        return
    what = f"eta = {eta:g}" if eta else "s_churn"
    if method.noise and churn:
        raise ValueError(f"solver {method.name!r} draws noise of its own; use s_churn with 'edm', 'heun' or 'euler'")
    if eta and churn:
        raise ValueError(f"eta = {eta:g} and s_churn both add noise; set one of them to 0")
    if method.corrector:
        raise ValueError(f"{what} would put noise into the corrector of {method.name!r}; use solver='sde-dpm++2m'")
    if method.noise in ("exact", "euler"):
        if method.order > 2:
            raise ValueError(f"{what} with {method.name!r}: an SDE solver of order {method.order} has weak order 2 at best; "
                             "use solver='sde-dpm++2m'")  # fmt: skip
    elif not method.one_step:
        raise ValueError(f"{what} needs a one-step solver, but this is {method.name!r}; use solver='euler', or "
                         "'sde-dpm++2m' for a stochastic multistep method")  # fmt: skip
    elif eta > 1:
        raise ValueError(f"eta = {eta:g} asks for more noise than there is; choose a value in [0, 1]")


class _Piece(NamedTuple):
    """One call of a multistep or singlestep method: from level s down to d, then up to n by noise."""

    step: int
    s: float
    d: float
    n: float
    time: float
    order: int


@dataclass(frozen=True)
class _Draft:
    """A table in the making."""

    method: Solver
    path: Path
    prediction: str
    levels: Sequence[float]
    times: Sequence[float]
    ends: Sequence[float]
    orders: Sequence[int] | None
    uncorrected: Sequence[int]
    eta: float
    churned: bool
    s_noise: float

    def landing(self, step: int) -> tuple[float, float]:
        """Levels (d, n) of a step: it goes down to d, and noise leads up to n, where it ends."""
        t = self.ends[step]
        if self.churned:
            return t, self.levels[step + 1]
        noise = self.method.noise or "ancestral"
        if not self.eta or t <= 0 or noise in ("exact", "euler"):
            return t, t
        return gauges.below(noise, self.levels[step], t, self.eta), t

    def gauge(self, s: float) -> Gauge:
        """The method's gauge; at pure noise, where eps says nothing, that of the flow."""
        gauge = self.method.gauge or "eps"
        return "flow" if gauge == "eps" and s >= 1 else gauge

    def row(
        self, gauge: Gauge, piece: _Piece, a: float, b: Sequence[float], c: float = 0.0, time: float | None = None
    ) -> Row:
        """Adds the noise from d to n, moves a row from y to the path's coordinates, and folds in the network's prediction."""
        s, n = piece.s, piece.n
        if n != piece.d:
            up, c = gauges.raised(piece.d, n)
            a, b = up * a, [up * v for v in b]
        n_s, n_n = self.path.norm(s), self.path.norm(n)
        wanted = gauges.stored(gauge, self.eta if self.method.noise in ("exact", "euler") and c else 0.0)
        p, q = predictions.row(self.prediction, wanted, self.path.alpha(s), self.path.sigma(s), self.path.sigma_data)
        b = tuple(v / n_n for v in b)
        return Row(
            s, n, piece.time if time is None else time, piece.step, p, q, a * n_s / n_n, b, self.s_noise * c / n_n
        )

    def pieces(self) -> Iterator[_Piece]:
        """The calls of a multistep or singlestep method."""
        for i, s in enumerate(self.levels[:-1]):
            d, n = self.landing(i)
            order = self.method.order if self.orders is None else min(self.method.order, self.orders[i])
            if not self.method.inner:
                yield _Piece(i, s, d, n, self.times[i], order)
                continue
            inner = self.method.inner if 0 < d < s else ()  # log-SNR is infinite at the end: hold the one prediction
            points = [s, *(_between(s, d, f) for f in inner), d]
            for j, (here, there) in enumerate(pairwise(points)):
                time = self.times[i] if j == 0 else self.path.time(here)
                yield _Piece(i, here, there, n if there == d else there, time, j + 1)

    def multistep(self) -> list[Row]:
        """Linear multistep rows, with the corrector of the step before fused into each, and singlestep rows."""
        rows: list[Row] = []
        nodes: list[float] = []  # flow times of the predictions, newest first
        before: tuple[float, float, Array, int] | None = None  # start, increment, weights and order of the row before
        eta = self.eta if self.method.noise in ("exact", "euler") else 0.0
        for piece in self.pieces():
            s, t = piece.s, piece.d
            nodes = [s, *nodes]
            order = min(piece.order, len(nodes))
            if self.method.singlestep:
                # A row of order 1 is a new start, from which the rows of higher order after it step.
                order = 1 if t <= 0 or before is None else order
                nodes = nodes[:order]
            base = nodes[-1] if self.method.singlestep else s
            gauge = self.gauge(base)
            a, _, c = increment(gauge, s, t, eta if t > 0 else 0.0)
            _, d, _ = increment(gauge, base, t, eta if t > 0 else 0.0)
            if self.method.noise == "euler" and t > 0:
                c = gauges.euler_noise(gauge, s, t, eta)
            q, used = self.interpolate(gauge, base, t, nodes, order)
            b = d * q
            if before and before[1]:
                start, d_before, q_before, used_before = before
                if self.method.singlestep and order > 1:
                    b = _add(b, -a * d_before * np.concatenate([[0.0], q_before]))
                elif self.corrects(piece.step - 1) and self.gauge(start) == gauge:
                    corrected, _ = self.interpolate(gauge, start, s, nodes, used_before + 1, corrector=True)
                    b = _add(b, a * d_before * _add(corrected, -np.concatenate([[0.0], q_before])))
            rows.append(self.row(gauge, piece, a, b.tolist(), c))
            before = s, d, q, used
        return rows

    def corrects(self, step: int) -> bool:
        return self.method.corrector and step not in self.uncorrected

    def interpolate(
        self, gauge: Gauge, s: float, t: float, nodes: Sequence[float], order: int, corrector: bool = False
    ) -> tuple[Array, int]:
        """Weights of the newest ``order`` usable nodes, zero at those passed over, and how many were usable."""
        tau, rules = self.method.tau, self.method.rules
        if tau == "lambda":
            if t <= 0 or s == t:
                order = 1  # log-SNR is infinite at the end: hold the newest prediction
            elif s >= 1 and (corrector or self.method.singlestep):
                tau, rules = "u", ("exact",)  # a node lies at log-SNR -inf, where the clock u is still finite
        infinite = tau == "lambda" or (tau == "u" and gauge == "eps")
        used: list[int] = []
        for k, node in enumerate(nodes):
            repeated = any(nodes[j] == node for j in used)
            if len(used) < order and not repeated and not (infinite and node >= 1 and k > 0):
                used.append(k)
        q = np.zeros(used[-1] + 1)
        rule = rules[min(len(used), len(rules) + 1) - 2]
        eta = self.eta if self.method.noise == "exact" else 0.0
        q[used] = weights(gauge, tau, rule, s, t, [nodes[k] for k in used], eta)
        if tau == "lambda" and not corrector and len(used) > 1 and self.method.reach < math.inf:
            far = (log_snr(t) - log_snr(s)) / (log_snr(s) - log_snr(nodes[used[1]]))
            share = min(1.0, self.method.reach / far) ** 2
            q *= share
            q[0] += 1.0 - share
        return q, len(used)

    def stages(self) -> list[Row]:
        """Runge-Kutta rows."""
        rows: list[Row] = []
        tableau = self.method.tableau or ()
        at_end = any(
            math.isclose(sum(weight), 1.0) for weight in tableau[:-1]
        )  # whether a stage lies where the step ends
        for i, s in enumerate(self.levels[:-1]):
            d, n = self.landing(i)
            gauge, time = self.gauge(s), self.times[i]
            if s == d or (d <= 0 and at_end):
                a, increase, _ = increment(gauge, s, d)  # a stage at sigma 0 would be wasted: end with Euler
                rows.append(self.row(gauge, _Piece(i, s, d, n, time, 1), a, [increase]))
                continue
            u, du = clock(gauge, s), clock(gauge, d) - clock(gauge, s)
            here, done = s, np.zeros(0)
            for j, weight in enumerate(tableau):
                last, total = j == len(tableau) - 1, sum(weight)
                there = d if last or math.isclose(total, 1.0) else from_clock(gauge, u + du * total)
                new = np.array(weight)
                b = scale(gauge, there) * du * _add(new, -done)[::-1]
                piece = _Piece(i, here, there, n if last else there, time, 1)
                rows.append(self.row(gauge, piece, scale(gauge, there) / scale(gauge, here), b.tolist()))
                known = i + 1 < len(self.times) and there == self.levels[i + 1]
                time = self.times[i + 1] if known else self.path.time(there)
                here, done = there, new
        return rows


def _between(s: float, t: float, fraction: float) -> float:
    """The level a fraction of the way from s to t in log-SNR; in flow time where that is infinite at s."""
    if s >= 1:
        return s + (t - s) * fraction
    return from_rho(rho(s) ** (1 - fraction) * rho(t) ** fraction)


def _add(first: Array, second: Array) -> Array:
    """first + second, the shorter padded with zeros."""
    size = max(len(first), len(second))
    return np.pad(first, (0, size - len(first))) + np.pad(second, (0, size - len(second)))


def step(
    row: Row, x: Tensor, raw: Tensor, history: Sequence[Tensor] = (), noise: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Applies one row.

    Args:
        row: from `build`.
        x: the sample, any shape.
        raw: the network's output, same shape.
        history: stored predictions, newest first, as returned by the row before.
        noise: standard normal, same shape; needed where ``row.c`` is not 0, not read elsewhere.

    Returns:
        The next sample, float32 or float64 (the wider of x and raw), and the stored predictions.

    Raises:
        ValueError: for a row with noise and none given.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, raw.dtype), torch.float32)
    x, raw = x.to(dtype), raw.to(dtype)
    a, b = row.a + row.b[0] * row.p, row.b[0] * row.q
    # torch.add leaves x alone; the in-place adds go to the one fresh buffer.
    result = torch.add(x, raw, alpha=b) if a == 1 else (x * a).add_(raw, alpha=b)
    for weight, stored in zip(row.b[1:], history, strict=False):
        if weight:
            result.add_(stored, alpha=weight)
    if row.c:
        if noise is None:
            raise ValueError(
                f"the row from s = {row.s:g} to {row.t:g} adds noise; pass noise=, or build the table with eta=0"
            )
        result.add_(noise.to(dtype), alpha=row.c)
    if not row.keep:
        return result, ()
    current = raw * row.q if row.p == 0 else (x * row.p).add_(raw, alpha=row.q)
    return result, (current, *history)[: row.keep]


def solve(
    rows: Sequence[Row],
    x: Tensor,
    model: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Runs a whole table: the loop, written once.

    Args:
        rows: from `build`.
        x: the sample at the first row's level.
        model: ``(sample, model time) -> raw output``.
        noise: ``row number -> standard normal`` like x, for tables with noise.

    Returns:
        The sample at the last row's result level.
    """
    history: tuple[Tensor, ...] = ()
    for i, row in enumerate(rows):
        x, history = step(row, x, model(x, row.time), history, noise(i) if noise and row.c else None)
    return x

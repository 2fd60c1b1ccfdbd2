"""Every linear sampler as a table: one row of coefficients a network call.

A row is ``x' = a x + sum_k b_k M_k + c z``: x the sample handed in, M_0 the current prediction, M_1, ... stored ones, z noise.
Solvers are written once, for ``y = (1 - s) x0 + s eps`` (see `flowkit.paths`), in a gauge (c, u, M) in which the
probability-flow ODE reads ``d(y / c) = M du``:

    gauge   c       u           M
    eps     1 - s   s / (1-s)   eps          Song et al. 2021 (DDIM), Karras et al. 2022
    x0      s       (1-s) / s   x0           Lu et al. 2022 (DPM-Solver++)
    flow    1       s           eps - x0     Liu et al. 2022

Holding M over a step from s to t gives ``y_t = a y_s + D M`` with ``a = c_t / c_s, D = c_t (u_t - u_s)``: DDIM, in every gauge.
Multistep methods replace M by its Lagrange interpolant through stored nodes, ``b_k = D q_k`` with
``q_k = int ell_k du / int du``; that and a Butcher tableau is all there is. Bootstrap, last step and final level are data in
the table, so a step has no branch and no state beyond the stored predictions. All coefficients are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkit import predictions
from flowkit.paths import Path, log_snr, rho
from flowkit.solvers import Gauge, Solver

Array = NDArray[np.float64]
_X, _W = np.polynomial.legendre.leggauss(32)
_STORED: dict[Gauge, tuple[float, float]] = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}


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


def clock(gauge: Gauge, s: float) -> float:
    """Returns the gauge's clock u(s)."""
    match gauge:
        case "eps":
            return rho(s)
        case "x0":
            return (1.0 - s) / s if s > 0 else math.inf
        case _:
            return s


def increment(gauge: Gauge, s: float, t: float) -> tuple[float, float]:
    """Returns (a, D) of ``y_t = a y_s + D M``, in the forms that are finite at both ends."""
    match gauge:
        case "eps":
            a = (1.0 - t) / (1.0 - s)
            return a, t - s * a
        case "x0":
            a = t / s
            return a, (1.0 - t) - a * (1.0 - s)
        case _:
            return 1.0, t - s


def _lagrange(nodes: Array, x: Array) -> Array:
    """Values at x of the Lagrange polynomials on the nodes, shape (nodes, x)."""
    return np.stack(
        [
            np.prod([(x - m) / (n - m) for m in np.delete(nodes, k)] + [np.ones_like(x)], axis=0)
            for k, n in enumerate(nodes)
        ]
    )


def weights(gauge: Gauge, tau: str, rule: str, s: float, t: float, nodes: Sequence[float]) -> Array:
    """Returns q, the share of each node's prediction in the step from s to t; sums to 1.

    Args:
        gauge: "eps", "x0" or "flow".
        tau: variable of the interpolation, "u" or "lambda"; the latter needs every level inside (0, 1).
        rule: "exact", "mid" or "bh1" (see `Solver`).
        s: flow time at the start.
        t: flow time at the end.
        nodes: flow times of the predictions, distinct.
    """
    if len(nodes) == 1:
        return np.ones(1)

    def variable(v: float) -> float:
        return clock(gauge, v) if tau == "u" else log_snr(v)

    z = np.array([variable(v) for v in nodes])
    low, high = variable(s), variable(t)
    if rule != "exact":
        q = _lagrange(z, np.array([(low + high) / 2]))[:, 0]
        if rule == "bh1":
            held = np.array([float(v == s) for v in nodes])
            h = high - low
            q = held + (q - held) * h / -math.expm1(-h)
        return q
    x = low + (high - low) * (_X + 1) / 2
    if tau == "u":
        density = np.ones_like(x)
    elif gauge == "flow":
        density = 0.25 / np.cosh(x / 2) ** 2
    else:
        rate = x if gauge == "x0" else -x
        density = np.exp(rate - rate.max())
    w = _W * density
    return np.asarray(_lagrange(z, x) @ w / w.sum())


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
    eta: float = 0.0,
) -> list[Row]:
    """Fills the table of a method on a grid.

    Args:
        method: the solver, from `flowkit.solvers.solver`.
        path: the path of the sample handed to `step`; its coordinates are those of the rows.
        prediction: what the network returns, one of `flowkit.predictions.PREDICTIONS`.
        levels: N + 1 flow times in [0, 1], falling; a repeated level is an identity row.
        times: N model times; None means the path's clock.
        ends: N flow times where the steps end; None means the next level. For first-order methods, which hold no history.
        orders: highest order of each of the N steps; None means the method's own. Fewer stored predictions lower it.
        uncorrected: steps whose result is not corrected.
        eta: stochasticity of the first-order step in [0, 1], 1 being ancestral sampling (Song et al. 2021, equation 16).

    Returns:
        One row a network call.

    Raises:
        ValueError: for eta with a method of higher order, for VE coordinates at infinite noise, or where the prediction does not
            determine the sample.
    """
    if eta and not method.first_order:
        raise ValueError(
            f"eta = {eta:g} needs a first-order solver, but this is {method.name!r}; use solver='euler' or eta=0"
        )
    if path.name in ("ve", "edm") and levels[0] >= 1:
        raise ValueError(f"the path {path.name!r} cannot start at infinite sigma; give the grid a finite first level")
    gauge = method.gauge or "eps"
    if eta:
        gauge = "x0"
    elif gauge == "eps" and levels[0] >= 1:
        gauge = "flow"  # eps says nothing at pure noise; first order is the same row in every gauge
    times = [path.time(s) for s in levels[:-1]] if times is None else times
    draft = _Draft(method, path, prediction, gauge, levels, times, ends or levels[1:], orders, uncorrected, eta)
    rows = draft.stages() if method.tableau else draft.multistep()
    for i in range(len(rows) - 2, -1, -1):
        rows[i] = rows[i]._replace(keep=max(len(rows[i + 1].b) - 1, rows[i + 1].keep - 1))
    return rows


@dataclass(frozen=True)
class _Draft:
    """A table in the making."""

    method: Solver
    path: Path
    prediction: str
    gauge: Gauge
    levels: Sequence[float]
    times: Sequence[float]
    ends: Sequence[float]
    orders: Sequence[int] | None
    uncorrected: Sequence[int]
    eta: float

    def row(self, step: int, s: float, t: float, time: float, a: float, b: Sequence[float], c: float = 0.0) -> Row:
        """Moves a row from y to the path's coordinates and folds in the network's prediction type."""
        n_s, n_t = self.path.norm(s), self.path.norm(t)
        p, q = predictions.row(
            self.prediction, _STORED[self.gauge], self.path.alpha(s), self.path.sigma(s), self.path.sigma_data
        )
        return Row(s, t, time, step, p, q, a * n_s / n_t, tuple(v / n_t for v in b), c / n_t)

    def multistep(self) -> list[Row]:
        """Linear multistep rows, with the corrector of the step before fused into each."""
        rows: list[Row] = []
        nodes: list[float] = []  # flow times of the predictions, newest first
        before: tuple[float, Array, int] | None = None  # increment, weights and order of the step before
        for i, (s, t) in enumerate(zip(self.levels, self.ends, strict=False)):
            nodes = [s, *nodes]
            if self.eta:
                a, eta_b, c = _stochastic(s, t, self.eta)
                rows.append(self.row(i, s, t, self.times[i], a, [eta_b], c))
                continue
            a, d = increment(self.gauge, s, t)
            q, used = self.interpolate(s, t, nodes, self.method.order if self.orders is None else self.orders[i])
            b = d * q
            if before and before[0] and self.method.corrector and i - 1 not in self.uncorrected:
                d_before, q_before, used_before = before
                corrected, _ = self.interpolate(self.levels[i - 1], s, nodes, used_before + 1, corrector=True)
                b = _add(b, a * d_before * _add(corrected, -np.concatenate([[0.0], q_before])))
            rows.append(self.row(i, s, t, self.times[i], a, b.tolist()))
            before = d, q, used
        return rows

    def interpolate(
        self, s: float, t: float, nodes: Sequence[float], order: int, corrector: bool = False
    ) -> tuple[Array, int]:
        """Weights of the newest ``order`` usable nodes, zero at those passed over, and how many were usable."""
        tau, rule = self.method.tau, self.method.rule
        if corrector and order > 2:
            rule = "exact"
        if tau == "lambda":
            if t <= 0 or s == t:
                order = 1  # log-SNR is infinite at the end: hold the newest prediction
            elif corrector and s >= 1:
                tau, rule = "u", "exact"  # the old node lies at log-SNR -inf, where the clock u is still finite
        used: list[int] = []
        for k, node in enumerate(nodes):
            repeated = any(nodes[j] == node for j in used)
            infinite = tau == "lambda" and node >= 1 and k > 0
            if len(used) < order and not repeated and not infinite:
                used.append(k)
        q = np.zeros(used[-1] + 1)
        q[used] = weights(self.gauge, tau, rule, s, t, [nodes[k] for k in used])
        return q, len(used)

    def stages(self) -> list[Row]:
        """Runge-Kutta rows: ``y_{j+1} = y_j + du sum_k (A_{j+1,k} - A_{j,k}) M_k`` needs no stored start."""
        rows: list[Row] = []
        tableau = self.method.tableau or ()
        for i, (s, t) in enumerate(zip(self.levels, self.ends, strict=False)):
            if t <= 0 or s == t:
                a, d = increment(self.gauge, s, t)  # a stage at sigma 0 would be wasted: end with Euler
                rows.append(self.row(i, s, t, self.times[i], a, [d]))
                continue
            u, du = clock(self.gauge, s), clock(self.gauge, t) - clock(self.gauge, s)
            here, time, done = s, self.times[i], np.zeros(0)
            for j, weight in enumerate(tableau):
                last = j == len(tableau) - 1
                whole = math.isclose(sum(weight), 1.0)
                there = t if last or whole else _from_clock(self.gauge, u + du * sum(weight))
                c = _scale(self.gauge, there)
                new = np.array(weight)
                b = c * du * _add(new, -done)[::-1]
                rows.append(self.row(i, here, there, time, c / _scale(self.gauge, here), b.tolist()))
                time = self.times[i + 1] if whole and i + 1 < len(self.times) else self.path.time(there)
                here, done = there, new
        return rows


def _add(first: Array, second: Array) -> Array:
    """first + second, the shorter padded with zeros."""
    size = max(len(first), len(second))
    return np.pad(first, (0, size - len(first))) + np.pad(second, (0, size - len(second)))


def _scale(gauge: Gauge, s: float) -> float:
    return {"eps": 1.0 - s, "x0": s, "flow": 1.0}[gauge]


def _from_clock(gauge: Gauge, u: float) -> float:
    """The inverse of `clock`."""
    return {"eps": u / (1.0 + u), "x0": 1.0 / (1.0 + u), "flow": u}[gauge]


def _stochastic(s: float, t: float, eta: float) -> tuple[float, float, float]:
    """(a, b, c) on (y, x0_hat, z): noise of variance v^2 is put in place of as much of eps (Song et al. 2021, equation 16)."""
    ratio = 0.0 if s >= 1 else rho(t) / rho(s)
    v = eta * t * math.sqrt(max(0.0, 1.0 - ratio**2))
    a = math.sqrt(max(0.0, t * t - v * v)) / s
    return a, (1.0 - t) - a * (1.0 - s), v


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

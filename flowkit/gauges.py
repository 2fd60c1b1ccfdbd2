"""Gauges: the scales and clocks in which the sampling equations of every path are one integral.

For ``y = (1 - s) x0 + s eps`` (see `flowkit.paths`) a gauge (c, u, M) is where the probability-flow ODE reads
``d(y / c) = M du``:

    gauge   c       u           M
    eps     1 - s   s / (1-s)   eps          Song et al. 2021 (DDIM), Karras et al. 2022
    x0      s       (1-s) / s   x0           Lu et al. 2022 (DPM-Solver++)
    flow    1       s           eps - x0     Liu et al. 2022

Holding M over a step from s to t gives ``y_t = a y_s + D M`` with ``a = c_t / c_s, D = c_t (u_t - u_s)``: DDIM, in every gauge.
Multistep methods replace M by its Lagrange interpolant through stored nodes, ``b_k = D q_k`` with
``q_k = int ell_k du / int du``. With noise of level eta the reverse SDE of the same marginals takes the ODE's place. All
numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowkit.paths import from_rho, log_snr, rho
from flowkit.solvers import Gauge, Noise, Rule

Array = NDArray[np.float64]
_X, _W = np.polynomial.legendre.leggauss(32)


def stored(gauge: Gauge, eta: float = 0.0) -> tuple[float, float]:
    """Returns (P, Q) of ``M = P x0 + Q eps``."""
    return {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0 + eta**2)}[gauge]


def scale(gauge: Gauge, s: float) -> float:
    """Returns c(s)."""
    return {"eps": 1.0 - s, "x0": s, "flow": 1.0}[gauge]


def clock(gauge: Gauge, s: float) -> float:
    """Returns u(s)."""
    match gauge:
        case "eps":
            return rho(s)
        case "x0":
            return (1.0 - s) / s if s > 0 else math.inf
        case _:
            return s


def from_clock(gauge: Gauge, u: float) -> float:
    """Returns the flow time s of a clock; the inverse of `clock`."""
    return {"eps": u / (1.0 + u), "x0": 1.0 / (1.0 + u), "flow": u}[gauge]


def increment(gauge: Gauge, s: float, t: float, eta: float = 0.0) -> tuple[float, float, float]:
    """Returns (a, D, c) of ``y_t = a y_s + D M + c z``, in the forms that are finite at both ends.

    Args:
        gauge: "eps", "x0" or "flow".
        s: flow time at the start; below 1 in the eps gauge.
        t: flow time at the end.
        eta: level of the reverse SDE, integrated exactly for M held; 0 is the ODE, 1 the reverse of the forward SDE. On the x0
            gauge that is SDE-DPM-Solver++ (Lu et al. 2022).
    """
    match gauge:
        case "eps":
            a = (1.0 - t) / (1.0 - s)
            c = eta * math.sqrt(max(0.0, ((1.0 - t) * rho(s)) ** 2 - t * t)) if eta else 0.0
            return a, (1.0 + eta**2) * (t - s * a), c
        case "x0":
            ratio = rho(t) / rho(s) if s < 1.0 else 0.0
            a = t / s * (ratio**eta**2 if eta else 1.0)
            return a, (1.0 - t) - a * (1.0 - s), t * math.sqrt(max(0.0, 1.0 - ratio ** (2 * eta**2))) if eta else 0.0
        case _:
            return 1.0, t - s, eta * math.sqrt(max(0.0, s * s - t * t))


def euler_noise(gauge: Gauge, s: float, t: float, eta: float) -> float:
    """Returns the noise c of Euler-Maruyama, whose diffusion is that at the start: ``g^2 = 2 eta^2 u`` in the gauge's clock u.

    Args:
        gauge: "eps" or "flow".
        s: flow time at the start.
        t: flow time at the end.
        eta: level of the SDE.
    """
    u, end = clock(gauge, s), clock(gauge, t)
    return scale(gauge, t) * eta * math.sqrt(2.0 * u * (u - end))


def below(noise: Noise, s: float, t: float, eta: float) -> float:
    """Returns the level d <= t to step down to, from where fresh noise leads up to t.

    ``ancestral``: ``rho_d^2 = rho_t^2 (1 - eta^2 (1 - rho_t^2 / rho_s^2))`` for ``rho = sigma / alpha`` (Song et al. 2021,
    equation 16); ``rf``: ``d = t (1 + eta (t / s - 1))``; ``full``: 0.

    Args:
        noise: which of them.
        s: flow time at the start.
        t: flow time at the end.
        eta: share of the noise that is fresh, in [0, 1].
    """
    match noise:
        case "ancestral":
            ratio = rho(t) / rho(s) if s < 1.0 else 0.0
            return from_rho(rho(t) * math.sqrt(max(0.0, 1.0 - eta**2 * (1.0 - ratio**2))))
        case "rf":
            return t * (1.0 + eta * (t / s - 1.0))
        case _:
            return 0.0


def raised(d: float, n: float) -> tuple[float, float]:
    """Returns (a, c) of ``y_n = a y_d + c z``: fresh noise from level d up to n, the signal as in y."""
    a = (1.0 - n) / (1.0 - d)
    return a, math.sqrt(max(0.0, n * n - (a * d) ** 2))


def _lagrange(nodes: Array, x: Array) -> Array:
    """Values at x of the Lagrange polynomials on the nodes, shape (nodes, x)."""
    return np.stack(
        [
            np.prod([(x - m) / (n - m) for m in np.delete(nodes, k)] + [np.ones_like(x)], axis=0)
            for k, n in enumerate(nodes)
        ]
    )


def weights(gauge: Gauge, tau: str, rule: Rule, s: float, t: float, nodes: Sequence[float], eta: float = 0.0) -> Array:
    """Returns q, the share of each node's prediction in the step from s to t; sums to 1.

    Args:
        gauge: "eps", "x0" or "flow".
        tau: variable of the interpolation, "u", "lambda" (every level inside (0, 1)) or "index" (nodes one apart).
        rule: see `flowkit.solvers.Solver`.
        s: flow time at the start.
        t: flow time at the end.
        nodes: flow times of the predictions, distinct, newest first.
        eta: level of the SDE, which the density of "lambda" depends on.
    """
    if len(nodes) == 1:
        return np.ones(1)
    if rule == "outer" and len(nodes) > 2:
        first, last = weights(gauge, tau, "exact", s, t, (nodes[0], nodes[-1]), eta)
        return np.array([first, *[0.0] * (len(nodes) - 2), last])
    if tau == "index":
        z, high = -np.arange(len(nodes), dtype=np.float64), float(t != nodes[0])
        low = high - 1.0
    else:
        variable = log_snr if tau == "lambda" else lambda v: clock(gauge, v)
        z = np.array([variable(v) for v in nodes])
        low, high = variable(s), variable(t)
    if rule in ("mid", "bh1"):
        q = _lagrange(z, np.array([(low + high) / 2]))[:, 0]
        if rule == "bh1":
            held = np.array([float(v == s) for v in nodes])
            h = high - low if gauge == "eps" else low - high
            q = held + (q - held) * h / math.expm1(h)
        return q
    x = low + (high - low) * (_X + 1) / 2
    if tau != "lambda":
        density = np.ones_like(x)
    elif gauge == "flow":
        density = 0.25 / np.cosh(x / 2) ** 2
    else:
        rate = (1.0 + eta**2) * x if gauge == "x0" else -x
        density = np.exp(rate - rate.max())
    w = _W * density / (_W @ density)
    q = _lagrange(z, x) @ w
    if rule == "half" and len(nodes) == 3:
        # Half of the second divided difference times the mean of (tau - tau_0)^2.
        q = q - 0.5 * (w @ (x - z[0]) ** 2) / np.array([np.prod(n - np.delete(z, k)) for k, n in enumerate(z)])
    return np.asarray(q)

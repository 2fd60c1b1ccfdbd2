"""The grids of diffusers' scheduler classes (0.42) on the flow path.

All lay a base grid, push it towards noise (a static shift, or mu; Esser et al. 2024, equation 23) and hand the model the time
``num_train_timesteps * s``. What sets the classes apart is data, in `FLOW`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowkit.schedulers.stock_spacing import Array, Config, Laid, check_range, closed, conversion, converted, count
from flowkit.spacing import shift, stretch


@dataclass(frozen=True)
class Flow:
    """How a class lays its grid on the flow path.

    Attributes:
        base: from (configuration, N) the N levels before the shift.
        shift: name of the static shift in the configuration.
        timed: when the shift is written ``f / (f + 1/s - 1)`` with f by time_shift_type instead of ``f s / (1 + (f - 1) s)``;
            the two differ in the last bit. With "always", given sigmas and a static shift of 1 are left alone.
        whole: model times are truncated to whole numbers.
        below: the first level is kept this much below 1.
        through: a karras grid is laid over the VP levels and then mapped to the flow.
        final: the end for want of final_sigmas_type: 0, or "sigma_min".
        repeats: "sigma_min" is the grid's own last level; otherwise the VP level sigma/alpha at time 0 (sic).
        paired: sigmas and timesteps may come together; timesteps alone are divided by num_train_timesteps and then shifted.
        exact: given sigmas are the levels themselves, terminal included, and given timesteps are sigmas.
    """

    base: Callable[[Config, int], Array]
    shift: str = "shift"
    timed: Literal["never", "dynamic", "always"] = "dynamic"
    whole: bool = False
    below: float = 0.0
    through: bool = False
    final: Literal["zero", "sigma_min"] = "zero"
    repeats: bool = False
    paired: bool = False
    exact: bool = False


def _match(c: Config, n: int) -> Array:
    # The class shifts the limits when it is built, and the grid between them once more.
    total = c["num_train_timesteps"]
    limits = np.array([1.0, 1 / total])
    if not c.get("use_dynamic_shifting"):
        limits = shift(limits, c["shift"])
    return np.asarray(np.linspace(limits[0] * total, limits[1] * total, n) / total)


def _open(c: Config, n: int) -> Array:
    return np.linspace(1, 1 / c["num_train_timesteps"], n + 1)[:-1]


def _complement(c: Config, n: int) -> Array:
    return np.flip(1.0 - np.linspace(1, 1 / c["num_train_timesteps"], n + 1))[:-1]


_DPM = Flow(_complement, "flow_shift", timed="never", whole=True)
_DEIS = Flow(_complement, "flow_shift", timed="never", whole=True, final="sigma_min", repeats=True)
FLOW: dict[str, Flow] = {
    "FlowMatchEulerDiscreteScheduler": Flow(_match, paired=True),
    "FlowMatchLCMScheduler": Flow(_match, paired=True),
    "FlowMatchHeunDiscreteScheduler": Flow(_match),
    "LTXEulerAncestralRFScheduler": Flow(_match, exact=True),
    "HeliosScheduler": Flow(_open, timed="always"),
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _DPM,
    "DEISMultistepScheduler": _DEIS,
    "SASolverScheduler": _DEIS,
    "UniPCMultistepScheduler": Flow(_open, "flow_shift", whole=True, below=1e-6, through=True, repeats=True),
}


def flow(c: Config, rhos: Array, n: int | None, times: Array | None, sigmas: Array | None, mu: float | None) -> Laid:
    """Lays the flow grid of the class ``c["stock"]``; arguments as in `flowkit.schedulers.stock_grids.lay`."""
    rules, total, flag = FLOW[c["stock"]], c["num_train_timesteps"], conversion(c)
    listed = times if sigmas is None else sigmas
    if rules.exact and listed is not None:
        check_range("sigmas", listed, 1)
        count(n, len(listed) - 1)
        return Laid(listed, listed[:-1] * total, listed[1:])
    times, sigmas = _open_end("timesteps", times, total), _open_end("sigmas", sigmas, 1)
    if times is not None and sigmas is not None and len(times) != len(sigmas):
        raise ValueError(f"{len(times)} timesteps contradict {len(sigmas)} sigmas; leave one of them out")
    given = sigmas if sigmas is not None else None if times is None else times / total
    n = count(n, None if given is None else len(given))
    if times is not None and not rules.paired:
        return closed(times / total, times, 0.0)
    if flag and rules.through:
        if given is not None:
            raise ValueError(f"sigmas cannot be combined with {flag}=True; set it to False")
        levels = converted(c, rhos[[-1, 0]], n)
        levels = levels / (levels + 1)
    else:
        levels = _shift(c, rules, rules.base(c, n) if given is None else given, mu, given=sigmas is not None)
        if flag:
            levels = converted(c, levels, n)
        if abs(levels[0] - 1) < rules.below:
            levels[0] -= rules.below
    if times is None:
        times = np.trunc(levels * total) if rules.whole else levels * total
    final = c.get("final_sigmas_type", rules.final)
    return closed(levels, times, 0.0 if final == "zero" else levels[-1] if rules.repeats else rhos[0])


def _open_end(name: str, values: Array | None, high: float) -> Array | None:
    """A caller's list without the terminal 0, which the classes add themselves."""
    if values is None:
        return None
    check_range(name, values, high)
    if values[0] == 0:
        raise ValueError(f"{name}=[0] leaves nothing to do; begin with noise, at {high:g}")
    return values[:-1] if values[-1] == 0 else values


def _shift(c: Config, rules: Flow, s: Array, mu: float | None, *, given: bool) -> Array:
    """Pushes levels towards noise, by the static shift or by mu, then stretches them to shift_terminal."""
    amount = mu if c.get("use_dynamic_shifting") else c[rules.shift]
    if amount is None or not math.isfinite(amount):
        raise ValueError(f"{c['stock']} with use_dynamic_shifting=True needs a number mu, got {mu}; pass mu=...")
    dynamic = bool(c.get("use_dynamic_shifting"))
    timed = rules.timed == "always" or (rules.timed == "dynamic" and dynamic)
    factor = float(np.exp(amount) if (dynamic or timed) and c["time_shift_type"] == "exponential" else amount)
    if not factor > 0:
        raise ValueError(f"a flow grid cannot be shifted by {amount:g}; give a positive number")
    if not timed:
        s = shift(s, factor)
    elif dynamic or not (given or amount == 1):
        s = factor / (factor + (1 / s - 1))
    if terminal := c.get("shift_terminal"):
        if not s[-1] < 1:
            raise ValueError(f"shift_terminal={terminal} needs at least two steps, got {len(s)}; ask for more")
        s = stretch(s, terminal)
    return np.array(s)

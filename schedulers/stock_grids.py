"""The grids of diffusers' scheduler classes (0.42), in float64, from plain configurations.

A grid is what ``set_timesteps`` of a class prepares: the noise level of each network call, the model time handed to the
network there, and the level where each step ends. What sets the classes apart is data, in `DISCRETE` and, for flows,
`flowkit.schedulers.stock_flow`. The order of operations is theirs wherever a model time is rounded or truncated, because there
the last bit decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowkit.schedulers.stock_flow import FLOW, flow
from flowkit.schedulers.stock_spacing import (
    Array,
    Config,
    Laid,
    check_range,
    closed,
    conversion,
    converted,
    count,
    numbers,
    short,
)
from flowkit.spacing import exponential, karras

EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")


@dataclass(frozen=True)
class Discrete:
    """How a class lays its grid over the times of a discrete diffusion.

    Attributes:
        extra: points beyond num_inference_steps in "linspace" and "leading" spacing; the least noisy one is dropped. With one,
            karras, exponential and beta grids span the whole table, without it the spaced grid.
        whole: model times are whole: evenly spaced ones are rounded, others truncated.
        rounds: where the times of a karras grid are rounded: "never", "always", or "betas" (not with squaredcos_cap_v2).
        final: the end for want of final_sigmas_type: 0, or "sigma_min", the level of time 0.
        repeats: "sigma_min" of a karras, exponential or beta grid is the grid's own last level.
        stride: a step ends num_train_timesteps // num_inference_steps below its own time, wherever the next call is, and the
            grid at set_alpha_to_one.
        limits: karras grids read sigma_min and sigma_max.
        least: smallest number of steps.
    """

    extra: int = 0
    whole: bool = False
    rounds: Literal["never", "always", "betas"] = "never"
    final: Literal["zero", "sigma_min"] = "zero"
    repeats: bool = False
    stride: bool = False
    limits: bool = True
    least: int = 1


_DDIM = Discrete(whole=True, stride=True)
_KDPM2 = Discrete(rounds="always")
_DEIS = Discrete(1, whole=True, rounds="always", repeats=True, final="sigma_min")
DISCRETE: dict[str, Discrete] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "CogVideoXDDIMScheduler": _DDIM,
    "CogVideoXDPMScheduler": _DDIM,
    "PNDMScheduler": _DDIM,
    "DDPMScheduler": Discrete(whole=True),
    "DDPMParallelScheduler": Discrete(whole=True),
    "UnCLIPScheduler": Discrete(whole=True, least=2),
    "LCMScheduler": Discrete(whole=True),
    "TCDScheduler": Discrete(whole=True, final="sigma_min"),
    "EulerDiscreteScheduler": Discrete(),
    "EulerAncestralDiscreteScheduler": Discrete(),
    "HeunDiscreteScheduler": Discrete(),
    "LMSDiscreteScheduler": Discrete(limits=False),
    "DPMSolverSDEScheduler": Discrete(limits=False),
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": _KDPM2,
    "DPMSolverMultistepScheduler": Discrete(1, whole=True, rounds="betas"),
    "DPMSolverSinglestepScheduler": Discrete(1, whole=True, rounds="always"),
    "UniPCMultistepScheduler": Discrete(1, whole=True, rounds="always", repeats=True),
    "DEISMultistepScheduler": _DEIS,
    "SASolverScheduler": _DEIS,
}


def lay(
    c: Config,
    rhos: Array,
    num_inference_steps: int | None,
    timesteps: Iterable[float] | None,
    sigmas: Iterable[float] | None,
    mu: float | None,
) -> Laid:
    """Lays the grid of the class ``c["stock"]``.

    Args:
        c: the class's own parameters, and "stock" and "path".
        rhos: sigma/alpha at the discrete times 0, 1, ...; on the other paths read for a quirk or two.
        num_inference_steps: N >= 1, or None where a list says it.
        timesteps: falling model times of the calls, or None.
        sigmas: falling levels in the sense of the class, or None.
        mu: amount of the dynamic shift; ignored without use_dynamic_shifting.

    Returns:
        Levels (N + 1), model times (N) and ends (N).

    Raises:
        ValueError: for any of these out of range, in conflict or not falling.
        ImportError: for a beta grid without SciPy.
    """
    times, given = numbers("timesteps", timesteps), numbers("sigmas", sigmas)
    on_flow = c["path"] == "flow"
    if times is not None and given is not None and on_flow and not FLOW[c["stock"]].paired:
        total = c["num_train_timesteps"]
        if len(times) != len(given) or np.abs(times / total - given).max() > 1 / total:
            raise ValueError(f"timesteps {short(times)} and sigmas {short(given)} disagree; leave one of them out")
        times = None  # CogView4 passes both
    if times is not None and given is not None and not on_flow:
        raise ValueError(f"{c['stock']} takes timesteps or sigmas, not both; leave one of them out")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if on_flow:
            laid = flow(c, rhos, num_inference_steps, times, given, mu)
        else:
            family = _discrete if c["path"] == "vp" else _continuous
            laid = family(c, rhos, num_inference_steps, times, given)
    rising = ~(laid.levels[1:] <= laid.levels[:-1])
    if rising.any():
        i = int(np.argmax(rising))
        raise ValueError(
            f"step {i} of {len(laid.times)} of the {c['stock']} grid goes from level {laid.levels[i]:.6g} to "
            f"{laid.levels[i + 1]:.6g}, but levels must fall; use other limits, spacing or number of steps"
        )
    return laid


def _discrete(c: Config, rhos: Array, n: int | None, times: Array | None, sigmas: Array | None) -> Laid:
    """The VP classes."""
    rules, flag = DISCRETE[c["stock"]], conversion(c)
    if sigmas is not None:
        return _listed(c, n, sigmas, lambda v: _log_times(v, rhos), lambda _: _end(c, rules, rhos[0]))
    if times is not None:
        check_range("timesteps", times, len(rhos) - 1)
        if flag:
            raise ValueError(f"timesteps cannot be combined with {flag}=True; pass sigmas, or set it to False")
        n = count(n, len(times))
        times = np.trunc(times) if rules.whole else times
    else:
        n = count(n, most=len(rhos), least=rules.least)
        times = _distilled(c, n) if "original_inference_steps" in c else _spaced(c, rhos, rules, n)
        if rules.stride:
            return _strided(c, rules, rhos, n, times)
    levels = _at(rhos, times)
    if c.get("interpolation_type") == "log_linear":
        # One level more than calls, and not those of the model times.
        levels = exponential(rhos[0], rhos[-1], n + 1)
        if not flag:
            return Laid(levels, times, levels[1:])
    if flag:
        levels = converted(c, rhos[[-1, 0]] if rules.extra else levels, n, limits=rules.limits)
        times = _log_times(levels, rhos)
        rounds = rules.rounds == "always" or (rules.rounds == "betas" and c["beta_schedule"] != "squaredcos_cap_v2")
        if rounds and flag in ("use_karras_sigmas", "use_lu_lambdas"):
            times = times.round()
        times = np.trunc(times) if rules.whole else times
    return closed(levels, times, _end(c, rules, levels[-1] if flag and rules.repeats else rhos[0]))


def _spaced(c: Config, rhos: Array, rules: Discrete, n: int) -> Array:
    """Model times by timestep_spacing, noisiest first."""
    points = n + rules.extra
    last = len(rhos) - int(np.sum(-np.log(rhos) < float(c.get("lambda_min_clipped", -math.inf))))
    match c.get("timestep_spacing", "linspace"):
        case "linspace":
            times = np.linspace(0, last - 1, points)
            return np.asarray((times.round() if rules.whole else times)[::-1][:n])
        case "leading":
            if points > last:
                raise ValueError(f'"leading" spacing has no room for {n} steps in {last} times; ask for fewer')
            return np.asarray(np.arange(points)[::-1][:n] * float(last // points) + c.get("steps_offset", 0))
        case _:
            # Rounding makes the stock classes take a last call at time -1 for 62 of the first 1000 numbers of steps.
            times = np.arange(last, 0, -len(rhos) / n).round()[:n] - 1
            return times[times >= 0]


def _strided(c: Config, rules: Discrete, rhos: Array, n: int, times: Array) -> Laid:
    """DDIM's grid: each step spans num_train_timesteps // N times and may miss the next call by a few."""
    if times[0] >= len(rhos):
        raise ValueError(
            f"steps_offset={c['steps_offset']} puts the first of {n} steps at time {times[0]:g}, beyond {len(rhos) - 1}; "
            "use fewer steps or steps_offset=0"
        )
    below = times - len(rhos) // n
    ends = np.where(below >= 0, _at(rhos, below), _end(c, rules, rhos[0]))
    return Laid(np.append(_at(rhos, times), ends[-1]), times, ends)


def _distilled(c: Config, n: int) -> Array:
    """Times of LCM and TCD: N of the original_inference_steps that the student was distilled on."""
    total, original = c["num_train_timesteps"], c["original_inference_steps"]
    if not n <= original <= total:
        raise ValueError(
            f"num_inference_steps={n} must not exceed original_inference_steps={original}, nor that {total}; ask for fewer"
        )
    origin = np.arange(original, 0, -1.0) * (total // original) - 1
    return np.asarray(origin[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)])


def _continuous(c: Config, rhos: Array, n: int | None, times: Array | None, sigmas: Array | None) -> Laid:
    """The classes whose clock reads the level itself: EDM's ``ln(sigma) / 4``, or the angle of the cosine path."""
    edm = c["path"] == "edm"

    def clock(levels: Array) -> Array:
        return np.asarray(0.25 * np.log(levels) if edm else np.arctan(levels) / math.pi * 2)

    def end(levels: Array) -> float:
        if c.get("final_sigmas_type", "zero") == "zero":
            return 0.0
        if c["stock"] not in EDM:
            return float(rhos[0])
        return float(levels[-1] if c["stock"] == "EDMEulerScheduler" else c["sigma_min"])

    if sigmas is not None:
        return _listed(c, n, sigmas, clock, end)
    if times is not None:
        count(n, len(times))
        if edm:
            levels = np.exp(4 * times)
        else:
            check_range("timesteps", times, 1)
            levels = np.where(times < 1, np.tan(times * math.pi / 2), np.inf)
        return closed(levels, times, end(levels))
    if c["stock"] == "EulerDiscreteScheduler":
        laid = _discrete(c, rhos, n, None, None)
        return laid._replace(times=clock(laid.levels[:-1]))
    n = count(n)
    if c["stock"] == "IPNDMScheduler":
        sines = np.sin(np.linspace(1, 0, n + 1)[:-1] * math.pi / 2) ** 2
        levels = sines / np.sqrt(1 - sines**2)
    elif c["sigma_schedule"] == "karras":
        levels = karras(c["sigma_min"], c["sigma_max"], n, c["rho"])
    else:
        levels = exponential(c["sigma_max"], c["sigma_min"], n)[::-1]
    return closed(levels, clock(levels), end(levels))


def _listed(
    c: Config, n: int | None, sigmas: Array, clock: Callable[[Array], Array], end: Callable[[Array], float]
) -> Laid:
    """A grid of given levels; the terminal is among them for Euler, and wherever the last is 0."""
    if sigmas[-1] < 0 or sigmas[0] == 0:
        raise ValueError(f"sigmas must be positive but for a terminal 0, got {short(sigmas)}; drop the others")
    if c["stock"] == "EulerDiscreteScheduler" or sigmas[-1] == 0:
        levels, last = sigmas[:-1], float(sigmas[-1])
    else:
        levels, last = sigmas, end(sigmas)
    count(n, len(levels))
    return closed(levels, clock(levels), last)


def _end(c: Config, rules: Discrete, last: float) -> float:
    """The level where the grid ends; ``last`` is what "sigma_min" means."""
    final = c.get("final_sigmas_type", rules.final)
    if rules.stride:
        final = "zero" if c["set_alpha_to_one"] else "sigma_min"
    return float(last) if final == "sigma_min" else 0.0


def _at(rhos: Array, times: Array) -> Array:
    """Levels at model times: linear interpolation in sigma/alpha, kept within the table."""
    if (times == np.trunc(times)).all():
        return np.asarray(rhos[np.clip(times, 0, len(rhos) - 1).astype(int)])
    return np.interp(times, np.arange(len(rhos)), rhos)


def _log_times(levels: Array, rhos: Array) -> Array:
    """Model times at levels: linear interpolation in log(sigma/alpha), kept within the table."""
    logs, wanted = np.log(rhos), np.log(np.maximum(levels, 1e-10))
    # The last entry below; a finite zero terminal SNR may lie below its neighbours, so the table need not rise.
    below = wanted[:, None] >= logs
    low = np.where(below.any(axis=1), len(logs) - 1 - np.argmax(below[:, ::-1], axis=1), 0)
    low = np.minimum(low, len(logs) - 2)
    w = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - w) * low + w * (low + 1))

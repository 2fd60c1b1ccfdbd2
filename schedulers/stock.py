"""What a scheduler configuration of diffusers means: path, grid, start and solver (facts of diffusers 0.42).

`translate` makes a full configuration of a stock one; everything else reads that configuration when called, since pipelines
edit it. Which classes there are is in `flowkit.schedulers.stock_classes`, how they lay their grids in
`flowkit.schedulers.stock_grids`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from flowkit import paths
from flowkit.paths import Path
from flowkit.schedulers.stock_classes import CLASSES, REFUSED, own, translate
from flowkit.schedulers.stock_grids import lay
from flowkit.schedulers.stock_solvers import orders, own_solver
from flowkit.schedulers.stock_spacing import Array, Config

__all__ = [
    "CLASSES",
    "REFUSED",
    "end_scale",
    "grid",
    "levels",
    "make_path",
    "orders",
    "own_solver",
    "start_scale",
    "translate",
]

_LAST_ALPHA: Final = 2.0**-24
# These classes keep zero terminal SNR finite: alpha^2 at the last time is 2^-24.
_FINITE: Final = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
# These hold the sample as x0 + sigma eps; "leading" spacing starts it with the variance sigma^2 + 1 of noised data.
_VE_SAMPLES: Final = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)


def make_path(config: Mapping[str, Any]) -> Path:
    """Returns the path of the model.

    Args:
        config: a configuration from `translate`, or a plain one: ``path`` "flow", "vp", "cosine", "ve" or "edm" with
            num_train_timesteps, sigma_data (edm), and for vp beta_schedule, beta_start, beta_end, trained_betas,
            rescale_betas_zero_snr and snr_shift_scale.

    Raises:
        ValueError: for an unknown path or betas that make none.
    """
    c = own(config) if config.get("stock") else config
    total = c.get("num_train_timesteps", 1000)
    match c.get("path"):
        case "flow":
            return paths.flow(total)
        case "vp":
            return Path("vp", total, tuple(float(r) for r in _rhos(c)))
        case "cosine":
            return paths.cosine(1 if c.get("stock") else total)
        case "ve":
            return paths.ve(total)
        case "edm":
            return paths.edm(total, float(c.get("sigma_data", 0.5)))
    raise ValueError(f"unknown path {c.get('path')!r}; choose flow, vp, cosine, ve or edm")


def levels(
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    *,
    timesteps: Iterable[float] | None = None,
    sigmas: Iterable[float] | None = None,
    mu: float | None = None,
) -> tuple[list[float], list[float]]:
    """Returns the grid that the imitated class lays, in float64.

    Explicit lists mean what they mean to the class: flow sigmas are taken before the shift and the classes add the terminal 0
    (given, it is not added twice); Euler's sigmas include the terminal; timesteps are model times. Where a class takes no
    list, timesteps are the times of the calls and sigmas their levels (on the flow path before the shift).

    Args:
        config: a configuration from `translate`.
        num_inference_steps: N >= 1, at most num_train_timesteps for discrete times; None where a list says it.
        timesteps: N falling model times.
        sigmas: N falling levels, or N + 1 with the terminal.
        mu: amount of the dynamic shift; ignored, as by diffusers, without use_dynamic_shifting.

    Returns:
        N + 1 levels in the convention of diffusers' ``sigmas`` (flow time on the flow path, sigma/alpha on vp and cosine, where
        it may be inf, sigma on edm), of which the last is where the last step ends; and N model times as the class hands them
        to the network. Of a class that calls the network twice a step, one each a step. Equal neighbouring levels mean that
        the class spends a call on nothing.

    Raises:
        ValueError: for arguments out of range, in conflict or not falling.
        ImportError: for a beta grid without SciPy.
    """
    return grid(config, num_inference_steps, timesteps=timesteps, sigmas=sigmas, mu=mu)[:2]


def grid(
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    *,
    timesteps: Iterable[float] | None = None,
    sigmas: Iterable[float] | None = None,
    mu: float | None = None,
) -> tuple[list[float], list[float], list[float] | None]:
    """Returns what `levels` does, and the N levels where the steps end, or None where these are just ``levels[1:]``.

    The steps of the DDIM classes and of PNDM all span num_train_timesteps // N times, so with "linspace" and "trailing" spacing
    they may end a little beside the level that the next call assumes.
    """
    c = own(config)
    laid = lay(c, _rhos(c) if "beta_schedule" in c else np.empty(0), num_inference_steps, timesteps, sigmas, mu)
    beside = not np.array_equal(laid.ends, laid.levels[1:])
    return laid.levels.tolist(), laid.times.tolist(), laid.ends.tolist() if beside else None


def start_scale(config: Mapping[str, Any], levels: Sequence[float]) -> float:
    """Returns the standard deviation of the initial noise: the class's init_noise_sigma in the path's own coordinates.

    Args:
        config: a configuration from `translate`, or a plain one.
        levels: the grid in the convention of `levels`; the first is read.
    """
    highest = float(levels[0])
    if not config.get("stock"):
        return highest if config.get("path") in ("ve", "edm") else 1.0
    c = own(config)
    total = math.hypot(highest, 1.0)
    if c["stock"] in _VE_SAMPLES:
        start = total if c["timestep_spacing"] == "leading" else highest
        return start if c["path"] == "edm" else 1.0 if start == total else start / total
    return total if c["path"] == "edm" else 1.0


def end_scale(config: Mapping[str, Any], levels: Sequence[float]) -> float:
    """Returns what the result is multiplied with to be the class's own: Euler and its kin hand on ``x0 + sigma eps``.

    Args:
        config: a configuration from `translate`, or a plain one.
        levels: the grid in the convention of `levels`; the last is read.
    """
    return math.hypot(levels[-1], 1.0) if config.get("stock") in _VE_SAMPLES and config["path"] == "vp" else 1.0


def _rhos(c: Config) -> Array:
    """sigma/alpha at the discrete times, with the class's own treatment of zero terminal SNR."""
    rescale, scale = bool(c.get("rescale_betas_zero_snr")), c.get("snr_shift_scale")
    rhos = np.array(paths.vp(_betas(c, rescale and scale is None)).rhos)
    if scale is not None:
        rhos *= math.sqrt(scale)
        if rescale:
            bar = _to_zero(1.0 / (1.0 + rhos**2))
            with np.errstate(divide="ignore"):
                rhos = np.sqrt((1.0 - bar) / bar)
    if rescale and c.get("stock") in _FINITE:
        rhos[-1] = math.sqrt((1.0 - _LAST_ALPHA) / _LAST_ALPHA)
    return rhos


def _betas(c: Config, rescale: bool) -> list[float]:
    total, schedule = c.get("num_train_timesteps", 1000), c.get("beta_schedule")
    if c.get("trained_betas") is not None:
        betas = np.asarray([float(b) for b in c["trained_betas"]])
    elif schedule in _ALPHA_BARS:
        bar = _ALPHA_BARS[schedule](np.arange(total + 1) / total)
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        given = {k: c[f"beta_{k}"] for k in ("schedule", "start", "end") if f"beta_{k}" in c}
        betas = np.asarray(paths.betas(**given, count=total))
    if rescale:
        bar = _to_zero(np.asarray(np.cumprod(1.0 - betas)))
        betas = 1.0 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return [float(b) for b in betas]


def _to_zero(bar: Array) -> Array:
    """Moves the last alpha^2 to 0 and keeps the first (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(bar)
    return np.asarray(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)


def _exp(u: Array) -> Array:
    return np.exp(-12.0 * u)


def _laplace(u: Array) -> Array:
    snr = np.exp(-0.5 * np.where(u <= 0.5, 1.0, -1.0) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
    return np.asarray(np.sqrt(snr / (1 + snr)))


# Schedules of HeunDiscreteScheduler ("exp") and DDPMScheduler ("laplace"), by alpha^2 at u = t / num_train_timesteps.
_ALPHA_BARS: Final = {"exp": _exp, "laplace": _laplace}

"""The lists that put a stock scheduler of diffusers on an exact grid.

A stock class takes ``sigmas=`` or ``timesteps=`` and then shifts, stretches, truncates or completes them in its own way. That is
undone here, from the live scheduler alone, and the result is tried on a copy of it: what is returned lands on the grid.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flowkit import spacing
from flowkit.levels import Levels, short

# Their sigmas are the levels themselves, the one where the run ends among them, whatever the configuration says.
_WHOLE_GRID = ("EulerDiscreteScheduler", "LTXEulerAncestralRFScheduler")
# What does not take a plain list: arithmetic is done on it as it comes.
_KINDS: Mapping[str, Callable[[list[float]], Any]] = {
    "UniPCMultistepScheduler": np.array,
    "EDMEulerScheduler": lambda values: torch.tensor(values, dtype=torch.float64),
}
_RESPACED = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
_CLASSES = {"flow": "FlowMatchEulerDiscreteScheduler", "vp": "EulerDiscreteScheduler", "edm": "EDMEulerScheduler"}
_NEAR = 0.01  # of a model time: float32 betas put a level this far, or a tenth of it, beside its time


def find(grid: Levels, scheduler: Any, mu: float | None = None) -> dict[str, Any]:  # noqa: ANN401
    """Returns the keyword argument that makes a stock scheduler take exactly the levels of a grid.

    The argument is for ``scheduler.set_timesteps`` and for pipelines that take it. A list, but for UniPC an array and for
    EDMEulerScheduler a tensor, because these take no lists.

    Args:
        grid: on the scheduler's path; see `Levels.on`.
        scheduler: the very instance that will run, since its configuration decides; it is left as it was.
        mu: what the pipeline or the caller passes as ``mu``; needed, and read, only with use_dynamic_shifting.

    Returns:
        ``{"sigmas": ...}``, or ``{"timesteps": ...}`` for classes that take only those.

    Raises:
        TypeError: for something that is no scheduler.
        ValueError: for a class or a configuration that cannot be put on the grid; says why and what can.
    """
    if not callable(getattr(scheduler, "set_timesteps", None)) or not hasattr(scheduler, "config"):
        raise TypeError(f"expected a scheduler of diffusers, got {scheduler!r:.80}; pass pipe.scheduler")
    name, config, path = type(scheduler).__name__, _config(scheduler), _path(scheduler)
    if callable(getattr(scheduler, "set_grid", None)):
        raise ValueError(f"{name} takes the grid itself; call scheduler.set_grid(grid)")
    taken = inspect.signature(scheduler.set_timesteps).parameters
    on_flow = config.get("use_flow_sigmas")  # None where the class has no such choice
    by_level = "sigmas" in taken and on_flow is not False
    by_time = "timesteps" in taken and hasattr(scheduler, "alphas_cumprod") and not on_flow
    if not by_level and not by_time:
        given = "" if on_flow is None else f" with use_flow_sigmas={on_flow}"
        raise ValueError(f"{name}{given} takes neither sigmas nor timesteps for its levels; {_cure(path)}")
    if grid.path != path:
        raise ValueError(f"the grid belongs to the path {grid.path!r}, {name} walks {path!r}; use grid.on({path!r})")
    whole_grid = _is(scheduler, *_WHOLE_GRID)
    if not whole_grid:
        _check(grid, name, config, mu)
    if by_level and math.isinf(grid.sigmas[0]):
        raise ValueError(f"{name} cannot start at an infinite level; start the grid at a finite one, such as 4096")
    if whole_grid:
        values = list(grid.sigmas)
    elif by_level and _is(scheduler, "EDMEulerScheduler"):
        values = _ramp(grid.sigmas[:-1], config)
    elif by_level:
        values = spacing.shift(np.array(grid.sigmas[:-1]), 1 / _factor(scheduler, mu)).tolist()
        if _is(scheduler, "UniPCMultistepScheduler"):
            # It truncates its times: none may fall below a whole one by rounding.
            values = [min(1.0, v * (1 + 1e-12)) for v in values]
    else:
        values = _times(grid.sigmas[:-1], scheduler)
    convert = next((kind for key, kind in _KINDS.items() if _is(scheduler, key)), list)
    found = {"sigmas" if by_level else "timesteps": convert(values)}
    _prove(grid, scheduler, found, mu if config.get("use_dynamic_shifting") and "mu" in taken else None)
    return found


def _is(scheduler: Any, *names: str) -> bool:  # noqa: ANN401
    """Whether a scheduler is, or derives from, a class of one of these names."""
    return any(parent.__name__ in names for parent in type(scheduler).__mro__)


def _config(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    """What the class reads of its configuration, which also carries the keys of the class that it came from."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return {k: v for k, v in scheduler.config.items() if k in known}


def _path(scheduler: Any) -> str:  # noqa: ANN401
    """Name of the path whose levels the scheduler calls sigmas."""
    config = _config(scheduler)
    if _is(scheduler, "IPNDMScheduler", "CosineDPMSolverMultistepScheduler"):
        return "cosine"
    if hasattr(scheduler, "precondition_noise") or (
        config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    ):
        return "edm"
    return "vp" if hasattr(scheduler, "alphas_cumprod") and not config.get("use_flow_sigmas") else "flow"


def _cure(path: str) -> str:
    stock = f"use {_CLASSES[path]}, or" if path in _CLASSES else "use"
    return f"{stock} flowkit.RectifiedFlowScheduler.from_config(scheduler) with set_grid"


def _check(grid: Levels, name: str, config: Mapping[str, Any], mu: float | None) -> None:
    """Raises ValueError for configurations that no list can overcome."""
    for flag in _RESPACED:
        if config.get(flag):
            raise ValueError(f"{name} with {flag}=True respaces whatever list it is given; set it to False")
    if config.get("sigma_schedule", "karras") != "karras":
        raise ValueError(f"{name} with sigma_schedule={config['sigma_schedule']!r} reads no list; set it to 'karras'")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} with invert_sigmas=True runs from 0 to 1, which is no grid; set it to False")
    if config.get("use_dynamic_shifting") and (mu is None or not math.isfinite(mu)):
        raise ValueError(f"{name} with use_dynamic_shifting=True needs a number mu, got {mu}; pass the pipeline's own")
    terminal = config.get("shift_terminal")
    if terminal and not math.isclose(grid.sigmas[-2], terminal, rel_tol=1e-5):
        raise ValueError(
            f"{name} with shift_terminal={terminal} makes that its last level before the end, the grid has "
            f"{grid.sigmas[-2]:.6g}; use grid.stretched({terminal}), or set shift_terminal to None"
        )


def _factor(scheduler: Any, mu: float | None) -> float:  # noqa: ANN401
    """The k of the scheduler's own shift, ``k s / (1 + (k - 1) s)``."""
    config = _config(scheduler)
    if config.get("use_dynamic_shifting"):
        amount = mu or 0.0
        k = amount if config.get("time_shift_type") == "linear" else math.exp(min(amount, 700.0))
    else:
        k = vars(scheduler).get("_shift") or config.get("shift") or config.get("flow_shift") or 1.0
    if not k > 0:
        raise ValueError(f"{type(scheduler).__name__} cannot shift its levels by {k:g}; give a positive amount")
    return float(k)


def _ramp(levels: Sequence[float], config: Mapping[str, Any]) -> list[float]:
    """Positions on the class's own karras curve, which is what it takes for sigmas; the inverse of `spacing.karras`."""
    power = 1 / config.get("rho", 7.0)
    low, high = config["sigma_min"] ** power, config["sigma_max"] ** power
    return [(high - v**power) / (high - low) for v in levels]


def _times(levels: Sequence[float], scheduler: Any) -> list[float]:  # noqa: ANN401
    """Model times at VP levels, whole but for Heun, which interpolates linearly in sigma/alpha."""
    bar = scheduler.alphas_cumprod.double().cpu().numpy()
    with np.errstate(divide="ignore"):
        rhos = np.sqrt((1 - bar) / bar)
    times = np.interp(levels, rhos, np.arange(len(rhos)))
    near = np.abs(times - times.round()) < _NEAR
    if not near.all() and not _is(scheduler, "HeunDiscreteScheduler"):
        i = int(np.argmin(near))
        raise ValueError(
            f"{type(scheduler).__name__} takes whole model times only, level {levels[i]:.6g} of step {i} lies at {times[i]:.2f}; "
            "use grid.at_whole_times(path)"
        )
    return [int(t.round()) if whole else float(t) for t, whole in zip(times, near, strict=True)]


def _prove(grid: Levels, scheduler: Any, found: Mapping[str, Any], mu: float | None) -> None:  # noqa: ANN401
    """Raises ValueError where the scheduler does not end up on the grid."""
    name, trial = type(scheduler).__name__, copy.deepcopy(scheduler)
    times = found.get("timesteps", ())
    try:
        trial.set_timesteps(**found, **({} if mu is None else {"mu": mu}))
        levels, clock = _taken(trial)
    except (ValueError, TypeError, AttributeError, AssertionError, LookupError, RuntimeError) as error:
        raise ValueError(f"{name} refuses the list of this grid ({error}); {_cure(grid.path)}") from error
    tolerance = 1e-3 if times else 1e-5
    if len(levels) != len(grid.sigmas):
        raise ValueError(f"{name} makes {len(levels) - 1} steps of the {len(grid)} of the grid; {_cure(grid.path)}")
    wrong = [i for i, pair in enumerate(zip(levels, grid.sigmas, strict=True)) if not _close(*pair, tolerance)]
    if wrong == [len(grid)]:
        ends = f"{name} ends its runs at level {levels[-1]:.6g}, the grid at {grid.sigmas[-1]:.6g}"
        late = _config(trial).get("final_sigmas_type") == "sigma_min"
        cure = "set final_sigmas_type to 'zero'" if late else "end the grid there"
        raise ValueError(f"{ends}; {cure}")
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"{name} takes level {levels[i]:.6g} for {grid.sigmas[i]:.6g} of step {i}, whatever the list; {_cure(grid.path)}"
        )
    slack = 1e-4 if grid.path == "edm" else _NEAR
    if grid.timesteps and any(abs(a - b) > slack for a, b in zip(clock, grid.timesteps, strict=True)):
        raise ValueError(
            f"{name} calls the model at times {short(clock)}, the grid at {short(grid.timesteps)}; "
            "drop them with dataclasses.replace(grid, timesteps=None)"
        )


def _close(level: float, wanted: float, tolerance: float) -> bool:
    # A class that keeps zero terminal SNR finite starts at alpha^2 = 2^-24.
    return math.isclose(level, wanted, rel_tol=tolerance, abs_tol=1e-9) or (math.isinf(wanted) and level > 4000)


def _taken(scheduler: Any) -> tuple[list[float], list[float]]:  # noqa: ANN401
    """Levels (N + 1) and model times (N) of a scheduler; of Heun's two calls a step the first."""
    times = scheduler.timesteps.double().tolist()
    if not hasattr(scheduler, "sigmas"):
        last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).reshape(1)
        bar = torch.cat([scheduler.alphas_cumprod.cpu()[scheduler.timesteps], last.cpu()]).double()
        return ((1 - bar) / bar).sqrt().tolist(), times
    levels = scheduler.sigmas.double().tolist()
    if scheduler.order == 2:
        levels, times = [levels[0], *levels[1:-1:2], levels[-1]], times[:1] + times[1::2]
    return levels, times[: len(levels) - 1]  # LTX lists the time of the end too

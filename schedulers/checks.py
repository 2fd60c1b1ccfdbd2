"""Values of a configuration that are of a wrong kind: files are edited by hand, and a step is no place to find out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

from flowkit.grids import BOUNDED

# What is read as a number: least and largest value, and whether it is a whole one.
_NUMBERS: Final[dict[str, tuple[float, float, bool]]] = {
    **dict.fromkeys(("num_train_timesteps", "original_inference_steps"), (1, 1e6, True)),
    **dict.fromkeys(("solver_order", "predictor_order"), (1, 9, True)),
    "steps_offset": (0, 1e6, True),
    "seed": (-(2**63), 2**64 - 1, True),
    **dict.fromkeys(("beta_start", "beta_end", "dynamic_thresholding_ratio", "shift_terminal"), (0, 1, False)),
    **dict.fromkeys(("snr_shift_scale", "rho", "sigma_data"), (1e-9, 1e9, False)),
    **dict.fromkeys(("sigma_min", "sigma_max", "clip_sample_range", "sample_max_value"), (0, 1e9, False)),
    **dict.fromkeys(("shift", "flow_shift"), (-1e9, 1e9, False)),
    "lambda_min_clipped": (-math.inf, math.inf, False),
    **dict.fromkeys(("eta", "s_churn", "s_tmin", "s_noise"), (-1e9, 1e9, False)),
    "s_tmax": (-1e9, math.inf, False),
}
_WORDS: Final = (
    *("path", "prediction_type", "solver", "gauge", "noise", "stock"),
    *("beta_schedule", "time_shift_type", "variance_type"),
)


def check_kinds(values: Mapping[str, Any], optional: Mapping[str, Any], owner: str) -> None:
    """Refuses values of a wrong kind or out of range.

    Args:
        values: a configuration; keys that are not read as numbers or words pass.
        optional: the defaults; where one is None, None is a value.
        owner: name of the class, for the message.

    Raises:
        ValueError: naming the key, its value, and what is wanted.
    """
    for key, value in values.items():
        if value is None and optional.get(key, 0) is None:
            continue
        if key in _NUMBERS:
            low, high, whole = _NUMBERS[key]
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not low <= value <= high or (whole and value != int(value)):
                kind = "whole number" if whole else "number"
                raise ValueError(f"{owner} with {key}={value!r:.60}: not a {kind} from {low:g} to {high:g}; correct it")
        elif key in _WORDS and not isinstance(value, str):
            raise ValueError(f"{owner} with {key}={value!r:.60}: not a name; correct it")
        elif key == "trained_betas" and not _is_list(value):
            raise ValueError(f"{owner} with {key}={value!r:.60}: not a list of numbers; correct it")
        elif key == "disable_corrector" and not _is_list(value):
            raise ValueError(f"{owner} with {key}={value!r:.60}: not a list of steps; correct it")


# What counts whatever class is imitated.
_ALWAYS: Final = frozenset(
    (
        "solver",
        "gauge",
        "grid",
        "eta",
        "s_churn",
        "s_tmin",
        "s_tmax",
        "s_noise",
        "noise",
        "seed",
        "debug",
        "prediction_type",
    )
)


def check_knobs(knobs: Mapping[str, Any], own: Iterable[str], stock: str | None, theirs: Mapping[str, Any]) -> None:
    """Refuses knobs that would have no effect.

    Args:
        knobs: what the caller gave.
        own: parameters of our scheduler.
        stock: name of the imitated class, None for none.
        theirs: its parameters.

    Raises:
        ValueError: for a knob that neither has, or that is ours but nothing reads while the class is imitated.
    """
    known = {*own, *theirs}
    if unknown := sorted(set(knobs) - known):
        raise ValueError(f"unknown knob {unknown[0]!r} = {knobs[unknown[0]]!r}; choose from {', '.join(sorted(known))}")
    read = {*_ALWAYS, *theirs, *(("sigma_min", "sigma_max") if knobs.get("grid") in BOUNDED else ()), "variance_type"}
    if stock and (idle := sorted(set(knobs) - read)):
        raise ValueError(
            f"{stock} does not read {idle[0]}={knobs[idle[0]]!r}; leave it out, or choose from {', '.join(sorted(read))}"
        )


def _is_list(value: Any) -> bool:  # noqa: ANN401
    """Whether a value is a sequence of numbers, arrays and tensors among them."""
    if isinstance(value, str) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
        return False
    try:
        return all(math.isfinite(float(v)) for v in value)
    except (TypeError, ValueError):
        return False

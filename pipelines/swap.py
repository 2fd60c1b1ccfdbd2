"""The scheduler to sample with: the model's own, ours in its place, or a class of diffusers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from flowkit.grids import Grid
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.schedulers.saving import stock_config


def make(current: Any, choice: str, knobs: Mapping[str, Any], eta: float | None = None) -> Any:  # noqa: ANN401
    """Returns the scheduler to sample with.

    Args:
        current: the model's own scheduler, or its configuration.
        choice: "flowkit" (ours from the configuration of the model's own, with keyed noise), "keep" (the model's own as it is) or
            a scheduler class of diffusers (from that configuration).
        knobs: of the scheduler that is made.
        eta: noise of stochastic steps, for a class that takes it at construction; of others, every step is told by the pipeline.

    Raises:
        ValueError: for an unknown class, one for another path or prediction type than the model's, a knob that it does not have,
            or a configuration that ours refuses.
    """
    if choice == "keep":
        if knobs:
            raise ValueError(
                f"{next(iter(knobs))} changes the scheduler, and scheduler 'keep' leaves it as it is; drop one of them"
            )
        return current
    kind = RectifiedFlowScheduler if choice == "flowkit" else stock_class(choice)
    known = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    if eta is not None and "eta" in knobs:
        raise ValueError(f"eta is given twice, as {eta:g} and among the knobs as {knobs['eta']}; drop one of them")
    if eta is not None and "eta" in known:
        knobs = {**knobs, "eta": eta}
    if choice == "flowkit":
        try:
            return kind.from_config(current, **{"noise": "keyed", **knobs})
        except ValueError as error:
            raise ValueError(f"{error} (scheduler 'keep' samples with the model's own)") from error
    if unknown := sorted(knobs.keys() - known):
        raise ValueError(f"{choice} has no {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    config = current if isinstance(current, Mapping) else {**current.config, "_class_name": type(current).__name__}
    if config.get("_class_name") == RectifiedFlowScheduler.__name__:
        config = stock_config(RectifiedFlowScheduler.from_config(config))[1]
    made = kind.from_config({k: v for k, v in config.items() if k != "flowkit"}, **knobs)
    model, other = _walks(current), _walks(made)
    if model and other and model != other:
        raise ValueError(f"the model predicts {model[1]} on the path {model[0]!r}, {choice} would take it for {other[1]} on "
                         f"{other[0]!r}; choose a class for its path, or flowkit")  # fmt: skip
    return made


def _walks(scheduler: Any) -> tuple[str, str] | None:  # noqa: ANN401
    """Path and prediction type of the model behind a scheduler or configuration; None where ours cannot say."""
    try:
        ours = RectifiedFlowScheduler.from_config(scheduler, solver="euler")
    except ValueError:
        return None
    return ours.path.name, str(ours.config["prediction_type"])


def stock_class(name: str) -> Any:  # noqa: ANN401
    """Returns a scheduler class of diffusers by name.

    Raises:
        ValueError: where there is none of that name.
    """
    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
        return kind
    near = difflib.get_close_matches(name, [n for n in dir(diffusers) if n.endswith("Scheduler")], 1, 0.0)[0]
    raise ValueError(f"unknown scheduler {name!r}; choose flowkit, keep, or a class of diffusers such as {near}")


def steps(scheduler: Any, asked: int | None) -> int | None:  # noqa: ANN401
    """Returns the number of steps to ask the pipeline for: those of the scheduler's exact grid, if it has one.

    Args:
        scheduler: ours or stock.
        asked: by the user; None means not.

    Raises:
        ValueError: where the grid has another number.
    """
    grid = getattr(scheduler, "grid", None)
    if not isinstance(grid, Grid):
        return asked
    if asked is not None and asked != len(grid):
        raise ValueError(f"{asked} steps are asked for, and the grid has {len(grid)}; leave out the number, or choose another "
                         "grid such as uniform")  # fmt: skip
    return len(grid)

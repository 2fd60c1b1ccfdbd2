"""How straight a flow's paths are, and how far they carry.

With a path from Z_0 to Z_1 over t in [0, 1] and velocity v (Liu, Gong & Liu 2023, section 3)

    straightness    S = int_0^1 E |(Z_1 - Z_0) - v(Z_t, t)|^2 dt,    zero where every path is a line run at constant speed,
    transport cost  E |Z_1 - Z_0|^2,                                 which a rectification never raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowkit.eval.intervals import Figure


def straightness(
    states: Sequence[Tensor], times: Sequence[float], velocities: Sequence[Tensor] | None = None
) -> Figure:
    """Returns S of recorded paths.

    The run of a flow pipeline that `flowkit.Recorder` kept with one evaluation a step (Euler) is
    ``straightness(t.states, [*t.sigmas, 0.0], t.outputs)``. Paths of a diffusion model whose sample is ``a x0 + s eps`` are
    judged as states ``x / a`` with times ``s / a`` and the predicted noise as velocity: there its first-order paths are lines.

    Args:
        states: N + 1 tensors (B, ...) along the paths, N >= 1.
        times: of the states, rising or falling all the way.
        velocities: the derivative of the state by time at each of the first N states, N tensors (B, ...); the integral is then
            the sum of the steps' lengths times the integrand at their beginnings. None takes each step's own chord.

    Returns:
        S, in the squared unit of the states, summed over a sample's elements, for the whole span of times as unit of time; its
        standard error over samples, NaN for a single one. The details hold "relative", S over the transport cost (NaN where
        nothing moved), and "transport_cost".

    Raises:
        ValueError: for numbers of tensors or shapes that do not fit, times that turn back, or values that are not finite.
    """
    t = torch.tensor(list(times), dtype=torch.float64)
    steps = t.diff()
    if len(states) < 2 or len(t) != len(states) or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"got {len(states)} states and times {list(times)}; give at least 2 states, and a time for each, all "
                         "rising or all falling")  # fmt: skip
    shapes = {tuple(x.shape) for x in (*states, *(velocities or ()))}
    if len(shapes) > 1 or (velocities is not None and len(velocities) != len(steps)):
        count = "no" if velocities is None else len(velocities)
        raise ValueError(f"got {len(states)} states and {count} velocities of shapes {sorted(shapes)}; give one velocity for each "
                         "state but the last, all of one shape")  # fmt: skip
    span, whole = float(t[-1] - t[0]), _flat(states[-1]) - _flat(states[0])
    total = torch.zeros(len(whole), dtype=torch.float64)
    for k, step in enumerate(steps.tolist()):
        chord = (_flat(states[k + 1]) - _flat(states[k])) / step if velocities is None else _flat(velocities[k])
        total += (whole - span * chord).square().sum(dim=1) * (step / span)
    cost = transport_cost(states[0], states[-1]).value
    figure = _figure(total)
    details = {"relative": figure.value / cost if cost else math.nan, "transport_cost": cost}
    return Figure(figure.value, figure.se, details)


def transport_cost(starts: Tensor, ends: Tensor) -> Figure:
    """Returns the mean of ``|end - start|^2`` over samples, summed over a sample's elements, and its standard error.

    Args:
        starts: (B, ...).
        ends: of the same paths, (B, ...).

    Raises:
        ValueError: for shapes that differ, no samples, or values that are not finite.
    """
    if starts.shape != ends.shape or not starts.ndim or not len(starts):
        raise ValueError(
            f"got starts of shape {tuple(starts.shape)} and ends of {tuple(ends.shape)}; give one end for each start"
        )
    return _figure((_flat(ends) - _flat(starts)).square().sum(dim=1))


def _flat(x: Tensor) -> Tensor:
    return x.detach().cpu().double().reshape(len(x), -1)


def _figure(values: Tensor) -> Figure:
    if not values.isfinite().all():
        raise ValueError(
            f"sample {int((~values.isfinite()).nonzero()[0])} holds NaN or infinity; look at its path first"
        )
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Figure(float(values.mean()), se)

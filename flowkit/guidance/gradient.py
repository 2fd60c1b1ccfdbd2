"""Guidance by the gradient of an energy: classifiers, observations, rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from flowkit.guidance.checks import finite, number
from flowkit.hooks.parts import Evaluation, Part

Energy = Callable[[Tensor, float, Mapping[str, Any]], Tensor]


class GradientGuidance(Part):
    """Moves each prediction of the data down the gradient of an energy E, lower being better:

        x0_hat <- x0_hat - strength k grad E.

    Three ways to take the gradient make the common methods of it:

    ``at="x0"``: of ``E(x0_hat)`` with respect to x0_hat, k = 1. No derivative of the network; for energies of clean data.

    ``at="x"``: of ``E(x)`` with respect to the noisy sample, ``k = sigma^2 / alpha``. With ``E = -log p(y | x)`` it is classifier
    guidance, ``eps <- eps + sigma grad E`` (Dhariwal & Nichol 2021, equation 14, with strength as its scale), and exact for an
    exact classifier of noisy data.

    ``through_network=True``: of ``E(x0_hat(x))`` with respect to x, through the network, ``k = sigma^2 / alpha``: diffusion
    posterior sampling (Chung et al. 2022, arXiv 2209.14687) and the observation self-guidance of TSDiff (Kollovieh et al. 2023,
    arXiv 2307.11494). On an exact network k times the Jacobian is the covariance of the data given x, so the step is as large
    as the data is uncertain.

    Nothing is changed at sigma = 0, where the sample is the data. Nothing is changed at alpha = 0 either, save with
    ``at="x0"``: there x is pure noise, which tells nothing of the data, the gradient vanishes as fast as k grows, and their
    product is not in reach of a derivative. That is the first evaluation of most flow pipelines, and no other.

    Args:
        energy: called with the point (B, C, ...), in at least float32; the noise level in diffusers' ``sigmas`` (flow time on the
            flow path, sigma/alpha on every other); and the network's arguments for the conditional rows, by name. Returns (B,),
            differentiable in the point. With ``at="x"`` the point is the noisy sample in the path's coordinates.
        strength: any finite number; negative ones move up.
        at: "x0" or "x".
        through_network: whether the gradient is taken through the network, which costs its backward pass and the memory for it.

    Raises:
        TypeError: for an energy that cannot be called, or a strength that is not a number.
        ValueError: for a strength that is not finite, an unknown ``at``, or ``through_network`` with ``at="x"``.
    """

    def __init__(
        self, energy: Energy, strength: float = 1.0, at: Literal["x0", "x"] = "x0", through_network: bool = False
    ) -> None:
        if not callable(energy):
            raise TypeError(f"energy must be a function of (x, sigma, conditioning), got {energy!r}; pass a callable")
        if at not in ("x0", "x"):
            raise ValueError(f"unknown at={at!r}; choose x0 or x")
        if through_network and at == "x":
            raise ValueError(
                "through_network=True takes an energy of x0_hat, and at='x' one of the noisy sample; use at='x0'"
            )
        self.energy = energy
        self.strength = finite("strength", strength, "give a number such as 1")
        self.at = at
        self.through_network = bool(through_network)

    def edit(self, evaluation: Evaluation, cond: Tensor) -> Tensor | None:
        """Returns the change of the network's output that moves x0_hat, in its dtype; None at the ends named above.

        Raises:
            ValueError: in ``torch.inference_mode``; where the scheduler's path is not known, x0 is not determined, or the energy
                does not return (B,), is NaN or has NaN in its gradient, or does not depend on the point.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("no gradient can be taken in torch.inference_mode; call the pipeline without it, which itself turns "
                             "gradients off")  # fmt: skip
        level = evaluation.level
        if level is None:
            raise ValueError(
                "GradientGuidance needs the scheduler's path, which is not known; swap in a RectifiedFlowScheduler"
            )
        in_x = self.through_network or self.at == "x"
        if level.sigma == 0 or (in_x and level.alpha == 0):
            return None
        sigma = level.path.level(level.s)
        with torch.enable_grad():  # pipelines run without
            if self.through_network:
                x, point = evaluation.x, evaluation.to(cond, "x0")
            else:
                start = evaluation.x if self.at == "x" else evaluation.to(cond, "x0")
                x = point = start.detach().to(torch.promote_types(start.dtype, torch.float32)).requires_grad_()
            values = self._energy(point, sigma, evaluation.conditioning)
            (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"the energy {_name(self.energy)} does not depend on its first argument; compute it from that"
            )
        if bool(values.isnan().any() | gradient.isnan().any()):
            raise ValueError(f"the energy {_name(self.energy)} or its gradient is NaN at noise level {sigma:g}; "
                             "look for a logarithm or a root of 0 in it")  # fmt: skip
        k = level.sigma**2 / level.alpha if in_x else 1.0
        return evaluation.delta(-self.strength * k * gradient, "x0").to(cond.dtype)

    def _energy(self, point: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        values = self.energy(point, sigma, conditioning)
        if not isinstance(values, Tensor) or values.shape != point.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"the energy {_name(self.energy)} returned {got} for {len(point)} samples; return a tensor of shape "
                             f"({len(point)},), one number a sample")  # fmt: skip
        if not values.requires_grad:
            raise ValueError(f"the energy {_name(self.energy)} has no gradient; compute it with torch from its first argument, "
                             "without detach or no_grad")  # fmt: skip
        return values


class ByLevel:
    """An energy that is one of several by noise level, such as experts that were each trained for a range of it.

    Args:
        experts: pairs of the highest noise level, in the unit of the energies' ``sigma``, and the energy for levels up to and
            with it and above the one before; increasing, the last may be ``math.inf``.

    Raises:
        ValueError: for no experts, or levels that do not increase.
    """

    def __init__(self, experts: Sequence[tuple[float, Energy]]) -> None:
        self.experts = [(number("a noise level", high, "give the highest one"), energy) for high, energy in experts]
        levels = [high for high, _ in self.experts]
        if not levels or any(b <= a for a, b in pairwise(levels)):
            raise ValueError(f"the experts' noise levels must increase, got {levels}; sort them, the cleanest first")

    def __call__(self, x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        """Returns the energy of the expert for ``sigma``.

        Raises:
            ValueError: for a level above the last expert's.
        """
        for high, energy in self.experts:
            if sigma <= high:
                return energy(x, sigma, conditioning)
        raise ValueError(
            f"no expert for noise level {sigma:g}; the last one ends at {self.experts[-1][0]:g}: give it math.inf"
        )


def _name(energy: Energy) -> str:
    return repr(getattr(energy, "__name__", type(energy).__name__))

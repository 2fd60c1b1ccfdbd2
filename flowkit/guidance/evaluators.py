"""Evaluators of `flowkit.guidance.dynamic.DynamicGuidance` in closed form or from outside; higher scores are better.

The trained ones are in `flowkit.guidance.latent_evaluators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Evaluator(Protocol):
    """Scores predictions of x0, any callable of this form.

    It may also have ``reliability(sigma: float) -> float``, >= 0: how well it tells good from bad at a noise level, the weight of
    its scores there (absent: 1). And ``best(cond_x0, uncond_x0) -> Tensor (B,)``, the guidance scale at which its score is highest,
    if that has a closed form.
    """

    def __call__(self, x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        """Returns one score a sample, (B,).

        Args:
            x0: predictions, (B, ...), at least float32.
            sigma: noise level that they were made at, in diffusers' ``sigmas``.
            conditioning: the network's arguments by name, each with B rows.
        """


class Quadratic:
    """The negative squared distance to a target, ``-|x0 - target|^2``: guidance towards a reference.

    On the line ``x0(s) = x0_u + s (x0_c - x0_u)`` it is highest at ``s* = <target - x0_u, x0_c - x0_u> / |x0_c - x0_u|^2``, so
    ``DynamicGuidance(Quadratic(target), scales=None)`` needs no candidates.

    Args:
        target: shape of one sample, or (B, ...) with one for each sample of the batch.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        """Returns ``-|x0 - target|^2``, (B,), of x0, (B, ...); sigma and conditioning are not read."""
        return -(x0 - self._like(x0)).square().flatten(1).sum(1)

    def best(self, cond_x0: Tensor, uncond_x0: Tensor) -> Tensor:
        """Returns s*, (B,); 1 where both predictions agree and every scale is as good.

        Args:
            cond_x0: conditional prediction of x0, (B, ...).
            uncond_x0: unconditional prediction, same shape.
        """
        line = (cond_x0 - uncond_x0).flatten(1)
        along = ((self._like(uncond_x0) - uncond_x0).flatten(1) * line).sum(1)
        square = line.square().sum(1)
        return torch.where(square == 0, 1.0, along / square)

    def _like(self, x0: Tensor) -> Tensor:
        """The target of each row: candidates come one batch after the other."""
        target = self.target.to(x0.device, x0.dtype)
        if target.shape == x0.shape[1:]:
            return target
        if target.shape[1:] != x0.shape[1:] or len(x0) % len(target):
            raise ValueError(f"the target has shape {tuple(target.shape)}, the predictions {tuple(x0.shape)}; give a target of one "
                             "sample's shape, or one for each sample of the batch")  # fmt: skip
        return target.repeat(len(x0) // len(target), *[1] * (target.ndim - 1))


class DecodedReward:
    """A reward of images: predictions of x0 are decoded first, which costs a decoder call for every candidate.

    Args:
        decode: x0, (B, ...), to images; `vae_decoder` makes one of a diffusers VAE.
        reward: (images, conditioning) to scores, (B,), higher is better; conditioning as in `Evaluator`.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor], reward: Callable[[Tensor, Mapping[str, Any]], Tensor]
    ) -> None:
        self.decode, self.reward = decode, reward

    def __call__(self, x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        """Returns the rewards of the decoded predictions, (B,)."""
        return self.reward(self.decode(x0), conditioning)


def vae_decoder(vae: Any) -> Callable[[Tensor], Tensor]:  # noqa: ANN401
    """Returns the function from a pipeline's latents, (B, C, H, W), to images in [0, 1], (B, 3, 8 H, 8 W).

    Undoes the scaling of the pipelines first: ``z / scaling_factor + shift_factor``, or ``z std / scaling_factor + mean`` where the
    VAE has ``latents_mean`` and ``latents_std``. ``vae.enable_slicing()`` limits the memory to one image's.

    Args:
        vae: a diffusers ``AutoencoderKL``.

    Raises:
        ValueError: for a VAE without ``scaling_factor``: others scale in ways of their own.
    """
    config = vae.config
    factor = getattr(config, "scaling_factor", None)
    if not isinstance(factor, int | float):
        raise ValueError(
            f"{type(vae).__name__} has scaling_factor {factor!r}; write decode(x0) as its pipeline does and pass that"
        )
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    shift = getattr(config, "shift_factor", None) or 0.0

    def decode(x0: Tensor) -> Tensor:
        if mean is not None and std is not None:
            z = x0 * x0.new_tensor(std).view(1, -1, 1, 1) / factor + x0.new_tensor(mean).view(1, -1, 1, 1)
        else:
            z = x0 / factor + shift
        images: Tensor = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    return decode

"""From images to what a pipeline's network denoises: pixels as they are, or latents scaled and packed as the pipeline has them.

That it is done as the pipeline does is not taken on trust: before the training the pipeline is run with one of our latents as its
last state, and must hand its decoder what the encoder returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowkit.distill.observe import under
from flowkit.hooks import Part
from flowkit.pipelines.sampling import Arguments, Inputs, sample_outputs
from flowkit.schedulers import RectifiedFlowScheduler

Noise = Callable[..., Tensor]  # (*shape) -> (b, *shape)


class Encoder:
    """Images to samples of a pipeline.

    Args:
        pipe: the pipeline; without a ``vae`` its samples are the images.
        shape: of a sample, as ``scheduler.step`` sees it.

    Raises:
        ValueError: for a ``vae`` of a kind that is not known.
    """

    def __init__(self, pipe: Any, shape: tuple[int, ...]) -> None:  # noqa: ANN401
        self._pipe, self._shape, self._name = pipe, shape, type(pipe).__name__
        self._vae: Any = getattr(pipe, "vae", None)
        self._pack = getattr(pipe, "_pack_latents", None)
        wanted = ["latents", "batch_size", "num_channels_latents", "height", "width"]
        if self._pack is not None and list(inspect.signature(self._pack).parameters)[:5] != wanted:
            raise ValueError(f"{self._name} packs its latents in a way of its own; take one that packs like Flux")  # fmt: skip
        if self._vae is not None and not {"scaling_factor", "latents_mean"} & set(self._vae.config):
            raise ValueError(f"the {type(self._vae).__name__} of {self._name} has no scaling_factor; take another")  # fmt: skip

    @torch.no_grad()
    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Encodes images.

        Args:
            images: float32 (b, C, H, W) in [-1, 1].
            noise: draws standard normal noise for these rows; what the encoder gives as a distribution is drawn from.

        Returns:
            Samples, float32 (b, *shape), on the pipeline's device.

        Raises:
            ValueError: where they come out in another shape than the network's.
        """
        device = torch.device(self._pipe.device)
        z = images.to(device)
        if self._vae is not None:
            z = self._scaled(self._latents(z, noise))
        if self._pack is not None:
            z = self._pack(z, *z.shape)
        if tuple(z.shape[1:]) != self._shape:
            raise ValueError(f"images of {tuple(images.shape[1:])} make samples of {tuple(z.shape[1:])}, and {self._name} has "
                             f"{self._shape}; pass size= for the images that it makes, or another model")  # fmt: skip
        return z

    def check(self, image: Tensor, inputs: Inputs, call: Mapping[str, Any]) -> None:
        """Refuses a pipeline that does not decode what was encoded, by running it with two steps.

        Args:
            image: (C, H, W).
            inputs: of the pipeline, see `flowkit.pipelines.sampling.as_inputs`.
            call: arguments shared by all.

        Raises:
            ValueError: where the decoder is given something else.
        """
        drawn: list[Tensor] = []

        def noise(*shape: int) -> Tensor:
            drawn.append(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)))
            return drawn[-1]

        try:
            sample = self(image[None], noise)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"the {type(self._vae).__name__} of {self._name} encodes no single images ({error}); train one of "
                             "images") from error  # fmt: skip
        if self._vae is None:
            return
        wanted = self._latents(image[None].to(sample.device), lambda *shape: drawn[0])
        given = self._decoded(sample, inputs, call)
        given = given.float().reshape(wanted.shape) if given.numel() == wanted.numel() else given
        close = 1e-4 if self._vae.dtype == torch.float32 else 2e-2
        if given.shape != wanted.shape or float((given - wanted).norm()) > close * float(wanted.norm()):
            raise ValueError(f"{self._name} decodes something else than its {type(self._vae).__name__} encodes, so its latents are "
                             "scaled or packed in a way that is not known; train another pipeline")  # fmt: skip

    def _latents(self, images: Tensor, noise: Noise) -> Tensor:
        """What the decoder inverts, float32."""
        with torch.no_grad():
            found = self._vae.encode(images.to(self._vae.dtype))
        if not hasattr(found, "latent_dist"):
            latents: Tensor = found.latent if hasattr(found, "latent") else found.latents
            return latents.float()
        mean = found.latent_dist.mean.float()
        drawn: Tensor = mean + found.latent_dist.std.float() * noise(*mean.shape[1:]).to(mean.device)
        return drawn

    def _scaled(self, z: Tensor) -> Tensor:
        config = self._vae.config
        scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (torch.tensor(v, device=z.device).view(1, -1, 1, 1) for v in (mean, std))
            return (z - mean) * scale / std
        return (z - shift) * scale

    def _decoded(self, sample: Tensor, inputs: Inputs, call: Mapping[str, Any]) -> Tensor:
        """What the pipeline gives its decoder where a run ends at a sample."""
        scheduler = RectifiedFlowScheduler.from_config(self._pipe.scheduler, solver="euler", grid="uniform")
        own = self._vae.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            raise _ReachedError(z)

        self._vae.decode = decode
        try:
            with under(self._pipe, scheduler, _End(sample)):
                shared: Arguments = {**call, "num_inference_steps": 2}
                list(sample_outputs(self._pipe, [range(1)], inputs=inputs, call=shared))
        except _ReachedError as reached:
            self._pipe.maybe_free_model_hooks()
            return reached.latents
        finally:
            self._vae.decode = own
        raise ValueError(f"{self._name} made an image without its {type(self._vae).__name__}")


class _ReachedError(Exception):
    """Ends a run of a pipeline at its decoder."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("the decoder was reached")
        self.latents = latents


class _End(Part):
    """Puts a sample in the place of every state."""

    def __init__(self, sample: Tensor) -> None:
        self._sample = sample

    def after_step(self, run: Any, sample: Tensor) -> Tensor:  # noqa: ANN401
        return self._sample.to(sample.dtype).expand_as(sample)

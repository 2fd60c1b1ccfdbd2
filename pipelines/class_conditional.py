"""Class-conditional generation in pixel space: what the embedded models need and diffusers has no pipeline for."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from flowkit import assets, rng, weights
from flowkit.schedulers.rectified_flow import RectifiedFlowScheduler


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of given classes from a class-conditional UNet, under any scheduler.

    The network is called as ``unet(x, t, class_labels=...)``; its label embedding has one row more than there are classes, the
    last one being "no class", for guidance.

    Args:
        unet: a diffusers ``UNet2DModel`` with ``num_class_embeds``, or a `flowkit.analytic.MixtureDenoiser`.
        scheduler: ours or any of diffusers'.
    """

    __module__ = "flowkit"
    model_cpu_offload_seq = "unet"

    def __init__(self, unet: torch.nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Loads a folder or hub repository, from safetensors only; our scheduler and grid come back where it was saved with them.

        Raises:
            FileNotFoundError: for a folder without weights.
            ValueError: for pickled, corrupt or truncated weights.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            weights.check_folder(folder)
            # Read ours at once: the stock class would warn about the key that carries it.
            if "scheduler" not in kwargs and "flowkit" in RectifiedFlowScheduler.load_config(folder / "scheduler"):
                kwargs["scheduler"] = RectifiedFlowScheduler.from_pretrained(folder / "scheduler")
        return super().from_pretrained(str(pretrained_model_name_or_path), use_safetensors=True, **kwargs)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        config = self.unet.config
        return int(config["num_classes"] if "num_classes" in config else config["num_class_embeds"] - 1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Any:  # noqa: ANN401
        """Draws one image a label.

        Args:
            class_labels: classes, each in [0, num_classes), shape (B,); num_classes itself means no class.
            guidance_scale: w of ``u + w (c - u)``; 1 is conditional only and costs one network row an image, otherwise two.
            num_inference_steps: number of steps; None means that of the scheduler's grid, or 16.
            sigmas: levels for the scheduler; None means its own.
            timesteps: model times for the scheduler; None means its own.
            generator: its initial seed, or one for each image, keys the noise (see `flowkit.rng`): an image does not depend on the
                batch that it is drawn in. None draws a seed.
            latents: starting noise of unit variance, shape (B, C, H, W); None draws it.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent", the sample in [-1, 1] unclipped.
            return_dict: whether to return an output object or a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": x}) after each step; what it returns under
                "latents" goes on.

        Returns:
            The images, as ``.images`` or the tuple's one element.

        Raises:
            ValueError: for labels out of range, an unknown output type, noise of another shape, or a result with NaN.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; choose 'pil', 'np', 'pt' or 'latent'")
        unet, scheduler, device = self.unet, self.scheduler, self._execution_device
        try:
            labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"class labels must be whole numbers from 0 to {self.num_classes - 1}, got {class_labels!r:.80}"
            ) from error
        if labels.is_floating_point() or not len(labels) or not ((labels >= 0) & (labels <= self.num_classes)).all():
            raise ValueError(
                f"class labels must be whole numbers from 0 to {self.num_classes - 1}, got {labels.tolist()}"
            )
        batch, size = len(labels), unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        shape = (unet.config["in_channels"], height, width)
        if latents is None:
            latents = rng.normal(shape, *rng.keys(generator, batch), tag=rng.INITIAL, device=device, dtype=unet.dtype)
        elif latents.shape != (batch, *shape):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, the labels ask for {(batch, *shape)}")
        if sigmas is not None or timesteps is not None:
            chosen = {"sigmas": sigmas, "timesteps": timesteps}
            scheduler.set_timesteps(device=device, **{k: v for k, v in chosen.items() if v is not None})
        else:
            grid = getattr(scheduler, "grid", None)
            steps = num_inference_steps if num_inference_steps is not None else len(grid) if grid else 16
            scheduler.set_timesteps(steps, device=device)
        x = (
            latents.to(device, unet.dtype) * scheduler.init_noise_sigma
            if hasattr(scheduler, "init_noise_sigma")
            else latents
        )
        guided = guidance_scale != 1.0
        if guided:
            labels = torch.cat([torch.full_like(labels, self.num_classes), labels])
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = unet(torch.cat([x_in, x_in]) if guided else x_in, t, class_labels=labels).sample
            if guided:
                uncond, cond = output.chunk(2)
                output = uncond + guidance_scale * (cond - uncond)
            x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, t, {"latents": x}).pop("latents", x)
        if not torch.isfinite(x).all():
            bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"images {bad} hold NaN or inf; a scheduler made with debug=True names the step")
        self.maybe_free_model_hooks()
        images: Any = x
        if output_type != "latent":
            images = (x / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def load_demo(name: str = "digits") -> ClassConditionalPipeline:
    """Loads an embedded model: a class-conditional rectified flow, with our scheduler.

    Args:
        name: "digits" (8x8, grey, 10 classes) or "shapes" (16x16, colour, 12 classes).

    Raises:
        ValueError: for another name.
    """
    scheduler = RectifiedFlowScheduler()
    pipe: ClassConditionalPipeline = ClassConditionalPipeline.from_pretrained(assets.folder(name), scheduler=scheduler)
    return pipe

"""Tiny random pipelines of diffusers' model families, built from configurations alone: nothing is downloaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Generator, Tensor

from . import tiny_parts as t
from .tiny_diffusion import DIFFUSION
from .tiny_image import IMAGE
from .tiny_parts import Family, Parts
from .tiny_sound import SOUND
from .tiny_variants import VARIANTS
from .tiny_video import VIDEO

# Of these, tests elsewhere take one each of pixels, labels, text on the VP path and text on the flow path, in latents and tokens.
FAMILIES = ("ddpm", "dit", "sd15", "sd3", "flux")


def build(family: str, scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a pipeline around a scheduler; pipelines of one model and dtype share their networks.

    Args:
        family: one of `PIPELINES`.
        scheduler: ours or stock.
        dtype: of the networks.
    """
    small = PIPELINES[family]
    pipe = small.pipeline(**_parts(small.parts, dtype), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    for name, value in small.attributes.items():
        setattr(pipe, name, value)
    return pipe


def run(pipe: Any, steps: int | None = 4, seed: int = 0, **arguments: Any) -> Tensor:
    """Runs a pipeline from `build`, the arguments winning over those that its family is called with here.

    Returns:
        Images in [0, 1] of pipelines without latents and of "dit", latents of the others.
    """
    # Families of one pipeline are called alike.
    family = next(family for family in PIPELINES.values() if type(pipe) is family.pipeline)
    call = {"num_inference_steps": steps, "generator": Generator().manual_seed(seed), **family.call, **arguments}
    dtype = next(networks(pipe)[0].parameters()).dtype
    result = pipe(**{name: _cast(value, dtype) for name, value in call.items()})
    return torch.as_tensor(next(iter(result.values())))


def parts(family: str) -> Parts:
    """The components of a family but for the scheduler."""
    return _parts(PIPELINES[family].parts, torch.float32)


def networks(pipe: Any) -> list[torch.nn.Module]:
    """The networks that a pipeline calls at a timestep, or takes turns with."""
    parts = (pipe.components.get(name) for name in ("unet", "transformer", "transformer_2"))
    return [part for part in parts if part is not None]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Embeddings and images in the networks' dtype."""
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@functools.cache
def _parts(make: Callable[[], Parts], dtype: torch.dtype) -> Parts:
    """The components of a family but for the scheduler, random and always the same."""
    if dtype != torch.float32:
        parts = copy.deepcopy(_parts(make, torch.float32))
        return {k: v.to(dtype) if isinstance(v, torch.nn.Module) else v for k, v in parts.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = make()
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return parts


def _ddpm() -> Parts:
    return {"unet": t.pixels()}


def _dit() -> Parts:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,  # as in DiT, half of it a learned variance
    )
    return {"transformer": transformer, "vae": t.vae()}


def _sd15() -> Parts:
    return {
        "unet": t.unet(),
        "vae": t.vae(),
        "text_encoder": transformers.CLIPTextModel(t.clip_config()),
        "tokenizer": t.clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd15_filled() -> Parts:
    """As in checkpoints made for inpainting: the network sees mask and image."""
    return {**_sd15(), "unet": t.unet(in_channels=9)}


def _sdxl() -> Parts:
    network = t.unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return {
        "unet": network,
        "vae": t.vae(),
        "text_encoder": transformers.CLIPTextModel(t.clip_config()),
        "tokenizer": t.clip_tokenizer(),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(t.clip_config()),
        "tokenizer_2": t.clip_tokenizer(),
        "add_watermarker": False,
    }


def _sd3(channels: int = 4) -> Parts:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return {
        "transformer": transformer,
        "vae": t.vae(shift_factor=0.06, latent_channels=channels),
        "text_encoder": transformers.CLIPTextModelWithProjection(t.clip_config()),
        "tokenizer": t.clip_tokenizer(),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(t.clip_config()),
        "tokenizer_2": t.clip_tokenizer(),
        "text_encoder_3": transformers.T5EncoderModel(t.t5_config(32)),
        "tokenizer_3": t.t5_tokenizer(),
    }


def _sd3_16() -> Parts:
    return _sd3(16)  # its inpainting knows what to do by the number of channels


def _flux() -> Parts:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return {
        "transformer": transformer,
        "vae": t.vae(shift_factor=0.06),
        "text_encoder": transformers.CLIPTextModel(t.clip_config()),
        "tokenizer": t.clip_tokenizer(),
        "text_encoder_2": transformers.T5EncoderModel(t.t5_config(16)),
        "tokenizer_2": t.t5_tokenizer(),
    }


# Guided, every family that knows guidance; latents, which no decoder scales or clamps, where there are any to be had.
_TEXT = {"prompt": "a red cat", "negative_prompt": "a dog", **t.LATENT}
_SIZE = {"height": 16, "width": 16, "max_sequence_length": 4}
_SD15 = {**_TEXT, "guidance_scale": 4.0}
_SD3 = {**_SD15, **_SIZE}
_FLUX = {**_TEXT, **_SIZE, "true_cfg_scale": 2.0}
_BEGIN = {"image": t.image(16), "strength": 0.5}
_MASK = {**_BEGIN, "mask_image": t.mask(16)}
_PIXELS = {"batch_size": 2, "output_type": "pt"}
_LABELS = {"class_labels": [3, 7], "guidance_scale": 3.0, "output_type": "pt"}
_EULER = (t.EULER, {**t.SD, **t.V})
_SHIFTED = (t.MATCH, {"shift": 3.0})
_DYNAMIC = (t.MATCH, {"use_dynamic_shifting": True})

PIPELINES: dict[str, Family] = {
    "ddpm": Family(diffusers.DDPMPipeline, _ddpm, _PIXELS, (t.DDIM, {**t.V, "clip_sample": False})),
    "dit": Family(diffusers.DiTPipeline, _dit, _LABELS, (t.DDIM, {**t.V, "clip_sample": False, "timestep_spacing": "trailing"})),
    "sd15": Family(diffusers.StableDiffusionPipeline, _sd15, _SD15, _EULER),
    "sd15-img2img": Family(diffusers.StableDiffusionImg2ImgPipeline, _sd15, {**_SD15, **_BEGIN}, _EULER, strength=0.5),
    "sd15-inpaint": Family(diffusers.StableDiffusionInpaintPipeline, _sd15, {**_SD15, **_MASK}, _EULER, strength=0.5),
    "sd15-inpaint-9": Family(diffusers.StableDiffusionInpaintPipeline, _sd15_filled, {**_SD15, **_MASK}, _EULER, strength=0.5),
    "sdxl": Family(diffusers.StableDiffusionXLPipeline, _sdxl, _SD15, _EULER),
    "sdxl-img2img": Family(diffusers.StableDiffusionXLImg2ImgPipeline, _sdxl, {**_SD15, **_BEGIN}, _EULER, strength=0.5),
    "sdxl-inpaint": Family(diffusers.StableDiffusionXLInpaintPipeline, _sdxl, {**_SD15, **_MASK}, _EULER, strength=0.5),
    "sd3": Family(diffusers.StableDiffusion3Pipeline, _sd3, _SD3, _SHIFTED),
    "sd3-img2img": Family(diffusers.StableDiffusion3Img2ImgPipeline, _sd3, {**_SD3, **_BEGIN}, _SHIFTED, strength=0.5),
    "sd3-inpaint": Family(diffusers.StableDiffusion3InpaintPipeline, _sd3_16, {**_SD3, **_MASK}, _SHIFTED, strength=0.5),
    "flux": Family(diffusers.FluxPipeline, _flux, _FLUX, _DYNAMIC, calls=2),
    "flux-img2img": Family(diffusers.FluxImg2ImgPipeline, _flux, {**_FLUX, **_BEGIN}, _DYNAMIC, calls=2, strength=0.5),
    "flux-inpaint": Family(diffusers.FluxInpaintPipeline, _flux, {**_FLUX, **_MASK}, _DYNAMIC, calls=2, strength=0.5),
    **DIFFUSION,
    **IMAGE,
    **VIDEO,
    **SOUND,
    **VARIANTS,
}  # fmt: skip

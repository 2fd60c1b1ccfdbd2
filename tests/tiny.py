"""Tiny random pipelines of five model families, built from configurations alone: nothing is downloaded."""

from __future__ import annotations

import copy
import functools
from typing import Any

import diffusers
import torch
import transformers
from torch import Generator, Tensor

FAMILIES = ("ddpm", "dit", "sd15", "sd3", "flux")
_CLASSES = {
    "ddpm": diffusers.DDPMPipeline,
    "dit": diffusers.DiTPipeline,
    "sd15": diffusers.StableDiffusionPipeline,
    "sd15-img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3-img2img": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxPipeline,
    "flux-img2img": diffusers.FluxImg2ImgPipeline,
}
_TEXT = {"prompt": "a red cat", "negative_prompt": "a dog", "output_type": "latent"}
_SIZE = {"height": 16, "width": 16, "max_sequence_length": 4}
# Guided, every family that knows guidance; latents, which no decoder scales or clamps, where there are any to be had.
_CALLS: dict[str, dict[str, Any]] = {
    "ddpm": {"batch_size": 2, "output_type": "pt"},
    "dit": {"class_labels": [3, 7], "guidance_scale": 3.0, "output_type": "pt"},
    "sd15": {**_TEXT, "guidance_scale": 4.0},
    "sd3": {**_TEXT, **_SIZE, "guidance_scale": 4.0},
    "flux": {**_TEXT, **_SIZE, "true_cfg_scale": 2.0},
}


def build(family: str, scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a pipeline around a scheduler; all pipelines of a family and dtype share their networks.

    Args:
        family: one of `FAMILIES`, or "sd15-img2img", "sd3-img2img", "flux-img2img".
        scheduler: ours or stock.
        dtype: of the networks.
    """
    pipe = _CLASSES[family](**_parts(family.partition("-")[0], dtype), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int | None = 4, seed: int = 0, **arguments: Any) -> Tensor:
    """Runs a pipeline from `build`, the arguments winning over those that its family is called with here.

    Returns:
        Images in [0, 1] of "ddpm" and "dit", latents of the others.
    """
    family = next(name for name, cls in _CLASSES.items() if type(pipe) is cls)
    call = {
        "num_inference_steps": steps,
        "generator": Generator().manual_seed(seed),
        **_CALLS[family.partition("-")[0]],
    }
    if family.endswith("img2img"):
        call |= {"image": torch.rand(1, 3, 16, 16, generator=Generator().manual_seed(1)), "strength": 0.5}
    return torch.as_tensor(pipe(**{**call, **arguments}).images)


@functools.cache
def _parts(family: str, dtype: torch.dtype) -> dict[str, Any]:
    """The components of a family but for the scheduler, random and always the same."""
    if dtype != torch.float32:
        parts = copy.deepcopy(_parts(family, torch.float32))
        return {k: v.to(dtype) if isinstance(v, torch.nn.Module) else v for k, v in parts.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {"ddpm": _ddpm, "dit": _dit, "sd15": _sd15, "sd3": _sd3, "flux": _flux}[family]()
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return parts


def _ddpm() -> dict[str, Any]:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return {"unet": unet}


def _dit() -> dict[str, Any]:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,  # as in DiT, half of it a learned variance
    )
    return {"transformer": transformer, "vae": _vae()}


def _sd15() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return {
        "unet": unet,
        "vae": _vae(),
        "text_encoder": transformers.CLIPTextModel(_clip_config()),
        "tokenizer": _clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd3() -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
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
        "vae": _vae(shift_factor=0.06),
        "text_encoder": transformers.CLIPTextModelWithProjection(_clip_config()),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(_clip_config()),
        "tokenizer_2": _clip_tokenizer(),
        "text_encoder_3": transformers.T5EncoderModel(_t5_config(32)),
        "tokenizer_3": _t5_tokenizer(),
    }


def _flux() -> dict[str, Any]:
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
        "vae": _vae(shift_factor=0.06),
        "text_encoder": transformers.CLIPTextModel(_clip_config()),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": transformers.T5EncoderModel(_t5_config(16)),
        "tokenizer_2": _t5_tokenizer(),
    }


def _vae(**config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **config,
    )


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _clip_config() -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{c}</w>" for c in _LETTERS)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def _t5_config(width: int) -> transformers.T5Config:
    return transformers.T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def _t5_tokenizer() -> transformers.T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    return transformers.T5Tokenizer(
        vocab=[(w, -float(i)) for i, w in enumerate(words)], extra_ids=0, model_max_length=16
    )

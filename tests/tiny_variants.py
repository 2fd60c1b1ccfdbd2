"""Tiny random pipelines whose loops are variants of others: ControlNets, edits, perturbed attention and the like."""

from __future__ import annotations

import diffusers

from .tiny_parts import (
    DDIM,
    EULER,
    LATENT,
    MATCH,
    NO_TEXT,
    SD,
    Family,
    Parts,
    V,
    absent,
    embedded,
    image,
    mask,
    masked,
    random,
    unet,
    vae,
)
from .tiny_video import VIDEO, WAN, WAN_FLOW, wan_vae

_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}


def _sd15() -> Parts:
    return {**NO_TEXT, **_CHECKER, "unet": unet(), "vae": vae()}


def _sd15_control() -> Parts:
    parts = _sd15()
    control = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8))
    return {**parts, "controlnet": control}


def _sd15_edit() -> Parts:
    return {**_sd15(), "unet": unet(in_channels=8)}


def _sdxl() -> Parts:
    return {**NO_TEXT, **absent("text_encoder", 2), **absent("tokenizer", 2), "unet": unet(**_XL), "vae": vae()}


def _sdxl_control() -> Parts:
    parts = _sdxl()
    return {
        **parts,
        "controlnet": diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8)),
    }


def _kolors() -> Parts:
    return {**NO_TEXT, "unet": unet(**_XL), "vae": vae()}


def _flux(channels: int = 16) -> Parts:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    numbered = absent("text_encoder", 2) | absent("tokenizer", 2)
    return {**NO_TEXT, **numbered, "vae": vae(shift_factor=0.06), "transformer": transformer}


def _flux_control() -> Parts:
    return _flux(32)


def _flux_fill() -> Parts:
    return _flux(16 + 16 + 16)  # noise, image and a mask of 2 by 2 pixels a latent


def _hunyuan15() -> Parts:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    codec = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    numbered = absent("text_encoder", 2) | absent("tokenizer", 2)
    return {**NO_TEXT, **numbered, "vae": codec, "transformer": transformer, "guider": guider}


def _easyanimate() -> Parts:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    codec = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    return {**NO_TEXT, "vae": codec, "transformer": transformer}


def _wan_vace() -> Parts:
    transformer = diffusers.WanVACETransformer3DModel(**{**WAN, "num_layers": 2}, vace_layers=[0], vace_in_channels=96)
    return {**NO_TEXT, "vae": wan_vae(), "transformer": transformer}


_TEXT = {**LATENT, **embedded(), "height": 16, "width": 16, "guidance_scale": 4.0}
_POOLED = {"pooled_prompt_embeds": random(1, 16), "negative_pooled_prompt_embeds": random(1, 16, seed=1)}
_FLUX = {**LATENT, "prompt_embeds": random(1, 4, 16), "pooled_prompt_embeds": random(1, 16), "height": 16, "width": 16}
_MASKED = {"image": image(16), "mask_image": mask(16)}
_EULER = (EULER, {**SD, **V})
_DYNAMIC = (MATCH, {"use_dynamic_shifting": True})
_TWO = {f"{name}_2": text for name, text in embedded().items()}

VARIANTS: dict[str, Family] = {
    "sd15-controlnet": Family(
        diffusers.StableDiffusionControlNetPipeline, _sd15_control, {**_TEXT, "image": image(16)}, _EULER
    ),
    "sd15-pag": Family(diffusers.StableDiffusionPAGPipeline, _sd15, _TEXT, _EULER),
    "sd15-sag": Family(diffusers.StableDiffusionSAGPipeline, _sd15, _TEXT, (DDIM, {**SD, **V, "clip_sample": False})),
    "sd15-instruct": Family(
        diffusers.StableDiffusionInstructPix2PixPipeline,
        _sd15_edit,
        {**LATENT, **embedded(), "image": image(16), "guidance_scale": 4.0},
        _EULER,
    ),
    "sdxl-controlnet": Family(
        diffusers.StableDiffusionXLControlNetPipeline,
        _sdxl_control,
        {**_TEXT, **_POOLED, "image": image(16)},
        _EULER,
    ),
    "sdxl-pag": Family(diffusers.StableDiffusionXLPAGPipeline, _sdxl, {**_TEXT, **_POOLED}, _EULER),
    "kolors": Family(diffusers.KolorsPipeline, _kolors, {**_TEXT, **_POOLED}, _EULER),
    "flux-kontext": Family(
        diffusers.FluxKontextPipeline,
        _flux,
        {**_FLUX, "image": image(16), "_auto_resize": False, "max_area": 256},
        _DYNAMIC,
    ),
    "flux-control": Family(
        diffusers.FluxControlPipeline, _flux_control, {**_FLUX, "control_image": image(16)}, _DYNAMIC
    ),
    "flux-fill": Family(diffusers.FluxFillPipeline, _flux_fill, {**_FLUX, **_MASKED}, _DYNAMIC),
    "animatediff-v2v": Family(
        diffusers.AnimateDiffVideoToVideoPipeline,
        VIDEO["animatediff"].parts,
        {**_TEXT, "video": [list(image(16, 2))], "strength": 0.5},
        VIDEO["animatediff"].stock,
        strength=0.5,
    ),
    "hunyuan-video-1.5": Family(
        diffusers.HunyuanVideo15Pipeline,
        _hunyuan15,
        {
            **LATENT,
            **embedded(),
            **masked("prompt_embeds_mask"),
            **_TWO,
            **masked("prompt_embeds_mask_2"),
            "height": 16,
            "width": 16,
            "num_frames": 5,
        },
        (MATCH, {"shift": 5.0}),
        calls=2,
    ),
    "easyanimate": Family(
        diffusers.EasyAnimatePipeline,
        _easyanimate,
        {**_TEXT, **masked(), "num_frames": 4},
        (MATCH, {"shift": 5.0}),
    ),
    "wan-vace": Family(
        diffusers.WanVACEPipeline,
        _wan_vace,
        {**LATENT, **embedded(), "height": 32, "width": 32, "num_frames": 5},
        WAN_FLOW,
        calls=2,
    ),
}

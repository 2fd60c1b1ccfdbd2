"""Tiny random pipelines of flow models that make images from embedded prompts, beside Stable Diffusion 3's and Flux's."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance

from .tiny_parts import (
    DPM,
    LATENT,
    MATCH,
    NO_TEXT,
    Family,
    Parts,
    absent,
    embedded,
    image,
    mask,
    masked,
    random,
    vae,
)


def _sana(**config: Any) -> Parts:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        **config,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _sana_sprint() -> Parts:
    return _sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def _aura_flow() -> Parts:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _qwen() -> Parts:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    codec = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {**NO_TEXT, "vae": codec, "transformer": transformer}


def _z_image() -> Parts:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.ones_(token)  # made without values
    return {**NO_TEXT, "vae": vae(shift_factor=0.1), "transformer": transformer}


def _lumina() -> Parts:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=16,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _lumina2() -> Parts:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[32, 32, 32],
        cap_feat_dim=16,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _flux2() -> Parts:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    codec = diffusers.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    return {**NO_TEXT, "vae": codec, "transformer": transformer}


def _chroma() -> Parts:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return {**NO_TEXT, "vae": vae(shift_factor=0.06), "transformer": transformer}


def _cogview4() -> Parts:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _hidream() -> Parts:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    numbered = absent("text_encoder", 2, 3, 4) | absent("tokenizer", 2, 3, 4)
    return {**NO_TEXT, **numbered, "vae": None, "transformer": transformer}


def _hunyuan_image() -> Parts:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    guiders = {name: ClassifierFreeGuidance(guidance_scale=3.0) for name in ("guider", "ocr_guider")}
    numbered = absent("text_encoder", 2) | absent("tokenizer", 2)
    return {**NO_TEXT, **numbered, **guiders, "vae": None, "transformer": transformer}


def _prx() -> Parts:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=16,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _bria() -> Parts:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    return {**NO_TEXT, "vae": vae(), "transformer": transformer}


def _ovis() -> Parts:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


_SIZE = {**LATENT, "height": 64, "width": 64}
_TEXT = {**_SIZE, **embedded()}
_SANA = {**_TEXT, **masked(), "negative_prompt": None, "use_resolution_binning": False}
_QWEN = {**_TEXT, **masked("prompt_embeds_mask"), "height": 16, "width": 16, "true_cfg_scale": 2.0}
_CHROMA = {**_TEXT, **masked(dtype=torch.bool), "height": 16, "width": 16}
_Z = {**_SIZE, "height": 16, "width": 16, **{name: [text[0]] for name, text in embedded().items()}}
_BEGIN = {"image": image(16), "strength": 0.5}
_HIDREAM = {
    **_SIZE,
    **{f"{name}_t5": text for name, text in embedded().items()},
    "prompt_embeds_llama3": random(2, 1, 4, 16),
    "negative_prompt_embeds_llama3": random(2, 1, 4, 16, seed=1),
    "pooled_prompt_embeds": random(1, 16),
    "negative_pooled_prompt_embeds": random(1, 16, seed=1),
}
_TWO = {f"{name}_2": text for name, text in embedded().items()}
_HUNYUAN = {
    **_TEXT,
    **masked("prompt_embeds_mask"),
    **_TWO,
    **masked("prompt_embeds_mask_2"),
    "height": 256,
    "width": 256,
}
_DYNAMIC = (MATCH, {"use_dynamic_shifting": True})


def _shift(amount: float) -> tuple[str, dict[str, Any]]:
    return (MATCH, {"shift": amount})


IMAGE: dict[str, Family] = {
    "sana": Family(
        diffusers.SanaPipeline,
        _sana,
        {**_SANA, "height": 256, "width": 256},
        (DPM, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ),
    "sana-sprint": Family(
        diffusers.SanaSprintPipeline,
        _sana_sprint,
        {
            **LATENT,
            "height": 256,
            "width": 256,
            "prompt_embeds": random(1, 4, 16),
            "prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
            "use_resolution_binning": False,
            "intermediate_timesteps": None,
        },
        ("SCMScheduler", {}),
    ),
    "aura-flow": Family(diffusers.AuraFlowPipeline, _aura_flow, {**_TEXT, **masked()}, _shift(1.73)),
    "qwen-image": Family(
        diffusers.QwenImagePipeline,
        _qwen,
        _QWEN,
        (MATCH, {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
        calls=2,
    ),
    "qwen-image-img2img": Family(
        diffusers.QwenImageImg2ImgPipeline, _qwen, {**_QWEN, **_BEGIN}, _DYNAMIC, calls=2, strength=0.5
    ),
    "qwen-image-inpaint": Family(
        diffusers.QwenImageInpaintPipeline,
        _qwen,
        {**_QWEN, **_BEGIN, "mask_image": mask(16)},
        _DYNAMIC,
        calls=2,
        strength=0.5,
    ),
    "z-image": Family(diffusers.ZImagePipeline, _z_image, _Z, _shift(3.0)),
    "z-image-img2img": Family(diffusers.ZImageImg2ImgPipeline, _z_image, {**_Z, **_BEGIN}, _shift(3.0), strength=0.5),
    "lumina": Family(diffusers.LuminaPipeline, _lumina, {**_TEXT, **masked(dtype=torch.bool)}, _shift(1.0)),
    "lumina2": Family(diffusers.Lumina2Pipeline, _lumina2, {**_TEXT, **masked(dtype=torch.bool)}, _shift(6.0), calls=2),
    "flux2-klein": Family(
        diffusers.Flux2KleinPipeline, _flux2, {**_TEXT, "height": 16, "width": 16}, _DYNAMIC, calls=2
    ),
    "chroma": Family(diffusers.ChromaPipeline, _chroma, _CHROMA, _DYNAMIC, calls=2),
    "chroma-img2img": Family(
        diffusers.ChromaImg2ImgPipeline, _chroma, {**_CHROMA, **_BEGIN}, _DYNAMIC, calls=2, strength=0.5
    ),
    "cogview4": Family(
        diffusers.CogView4Pipeline,
        _cogview4,
        _TEXT,
        (MATCH, {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}),
        calls=2,
    ),
    "hidream": Family(
        diffusers.HiDreamImagePipeline, _hidream, _HIDREAM, _shift(3.0), attributes={"default_sample_size": 8}
    ),
    "hunyuan-image": Family(diffusers.HunyuanImagePipeline, _hunyuan_image, _HUNYUAN, _shift(5.0), calls=2),
    "prx": Family(
        diffusers.PRXPipeline,
        _prx,
        {**_TEXT, **masked(dtype=torch.bool), "negative_prompt": None, "use_resolution_binning": False},
        _shift(3.0),
    ),
    "bria": Family(diffusers.BriaPipeline, _bria, {**_TEXT, "height": 16, "width": 16}, _shift(3.0)),
    "ovis-image": Family(diffusers.OvisImagePipeline, _ovis, {**_TEXT, "negative_prompt": None}, _DYNAMIC, calls=2),
}

"""Tiny random pipelines of diffusion models, on the VP path, beside Stable Diffusion."""

from __future__ import annotations

import diffusers

from .tiny_parts import (
    DDIM,
    DPM,
    LATENT,
    NO_TEXT,
    SD,
    Family,
    Parts,
    V,
    embedded,
    masked,
    pixels,
    random,
    unet,
    vae,
)


def _pixart() -> Parts:
    return {**NO_TEXT, "vae": None, "transformer": diffusers.PixArtTransformer2DModel(**_DIT)}


def _cogview3() -> Parts:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _hunyuan_dit() -> Parts:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=16,
        text_len=4,
        text_len_t5=4,
    )
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {**NO_TEXT, **checker, "vae": None, "transformer": transformer}


def _kandinsky2() -> Parts:
    network = unet(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    codec = diffusers.VQModel(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {"unet": network, "movq": codec}


def _deepfloyd() -> Parts:
    network = unet(
        in_channels=3,
        out_channels=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {**NO_TEXT, **checker, "unet": network, "watermarker": None}


def _consistency() -> Parts:
    return {"unet": pixels()}


def _lcm() -> Parts:
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {**NO_TEXT, **checker, "vae": vae(), "unet": unet(time_cond_proj_dim=8)}


_DIT = {
    "sample_size": 8,
    "num_layers": 1,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_channels": 16,
    "in_channels": 4,
    "cross_attention_dim": 16,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_SIZE = {**LATENT, "height": 64, "width": 64}
_TEXT = {**_SIZE, **embedded()}
_PIXART = {**_TEXT, **masked(), "negative_prompt": None, "use_resolution_binning": False}
_TWO = {f"{name}_2": text for name, text in embedded().items()}
_HUNYUAN_DIT = {**_TEXT, **masked(), **_TWO, **masked("prompt_attention_mask_2"), "use_resolution_binning": False}
_KANDINSKY = {
    **LATENT,
    "height": 64,
    "width": 64,
    "image_embeds": random(1, 16),
    "negative_image_embeds": random(1, 16, seed=1),
}
_PIXELS = {"output_type": "pt", "height": 8, "width": 8, **embedded()}
_ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_LEARNED = {"variance_type": "learned_range", "clip_sample": False}

DIFFUSION: dict[str, Family] = {
    "pixart-alpha": Family(diffusers.PixArtAlphaPipeline, _pixart, _PIXART, (DPM, V)),
    "pixart-sigma": Family(diffusers.PixArtSigmaPipeline, _pixart, _PIXART, (DPM, V)),
    "cogview3-plus": Family(diffusers.CogView3PlusPipeline, _cogview3, _TEXT, ("CogVideoXDDIMScheduler", _ZERO_SNR)),
    "hunyuan-dit": Family(
        diffusers.HunyuanDiTPipeline, _hunyuan_dit, _HUNYUAN_DIT, (DDIM, {**V, "clip_sample": False})
    ),
    "kandinsky2.2": Family(diffusers.KandinskyV22Pipeline, _kandinsky2, _KANDINSKY, ("DDPMScheduler", _LEARNED)),
    "deepfloyd": Family(
        diffusers.IFPipeline, _deepfloyd, _PIXELS, ("DDPMScheduler", {**_LEARNED, "beta_schedule": "squaredcos_cap_v2"})
    ),
    "consistency": Family(
        diffusers.ConsistencyModelPipeline,
        _consistency,
        {"batch_size": 2, "output_type": "pt"},
        ("CMStochasticIterativeScheduler", {}),
    ),
    "lcm": Family(
        diffusers.LatentConsistencyModelPipeline,
        _lcm,
        {**LATENT, "prompt_embeds": random(1, 4, 16), "height": 16, "width": 16},
        ("LCMScheduler", {**SD, **V}),
    ),
}

"""Tiny random pipelines that make sounds from embedded prompts."""

from __future__ import annotations

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from .tiny_parts import (
    DDIM,
    LATENT,
    NO_TEXT,
    Family,
    Parts,
    V,
    embedded,
    t5_config,
    vae,
)


def _stable_audio() -> Parts:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    codec = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    return {**NO_TEXT, "vae": codec, "transformer": transformer, "projection_model": projection}


def _audioldm2() -> Parts:
    network = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 16),
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    return {
        **NO_TEXT,
        "text_encoder_2": transformers.T5EncoderModel(t5_config(16)),
        "tokenizer_2": None,
        "projection_model": None,
        "language_model": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=8, n_positions=8)
        ),
        "feature_extractor": None,
        "vae": vae(in_channels=1, out_channels=1),
        "unet": network,
        "vocoder": transformers.SpeechT5HifiGan(vocoder),
    }


_SOUND = {
    **embedded(),
    **{f"{prefix}attention_mask": torch.ones(1, 4, dtype=torch.long) for prefix in ("", "negative_")},
    **LATENT,
}
_GENERATED = {name.replace("prompt", "generated_prompt"): text for name, text in embedded().items()}
_LINEAR = (DDIM, {**V, "clip_sample": False})

SOUND: dict[str, Family] = {
    "stable-audio": Family(
        diffusers.StableAudioPipeline,
        _stable_audio,
        {**_SOUND, **embedded(4)},
        ("EDMDPMSolverMultistepScheduler", {"sigma_data": 1.0, "sigma_schedule": "exponential", **V}),
    ),
    "audioldm2": Family(
        diffusers.AudioLDM2Pipeline, _audioldm2, {**_SOUND, **_GENERATED, "audio_length_in_s": 0.004}, _LINEAR
    ),
}

"""Tiny random pipelines that make videos from embedded prompts."""

from __future__ import annotations

import diffusers
import torch
import transformers

from .tiny_parts import (
    DDIM,
    EULER,
    LATENT,
    MATCH,
    NO_TEXT,
    SD,
    UNIPC,
    Family,
    Parts,
    V,
    absent,
    embedded,
    image,
    masked,
    random,
    unet,
    vae,
)


def wan_vae() -> diffusers.AutoencoderKLWan:
    """The autoencoder of Wan, which others have too."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 16,
    "num_layers": 1,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def _wan() -> Parts:
    return {**NO_TEXT, "vae": wan_vae(), "transformer": diffusers.WanTransformer3DModel(**WAN)}


def _wan_two() -> Parts:
    """Wan 2.2 changes networks in mid run."""
    return {**_wan(), "transformer_2": diffusers.WanTransformer3DModel(**WAN), "boundary_ratio": 0.7}


def _wan_tokens() -> Parts:
    """Wan 2.2 5B: the tokens of the given frame are at time 0."""
    return {**_wan(), "expand_timesteps": True}


def _skyreels() -> Parts:
    return {**NO_TEXT, "vae": wan_vae(), "transformer": diffusers.SkyReelsV2Transformer3DModel(**WAN)}


def _ltx() -> Parts:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    codec = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    return {**NO_TEXT, "vae": codec, "transformer": transformer}


def _ltx2() -> Parts:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    codec = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
    )
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    return {
        **NO_TEXT,
        "vae": codec,
        "audio_vae": sound,
        "connectors": connectors,
        "transformer": transformer,
        "vocoder": None,
    }


def _hunyuan() -> Parts:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return {**NO_TEXT, **absent("text_encoder", 2), **absent("tokenizer", 2), "vae": None, "transformer": transformer}


def _cogvideo() -> Parts:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=4,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _mochi() -> Parts:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=4,
    )
    torch.nn.init.zeros_(transformer.pos_frequencies)
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _latte() -> Parts:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _allegro() -> Parts:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=16,
    )
    return {**NO_TEXT, "vae": None, "transformer": transformer}


def _sana_video() -> Parts:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return {**NO_TEXT, "vae": wan_vae(), "transformer": transformer}


def _cosmos() -> Parts:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    )
    return {**NO_TEXT, "vae": wan_vae(), "transformer": transformer, "safety_checker": _Harmless()}


class _Harmless(torch.nn.Module):
    """In the place of the Cosmos guardrail, without which its pipelines do not start."""

    device = torch.device("cpu")

    def check_text_safety(self, _prompt: str) -> bool:
        return True


def _kandinsky5() -> Parts:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(1, 1, 2),
        visual_cond=False,
    )
    return {**NO_TEXT, **absent("text_encoder", 2), **absent("tokenizer", 2), "vae": None, "transformer": transformer}


def _animatediff() -> Parts:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    network = diffusers.UNetMotionModel.from_unet2d(unet(block_out_channels=(8, 8)), adapter)
    return {**NO_TEXT, "vae": vae(), "unet": network, "motion_adapter": adapter}


def _svd() -> Parts:
    network = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    codec = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=[32], down_block_types=["DownEncoderBlock2D"])
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return {
        "unet": network,
        "vae": codec,
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
        "feature_extractor": transformers.CLIPImageProcessor(crop_size=8, size=8),
    }


_TEXT = {**LATENT, **embedded()}
_SMALL = {**_TEXT, "height": 32, "width": 32, "num_frames": 5}
_LTX = {**_SMALL, **masked(), "num_frames": 9}
_LTX2 = {
    **_LTX,
    "num_frames": 5,
    "frame_rate": 25.0,
    "guidance_scale": 3.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 3.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
}
_HUNYUAN = {
    **_SMALL,
    **masked(),
    "pooled_prompt_embeds": random(1, 8),
    "negative_pooled_prompt_embeds": random(1, 8, seed=1),
    "true_cfg_scale": 2.0,
}
_LENGTHS = torch.tensor([0, 4], dtype=torch.int32)
_KANDINSKY = {
    **LATENT,
    **{f"{name}_qwen": text for name, text in embedded().items()},
    "prompt_embeds_clip": random(1, 16),
    "negative_prompt_embeds_clip": random(1, 16, seed=1),
    "prompt_cu_seqlens": _LENGTHS,
    "negative_prompt_cu_seqlens": _LENGTHS,
    "height": 128,
    "width": 128,
    "num_frames": 5,
}
_FRAMES = list(image(32, 5))
WAN_FLOW = (UNIPC, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0})
_LTX_FLOW = (MATCH, {"use_dynamic_shifting": True, "shift_terminal": 0.1})
_COG = ("CogVideoXDDIMScheduler", {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
_LINEAR = (DDIM, {**V, "clip_sample": False})
_CONTINUOUS = {
    **SD,
    **V,
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 70.0,
    "timestep_spacing": "leading",
}

VIDEO: dict[str, Family] = {
    "wan": Family(diffusers.WanPipeline, _wan, _SMALL, WAN_FLOW, calls=2),
    "wan2.2": Family(diffusers.WanPipeline, _wan_two, _SMALL, WAN_FLOW, calls=2),
    "wan-i2v": Family(
        diffusers.WanImageToVideoPipeline, _wan_tokens, {**_SMALL, "image": image(32)}, WAN_FLOW, calls=2
    ),
    "wan-v2v": Family(
        diffusers.WanVideoToVideoPipeline,
        _wan,
        {**_TEXT, "height": 32, "width": 32, "video": _FRAMES, "strength": 0.5},
        WAN_FLOW,
        calls=2,
        strength=0.5,
    ),
    "skyreels-v2": Family(diffusers.SkyReelsV2Pipeline, _skyreels, _SMALL, WAN_FLOW, calls=2),
    "ltx": Family(diffusers.LTXPipeline, _ltx, _LTX, _LTX_FLOW),
    "ltx-i2v": Family(diffusers.LTXImageToVideoPipeline, _ltx, {**_LTX, "image": image(32)}, _LTX_FLOW),
    "ltx-condition": Family(
        diffusers.LTXConditionPipeline, _ltx, {**_LTX, "image": image(32)}, (MATCH, {"shift": 1.0})
    ),
    "ltx2": Family(diffusers.LTX2Pipeline, _ltx2, _LTX2, _LTX_FLOW),
    "hunyuan-video": Family(diffusers.HunyuanVideoPipeline, _hunyuan, _HUNYUAN, (MATCH, {"shift": 7.0}), calls=2),
    "cogvideox": Family(diffusers.CogVideoXPipeline, _cogvideo, {**_SMALL, "max_sequence_length": 4}, _COG),
    "mochi": Family(
        diffusers.MochiPipeline,
        _mochi,
        {**_SMALL, **masked(dtype=torch.bool), "num_frames": 7},
        (MATCH, {"invert_sigmas": True}),
    ),
    "latte": Family(
        diffusers.LattePipeline,
        _latte,
        {**_TEXT, "negative_prompt": None, "height": 64, "width": 64, "video_length": 1, "clean_caption": False},
        _LINEAR,
    ),
    "allegro": Family(
        diffusers.AllegroPipeline,
        _allegro,
        {**_SMALL, **masked(), "negative_prompt": None, "num_frames": 8},
        (EULER, V),
    ),
    "sana-video": Family(
        diffusers.SanaVideoPipeline,
        _sana_video,
        {
            **_TEXT,
            **masked(),
            "negative_prompt": None,
            "height": 32,
            "width": 32,
            "frames": 5,
            "use_resolution_binning": False,
        },
        ("DPMSolverMultistepScheduler", WAN_FLOW[1]),
    ),
    "cosmos2": Family(
        diffusers.Cosmos2TextToImagePipeline,
        _cosmos,
        {**_TEXT, "height": 32, "width": 32},
        (MATCH, {"use_karras_sigmas": True}),
        calls=2,
    ),
    "kandinsky5": Family(diffusers.Kandinsky5T2VPipeline, _kandinsky5, _KANDINSKY, (MATCH, {"shift": 5.0}), calls=2),
    "animatediff": Family(
        diffusers.AnimateDiffPipeline, _animatediff, {**_TEXT, "num_frames": 2, "height": 16, "width": 16}, _LINEAR
    ),
    "svd": Family(
        diffusers.StableVideoDiffusionPipeline,
        _svd,
        {**LATENT, "image": image(8), "height": 8, "width": 8, "num_frames": 2},
        (EULER, _CONTINUOUS),
    ),
}

"""What the tiny pipelines are made of: the record of a family, and networks and texts that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch import Generator, Tensor

Parts = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A pipeline of diffusers in small.

    Attributes:
        pipeline: its class.
        parts: makes its components but for the scheduler; families with the same function share them.
        call: arguments of a call but for the number of steps and the generator.
        stock: class and configuration of the scheduler that its models come with.
        calls: network calls at a timestep, 2 where guidance takes two.
        strength: share of the grid that is executed, below 1 for what begins with an image.
        attributes: what is set on the pipeline after it is made.
    """

    pipeline: Any
    parts: Callable[[], Parts]
    call: Mapping[str, Any]
    stock: tuple[str, Mapping[str, Any]]
    calls: int = 1
    strength: float = 1.0
    attributes: Mapping[str, Any] = field(default_factory=dict)


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
DDIM, EULER, HEUN = "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
MATCH, MATCH_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"

NO_TEXT: Parts = {"text_encoder": None, "tokenizer": None}
LATENT = {"output_type": "latent"}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def image(size: int, count: int = 1) -> Tensor:
    """Images in [0, 1] of shape (count, 3, size, size)."""
    return torch.rand(count, 3, size, size, generator=Generator().manual_seed(1))


def mask(size: int) -> Tensor:
    """A mask of shape (1, 1, size, size): the left half is repainted."""
    painted = torch.zeros(1, 1, size, size)
    painted[..., : size // 2] = 1.0
    return painted


def embedded(width: int = 16, tokens: int = 4) -> dict[str, Tensor]:
    """Embeddings of a prompt and of its negative, instead of encoders that the scheduler never meets."""
    return {
        "prompt_embeds": random(1, tokens, width),
        "negative_prompt_embeds": random(1, tokens, width, seed=1),
    }


def masked(
    suffix: str = "prompt_attention_mask", dtype: torch.dtype = torch.long, tokens: int = 4
) -> dict[str, Tensor]:
    """Masks for `embedded`, under the names ``suffix`` and ``negative_suffix``."""
    return {prefix + suffix: torch.ones(1, tokens, dtype=dtype) for prefix in ("", "negative_")}


def absent(name: str, *numbers: int) -> Parts:
    """Components ``name_2``, ... that a pipeline wants named, though they are None."""
    return {f"{name}_{i}": None for i in numbers}


def vae(**config: Any) -> diffusers.AutoencoderKL:
    """An autoencoder of half the size; parameters win over the defaults."""
    small = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**{**small, **config})


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion's network; parameters win over the defaults."""
    small = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return diffusers.UNet2DConditionModel(**{**small, **config})


def pixels(**config: Any) -> diffusers.UNet2DModel:
    """A network on 8 by 8 images without text."""
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **config,
    )


def grey(classes: int | None = None, seed: int = 0, **config: Any) -> diffusers.UNet2DModel:
    """A network of convolutions on grey 8 by 8 images, with labels, and one for none, where there are classes."""
    small = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "num_class_embeds": classes and classes + 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(**{**small, **config}).eval()


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_config() -> transformers.CLIPTextConfig:
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


def clip_tokenizer() -> transformers.CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{c}</w>" for c in _LETTERS)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def t5_config(width: int) -> transformers.T5Config:
    return transformers.T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def t5_tokenizer() -> transformers.T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    return transformers.T5Tokenizer(
        vocab=[(w, -float(i)) for i, w in enumerate(words)], extra_ids=0, model_max_length=16
    )

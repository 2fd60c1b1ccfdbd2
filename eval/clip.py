"""CLIP embeddings of images and texts, of CMMD and the CLIP score, through transformers and from local files only."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.eval.features import full_float32, library_versions
from flowkit.eval.networks import ModuleExtractor
from flowkit.eval.weight_files import find_folder, load_transformer, transformers

REPO = "openai/clip-vit-large-patch14-336"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# How images reach the model's size: CMMD squeezes them without antialiasing, CLIP itself cuts out the middle.
RESIZERS = {"cmmd": "bicubic", "clip": "pil_crop"}


class ClipExtractor(ModuleExtractor):
    """CLIP's projected embeddings, of length 1; 768 features with ViT-L/14 at 336 pixels.

    Args:
        path: folder with config.json and model.safetensors (for `text` also the tokenizer's files), as transformers saves them.
            None looks for ``openai/clip-vit-large-patch14-336`` in the Hugging Face cache.
        device: where to compute.
        preset: "cmmd" (Jayasumana et al. 2024: resized to a square, bicubic without antialiasing) or "clip" (CLIP's own: shorter
            side, then the middle; of the CLIP score).

    Raises:
        FileNotFoundError: where there are no weights; names them and says where to put them. Nothing is downloaded.
        ImportError: without transformers.
        ValueError: for weights of another model, or an unknown preset.
    """

    def __init__(
        self, path: str | PathLike[str] | None = None, device: torch.device | str = "cpu", preset: str = "cmmd"
    ) -> None:
        if preset not in RESIZERS:
            raise ValueError(f"unknown preset {preset!r}; choose {', '.join(RESIZERS)}")
        self._folder = find_folder(path, REPO, "ClipExtractor")
        self.model = load_transformer("CLIPModel", self._folder, REPO, "ClipExtractor").to(device)
        size = self.model.config.vision_config.image_size
        super().__init__(
            _Image(self.model), preset, size=size, resizer=RESIZERS[preset], mean=MEAN, std=STD, device=device
        )
        self.identity |= {"layer": "projection, length 1", "versions": library_versions("torch", "transformers")}
        self._tokenizer: Any = None

    def text(self, texts: Sequence[str]) -> Tensor:
        """Returns embeddings of length 1, float32 (B, dim), of texts; what is beyond the model's 77 tokens is cut off.

        Raises:
            FileNotFoundError: for a folder without the tokenizer's files.
            ValueError: for one string instead of a list.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of strings, got {texts!r}; write [text]")
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._folder)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad(), full_float32():
            pooled = self.model.text_model(**tokens.to(self.device)).pooler_output
            return _unit(self.model.text_projection(pooled))


class _Image(nn.Module):
    def __init__(self, model: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection

    def forward(self, x: Tensor) -> Tensor:
        return _unit(self.projection(self.vision(x).pooler_output))


def _unit(embedding: Tensor) -> Tensor:
    unit: Tensor = embedding / embedding.norm(dim=1, keepdim=True)
    return unit


def _tokenizer(folder: Path) -> Any:  # noqa: ANN401
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise FileNotFoundError(f"no tokenizer.json or vocab.json in {folder}; copy CLIP's tokenizer files there")
    return transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)

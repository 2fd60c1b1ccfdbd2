"""DINOv2, the extractor of FD-DINOv2 (Stein et al. 2023), through transformers and from local files only."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.eval.features import library_versions
from flowkit.eval.networks import ModuleExtractor
from flowkit.eval.weight_files import load_transformer

REPO = "facebook/dinov2-large"
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoExtractor(ModuleExtractor):
    """The class token of DINOv2 after its last normalisation; 1024 features with ViT-L/14.

    Images are resized to 224x224 by antialiased bicubic and normalised by ImageNet's mean and deviation.

    Args:
        path: folder with config.json and model.safetensors, as transformers saves them. None looks for ``facebook/dinov2-large``
            in the Hugging Face cache.
        device: where to compute.
        rounded: resize as PIL does, to whole levels (Stein et al. 2023); False is EDM2's, without rounding or clamping, 0.3
            levels apart.

    Raises:
        FileNotFoundError: where there are no weights; names them and says where to put them. Nothing is downloaded.
        ImportError: without transformers.
        ValueError: for weights of another model.
    """

    def __init__(
        self, path: str | PathLike[str] | None = None, device: torch.device | str = "cpu", rounded: bool = True
    ) -> None:
        network = _ClassToken(load_transformer("Dinov2Model", path, REPO, "DinoExtractor"))
        resizer = "pil_bicubic" if rounded else "antialiased_bicubic"
        super().__init__(network, "fd-dinov2", size=SIZE, resizer=resizer, mean=MEAN, std=STD, device=device)
        self.identity |= {"layer": "class token", "versions": library_versions("torch", "transformers")}


class _ClassToken(nn.Module):
    def __init__(self, model: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model
        embeddings, patch = model.embeddings, model.config.patch_size
        embeddings.position_embeddings = nn.Parameter(positions(embeddings.position_embeddings.detach(), SIZE // patch))

    def forward(self, x: Tensor) -> Tensor:
        token: Tensor = self.model(x).last_hidden_state[:, 0]
        return token


def positions(table: Tensor, grid: int) -> Tensor:
    """Resamples position embeddings as the published model does: bicubic, with a scale of (grid + 0.1) / M.

    transformers takes grid / M, which moves the embeddings by up to 0.6 % of the grid. A grid of the table's own is left as it is.

    Args:
        table: of the class token and an M x M grid, (1, 1 + M^2, d).
        grid: patches along each side of the images.

    Returns:
        (1, 1 + grid^2, d).
    """
    side, dim = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    if side == grid:
        return table
    squares = table[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    squares = F.interpolate(squares, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], squares.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)

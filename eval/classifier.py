"""The small classifier of each embedded data set; its penultimate layer is the feature space of their Frechet distances."""

from __future__ import annotations

import json
import os

from torch import Tensor, nn

from flowkit import weights


class Classifier(nn.Module):
    """Three convolutions, pooling to 2x2, a linear layer to the features and one to the logits.

    There is no normalisation and no dropout, so an image's features do not depend on its batch or on the mode.

    Args:
        channels: image channels C.
        size: image height and width, a multiple of 8.
        width: channels of the first convolution; the others have twice as many.
        dim: number of features.
        classes: number of classes.
    """

    def __init__(self, channels: int, size: int, width: int, dim: int, classes: int) -> None:
        super().__init__()
        self.image_shape, self.dim = (channels, size, size), dim
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(size // 4),
            nn.Flatten(),
            nn.Linear(8 * width, dim),
            nn.SiLU(),
        )
        self.head = nn.Linear(dim, classes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Reads a classifier, in float32 and in inference mode, from a safetensors file with its sizes in the metadata.

        Raises:
            FileNotFoundError: where there is no file.
            ValueError: where the file is no such classifier.
        """
        tensors, metadata = weights.read(path)
        try:
            network = cls(**json.loads(metadata["sizes"]))
            network.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a classifier ({reason}); examples/build_assets.py makes one") from error
        return network.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """Returns the penultimate layer.

        Args:
            x: images in [-1, 1], (B, C, H, W).

        Returns:
            Features, (B, dim).

        Raises:
            ValueError: for images of another shape than the classifier's.
        """
        if x.shape[1:] != self.image_shape:
            raise ValueError(
                f"got images of shape {tuple(x.shape)}; this classifier takes (B, {str(self.image_shape)[1:]}"
            )
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, (B, classes), of images in [-1, 1], (B, C, H, W)."""
        logits: Tensor = self.head(self.features(x))
        return logits

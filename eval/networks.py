"""Any network as an extractor, with what it is given declared: size, resizing rule, range and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.eval import resize
from flowkit.eval.features import check_images, full_float32, library_versions
from flowkit.eval.weight_files import content_hash


class ModuleExtractor:
    """The outputs of a network or function on images in a declared form.

    Levels 0 ... 255 are resized, mapped linearly to ``value_range``, then ``(x - mean) / std``.

    Args:
        network: from images (B, channels, size, size), float32, to features (B, d). A module is put into inference mode and
            moved to the device.
        name: short name, used in results.
        size: pixels along each side of what the network takes.
        resizer: rule of `flowkit.eval.resize.RESIZERS`; "none" refuses images of another size.
        value_range: what black and white become.
        mean: for each channel, subtracted after that. None means 0.
        std: for each channel. None means 1.
        channels: 3 (greyscale images are repeated) or 1.
        weights: what tells this network from others in records and comparisons. None hashes a module's parameters and buffers; a
            function has none to hash and must be told.
        device: where to compute.

    Attributes:
        dim: number of features, from one black image.

    Raises:
        TypeError: for a network that cannot be called, or a result that is not floating point.
        ValueError: for options that do not fit, a function without ``weights``, or a result that is not (B, d).
    """

    def __init__(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        name: str,
        *,
        size: int,
        resizer: str = "clean",
        value_range: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int = 3,
        weights: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        low, high = value_range
        mean, std = [0.0] * channels if mean is None else mean, [1.0] * channels if std is None else std
        if not callable(network):
            raise TypeError(f"the network must be a module or function, got {type(network).__name__}")
        if size < 1 or channels not in (1, 3) or low >= high or {len(mean), len(std)} != {channels} or min(std) <= 0:
            raise ValueError(f"got size={size}, channels={channels}, value_range={value_range}, mean={mean}, std={std}; sizes and "
                             "std are positive, channels 1 or 3 with a mean and std each, low < high")  # fmt: skip
        self._resize = resize.resizer(resizer)
        if isinstance(network, nn.Module):
            network = network.to(device).eval().requires_grad_(False)
            weights = content_hash(network.state_dict()) if weights is None else weights
        elif weights is None:
            raise ValueError(
                f"{name}: a function has no weights to hash; pass weights= with words that tell it from others"
            )
        self.network, self.name, self.size, self.channels, self.device = network, name, size, channels, device
        # One multiplication and one addition from levels to what the network sees.
        shape = (1, channels, 1, 1)
        shift, scale = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = ((high - low) / 255 / scale).float().reshape(shape).to(device)
        self._shift = ((low - shift) / scale).float().reshape(shape).to(device)
        normalised = f", mean {list(mean)}, std {list(std)}" if any(mean) or set(std) != {1.0} else ""
        self.identity = {
            "name": name,
            "weights": weights,
            "preprocessing": f"{resizer} {size}, [{low:g}, {high:g}]{normalised}",
            "channels": str(channels),
            "dtype": "float32",
            "tf32": "off",
            "versions": library_versions("torch"),
        }
        self.dim = self(torch.zeros(1, channels, size, size, dtype=torch.uint8)).shape[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """Returns what the network sees, float32 (B, channels, size, size), of images, uint8 (B, C, H, W).

        Raises:
            ValueError: for images of other channels.
        """
        count = check_images(images).shape[1]
        if count != self.channels and count != 1:
            raise ValueError(f"{self.name} takes images of {self.channels} channels, got {count}; convert them first")
        x = self._resize(images.to(self.device).float(), self.size).expand(-1, self.channels, -1, -1)
        return x * self._scale + self._shift

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, float32 (B, dim), of images, uint8 (B, C, H, W).

        Raises:
            TypeError: where the network returns something else than floating point.
            ValueError: where it does not return (B, d).
        """
        with torch.no_grad(), full_float32():
            features: Any = self.network(self.preprocess(images))
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(
                f"{self.name} returned {type(features).__name__}; wrap the network to return features (B, d)"
            )
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{self.name} returned shape {tuple(features.shape)} for {len(images)} images; wrap it to return "
                             "features (B, d)")  # fmt: skip
        return features.float()

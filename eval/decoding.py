"""One image file to pixels, by rules that are stated: what other tools convert in silence is done when asked for, or refused."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowkit.eval import resize

ALPHA = ("refuse", "white", "black", "drop")
DEEP = ("refuse", "scale")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_PLAIN = ("1", "L", "RGB")


@dataclass(frozen=True)
class Decoding:
    """What becomes of image files.

    Attributes:
        channels: of the result: 3 (greyscale is repeated) or 1 (colour is refused).
        size: pixels along each side: see `flowkit.eval.resize.pil_crop`. None leaves images as they are.
        alpha: transparent images: "refuse"; "white" or "black" puts them on that ground; "drop" forgets the transparency, as
            torch-fidelity does.
        deep: images of 16 bits: "refuse", or "scale" by 255 / 65535, rounded. Other tools keep the upper byte or clip.
    """

    channels: int = 3
    size: int | None = None
    alpha: str = "refuse"
    deep: str = "refuse"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or (self.size is not None and self.size < 1):
            raise ValueError(f"got channels={self.channels}, size={self.size}; channels are 1 or 3 and size at least 1")
        for name, value, known in (("alpha", self.alpha, ALPHA), ("deep", self.deep, DEEP)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose {', '.join(known)}")

    def __call__(self, content: bytes, name: str) -> Tensor:
        """Decodes a file.

        Args:
            content: of the file.
            name: what an error calls it.

        Returns:
            uint8 (channels, H, W).

        Raises:
            ValueError: for a file that is broken, or of a kind that needs a choice; it is named with the cure.
        """
        try:
            # PIL warns of damage that it passes over, and of images so large that they may be an attack.
            with warnings.catch_warnings(action="error"), Image.open(io.BytesIO(content)) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    raise ValueError(f"{name} is an animation of {frames} frames; extract the frame you mean")
                # PIL reads 16-bit colour as 8 bits without a word; byte 24 of a PNG has the depth.
                if image.format == "PNG" and content[24] == 16 and not image.mode.startswith("I"):
                    raise ValueError(f"{name} has 16 bits a channel in colour, which PIL cannot read in full; convert it to 8 "
                                     "bits first")  # fmt: skip
                image.load()
                return self.image(image, name)
        except (UnidentifiedImageError, OSError, SyntaxError, EOFError, Warning, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} is broken or no image ({reason[:160]}); copy it again or remove it") from error

    def image(self, image: Image.Image, name: str) -> Tensor:
        """Converts an image that is open. Arguments and result otherwise as for a file."""
        pixels = self._fit(self._levels(image, name), name)
        if self.size is None:
            return pixels
        return resize.pil_crop(pixels[None].float(), self.size)[0].to(torch.uint8).contiguous()

    def _levels(self, image: Image.Image, name: str) -> Tensor:
        """8-bit values, (H, W) or (H, W, 3)."""
        if image.mode.startswith("I;16"):
            if self.deep == "refuse":
                raise ValueError(f"{name} has 16 bits a channel; pass deep='scale' to round them to 8")
            # 65535 / 255 = 257, so this is the nearest level.
            return torch.from_numpy((np.array(image).astype(np.int64) + 128) // 257).to(torch.uint8)
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = self._ground(image.convert("RGBA"), name)
        elif image.mode == "P":
            image = image.convert("RGB")
        if image.mode not in _PLAIN:
            raise ValueError(
                f"{name} is of PIL's mode {image.mode}, which has no one conversion to RGB; convert it first"
            )
        return torch.from_numpy(np.array(image.convert("L") if image.mode == "1" else image))

    def _ground(self, image: Image.Image, name: str) -> Image.Image:
        if self.alpha == "refuse" and image.getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"{name} is partly transparent; pass alpha='white' or 'black' for the ground, or 'drop'")
        if self.alpha in ("white", "black"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.alpha), image)
        return image.convert("RGB")

    def _fit(self, pixels: Tensor, name: str) -> Tensor:
        """(H, W) or (H, W, 3) to (channels, H, W)."""
        if pixels.ndim == 2:
            return pixels.expand(self.channels, -1, -1).contiguous()
        if self.channels == 1:
            if not (pixels[..., :1] == pixels).all():
                raise ValueError(f"{name} is in colour where channels=1; pass channels=3, or convert it first")
            return pixels[None, ..., 0].contiguous()
        return pixels.permute(2, 0, 1).contiguous()

"""Pictures for people: tiles on one sheet, and a PNG written whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from flowkit.weights import write_bytes


def picture(image: Tensor) -> Image.Image:
    """Returns an image, uint8 (C, H, W) of 1 or 3 channels, as a picture: grey ("L") or colour ("RGB")."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def mosaic(pictures: Sequence[Image.Image], columns: int = 10, size: int = 48, gap: int = 2) -> Image.Image:
    """Returns pictures as one sheet of square tiles, row by row.

    Args:
        pictures: of any sizes; each fits its tile, small ones magnified pixel by pixel.
        columns: tiles of a row.
        size: side of a tile in pixels.
        gap: pixels between tiles.
    """
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (size + gap) - gap, rows * (size + gap) - gap), "white")
    for i, one in enumerate(pictures):
        scale = size / max(one.size)
        width, height = (max(1, round(side * scale)) for side in one.size)
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        tile = one.convert("RGB").resize((width, height), method)
        left, top = (i % columns * (size + gap), i // columns * (size + gap))
        sheet.paste(tile, (left + (size - width) // 2, top + (size - height) // 2))
    return sheet


def save_png(path: Path, picture: Image.Image) -> None:
    """Writes a picture whole or not at all."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def save_tiles(path: Path, pictures: Sequence[Image.Image], most: int = 128) -> Path:
    """Writes pictures as one sheet of at most four columns: PNG where they are small, JPEG of smaller copies where they are not.

    Args:
        path: without suffix.
        pictures: at least one.
        most: side of the largest tile in pixels.

    Returns:
        The file.
    """
    side = max(max(one.size) for one in pictures)
    small = side <= most // 2
    sheet = mosaic(pictures, min(4, len(pictures)), max(48, side) if small else min(side, most))
    if small:
        save_png(path.with_suffix(".png"), sheet)
        return path.with_suffix(".png")
    buffer = BytesIO()
    sheet.save(buffer, "JPEG", quality=88)
    write_bytes(path.with_suffix(".jpg"), buffer.getvalue())
    return path.with_suffix(".jpg")

"""Procedural 16x16 colour pictures: a disc, square or triangle in one of four colours, jittered and anti-aliased."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = 16
# Red, green, blue, yellow.
COLOURS = np.array([[1.0, 0.25, 0.2], [0.2, 0.85, 0.3], [0.25, 0.4, 1.0], [1.0, 0.85, 0.2]], dtype=np.float32)
Array = np.ndarray[Any, np.dtype[Any]]


def shapes(count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draws pictures; picture i depends on the generator's start and i, not on the count.

    A form is the set where its distance d is negative; a pixel's coverage is ``clip(1/2 - d, 0, 1)``. Only operations that
    IEEE 754 rounds correctly are used, so every machine draws the same bytes.

    Args:
        count: number of pictures, N.
        generator: fresh; gives five uniform numbers a picture: centre (+-1.5 pixels in x and y), radius (3.5 to 5.5 pixels),
            brightness (0.7 to 1) and grey level of the background (0 to 0.15).

    Returns:
        Pictures, uint8 (N, 3, 16, 16), and labels ``i % 12 = 4 form + colour``, int64 (N,).
    """
    labels = np.arange(count, dtype=np.int64) % 12
    u = generator.random((count, 5)).astype(np.float32).T[..., None, None]
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = grid[None, None, :] - (6.5 + 3 * u[0]), grid[None, :, None] - (6.5 + 3 * u[1])
    radius, brightness, background = 3.5 + 2 * u[2], 0.7 + 0.3 * u[3], 0.15 * u[4]

    disc = np.sqrt(x * x + y * y) - radius
    square = np.maximum(abs(x), abs(y)) - 0.85 * radius
    triangle = np.maximum(y, np.float32(0.75**0.5) * abs(x) - y / 2) - 0.6 * radius
    distance = np.choose((labels // 4)[:, None, None], [disc, square, triangle])
    coverage = np.clip(0.5 - distance, 0, 1)[:, None]
    colour = COLOURS[labels % 4][..., None, None] * brightness[:, None]
    background = background[:, None]
    return np.rint(255 * (background + coverage * (colour - background))).astype(np.uint8), labels

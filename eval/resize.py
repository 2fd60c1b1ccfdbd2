"""The resizing rules of the evaluation tools, as exact batched torch: where most of their disagreement comes from.

Every rule maps levels in 0 ... 255 to levels, in the dtype given, without rounding unless it says so. Pixel i of n sees the m
pixels of the input around

    tf1:    i m / n                      (TensorFlow 1: no half-pixel centres, so a shift of up to half an input pixel)
    others: (i + 1/2) m / n - 1/2

All are separable: ``y = R_height x R_width^T`` with matrices of shape (n, m), whose rows sum to 1. Where antialiased, the kernel
is widened by m / n when that is above 1, as PIL does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Resizer = Callable[[Tensor, int], Tensor]


def tf1(x: Tensor, size: int) -> Tensor:
    """TensorFlow 1's ``ResizeBilinear``, of torch-fidelity, the TF graph of ADM and (to 3e-3 levels) NVIDIA's networks.

    Args:
        x: float32 or float64 (B, C, H, W).
        size: pixels n along each side of the result.

    Returns:
        (B, C, n, n), same dtype and within 1e-4 levels of torch-fidelity's.
    """
    rows, columns = (_matrix(_linear_weights, length, size, x.dtype, str(x.device)) for length in x.shape[2:])
    return rows @ (x @ columns.T)


def clean(x: Tensor, size: int) -> Tensor:
    """clean-fid's resize: PIL's antialiased bicubic of each channel in floating point, clamped to 0 ... 255 (Parmar et al. 2022).

    Args:
        x: float32 or float64 (B, C, H, W).
        size: pixels n along each side of the result.

    Returns:
        (B, C, n, n), same dtype and within 1e-3 levels of PIL's.
    """
    rows, columns = (_matrix(_cubic_weights, length, size, x.dtype, str(x.device)) for length in x.shape[2:])
    return (rows @ (x @ columns.T)).clamp(0, 255)


def bilinear(x: Tensor, size: int) -> Tensor:
    """pytorch-fid's resize: bilinear with half-pixel centres and no antialiasing. Arguments and result as `clean`'s."""
    return F.interpolate(x, (size, size), mode="bilinear")


def antialiased(x: Tensor, size: int) -> Tensor:
    """torchmetrics' resize since 1.8: bilinear, antialiased. Arguments and result as `clean`'s."""
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def bicubic(x: Tensor, size: int) -> Tensor:
    """CMMD's resize: bicubic without antialiasing (a = -0.75), not clamped. Arguments and result as `clean`'s."""
    return F.interpolate(x, (size, size), mode="bicubic")


def antialiased_bicubic(x: Tensor, size: int) -> Tensor:
    """EDM2's resize for DINOv2: torch's antialiased bicubic of floats, not clamped. Arguments and result as `clean`'s."""
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True)


def pil_bicubic(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """PIL's bicubic of 8-bit images, bit for bit: antialiased, rounded to whole levels after each of its two passes.

    Rows are resized first, as in every PIL up to version 12; later ones take the cheaper order, which can differ on noise.

    Args:
        x: whole levels as float (B, C, H, W).
        size: pixels along each side of the result, or (height, width).

    Returns:
        (B, C, height, width), whole levels, same dtype.
    """
    height, width = (size, size) if isinstance(size, int) else size
    y = x.to(torch.float64)
    if width != x.shape[3]:
        y = _round(y @ _matrix(_fixed_cubic_weights, x.shape[3], width, y.dtype, str(x.device)).T)
    if height != x.shape[2]:
        y = _round(_matrix(_fixed_cubic_weights, x.shape[2], height, y.dtype, str(x.device)) @ y)
    return y.to(x.dtype)


def pil_crop(x: Tensor, size: int) -> Tensor:
    """The shorter side resized to ``size`` by PIL's bicubic and the middle cut out: torchvision's Resize and CenterCrop, CLIP's.

    Args:
        x: whole levels as float (B, C, H, W).
        size: pixels n along each side of the result.

    Returns:
        (B, C, n, n), whole levels, same dtype.
    """
    height, width = x.shape[2:]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pil_bicubic(x, (height, width))[:, :, top : top + size, left : left + size]


def none(x: Tensor, size: int) -> Tensor:
    """No resizing: images of another size are refused.

    Raises:
        ValueError: for images that are not squares of ``size``.
    """
    if tuple(x.shape[2:]) != (size, size):
        raise ValueError(
            f"got images of {x.shape[2]}x{x.shape[3]} pixels where {size}x{size} are needed; choose a resizer"
        )
    return x


RESIZERS: dict[str, Resizer] = {
    rule.__name__: rule
    for rule in (tf1, clean, bilinear, antialiased, bicubic, antialiased_bicubic, pil_bicubic, pil_crop, none)
}


def resizer(name: str) -> Resizer:
    """Returns a rule by its name.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in RESIZERS:
        raise ValueError(f"unknown resizer {name!r}; choose {', '.join(RESIZERS)}")
    return RESIZERS[name]


@lru_cache(maxsize=64)
def _matrix(weights: Callable[[int, int], Tensor], length: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """The matrix (size, length) of a rule, from its float64 weights."""
    return weights(length, size).to(device, dtype)


def _linear_weights(length: int, size: int) -> Tensor:
    # Positions are rounded as TensorFlow rounds them, in float32; that decides which pixel a position belongs to.
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
    low = position.long().clamp_max(length - 1)
    share = (position - low)[:, None].to(torch.float64)
    matrix = torch.zeros(size, length, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], 1 - share)
    return matrix.scatter_add_(1, (low + 1).clamp_max(length - 1)[:, None], share)


def _cubic_weights(length: int, size: int) -> Tensor:
    """Keys' cubic (1981, equation 4, a = -1/2) around each centre, over the pixels whose centres are within its support."""
    ratio = length / size
    scale = max(1.0, ratio)
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * ratio
    pixel = torch.arange(length, dtype=torch.float64)
    inside = (pixel >= (centre - 2 * scale + 0.5).trunc()) & (pixel < (centre + 2 * scale + 0.5).trunc())
    t = ((pixel + 0.5 - centre) / scale).abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0)) * inside
    return weights / weights.sum(dim=1, keepdim=True)


def _fixed_cubic_weights(length: int, size: int) -> Tensor:
    """The same in PIL's fixed point, multiples of 2^-22: products with whole levels are exact in float64."""
    weights = _cubic_weights(length, size) * 2**22
    return (weights.abs() + 0.5).floor().copysign(weights) / 2**22


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)

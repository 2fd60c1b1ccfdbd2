"""Resizing rules against the tools and libraries that they repeat, in pixel space."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from flowkit.eval import resize

transforms = importlib.import_module("torchvision.transforms")  # without types

SIZES = [
    (32, 32),
    (64, 64),
    (256, 256),
    (299, 299),
    (512, 512),
    (1024, 1024),
    (40, 56),
    (301, 17),
    (1, 1),
    (1, 9),
    (2, 3),
]


def levels(height: int, width: int) -> Tensor:
    """One image: smooth above, noise below, so that both the shift of a rule and its kernel show."""
    generator = torch.Generator().manual_seed(height * 2048 + width)
    noise = torch.randint(256, (1, 3, height, width), generator=generator).float()
    ramp = torch.linspace(0, 255, width).expand(1, 3, height, width).round()
    return torch.cat([ramp[:, :, : height // 2], noise[:, :, height // 2 :]], dim=2)


def pil(x: Tensor, width: int, height: int | None = None) -> Tensor:
    size = (width, width if height is None else height)
    channels = [Image.fromarray(c.numpy()).resize(size, Image.Resampling.BICUBIC) for c in x[0]]
    return torch.stack([torch.from_numpy(np.array(c)) for c in channels])[None]


@pytest.mark.parametrize("shape", SIZES)
def test_tf1_is_torch_fidelitys(shape: tuple[int, int]) -> None:
    x = levels(*shape)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize.tf1(x, 299), theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(resize.tf1(x.double(), 299), theirs.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SIZES)
def test_tf1_is_that_of_nvidias_networks(shape: tuple[int, int]) -> None:
    """A grid of sampling positions in [-1, 1], shifted so that the first falls on the first pixel's centre."""
    x = levels(*shape)
    theta = torch.eye(2, 3)[None]
    theta[0, 0, 2] = 1 / shape[1] - 1 / 299
    theta[0, 1, 2] = 1 / shape[0] - 1 / 299
    grid = F.affine_grid(theta, [1, 3, 299, 299], align_corners=False)
    theirs = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    # Their positions carry float32's rounding of whole images, 2^-24 of the side, and noise changes by up to 255 a pixel.
    assert (resize.tf1(x, 299) - theirs).abs().max() < 255 * max(shape) * 2**-22


@pytest.mark.parametrize("shape", SIZES)
def test_clean_is_pils_float_bicubic(shape: tuple[int, int]) -> None:
    x = levels(*shape)
    torch.testing.assert_close(resize.clean(x, 299), pil(x, 299).clamp(0, 255), rtol=0, atol=1e-3)


def test_clean_is_clean_fids() -> None:
    if importlib.util.find_spec("cleanfid") is None:
        pytest.skip("clean-fid is not installed")
    theirs = importlib.import_module("cleanfid.resize").build_resizer("clean")
    x = levels(40, 56)
    expected = torch.from_numpy(theirs(x[0].permute(1, 2, 0).to(torch.uint8).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(resize.clean(x, 299)[0], expected, rtol=0, atol=1e-3)


def test_clean_is_clamped_where_the_cubic_overshoots() -> None:
    x = levels(64, 64)
    assert pil(x, 299).min() < -1
    assert resize.clean(x, 299).min() == 0
    assert resize.clean(x, 299).max() == 255


@pytest.mark.parametrize("shape", SIZES)
def test_rounded_bicubic_is_pils_of_bytes(shape: tuple[int, int]) -> None:
    x = levels(*shape)
    rows = pil(x.to(torch.uint8), 224, shape[0])
    assert torch.equal(resize.pil_bicubic(x, 224), pil(rows, 224).float())


@pytest.mark.parametrize("shape", [(32, 48), (1, 1), (400, 20)])
def test_linear_rules_are_the_formula(shape: tuple[int, int]) -> None:
    """Triangles around (i + 1/2) m / n - 1/2, of width 1 or, antialiased and shrinking, m / n; weights sum to 1."""
    x = levels(*shape).double()
    for rule, widen in ((resize.bilinear, False), (resize.antialiased, True)):
        factors = []
        for length in shape:
            ratio = length / 30
            centre = (torch.arange(30, dtype=torch.float64) + 0.5) * ratio - 0.5
            centre = centre if widen else centre.clamp(0, length - 1)
            width = max(1.0, ratio) if widen else 1.0
            weight = (1 - (centre[:, None] - torch.arange(length)).abs() / width).clamp_min(0)
            factors.append(weight / weight.sum(dim=1, keepdim=True))
        torch.testing.assert_close(rule(x, 30), factors[0] @ x @ factors[1].T, rtol=0, atol=1e-4)


# Of a square that is enlarged: nothing to antialias, nothing to cut; and clean only clamps what EDM2's leaves.
SAME = ("none", "antialiased", "pil_crop", "antialiased_bicubic")


def test_rules_differ_where_the_tools_do() -> None:
    """Table 2.2: root mean squares of differences on noise are levels, not rounding."""
    x = levels(64, 64)
    results = [rule(x, 299) for name, rule in resize.RESIZERS.items() if name not in SAME]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).square().mean().sqrt() > 0.1
    torch.testing.assert_close(resize.antialiased(x, 299), resize.bilinear(x, 299), rtol=0, atol=1e-3)
    assert torch.equal(resize.pil_crop(x, 299), resize.pil_bicubic(x, 299))
    unclamped = resize.antialiased_bicubic(x, 299)
    assert unclamped.min() < -1
    torch.testing.assert_close(unclamped.clamp(0, 255), resize.clean(x, 299), rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(30, 47), (47, 30), (16, 16), (21, 20)])
def test_crop_is_torchvisions(shape: tuple[int, int]) -> None:
    x = levels(*shape)
    picture = Image.fromarray(x[0].permute(1, 2, 0).to(torch.uint8).numpy())
    resized = transforms.Resize(16, transforms.InterpolationMode.BICUBIC)(picture)
    rows = picture.resize((resized.width, picture.height), Image.Resampling.BICUBIC)  # rows first, see pil_bicubic
    expected = transforms.CenterCrop(16)(rows.resize(resized.size, Image.Resampling.BICUBIC))
    assert torch.equal(resize.pil_crop(x, 16)[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1).float())


def test_same_size_is_the_same_image() -> None:
    x = levels(40, 40)
    for name, rule in resize.RESIZERS.items():
        torch.testing.assert_close(rule(x, 40), x, rtol=0, atol=1e-4, msg=name)


def test_unknown_rules_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown resizer 'lanczos'; choose tf1, clean"):
        resize.resizer("lanczos")
    with pytest.raises(ValueError, match="40x56 pixels where 40x40 are needed"):
        resize.resizer("none")(levels(40, 56), 40)

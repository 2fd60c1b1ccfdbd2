"""`flowkit.attach` in every family of pipelines: nothing changes idly, guidance inside is guidance outside, a cut is a cut."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit.hooks import Recorder, attach

from . import test_modular as modular
from .families import WORKING, steps_of, stock_of
from .guided import Cut, Fixed, Idle, counted, reference, scaled, trace
from .tiny import PIPELINES, build, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

_UNGUIDED = ("ddpm", "flux-control", "flux-fill")  # no unconditional output at all
_OWN_GUIDER = ("hunyuan-image", "hunyuan-video-1.5")  # the scale is that of a component
GUIDED = [family for family in WORKING if family not in (*_UNGUIDED, *_OWN_GUIDER)]
# By default: one of each way to guide.
_DEFAULT = {
    *("sd15", "sdxl", "sd3", "pixart-alpha", "dit", "flux", "wan", "wan2.2", "z-image", "lumina2", "hidream"),
    *("sd15-pag", "sd15-instruct", "svd", "animatediff", "cogvideox", "kandinsky5", "chroma", "deepfloyd", "ltx2", "lumina"),
}  # fmt: skip
# Plain guidance inside is not the pipeline's own, since the pipeline does not do plain guidance.
NOT_PLAIN = {
    **dict.fromkeys(("qwen-image", "qwen-image-img2img", "qwen-image-inpaint"), "rescales what it combines"),
    "lumina": "guides three channels only",
    "lumina2": "rescales what it combines",
    "sd15-instruct": "has a scale for the image as well",
    "ltx2": "combines the sound itself, and sound changes the picture",
}
_PERTURBED = ("sd15-pag", "sdxl-pag")  # keep their own term, to rounding
_ROUNDED = (*_PERTURBED, "z-image", "z-image-img2img")  # the latter: c + (w - 1) (c - u)
_DEAF = ("prx", "kandinsky5")  # random as they are, these networks do not hear the prompt


def _params(families: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in _DEFAULT else pytest.mark.slow) for name in families]


@pytest.mark.parametrize("family", _params(WORKING))
def test_idle_changes_nothing(family: str) -> None:
    pipe = build(family, stock_of(family))
    steps = steps_of(family)
    with counted(pipe) as rows:
        expected = run(pipe, steps)
    before = trace(pipe)  # a first call leaves traces of its own
    with attach(pipe), counted(pipe) as same:
        assert torch.equal(run(pipe, steps), expected)
    assert same == rows
    with attach(pipe, Idle(), Recorder()) as attached, counted(pipe) as same:
        assert torch.equal(run(pipe, steps), expected)
    assert same == rows
    assert attached.rows == attached.asked == sum(rows)
    assert trace(pipe) == before


@pytest.mark.parametrize("family", _params([name for name in GUIDED if name not in NOT_PLAIN]))
def test_guidance_inside_is_guidance_outside(family: str) -> None:
    expected, other = reference(family, 7.0), reference(family, 2.0)
    assert (expected - other).abs().max() > 1e-5 or family in _DEAF
    pipe = build(family, stock_of(family))
    with attach(pipe, Fixed(7.0)):
        found = run(pipe, steps_of(family), **scaled(family, 2.0))
    if family in _ROUNDED:
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", _params(list(NOT_PLAIN)))
def test_guidance_inside_does_not_depend_on_the_scale_outside(family: str) -> None:
    pipe = build(family, stock_of(family))
    found = []
    for w in (2.0, 4.0):
        with attach(pipe, Fixed(7.0)):
            call = {"guidance_scale": w} if family == "ltx2" else scaled(family, w)
            found.append(run(pipe, steps_of(family), **call))
    assert torch.equal(*found)
    assert (found[0] - reference(family)).abs().max() > 1e-4


@pytest.mark.parametrize("family", _params(GUIDED))
def test_cut(family: str) -> None:
    """From the first step on it is the pipeline without guidance, at half the rows."""
    pipe, steps = build(family, stock_of(family)), steps_of(family)
    with counted(pipe) as rows:
        on = {"guidance_scale": 5.0} if family.endswith("-pag") else scaled(family, 5.0)
        full = run(pipe, steps, **on)
    with attach(pipe, Cut(0)) as attached, counted(pipe) as fewer:
        found = run(pipe, steps, **on)
    off = scaled(family, 1.0) | ({"image_guidance_scale": 1.0} if family == "sd15-instruct" else {})
    if family in _PERTURBED:  # all rows are run, since its attention takes the batch apart
        assert sum(fewer) == sum(rows)
    else:
        parts = 3 if family == "sd15-instruct" else 2
        assert sum(fewer) == attached.rows == sum(rows) // parts
        assert attached.asked == sum(rows)
        assert attached.saved == pytest.approx(1 - 1 / parts)
    expected = run(pipe, steps, **off)
    assert (expected - full).abs().max() > 1e-5 or family in _DEAF
    if family in _PERTURBED:
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    else:
        assert torch.equal(found, expected)
    with attach(pipe, Cut(2)) as attached, counted(pipe) as fewer:
        later = run(pipe, steps, **on)
    assert sum(fewer) == attached.rows
    assert min((later - other).abs().max() for other in (found, full)) > 1e-6 or family in _DEAF


@pytest.mark.parametrize("family", _params(list(_OWN_GUIDER)))
def test_pipelines_with_a_guider(family: str) -> None:
    pipe, steps = build(family, stock_of(family)), steps_of(family)

    def scaled_by(w: float) -> Tensor:
        for name in ("guider", "ocr_guider"):
            if hasattr(pipe, name):
                setattr(pipe, name, diffusers.ClassifierFreeGuidance(guidance_scale=w))
        return run(pipe, steps)

    expected = scaled_by(7.0)
    assert (scaled_by(2.0) - expected).abs().max() > 1e-5
    with attach(pipe, Fixed(7.0)):
        assert torch.equal(run(pipe, steps), expected)
    with attach(pipe, Cut(0)) as attached:
        found = run(pipe, steps)
    assert 2 * attached.rows == attached.asked
    assert torch.equal(found, scaled_by(1.0))


@pytest.mark.parametrize("family", _UNGUIDED)
def test_without_guidance_a_method_is_refused_and_a_recorder_is_not(family: str) -> None:
    pipe = build(family, stock_of(family))
    expected, before = run(pipe), trace(pipe)
    with attach(pipe, Fixed(2.0)), pytest.raises(ValueError, match=r"which is off in this call of .*: pass"):
        run(pipe)
    assert trace(pipe) == before
    with attach(pipe, recorder := Recorder()):
        assert torch.equal(run(pipe), expected)
    assert len(recorder.trajectories[0].states) == len(pipe.scheduler.timesteps) + 1
    assert trace(pipe) == before


# Modular pipelines.

MODULAR_DEFAULT = ("sdxl", "sd3", "qwen-image", "wan", "ltx")
_NO_GUIDER = ("FluxAutoBlocks",)
_DRIVEN = [case for case in modular.CASES if case[0] not in (*_NO_GUIDER, "ZImageAutoBlocks")]


def _scale(pipe: Any, w: float) -> None:
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=w))


def _modular(pipe: Any, family: str) -> Tensor:
    return modular.run(pipe, family)


@pytest.mark.parametrize(
    ("blocks", "family"),
    [pytest.param(*case, marks=() if case[1] in MODULAR_DEFAULT else pytest.mark.slow) for case in _DRIVEN],
)
def test_modular(blocks: str, family: str) -> None:
    pipe = modular.assembled(blocks, family, stock_of(family))
    plain, before = _modular(pipe, family), trace(pipe)
    with attach(pipe, Idle(), Recorder()):
        assert torch.equal(_modular(pipe, family), plain)
    _scale(pipe, 7.0)
    expected = _modular(pipe, family)
    assert (expected - plain).abs().max() > 1e-4
    _scale(pipe, 2.0)
    with attach(pipe, Fixed(7.0)) as attached:
        found = _modular(pipe, family)
    assert attached.rows == attached.asked
    assert torch.equal(found, expected) == (family not in NOT_PLAIN)
    with attach(pipe, Cut(0)) as attached, counted(pipe) as rows:
        cut = _modular(pipe, family)
    assert 2 * sum(rows) == 2 * attached.rows == attached.asked
    _scale(pipe, 1.0)
    assert torch.equal(cut, _modular(pipe, family))
    assert trace(pipe) == before


def test_modular_without_guidance() -> None:
    pipe = modular.assembled("FluxAutoBlocks", "flux", stock_of("flux"))
    expected, before = _modular(pipe, "flux"), trace(pipe)
    with (
        attach(pipe, Fixed(5.0)),
        pytest.raises(ValueError, match="Fixed needs classifier-free guidance, which is off"),
    ):
        _modular(pipe, "flux")
    assert trace(pipe) == before
    assert torch.equal(_modular(pipe, "flux"), expected)


def test_modular_that_combines_otherwise() -> None:
    pipe = modular.assembled("ZImageAutoBlocks", "z-image", stock_of("z-image"))
    expected, before = _modular(pipe, "z-image"), trace(pipe)
    with attach(pipe, Idle()):
        assert torch.equal(_modular(pipe, "z-image"), expected)
    with (
        attach(pipe, Fixed(5.0)),
        pytest.raises(ValueError, match=r"changes the network's prediction before scheduler\.step"),
    ):
        _modular(pipe, "z-image")
    assert trace(pipe) == before


def test_the_lists_are_complete() -> None:
    assert {*_DEFAULT, *NOT_PLAIN, *_PERTURBED} <= {*WORKING}
    assert {*WORKING} <= {*PIPELINES}

"""Calibrating adaptive guidance, and what it and LinearAG cost beside guidance that is cut off or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowkit
from flowkit.guidance.adaptive import _between, _saving
from flowkit.guidance.runs import Unguided, recorded
from flowkit.hooks import Part

STEPS = 8
CALL = {"guidance_scale": 2.0, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def pipe() -> Any:
    digits = flowkit.load_demo("digits")
    digits.set_progress_bar_config(disable=True)
    return digits


def run(pipe: Any, *parts: Part, **call: Any) -> tuple[Tensor, float]:
    """Final samples and the share of network rows that was saved."""
    labels, generator = [i % 10 for i in range(80)], torch.Generator().manual_seed(5)
    with flowkit.attach(pipe, *parts, flowkit.Recorder("state")) as attached:
        images = pipe(labels, **{**CALL, **call}, generator=generator, output_type="latent").images
    return images, attached.saved


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean().sqrt())


def calibrated(pipe: Any, **how: Any) -> flowkit.AdaptiveGuidance:
    found: flowkit.AdaptiveGuidance = flowkit.AdaptiveGuidance.calibrate(
        pipe, range(10), call=CALL, samples=40, progress=False, **how
    )
    return found


def test_the_saving_of_a_threshold_is_what_a_run_saves(pipe: Any) -> None:
    for per_sample in (True, False):
        guidance = calibrated(pipe, saving=0.2, per_sample=per_sample, batch_size=40)
        call = {**CALL, "output_type": "latent"}
        given: dict[str, Any] = {"samples": 40, "inputs": range(10), "call": call, "seed": 0, "batch_size": 40}
        ((_, attached),) = recorded(pipe, guidance, keep=("state",), **given)
        assert attached.saved == pytest.approx(guidance.about["saving"], abs=1e-12)
        assert abs(guidance.about["saving"] - 0.2) < (0.02 if per_sample else 0.04)


def test_savings_are_counted_as_by_hand() -> None:
    cosines = torch.tensor([[0.5, 0.9, 0.7, 0.95], [0.6, 0.6, 0.6, 0.99]], dtype=torch.float64)
    assert _saving(cosines, 2.0) == 0
    assert _saving(cosines, 0.0) == 3 / 8  # all rows but those of the first evaluation
    assert _saving(cosines, 0.8) == (2 / 8 + 0) / 2  # after the second of the first sample; after the last of the other
    savings = [_saving(cosines, threshold) for threshold in _between(cosines)]
    assert savings == sorted(savings, reverse=True)


def test_it_holds_on_other_samples(pipe: Any) -> None:
    _, saved = run(pipe, calibrated(pipe, saving=0.25))
    assert abs(saved - 0.25) < 0.03


def test_a_tolerance_is_kept_and_a_wider_one_saves_more(pipe: Any) -> None:
    narrow, wide = calibrated(pipe, tolerance=0.2), calibrated(pipe, tolerance=0.6)
    assert narrow.about["distance"] <= 0.2
    assert 0.2 < wide.about["distance"] <= 0.6
    assert wide.about["saving"] > narrow.about["saving"] > 0
    full, nothing = run(pipe)[0], run(pipe, Unguided())[0]
    for guidance, bound in ((narrow, 0.2), (wide, 0.6)):
        assert rms(run(pipe, guidance)[0], full) < 1.3 * bound * rms(nothing, full)


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_distances_to_full_guidance(pipe: Any, scale: float) -> None:
    """At 16 steps, AG at a quarter of the rows is within .45 of the way to no guidance, and LinearAG nearer than AG at 40 %."""
    call = {"guidance_scale": scale, "num_inference_steps": 16}
    given: dict[str, Any] = {"samples": 40, "progress": False}
    full, nothing = run(pipe, **call)[0], run(pipe, Unguided(), **call)[0]
    adaptive = flowkit.AdaptiveGuidance.calibrate(pipe, range(10), saving=0.25, call=call, **given)
    assert rms(run(pipe, adaptive, **call)[0], full) < 0.45 * rms(nothing, full)
    adaptive = flowkit.AdaptiveGuidance.calibrate(pipe, range(10), saving=0.4, call=call, **given)
    linear = flowkit.LinearAdaptiveGuidance.calibrate(pipe, range(10), saving=0.4, call=call, **given)
    (near, saved), (far, also) = run(pipe, linear, **call), run(pipe, adaptive, **call)
    assert abs(saved - also) < 0.05
    assert rms(near, full) < 0.7 * rms(far, full)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "give one of them"),
        ({"saving": 0.2, "tolerance": 0.2}, "give one of them"),
        ({"saving": 0.5}, r"saving must lie in \(0, 0.5\), got 0.5"),
        ({"saving": 0.49}, "saving=0.49 is more than the 0.4375"),
        ({"tolerance": 1.0}, r"tolerance must lie in \(0, 1\), got 1.0"),
        ({"saving": 0.2, "space": "pixels"}, "unknown space 'pixels'"),
    ],
)
def test_bad_arguments(pipe: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(pipe, **how)


def test_no_guidance_nothing_to_calibrate(pipe: Any) -> None:
    with pytest.raises(ValueError, match="needs classifier-free guidance"):
        flowkit.AdaptiveGuidance.calibrate(
            pipe, range(10), saving=0.2, call={"num_inference_steps": 4}, samples=4, progress=False
        )
    assert "step" not in vars(pipe.scheduler)

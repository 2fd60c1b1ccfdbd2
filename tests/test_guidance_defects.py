"""Defects of diffusers' guiders that ours must not have. A test that fails in its first half says that they are mended there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from diffusers import guiders
from diffusers.guiders import frequency_decoupled_guidance as frequency
from diffusers.modular_pipelines import BlockState
from torch import Tensor
from torch.nn import functional

from flowkit import paths
from flowkit.guidance import (
    AdaptiveGuidance,
    IntervalGuidance,
    ProjectedGuidance,
    SecondModelGuidance,
    ZeroStarGuidance,
)
from flowkit.hooks.parts import Evaluation, Level

NOISE = torch.Generator().manual_seed(0)
C, U = (torch.randn(2, 3, 8, 8, generator=NOISE) for _ in range(2))


def stock(name: str, step: int = 0, steps: int = 10, **arguments: Any) -> Any:
    guider = getattr(guiders, name)(**arguments)
    guider.set_state(step, steps, torch.tensor(500))
    return guider


class Blocks(torch.nn.Module):
    """What a guider that skips layers wants to see of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))


@pytest.mark.parametrize(
    ("name", "arguments", "calls"),
    [
        ("SkipLayerGuidance", {"skip_layer_guidance_layers": [1, 2], "skip_layer_guidance_start": 0.0}, 3),
        ("AutoGuidance", {"auto_guidance_layers": [1, 2], "dropout": 0.5}, 2),
    ],
)
def test_the_documented_list_of_layers(name: str, arguments: dict[str, Any], calls: int) -> None:
    guider = stock(name, step=1, **arguments)

    def prepare() -> None:
        for _ in range(calls):
            guider.prepare_models(Blocks())

    with pytest.raises(TypeError, match="len"):
        prepare()
    # Ours has no layers to list, and says at construction what a list in place of a number is.
    wrong: list[Callable[[Any], object]] = [
        AdaptiveGuidance,
        ProjectedGuidance,
        ZeroStarGuidance,
        lambda given: IntervalGuidance(0.0, given),
        lambda given: SecondModelGuidance(given, adapter="weak"),
    ]
    for build in wrong:
        with pytest.raises(TypeError, match=r"must be one number, got \[1, 2\]; "):
            build([1, 2])


def test_a_weak_network_without_classifier_free_guidance_sees_the_condition() -> None:
    guider = stock(
        "SkipLayerGuidance",
        step=1,
        guidance_scale=1.0,
        skip_layer_guidance_layers=0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    rows = {"prompt": ("the prompt", "the negative prompt")}
    first, second = guider.prepare_inputs(rows)
    assert (first.prompt, second.prompt) == ("the prompt", "the negative prompt")
    skipped = guider(_two("pred_cond_skip"))[0]
    assert torch.allclose(
        skipped, U + 2.8 * (C - U), atol=1e-5
    )  # which is plain guidance at the scale of the skipped layers
    # Ours: no guidance away from a second network that is the first one, whatever the negative prompt.
    ours = SecondModelGuidance(2.8, model=torch.nn.Tanh(), condition="same")
    assert not ours.needs_guidance
    row = {"cond": C, "uncond": U}[cast(str, ours.second)]
    again = ours.uncond(torch.nn.Tanh(), row)
    assert torch.equal(ours.combine(C.tanh(), again, 1, 0.9, {})[0], C.tanh())


def test_projected_guidance_is_the_papers() -> None:
    w, eta, r = 5.0, 0.0, 2.0
    options: dict[str, Any] = {"eta": eta, "adaptive_projected_guidance_rescale": r}
    d = C - U
    d = d * (r / d.flatten(1).norm(dim=1)).clamp_max(1).reshape(-1, 1, 1, 1)
    along = (d * C).sum((1, 2, 3), keepdim=True) / C.square().sum((1, 2, 3), keepdim=True) * C
    paper = C + (w - 1) * (d - along + eta * along)
    default = stock("AdaptiveProjectedGuidance", guidance_scale=w, **options)(_two())[0]
    assert (default - paper).abs().max() > 1
    same = stock("AdaptiveProjectedGuidance", guidance_scale=w - 1, use_original_formulation=True, **options)(_two())[0]
    ours, _ = ProjectedGuidance(w, eta=eta, norm_threshold=r).combine(C, U, 0, 0.5, {})
    assert (same - paper).abs().max() < 1e-5
    assert (ours - paper).abs().max() < 1e-5


def test_a_zeroed_velocity_costs_no_second_pass() -> None:
    guider = stock("ClassifierFreeZeroStarGuidance", guidance_scale=5.0, zero_init_steps=1)
    assert guider.num_conditions == 2
    assert not guider(_two())[0].any()
    ours = ZeroStarGuidance(5.0, zero_init=1)
    assert ours.plan(0, 1.0, {}) == "cond"
    assert not ours.combine(C, None, 0, 1.0, {})[0].any()
    # Where it is not zero, both are the same method.
    later = stock("ClassifierFreeZeroStarGuidance", step=3, guidance_scale=5.0, zero_init_steps=1)(_two())[0]
    assert torch.allclose(ours.combine(C, U, 3, 0.5, {})[0], later, atol=1e-5)


@pytest.mark.parametrize("start", [[0.5, 0.0], [0.0, 0.5]])
def test_out_of_its_range_guidance_is_the_conditional_output(
    monkeypatch: pytest.MonkeyPatch, start: list[float]
) -> None:
    """A stand-in for kornia's pyramid of two levels: which level is out of range decides between two errors."""

    def pyramid(x: Tensor, levels: int) -> list[Tensor]:
        coarse = functional.avg_pool2d(x, 2)
        return [x - functional.interpolate(coarse, scale_factor=2), coarse]

    def double(x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2)

    monkeypatch.setattr(frequency, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(frequency, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(frequency, "upsample_and_blur_func", double)
    whole = stock("FrequencyDecoupledGuidance", guidance_scales=[5.0, 5.0])(_two())[0]
    assert torch.allclose(whole, U + 5.0 * (C - U), atol=1e-4)
    with pytest.raises((NameError, RuntimeError)):
        stock("FrequencyDecoupledGuidance", guidance_scales=[5.0, 5.0], start=start)(_two())
    ours = IntervalGuidance(0.2, 0.6)
    level = Level(paths.flow(), 0.9, "flow_prediction")
    state = {"evaluation": Evaluation(C, level, 0, 10, {})}
    assert ours.plan(0, 0.9, state) == "cond"
    (c, u), _ = ours.combine(C, None, 0, 0.9, state)
    assert c is C
    assert u is C


def _two(second: str = "pred_uncond") -> list[Any]:
    """Two outputs as a guider takes them, the conditional one first."""
    key = cast(Any, guiders.BaseGuidance)._identifier_key
    return [BlockState(**{key: name, "noise_pred": x}) for name, x in (("pred_cond", C), (second, U))]

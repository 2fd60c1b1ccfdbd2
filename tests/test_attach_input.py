"""What `flowkit.attach` refuses, with the reason, and that the pipeline is left as it was."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import flowkit
from flowkit.hooks import Guidance, Part, Recorder, attach
from flowkit.hooks.selftest import Use, learned

from .families import stock_of
from .guided import Cut, Fixed, Idle, scaled, trace
from .tiny import build, parts, run
from .tiny_parts import random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 4


class _Wrong(Guidance):
    def __init__(self, plan: Any = "both", result: Any = None) -> None:
        self.planned, self.result = plan, result

    def plan(self, step: int, sigma: float, state: Any) -> Any:
        return self.planned

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
        return (cond, self.result), state


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (_Wrong(plan="never"), "_Wrong.plan returned 'never' for 1 samples; return 'both'"),
        (
            _Wrong(plan=torch.ones(3, dtype=torch.bool)),
            r"_Wrong.plan returned tensor\(\[True, True, True\]\) for 1 samples",
        ),
        (_Wrong(plan=None), "_Wrong.plan returned None"),
        (_Wrong(result=torch.zeros(1, 2)), r"_Wrong.combine returned shape \(1, .*; return the same shape"),
    ],
)
def test_wrong_answers_of_a_method(family: str, part: Part, message: str) -> None:
    pipe = build(family, stock_of(family))
    expected = run(pipe, STEPS)
    before = trace(pipe)
    with attach(pipe, part), pytest.raises(ValueError, match=message):
        run(pipe, STEPS)
    assert trace(pipe) == before
    assert torch.equal(run(pipe, STEPS), expected)


@pytest.mark.parametrize("family", ["z-image", "hidream"])
def test_a_prediction_of_zero_does_not_tell_its_sign(family: str) -> None:
    pipe = build(family, stock_of(family))
    with attach(pipe, flowkit.ZeroStarGuidance(4.0, zero_init=1)) as attached:
        run(pipe, STEPS)
    assert [step.rows for step in attached.steps] == [1, 2, 2, 2]
    with attach(pipe, Idle()):
        run(pipe, STEPS)


def test_what_cannot_be_attached_to() -> None:
    pipe = build("sd15", stock_of("sd15"))
    before = trace(pipe)
    with pytest.raises(TypeError, match=r"attach takes guidance, recorders and the like, got 'ag'; pass e\.g\."):
        attach(pipe, "ag")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Fixed and Cut would each combine the network's outputs; attach one of them"):
        attach(pipe, Fixed(2.0), Cut(1))
    with attach(pipe, Fixed(2.0)), pytest.raises(ValueError, match="Fixed and Idle would each combine"):
        attach(pipe, Idle())
    with pytest.raises(TypeError, match=r"^AutoencoderKL has no scheduler to attach to; pass a diffusers pipeline"):
        attach(pipe.vae, Idle())
    with pytest.raises(
        ValueError, match=r"^CLIPTextModel has no network that is called at every step, none of unet, tr"
    ):
        attach(pipe.text_encoder, Idle())
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with (
        attach(pipe, Recorder()),
        pytest.raises(ValueError, match="attached to through StableDiffusionPipeline, which has"),
    ):
        attach(other, Recorder())
    sharing = build("sd3", pipe.scheduler)
    with (
        attach(pipe, Recorder()),
        pytest.raises(ValueError, match="is attached to through another pipeline; detach that"),
    ):
        attach(sharing, Recorder())
    assert trace(pipe) == before

    class Odd:
        def step(self, output: Tensor, sigma: float, sample: Tensor) -> Tensor:
            return sample

        def set_timesteps(self, steps: int) -> None: ...

    class Made:
        unet, scheduler = pipe.unet, Odd()

    with pytest.raises(TypeError, match=r"Odd\.step takes no model_output, so it cannot be attached to; use another"):
        attach(Made(), Recorder())
    assert trace(pipe) == before


@pytest.mark.parametrize("family", ["sd15", "flux", "dit", "pixart-alpha"])
def test_guidance_that_is_off(family: str) -> None:
    pipe = build(family, stock_of(family))
    expected = run(pipe, STEPS, **scaled(family, 1.0))
    before = trace(pipe)
    with (
        attach(pipe, Fixed(5.0)),
        pytest.raises(ValueError, match=r"^Fixed needs classifier-free guidance, which is off in"),
    ):
        run(pipe, STEPS, **scaled(family, 1.0))
    assert trace(pipe) == before
    with attach(pipe, recorder := Recorder("state")):
        assert torch.equal(run(pipe, STEPS, **scaled(family, 1.0)), expected)
    assert len(recorder.trajectories[0].states) == STEPS + 1


def test_guidance_that_is_built_in() -> None:
    config = dict(parts("flux")["transformer"].config)
    network = diffusers.FluxTransformer2DModel(**{**config, "guidance_embeds": True})
    pipe = diffusers.FluxPipeline(**{**parts("flux"), "transformer": network}, scheduler=stock_of("flux"))
    pipe.set_progress_bar_config(disable=True)
    with (
        attach(pipe, Fixed(5.0)),
        pytest.raises(ValueError, match=r"\(its network has guidance built in, with the scale as an"),
    ):
        run(pipe, STEPS, true_cfg_scale=1.0)
    with attach(pipe, Fixed(5.0)):  # both at once is fine
        run(pipe, STEPS, true_cfg_scale=2.0)


def test_what_is_not_finite_is_reported_on_leaving() -> None:
    pipe = build("sd15", stock_of("sd15"))
    before = trace(pipe)
    with pytest.raises(ValueError, match="the last sample holds NaN or infinity"), attach(pipe, Fixed(float("nan"))):
        run(pipe, STEPS)
    attached = attach(pipe, Fixed(float("inf")))
    run(pipe, STEPS)
    with pytest.raises(ValueError, match="the last sample holds NaN or infinity"):
        attached.detach()
    attached.detach()
    assert trace(pipe) == before

    def end(*_: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError), attach(pipe, Fixed(float("nan"))):  # another error goes first
        run(pipe, STEPS, callback_on_step_end=end)


def _nan(x0: Tensor, sigma: float, conditioning: Any) -> Tensor:
    return x0.flatten(1).sum(1) * float("nan")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (flowkit.DynamicGuidance([_nan], scales=(1.0, 2.0)), "NaN"),
        (flowkit.DynamicGuidance([lambda x0, sigma, conditioning: x0], scales=(1.0, 2.0)), "shape"),
        (flowkit.GradientGuidance(_nan), "NaN"),
        (flowkit.PolicyGuidance(["cond"] * (STEPS + 1)), f"{STEPS}"),
        (flowkit.LinearAdaptiveGuidance(torch.zeros(1, 2, STEPS + 1), [1]), f"{STEPS}"),
        (flowkit.ZeroStarGuidance(2.0), "flow"),
        (Recorder("state", limit=100), "the recorder is full: .* limit is 100; raise limit"),
    ],
)
def test_what_a_part_refuses_while_the_pipeline_runs_detaches_it(part: Part, message: str) -> None:
    pipe = build("sd15", stock_of("sd15"))
    before = trace(pipe)
    run_ = attach(pipe, part)
    with pytest.raises(ValueError, match=message):
        run(pipe, STEPS)
    assert trace(pipe) == before
    run_.detach()  # a second time does nothing


@pytest.mark.parametrize("family", ["qwen-image", "lumina2"])
def test_pipelines_that_divide_by_the_norm_of_a_zero_prediction(family: str) -> None:
    pipe = build(family, stock_of(family))
    run(pipe, STEPS)  # a first call leaves traces of its own
    before = trace(pipe)
    attach(pipe, flowkit.ZeroStarGuidance(3.0))
    with pytest.raises(ValueError, match=r"Pipeline makes NaN or infinity of finite predictions.*pass zero_init=0$"):
        run(pipe, STEPS)
    assert trace(pipe) == before
    with attach(pipe, flowkit.ZeroStarGuidance(3.0, zero_init=0)):
        assert run(pipe, STEPS).isfinite().all()


def test_what_cannot_be_told_of_a_zero_output() -> None:
    """Not that it is negated, which would refuse a pipeline whose first prediction is zero."""
    c, u = random(2, 4, 3, 3, seed=1), random(2, 4, 3, 3, seed=2)
    zero = torch.zeros_like(c)
    assert learned(zero, zero, zero) == learned(zero, zero, None) == learned(3 * c, c, 2 * c) == Use()
    assert learned(-c, c, c) == Use(-1)
    told = learned(u + 5 * (c - u), c, u)
    assert told is not None
    assert told.sign == 1
    assert told.scale == pytest.approx(5.0)


def test_other_errors_leave_it_attached() -> None:
    """Out of memory, say: the next call is smaller, and guided."""
    pipe = build("sd15", stock_of("sd15"))
    with attach(pipe, Cut(0)) as attached:
        handle = pipe.unet.register_forward_pre_hook(_broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(pipe, STEPS)
        handle.remove()
        run(pipe, STEPS)
        assert (attached.rows, attached.asked) == (STEPS, 2 * STEPS)


def _broken(*_: Any) -> None:
    raise RuntimeError("out of memory")

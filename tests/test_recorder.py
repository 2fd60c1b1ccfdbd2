"""What the recorder keeps is what hooks of one's own see; a recorded call can be run again, or is refused; reports and pictures."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit.hooks import DenoiserCall, Recorder, attach
from flowkit.hooks.layout import networks
from flowkit.hooks.parts import reported
from flowkit.hooks.selftest import aligned
from flowkit.hooks.standins import NetworkCall

from . import test_modular as modular
from .families import WORKING, built, steps_of, stock_of
from .guided import Cut, Fixed, Idle, Seeing, reference, returned, scaled
from .tiny import PIPELINES, build, parts, run
from .tiny_parts import random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 4
ALL = ("state", "output", "cond", "uncond")
_UNGUIDED = ("ddpm", "flux-kontext", "flux-control", "flux-fill")  # as they are called in tests/tiny.py
_FRAMES = "gives its network something else than the sample"
REFUSED = {
    "wan-i2v": _FRAMES,
    "ltx-i2v": _FRAMES,
    "ltx2": "changes audio_hidden_states, sigma from step to step, so its network cannot be called at other samples",
    "wan2.2": "changes the network itself from step to step",
}
_DEFAULT = (
    "ddpm",
    "dit",
    "sd15",
    "sd3",
    "flux",
    "lumina2",
    "z-image",
    "hidream",
    "deepfloyd",
    "kandinsky5",
    "cogvideox",
)
REPEATED = [
    pytest.param(family, marks=() if family in _DEFAULT else pytest.mark.slow)
    for family in WORKING
    if family not in REFUSED
]


class _Steps:
    """What the pipeline gives to its scheduler and gets back, noted by other means."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.step = scheduler, scheduler.step
        self.samples: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.last: Tensor | None = None

    def __enter__(self) -> _Steps:
        @functools.wraps(self.step)  # pipelines look for names in the signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.samples.append(sample.clone())
            self.outputs.append(model_output.clone())
            result = self.step(model_output, timestep, sample, *args, **kwargs)
            self.last = (result[0] if isinstance(result, tuple) else result.prev_sample).clone()
            return result

        self.scheduler.step = step
        return self

    def __exit__(self, *_: object) -> None:
        del self.scheduler.step


# What is kept.


@pytest.mark.parametrize("family", ["ddpm", "sd15", "sd3", "flux", "dit", "deepfloyd", "kandinsky5"])
def test_it_keeps_what_others_see(family: str) -> None:
    pipe = build(family, stock_of(family))
    guided = family != "ddpm"
    with _Steps(pipe.scheduler) as steps, returned(pipe) as seen:
        expected = run(pipe, STEPS)
    with attach(pipe, recorder := Recorder(*ALL)):
        assert torch.equal(run(pipe, STEPS), expected)
    (kept,) = recorder.trajectories
    assert steps.last is not None
    size = len(kept.states[0])
    channels = steps.samples[0].shape[1]
    assert len(kept.states) == STEPS + 1
    for mine, theirs in zip(kept.states, [*steps.samples, steps.last], strict=True):
        assert torch.equal(mine, theirs[:size])
    for mine, theirs in zip(kept.outputs, steps.outputs, strict=True):
        assert torch.equal(mine, theirs[:size, :channels])
    two = PIPELINES[family].calls == 2
    for i, (cond, uncond) in enumerate(zip(kept.cond, kept.uncond, strict=True)):
        assert cond is not None
        if not guided:
            assert uncond is None
            assert torch.equal(cond, seen[i])
            continue
        c, u = seen[2 * i : 2 * i + 2] if two else reversed(seen[i].chunk(2))
        if family == "dit":
            c, u = u, c
        assert uncond is not None
        assert torch.equal(cond, c[:, : cond.shape[1]])
        assert torch.equal(uncond, u[:, : cond.shape[1]])
    assert kept.timesteps == [float(t) for t in pipe.scheduler.timesteps]
    names = {"pipeline": type(pipe).__name__, "network": type(networks(pipe)[0]).__name__, "levels": kept.sigmas}
    assert kept.identity == names
    every = [*kept.states, *kept.outputs, *(x for x in (*kept.cond, *kept.uncond) if x is not None)]
    assert recorder.bytes > sum(x.numel() * x.element_size() for x in every)  # the network's arguments count as well


def test_states_follow_what_the_pipeline_does_between_steps() -> None:
    """Inpainting with an ordinary network puts the known half back after every step."""
    pipe = build("sd15-inpaint", stock_of("sd15-inpaint"))
    with _Steps(pipe.scheduler) as steps:
        run(pipe, 8)
    with attach(pipe, recorder := Recorder()):
        run(pipe, 8)
    assert all(torch.equal(a, b) for a, b in zip(recorder.trajectories[0].states[:-1], steps.samples, strict=True))


def test_with_guidance_it_keeps_what_the_network_returned_and_what_was_made_of_it() -> None:
    pipe = build("sd15", stock_of("sd15"))
    with attach(pipe, Cut(2), recorder := Recorder("cond", "uncond", "output")):
        run(pipe, STEPS)
        run(pipe, STEPS)
    assert len(recorder.trajectories) == 2
    for kept in recorder.trajectories:
        assert [uncond is None for uncond in kept.uncond] == [False, False, True, True]
        assert not kept.states
        for output, cond, uncond in zip(kept.outputs, kept.cond, kept.uncond, strict=True):
            assert cond is not None
            assert torch.equal(output, cond if uncond is None else uncond + 4.0 * (cond - uncond))


def test_the_bound_on_memory() -> None:
    """It holds for all that is kept: what the network was called with, too."""
    pipe = build("sd15", stock_of("sd15"))
    sample, first = 4 * 8 * 8 * 4, Recorder()
    with attach(pipe, first):
        run(pipe, STEPS)
    embedded = first.trajectories[0].conditioning["encoder_hidden_states"]
    recorded = (2 * STEPS + 1) * sample
    assert first.bytes >= recorded + 2 * embedded.nbytes + 2 * sample  # both rows and their latents
    recorder = Recorder(limit=first.bytes)
    with attach(pipe, recorder):
        run(pipe, STEPS)
        with pytest.raises(
            ValueError, match=rf"^the recorder is full: \d+ bytes, and its limit is {first.bytes}; raise limit, keep le"
        ):
            run(pipe, STEPS)
    assert torch.equal(run(pipe, STEPS), reference("sd15"))
    recorder.take()
    assert recorder.bytes == 0


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "dit"])
def test_the_conditioning_is_what_the_network_was_given(family: str) -> None:
    pipe = build(family, stock_of(family))
    recorder, seeing = Recorder(), Seeing()
    with attach(pipe, recorder, seeing):
        run(pipe, STEPS)
    kept, told = recorder.trajectories[0].conditioning, seeing.seen[0][0].conditioning
    assert {"class_labels" if family == "dit" else "encoder_hidden_states"} <= kept.keys()
    assert not kept.keys() & {"sample", "hidden_states", "timestep"}
    assert all(told[name] is value or torch.equal(told[name], value) for name, value in kept.items())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="cannot record 'noise'; choose from state, output, cond, uncond"):
        Recorder("noise")
    for limit in (0, float("nan"), "1", None):
        with pytest.raises(ValueError, match="limit must be a positive number of bytes, got"):
            Recorder(limit=limit)  # type: ignore[arg-type]


# Calls again.


def _inputs(family: str) -> tuple[Any, Any, list[Tensor]]:
    pipe = build(family, stock_of(family))
    recorder, seeing = Recorder(*ALL), Seeing()
    with attach(pipe, recorder, seeing):
        run(pipe, steps_of(family))
    kept = recorder.trajectories[0]
    if family in _UNGUIDED:  # no scale, and no method is asked
        return pipe, kept, kept.states[:-1]
    found = [
        aligned(evaluation.x, state)
        for evaluation, state in zip((s[0] for s in seeing.seen), kept.states, strict=False)
    ]
    return pipe, kept, [x for x in found if x is not None]


@pytest.mark.parametrize("family", REPEATED)
def test_a_recorded_call_again(family: str) -> None:
    _, kept, inputs = _inputs(family)
    call = kept.denoiser()
    assert set(call.roles) == ({"cond"} if family in _UNGUIDED else {"cond", "uncond"})
    assert len(inputs) == len(kept.timesteps)
    sign = -1 if family in ("z-image", "z-image-img2img", "hidream", "lumina", "lumina2", "ltx-condition") else 1
    with torch.no_grad():
        for i, (x, time) in enumerate(zip(inputs, kept.timesteps, strict=True)):
            for rows, value in (("cond", kept.cond[i]), ("uncond", kept.uncond[i])):
                if value is None:
                    continue
                found = call(x, time, rows)
                theirs = aligned(value, found)
                assert theirs is not None
                assert torch.allclose(found, sign * theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "lumina2"])
def test_a_call_is_differentiable(family: str) -> None:
    _, kept, inputs = _inputs(family)
    call = kept.denoiser()
    x = inputs[1].clone().requires_grad_()
    weights, direction = random(*x.shape, seed=1), random(*x.shape, seed=2)
    (weights * call(x, kept.timesteps[1])).sum().backward()
    assert x.grad is not None
    step = 1e-2
    with torch.no_grad():
        ends = [(weights * call(x + way * step * direction, kept.timesteps[1])).sum() for way in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert float((x.grad * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.02)


@pytest.mark.parametrize("family", list(REFUSED))
def test_calls_that_cannot_be_repeated(family: str) -> None:
    pipe = build(family, stock_of(family))
    with attach(pipe, recorder := Recorder()):
        run(pipe, STEPS)
    with pytest.raises(ValueError, match=REFUSED[family]):
        recorder.trajectories[0].denoiser()


@pytest.mark.parametrize("end", [1.0, 0.6])
def test_a_controlnet_cannot_be_repeated(end: float) -> None:
    """Its residuals belong to one sample. At first those of a new one are zero, and nothing shows."""
    pipe = build("sd15-controlnet", stock_of("sd15-controlnet"))
    control = copy.deepcopy(pipe.controlnet)
    for block in control.controlnet_down_blocks:
        torch.nn.init.constant_(block.weight, 0.1)
    pipe.controlnet = control
    with attach(pipe, recorder := Recorder()):
        run(pipe, STEPS, control_guidance_end=end)
    with pytest.raises(ValueError, match=r"changes down_block_additional_residuals.* from step to step"):
        recorder.trajectories[0].denoiser()


def test_arguments_that_change_late() -> None:
    pipe = build("sd15", stock_of("sd15"))

    def other(pipe: Any, step: int, time: Any, values: Any) -> Any:
        return {"prompt_embeds": values["prompt_embeds"] + (step == 2)}

    with attach(pipe, recorder := Recorder()):
        run(pipe, STEPS, callback_on_step_end=other, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(ValueError, match="changes encoder_hidden_states from step to step"):
        recorder.trajectories[0].denoiser()


def test_a_call_for_another_batch_at_times_of_its_own() -> None:
    """With arguments of more samples than were recorded, and another module."""
    pipe = built("sd3", "euler")
    call: dict[str, Any] = {"prompt": ["a red cat", "a car"], "negative_prompt": ["a dog", "mud"]}
    with attach(pipe, recorder := Recorder(*ALL)):
        run(pipe, STEPS, **call)
    kept = recorder.trajectories[0]
    denoise = kept.denoiser()
    given = denoise._calls["cond"].cut(2, [1, 0, 1])
    student = copy.deepcopy(pipe.transformer)
    x = torch.stack([kept.states[3][1], kept.states[0][0], kept.states[2][1]])
    times = torch.tensor([kept.timesteps[3], kept.timesteps[0], kept.timesteps[2]])
    with torch.no_grad():
        found = denoise(x, times, given=given)
        assert torch.equal(denoise(x, times, given=given, network=student), found)
        for place, (step, row) in enumerate(((3, 1), (0, 0), (2, 1))):
            cond = kept.cond[step]
            assert cond is not None
            assert torch.allclose(found[place], cond[row], rtol=0, atol=1e-5)
        student.proj_out.bias += 1.0
        assert torch.allclose(denoise(x, times, given=given, network=student), found + 1.0, atol=1e-5)
        assert torch.equal(denoise(x, times, given=given), found)
    with pytest.raises(ValueError, match=r"got times of shape \(3,\) for 2 samples; pass one, or one a sample"):
        denoise(kept.states[0], times)
    with pytest.raises(ValueError, match=r"got samples of shape \(2, 4, 8, 8\), recorded were \(3, 4, 8, 8\)"):
        denoise(kept.states[0], 500.0, given=given)


def test_frames_that_are_given_keep_their_time() -> None:
    """They are told time 0; every sample has its own for the others."""
    call = DenoiserCall(torch.nn.Identity(), {}, (3, 2), "t / T", 1000, 1, None)
    old = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    told = call._told(torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64), old)
    assert torch.equal(told, torch.tensor([[0.0, 0.1, 0.1], [0.0, 0.0, 0.2], [0.3, 0.3, 0.3]]))
    whole = call._told(torch.tensor([100.0, 200.0], dtype=torch.float64), torch.tensor([1000, 1000]))
    assert torch.equal(whole, torch.tensor([0.1, 0.2]))  # not cut to whole numbers


def test_a_call_does_not_meet_what_is_attached() -> None:
    pipe, expected = build("sd15", stock_of("sd15")), reference("sd15", 7.0)
    x = random(1, 4, 8, 8)
    with attach(pipe, Fixed(7.0), recorder := Recorder()) as attached:
        run(pipe, STEPS)
        kept, rows = recorder.trajectories[0], attached.rows
        call = kept.denoiser()
        with torch.no_grad():
            cond, uncond = (call(x, 500.0, half) for half in ("cond", "uncond"))
        leaf = x.clone().requires_grad_()
        call(leaf, 500.0).sum().backward()
        assert leaf.grad is not None
        assert attached.rows == rows
        assert torch.equal(run(pipe, STEPS), expected)
    with torch.no_grad():
        assert torch.equal(call(x, 500.0, "cond"), cond)
        assert torch.equal(call(x, 500.0, "uncond"), uncond)
    assert (cond - uncond).abs().max() > 1e-4
    assert NetworkCall.SLOT not in vars(pipe.unet)


def test_a_call_says_what_is_wrong() -> None:
    pipe = build("sd15", stock_of("sd15"))
    with attach(pipe, recorder := Recorder()):
        run(pipe, STEPS, guidance_scale=1.0)
    call = recorder.trajectories[0].denoiser()
    assert call.roles == ("cond",)
    with pytest.raises(ValueError, match="no 'uncond' rows were recorded, only cond; record a guided call"):
        call(random(1, 4, 8, 8), 500.0, "uncond")
    with pytest.raises(ValueError, match=r"got samples of shape \(2, 4, 8, 8\), recorded were \(1, 4, 8, 8\)"):
        call(random(2, 4, 8, 8), 500.0)
    with attach(pipe, recorder := Recorder()):
        recorder.begin(None)
        with pytest.raises(
            ValueError, match="nothing was recorded yet; call the pipeline while the recorder is attached"
        ):
            recorder.trajectories[0].denoiser()


def test_of_a_batch_and_a_scheduler_of_ours() -> None:
    pipe = built("sd3", "heun")
    call: dict[str, Any] = {"prompt": ["a red cat", "a car"], "negative_prompt": ["a dog", "mud"]}
    with attach(pipe, recorder := Recorder(*ALL)):
        expected = run(pipe, STEPS, **call)
    kept = recorder.trajectories[0]
    assert len(kept.outputs) == len(pipe.scheduler.timesteps) > STEPS
    assert torch.equal(kept.states[-1], expected)
    denoise = kept.denoiser()
    with torch.no_grad():
        c, u = (denoise(kept.states[3], kept.timesteps[3], rows) for rows in ("cond", "uncond"))
    assert torch.allclose(u + 4.0 * (c - u), kept.outputs[3], rtol=0, atol=1e-5)


def test_of_a_modular_pipeline() -> None:
    pipe = modular.assembled("StableDiffusion3AutoBlocks", "sd3", stock_of("sd3"))
    with attach(pipe, recorder := Recorder(*ALL)):
        modular.run(pipe, "sd3")
    kept = recorder.trajectories[0]
    call = kept.denoiser()
    with torch.no_grad():
        assert kept.uncond[2] is not None
        found = call(kept.states[2], kept.timesteps[2], "uncond")
    assert torch.allclose(found, kept.uncond[2], rtol=0, atol=1e-5)


# Reports.


class Reporting(Cut):
    """Tells a scale for every sample."""

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
        result, state = super().combine(cond, uncond, step, sigma, state)
        return result, reported(state, scale=torch.arange(float(len(cond))) + step)


def test_the_report() -> None:
    pipe = build("sd15", stock_of("sd15"))
    with attach(pipe, Reporting(1)) as attached:
        assert "no step yet" in attached.report()
        with pytest.raises(ValueError, match="there is nothing to draw yet; attach a part and call the pipeline"):
            attached.plot()
        run(pipe, STEPS, num_images_per_prompt=2, generator=None)
        run(pipe, STEPS, num_images_per_prompt=2, generator=None)
    assert (attached.rows, attached.asked) == (20, 32)
    assert attached.saved == pytest.approx(3 / 8)
    lines = attached.report().splitlines()
    assert lines[0].split() == ["step", "sigma", "run", "of", "scale"]
    sigmas = pipe.scheduler.sigmas
    for i, line in enumerate(lines[1:-1]):
        step, sigma, rows, asked, *scale = line.split(maxsplit=4)
        assert (step, rows, asked) == (str(i), "4" if i < 1 else "2", "4")
        assert float(sigma) == pytest.approx(float(sigmas[i]), rel=1e-3)
        assert scale == [f"{i + 0.5} ({i} to {i + 1})"]
    assert len(lines) == STEPS + 2
    assert lines[-1] == "network rows, all calls: 20 of 32, 37.5% saved"
    assert repr(attached.report()) == str(attached.report())


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pipe = build("sd15", stock_of("sd15"))
    with attach(pipe, Reporting(2, 1)) as attached:
        run(pipe, STEPS, num_images_per_prompt=2)
    figure = attached.plot(tmp_path / "new" / "rows.png")
    assert (tmp_path / "new" / "rows.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows, scale = figure.axes
    asked, ran = ([bar.get_height() for bar in bars] for bars in rows.containers)
    assert asked == [4] * STEPS
    assert ran == [4, 3, 2, 2]
    assert [list(line.get_ydata()) for line in scale.lines] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    with attach(pipe, Idle()) as attached:
        run(pipe, STEPS, **scaled("sd15", 4.0))
    assert len(attached.plot().axes) == 1


def test_lists_are_complete() -> None:
    assert {*REFUSED, *_DEFAULT, *_UNGUIDED} <= {*WORKING}
    assert issubclass(PIPELINES["ddpm"].pipeline, diffusers.DiffusionPipeline)
    assert "unet" in parts("ddpm")

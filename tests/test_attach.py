"""`flowkit.attach` against loops written out here: cuts, batches, plans by sample, calls that are not of two halves."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from flowkit import RectifiedFlowScheduler
from flowkit.hooks import Part, Recorder, attach

from .families import built, stock_of
from .guided import Cut, Fixed, Idle, Seeing, counted, noises, reference, returned, scaled, trace
from .tiny import build, run
from .tiny_parts import random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 4
LATENT = {"sd15": (4, 8, 8), "sd3": (4, 8, 8), "flux": (16, 16)}
WIDTH = {"sd15": (16, 0), "sd3": (32, 32), "flux": (16, 16)}


def _inputs(family: str, batch: int) -> dict[str, Any]:
    """Other noise, prompt and negative prompt for each sample."""
    width, pooled = WIDTH[family]
    inputs: dict[str, Any] = {
        "prompt": None,
        "negative_prompt": None,
        "latents": random(batch, *LATENT[family], seed=5),
    }
    for k, prefix in enumerate(("", "negative_")):
        inputs[f"{prefix}prompt_embeds"] = random(batch, 4, width, seed=k)
        if pooled:
            inputs[f"{prefix}pooled_prompt_embeds"] = random(batch, pooled, seed=7 + k)
    return inputs


def _one(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: value if value is None else value[i : i + 1] for name, value in inputs.items()}


def _batched_loop(pipe: Any, family: str, inputs: dict[str, Any], cut: int, w: float) -> Any:
    """[negative, prompt] in one call until the cut, the prompt alone from there on."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    x = inputs["latents"] * (scheduler.init_noise_sigma if family == "sd15" else 1.0)
    for i, t in enumerate(scheduler.timesteps):
        halves = ("negative_", "") if i < cut else ("",)
        rows = torch.cat([x] * len(halves))
        text = torch.cat([inputs[f"{half}prompt_embeds"] for half in halves])
        if family == "sd15":
            rows = scheduler.scale_model_input(rows, t)
            output = pipe.unet(rows, t, encoder_hidden_states=text, return_dict=False)[0]
        else:
            output = pipe.transformer(
                hidden_states=rows,
                timestep=t.expand(len(rows)),
                encoder_hidden_states=text,
                pooled_projections=torch.cat([inputs[f"{half}pooled_prompt_embeds"] for half in halves]),
                return_dict=False,
            )[0]
        if i < cut:
            uncond, cond = output.chunk(2)
            output = uncond + w * (cond - uncond)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def _flux_loop(pipe: Any, inputs: dict[str, Any], cut: int, w: float) -> Any:
    """Two calls a step until the cut, one from there on."""
    scheduler, x = pipe.scheduler, inputs["latents"]
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(x.shape[1], *(scheduler.config[key] for key in keys))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
    ids = pipe._prepare_latent_image_ids(len(x), 4, 4, "cpu", x.dtype)

    def network(x: Tensor, t: Tensor, half: str) -> Tensor:
        output: Tensor = pipe.transformer(
            hidden_states=x,
            timestep=t.expand(len(x)) / 1000,
            encoder_hidden_states=inputs[f"{half}prompt_embeds"],
            pooled_projections=inputs[f"{half}pooled_prompt_embeds"],
            img_ids=ids,
            txt_ids=torch.zeros(4, 3),
            return_dict=False,
        )[0]
        return output

    for i, t in enumerate(scheduler.timesteps):
        output = network(x, t, "")
        if i < cut:
            uncond = network(x, t, "negative_")
            output = uncond + w * (output - uncond)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", list(LATENT))
def test_a_cut_is_a_loop_that_switches(family: str, batch: int) -> None:
    pipe, inputs = build(family, stock_of(family)), _inputs(family, batch)
    for cut in (0, 1, 3):
        with attach(pipe, Cut(cut)) as attached, counted(pipe) as rows:
            found = run(pipe, STEPS, **scaled(family, 4.0), **inputs)
        assert sum(rows) == attached.rows == batch * (STEPS + cut)
        assert attached.asked == batch * 2 * STEPS
        with torch.no_grad():
            expected = (
                _flux_loop(pipe, inputs, cut, 4.0)
                if family == "flux"
                else _batched_loop(pipe, family, inputs, cut, 4.0)
            )
        assert torch.equal(found, expected)
        for i in range(batch if cut == 1 else 0):
            with attach(pipe, Cut(cut)):
                single = run(pipe, STEPS, **scaled(family, 4.0), **_one(inputs, i))
            assert torch.allclose(found[i : i + 1], single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(LATENT))
def test_plans_by_sample(family: str) -> None:
    """Each sample ends as it does alone with its own cut, and rows are run for nothing else."""
    pipe, inputs = build(family, stock_of(family)), _inputs(family, 3)
    cuts = (1, 3, 0)
    with attach(pipe, Cut(*cuts)) as attached, counted(pipe) as rows:
        found = run(pipe, STEPS, **scaled(family, 4.0), **inputs)
    assert sum(rows) == attached.rows == 3 * STEPS + sum(cuts)
    assert attached.saved == 1 - (3 * STEPS + sum(cuts)) / (6 * STEPS)
    for i, cut in enumerate(cuts):
        with attach(pipe, Cut(cut)):
            single = run(pipe, STEPS, **scaled(family, 4.0), **_one(inputs, i))
        assert torch.allclose(found[i : i + 1], single, rtol=0, atol=1e-5)
    assert (found - run(pipe, STEPS, **scaled(family, 4.0), **inputs)).flatten(1).abs().amax(1).min() > 1e-4


def test_several_images_of_a_prompt() -> None:
    pipe = build("sd15", stock_of("sd15"))
    call: dict[str, Any] = {
        "prompt": ["a red cat", "a car"],
        "negative_prompt": ["a dog", "mud"],
        "num_images_per_prompt": 2,
    }
    expected = run(pipe, STEPS, guidance_scale=7.0, **call)
    with attach(pipe, Fixed(7.0)):
        assert torch.equal(run(pipe, STEPS, **call), expected)
    expected = run(pipe, STEPS, **call, guidance_scale=1.0)
    with attach(pipe, Cut(0)) as attached:
        assert torch.equal(run(pipe, STEPS, **call), expected)
    assert attached.asked - attached.rows == 4 * STEPS


@pytest.mark.parametrize("w", [1.0, 4.0])
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "pixart-alpha", "dit"])
def test_samples_of_the_same_noise(family: str, w: float) -> None:
    """Two prompts from one noise look like the two halves of a guided batch; the result is right, or there is none."""
    pipe = build(family, stock_of(family))
    if family in LATENT:
        inputs = _inputs(family, 2)
        inputs["latents"] = inputs["latents"][:1].expand(2, *LATENT[family]).clone()
    elif family == "dit":
        inputs = {"class_labels": [3, 7]}
    else:
        inputs = {f"{half}prompt_embeds": random(2, 4, 16, seed=k) for k, half in enumerate(("", "negative_"))}
        inputs |= {f"{half}prompt_attention_mask": torch.ones(2, 4) for half in ("", "negative_")}

    def made(w: float) -> Tensor:
        noise: dict[str, Any] = {} if family in LATENT else {"generator": noises(0, 0)}
        return run(pipe, STEPS, **scaled(family, w), **inputs, **noise)

    expected = made(w)
    before = trace(pipe)
    for part in (Idle(), Fixed(w), Recorder()):
        refused = False
        try:
            with attach(pipe, part):
                found = made(w)
        except ValueError as error:
            refused = "give each sample noise of its own" in str(error) or "is off in this call" in str(error)
        assert refused or torch.equal(found, expected)
        assert not (refused and w > 1)
        assert refused or w > 1 or not isinstance(part, Fixed)
    assert trace(pipe) == before
    if w > 1:
        expected = made(1.0)
        with attach(pipe, Cut(0)):
            assert torch.equal(made(w), expected)


def test_stock_cutoffs_are_wrong_or_fail_for_a_batch() -> None:
    """What attach is better than: they keep the last prompt for every sample."""

    def cut(family: str, batch: int) -> float:
        pipe, inputs = build(family, stock_of(family)), _inputs(family, batch)
        kind = SD3CFGCutoffCallback if family == "sd3" else SDCFGCutoffCallback
        stock = kind(cutoff_step_ratio=None, cutoff_step_index=1)
        call = {"callback_on_step_end": stock, "callback_on_step_end_tensor_inputs": stock.tensor_inputs}
        theirs = run(pipe, STEPS, **scaled(family, 4.0), **inputs, **call)
        with attach(pipe, Cut(2)):
            return float((run(pipe, STEPS, **scaled(family, 4.0), **inputs) - theirs).abs().max())

    assert cut("sd3", 1) == cut("sd15", 1) == 0.0
    assert cut("sd3", 2) > 1e-3
    with pytest.raises(RuntimeError):
        cut("sd15", 2)


def test_skip_layer_guidance_keeps_its_own_term() -> None:
    pipe = build("sd3", stock_of("sd3"))
    third: dict[str, Any] = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_scale": 2.0,
        "skip_layer_guidance_start": -1.0,
        "skip_layer_guidance_stop": 1.0,
    }
    with counted(pipe) as rows:
        expected = run(pipe, STEPS, guidance_scale=7.0, **third)
    assert (expected - reference("sd3", 7.0)).abs().max() > 1e-3
    with attach(pipe, Idle()) as attached:
        assert torch.equal(run(pipe, STEPS, guidance_scale=7.0, **third), expected)
    assert attached.rows == attached.asked == sum(rows) == 3 * STEPS
    with attach(pipe, Fixed(7.0)):
        assert torch.allclose(run(pipe, STEPS, guidance_scale=2.0, **third), expected, rtol=0, atol=1e-5)
    with attach(pipe, Cut(0)) as attached:
        run(pipe, STEPS, guidance_scale=7.0, **third)
    assert attached.rows == 2 * STEPS


# Schedulers that call the network twice a step.


class Latching(Idle):
    """Off for good once it was on for some evaluations."""

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def plan(self, step: int, sigma: float, state: Any) -> str:
        return "cond" if state.get("seen", 0) >= self.evaluations else "both"

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
        return super().combine(cond, uncond, step, sigma, {**state, "seen": state.get("seen", 0) + 1})[0], {
            **state,
            "seen": state.get("seen", 0) + 1,
        }


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("sd15", diffusers.HeunDiscreteScheduler(prediction_type="v_prediction")),
        ("sd3", diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        ("sd15", "heun"),
        ("flux", "heun"),
        ("dit", "heun"),
    ],
    ids=str,
)
def test_two_calls_a_step(family: str, scheduler: Any) -> None:
    pipe = built(family, scheduler) if isinstance(scheduler, str) else build(family, scheduler)
    expected = run(pipe, STEPS, **scaled(family, 7.0))
    calls, size = len(pipe.scheduler.timesteps), 2 if family == "dit" else 1
    assert calls > STEPS
    with attach(pipe, Fixed(7.0)) as attached:
        assert torch.equal(run(pipe, STEPS, **scaled(family, 2.0)), expected)
    assert [step.evaluation.step for step in attached.steps] == list(range(calls))
    assert {step.evaluation.steps for step in attached.steps} == {calls}
    for _ in range(2):  # a second run begins anew
        with attach(pipe, Latching(3)) as attached:
            run(pipe, STEPS)
            run(pipe, STEPS)
        assert attached.rows == 2 * size * (calls + 3)


def test_two_networks_take_turns() -> None:
    pipe = build("wan2.2", stock_of("wan2.2"))
    run(pipe, STEPS)
    seen: list[int] = []
    handles = [
        network.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
        for i, network in enumerate((pipe.transformer, pipe.transformer_2))
    ]
    with attach(pipe, Cut(1)) as attached:
        run(pipe, STEPS)
    for handle in handles:
        handle.remove()
    assert len(seen) == attached.rows == STEPS + 1
    assert seen == sorted(seen)
    assert {*seen} == {0, 1}
    assert [step.evaluation.step for step in attached.steps] == list(range(STEPS))


# What a method is told.


def _flow(scheduler: Any, output: Tensor, sample: Tensor, i: int) -> Any:
    return sample - scheduler.sigmas[i] * output


def _euler(scheduler: Any, output: Tensor, sample: Tensor, i: int) -> Any:
    sigma = scheduler.sigmas[i]
    return sample / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


def _ddim(scheduler: Any, output: Tensor, sample: Tensor, i: int) -> Any:
    a = scheduler.alphas_cumprod[scheduler.timesteps[i]]
    return (a**0.5 * sample - (1 - a) ** 0.5 * output).chunk(2)[0]


@pytest.mark.parametrize(
    ("family", "x0"),
    [(name, _flow) for name in ("sd3", "flux", "lumina", "lumina2", "z-image", "hidream", "wan2.2", "ltx", "sd3-img2img")]
    + [("sd15", _euler), ("sd15-img2img", _euler), ("sdxl", _euler), ("dit", _ddim)],
)  # fmt: skip
def test_x0_is_the_schedulers(family: str, x0: Any) -> None:
    """Also where the pipeline negates the output, or tells the network another time."""

    class Told(Fixed):
        def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
            combined, after = super().combine(cond, uncond, step, sigma, state)
            told.append((state["evaluation"].to(combined, "x0"), sigma))
            return combined, after

    class Stepped(Part):
        def before_step(self, run: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:
            at = pipe.scheduler.timesteps.tolist().index(float(timestep))
            stepped.append((x0(pipe.scheduler, model_output, sample, at), at))

    told: list[Any] = []
    stepped: list[Any] = []
    pipe = build(family, stock_of(family))
    with attach(pipe, Told(3.0), Stepped()):
        run(pipe, 8 if "img2img" in family else STEPS)
    assert len(told) == len(stepped) == STEPS
    for (mine, sigma), (theirs, at) in zip(told, stepped, strict=True):
        assert float(
            (mine.reshape(theirs.shape) if mine.numel() == theirs.numel() else mine).sub(theirs).abs().max()
        ) < (2e-4 * float(theirs.abs().max()))
        if hasattr(pipe.scheduler, "sigmas"):
            assert sigma == pytest.approx(float(pipe.scheduler.sigmas[at]), rel=2e-4)


@pytest.mark.parametrize("family", ["dit", "sd15", "flux"])
def test_halves_are_what_the_network_returned(family: str) -> None:
    pipe = build(family, stock_of(family))
    with attach(pipe, seen := Seeing()), returned(pipe) as outputs:
        run(pipe, STEPS)
    for i, (evaluation, cond, uncond) in enumerate(seen.seen):
        assert evaluation.step == i
        assert evaluation.steps == STEPS
        assert uncond is not None
        if family == "flux":
            c, u = outputs[2 * i : 2 * i + 2]
        else:
            u, c = outputs[i][:, :4].chunk(2)
        if family == "dit":
            c, u = u, c
            assert evaluation.conditioning["class_labels"].tolist() == [3, 7]
        assert torch.equal(cond, c)
        assert torch.equal(uncond, u)
        assert evaluation.x.shape == cond.shape
    assert seen.sigmas == sorted(seen.sigmas, reverse=True)


def test_image_to_image_knows_its_place() -> None:
    """DDIM tells no begin, and the time that is left at one step is the time of another."""
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", steps_offset=0, clip_sample=False)
    pipe = build("sd15-img2img", scheduler)
    for strength in (0.2, 0.5, 0.8):
        with attach(pipe, seen := Seeing()) as attached:
            run(pipe, 10, strength=strength)
        left = round(10 * strength)
        a = scheduler.alphas_cumprod[pipe.scheduler.timesteps[-left:]]
        assert seen.sigmas == pytest.approx(((1 - a) / a).sqrt().tolist(), rel=1e-4)
        assert {step.evaluation.steps for step in attached.steps} == {left}


def test_our_scheduler_too() -> None:
    pipe = built("sd3", "unipc")
    assert isinstance(pipe.scheduler, RectifiedFlowScheduler)
    expected = run(pipe, STEPS, guidance_scale=7.0)
    with attach(pipe, Fixed(7.0)):
        assert torch.equal(run(pipe, STEPS, guidance_scale=2.0), expected)


def test_what_is_attached_in_the_middle_of_a_run_waits_for_the_next() -> None:
    pipe = build("sd15", stock_of("sd15"))
    late: list[Any] = []
    first, second = Recorder("state"), Recorder("state")

    def join(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and not late:
            late.append(attach(pipe, Cut(0), second))
        return state

    expected = run(pipe, STEPS)
    with attach(pipe, first):
        assert torch.equal(run(pipe, STEPS, callback_on_step_end=join), expected)
        rest = 2 * (STEPS - 2)  # guided as before
        assert (late[0].rows, late[0].asked, second.trajectories) == (rest, rest, [])
        run(pipe, STEPS)
        assert (late[0].rows, late[0].asked) == (rest + STEPS, rest + 2 * STEPS)
        assert len(second.trajectories[0].states) == STEPS + 1
        late[0].detach()
    assert len(first.trajectories) == 2
    assert torch.equal(run(pipe, STEPS), expected)

"""A network run for samples and times of all kinds at once returns what the pipeline's own batches returned, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

import flowkit
from flowkit import RectifiedFlowScheduler
from flowkit.distill.conditions import Conditions
from flowkit.hooks import Recorder, Trajectory, attach
from flowkit.hooks.arguments import Arguments, changes
from flowkit.hooks.joining import apart
from flowkit.hooks.selftest import aligned
from flowkit.pipelines.sampling import sample_outputs

from .families import WORKING, stock_of
from .tiny import PIPELINES, build
from .tiny_parts import random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

_WORDS = ("a red cat", "a car", "mud")
_NEGATED = ("z-image", "z-image-img2img", "hidream", "lumina", "lumina2", "ltx-condition")
_FRAMES = "gives its network something else than the sample"
REFUSED = {
    "wan-i2v": _FRAMES,
    "ltx-i2v": _FRAMES,
    "ltx2": "changes audio_hidden_states, sigma from step to step, so its network cannot be called at other samples",
    "wan2.2": "has 2 networks that take turns",
    "wan-vace": "Passing a list of generators is not yet supported",  # says the pipeline
    "sd15-controlnet": "changes down_block_additional_residuals.* from step to step",
    "sdxl-controlnet": "changes down_block_additional_residuals.* from step to step",
}
# Pipelines that make one sample a call, whatever they are given.
_SINGLE = ("animatediff-v2v",)
_QUICK = ("ddpm", "dit", "sd15", "sdxl", "sd3", "flux", "pixart-sigma", "qwen-image", "z-image", "hidream", "lumina", "wan",
          "hunyuan-video", "svd", "stable-audio", "flux-kontext", "kandinsky5", "ltx-condition", "prx", "sd15-pag")  # fmt: skip
ALL = [pytest.param(family, marks=() if family in _QUICK else pytest.mark.slow)
       for family in WORKING if family not in REFUSED and family not in _SINGLE]  # fmt: skip
# Their tiny networks do not hear the text: what it goes through is zero at first.
_DEAF = ("prx", "kandinsky5")
# With guidance, PRX tells two rows the time, however many there are.
_CALLS: dict[str, dict[str, Any]] = {"prx": {"guidance_scale": 1.0}, "svd": {"noise_aug_strength": 0.0}}


def arguments_of(family: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Inputs of three samples that differ in all that they can, and what is shared by them."""
    shared = dict(PIPELINES[family].call)
    each: list[dict[str, Any]] = [{} for _ in _WORDS]
    for number, (name, value) in enumerate(PIPELINES[family].call.items()):
        if name == "strength":
            shared[name] = 1.0
            continue
        if name == "batch_size":
            del shared[name]
            continue
        for i, own in enumerate(each):
            if isinstance(value, str) and "prompt" in name:
                own[name] = _WORDS[i - number]
            elif name == "class_labels":
                own[name] = 3 * i
            elif isinstance(value, Tensor) and family not in _ENCODED and not (family == "wan-i2v" and name == "image"):
                own[name] = value[0]
                if value.is_floating_point():
                    drawn = random(*value.shape[1:], seed=100 * number + i)
                    own[name] = drawn.sigmoid() if "image" in name and "embeds" not in name else drawn
                elif i == 1:
                    own[name] = torch.cat([value[0, :-1], torch.zeros_like(value[0, -1:])])
            else:
                continue
            shared.pop(name, None)
    if family in _ENCODED:
        shared = {name: value for name, value in shared.items() if "prompt" not in name}
        each = [{"prompt": word} for word in _WORDS]
    return each, {**shared, **_CALLS.get(family, {})}


def _z_image(prompt: Any, **_: Any) -> Any:
    """Embeddings as long as the prompts, in a list."""
    found = [random(len(word), 16, seed=len(word)) for word in prompt]
    return found, [x[:2] for x in found]


def _hidream(prompt: Any, **_: Any) -> Any:
    t5, llama, pooled = (torch.stack([random(*shape, seed=len(word)) for word in prompt], axis)
                         for shape, axis in (((4, 16), 0), ((2, 4, 16), 1), ((16,), 0)))  # fmt: skip
    return t5, -t5, llama, -llama, pooled, -pooled


def _kandinsky5(prompt: Any, **_: Any) -> Any:
    words = [word[:9] for word in prompt]
    qwen, clip = (torch.stack([random(*shape, seed=len(word)) for word in words]) for shape in ((4, 16), (16,)))
    return qwen, clip, torch.arange(len(words) + 1, dtype=torch.int32) * 4


# Pipelines whose embeddings cannot be given for each sample, and what encodes prompts in their place.
_ENCODED = {"z-image": _z_image, "z-image-img2img": _z_image, "hidream": _hidream, "kandinsky5": _kandinsky5}


def built(family: str) -> Any:
    pipe = build(family, stock_of(family))
    if family in _ENCODED:
        pipe.encode_prompt = _ENCODED[family]
    if "controlnet" in family:  # a fresh one adds zeros to any sample
        pipe.controlnet = copy.deepcopy(pipe.controlnet)
        for block in pipe.controlnet.controlnet_down_blocks:
            torch.nn.init.constant_(block.weight, 0.1)
    if family in _DEAF:
        pipe.transformer = copy.deepcopy(pipe.transformer)
        for number, parameter in enumerate(pipe.transformer.parameters()):
            if not parameter.any():
                parameter.add_(random(*parameter.shape, seed=number), alpha=0.1)
    return pipe


def _recorded(pipe: Any, inputs: Any, call: dict[str, Any], count: int, steps: int = 4) -> Trajectory:
    """What the pipeline's own network returns in one batch."""
    pipe.scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler, solver="euler", grid="karras")
    with attach(pipe, recorder := Recorder("state", "cond")):
        list(sample_outputs(pipe, [range(count)], inputs=inputs, call={**call, "num_inference_steps": steps}))
    (run,) = recorder.trajectories
    return run


@pytest.fixture
def plain_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that pipelines are given are encoded without the noise of each sample's generator."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


# Truth.


@pytest.mark.parametrize("family", ALL)
@pytest.mark.usefixtures("plain_posterior")
def test_rows_of_all_kinds_are_those_of_the_pipelines_own_batch(family: str) -> None:
    """Samples in another order and repeated, captured in two batches, each at the time of another step."""
    inputs, call = arguments_of(family)
    pipe = built(family)
    conditions = Conditions(pipe, None if family == "ddpm" else inputs, 6, call=call, batch_size=2)
    assert type(pipe.scheduler) is type(stock_of(family))
    assert conditions.distinct == (1 if family == "ddpm" else 3)
    run = _recorded(pipe, None if family == "ddpm" else inputs, call, 3)
    samples, steps = [5, 0, 1, 2, 0, 4], [3, 1, 0, 2, 2, 1]
    x = torch.stack([run.states[step][i % 3] for i, step in zip(samples, steps, strict=True)])
    s = torch.tensor([conditions.path.at_level(run.sigmas[step]) for step in steps], dtype=torch.float64)
    with torch.no_grad():
        found = conditions(conditions.network, x, s, samples)
        other = conditions(conditions.network, x, s, samples[::-1])
    assert found.shape == (6, *conditions.shape)
    sign = -1 if family in _NEGATED else 1
    for row, i, step in zip(found, samples, steps, strict=True):
        cond = run.cond[step]
        assert cond is not None
        theirs = aligned(cond, run.states[step])
        assert theirs is not None
        assert torch.allclose(row, sign * theirs[i % 3], rtol=0, atol=1e-5 * float(theirs.abs().max()))
    # The conditioning of another sample gives another result, so that the one above is this sample's.
    assert family == "ddpm" or not torch.allclose(found, other, rtol=0, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_called_again_is_refused(family: str) -> None:
    inputs, call = arguments_of(family)
    with pytest.raises(ValueError, match=REFUSED[family]):
        Conditions(built(family), inputs, 3, call=call)


def test_the_embedded_digits() -> None:
    pipe = flowkit.load_demo("digits")
    scheduler = pipe.scheduler
    conditions = Conditions(pipe, range(10), 25)
    assert pipe.scheduler is scheduler
    assert (conditions.path.name, conditions.prediction, conditions.start) == ("flow", "flow_prediction", 1.0)
    assert (conditions.shape, conditions.dtype, conditions.distinct) == ((1, 8, 8), torch.float32, 10)
    x, s, samples = random(40, 1, 8, 8), torch.linspace(0, 1, 40), torch.arange(40) * 7 % 25
    with torch.no_grad():
        found = conditions(pipe.unet, x, s, samples)
        assert torch.equal(found, pipe.unet(x, 1000 * s, class_labels=samples % 10).sample)


def test_guided_or_not_it_is_the_conditional_call() -> None:
    pipe = flowkit.load_demo("digits")
    plain, guided = (Conditions(pipe, range(10), 10, call={"guidance_scale": w}) for w in (1.0, 4.0))
    x, s = random(10, 1, 8, 8), torch.full((10,), 0.5)
    with torch.no_grad():
        assert torch.equal(plain(pipe.unet, x, s, range(10)), guided(pipe.unet, x, s, range(10)))


# Groups.


@pytest.mark.parametrize("family", ["lumina2", "hunyuan-video"])
def test_prompts_of_other_lengths_run_in_groups(family: str) -> None:
    inputs, call = arguments_of(family)
    for name in inputs[1]:
        if "embeds" in name and "pooled" not in name:
            inputs[1][name] = torch.cat([inputs[1][name], inputs[0][name][:2]])
        elif "mask" in name:
            inputs[1][name] = torch.ones(6, dtype=inputs[1][name].dtype)
    pipe = built(family)
    conditions = Conditions(pipe, inputs, 3, call=call, batch_size=1)
    calls: list[int] = []
    pipe_network = copy.deepcopy(conditions.network)
    pipe_network.register_forward_pre_hook(
        lambda _, args, given: calls.append(len(given["hidden_states"])), with_kwargs=True
    )
    samples, s = [1, 0, 2, 1], torch.tensor([0.9, 0.2, 0.5, 0.4])
    x = random(4, *conditions.shape)
    with torch.no_grad():
        found = conditions(pipe_network, x, s, samples)
        assert calls == [2, 2]
        alone = [conditions(pipe_network, x[i : i + 1], s[i : i + 1], samples[i : i + 1]) for i in range(4)]
    assert torch.allclose(found, torch.cat(alone), rtol=0, atol=1e-5)


# Students.


class _Wrapped(torch.nn.Module):
    """As a network is wrapped for training in several processes."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("family", ["sd15", "qwen-image", "z-image"])
def test_a_student_is_run_in_the_networks_place_and_gets_gradients(family: str) -> None:
    inputs, call = arguments_of(family)
    conditions = Conditions(built(family), inputs, 3, call=call)
    student = copy.deepcopy(conditions.network).requires_grad_(True)
    x, s = random(3, *conditions.shape), torch.tensor([0.9, 0.2, 0.5])
    with torch.no_grad():
        before = conditions(conditions.network, x, s, [0, 1, 2])
        assert torch.equal(conditions(_Wrapped(student), x, s, [0, 1, 2]), before)
        next(p for p in student.parameters() if p.ndim > 1).add_(0.5)
        after = conditions(student, x, s, [0, 1, 2])
        assert torch.equal(conditions(conditions.network, x, s, [0, 1, 2]), before)
    assert not torch.allclose(after, before, atol=1e-4)
    conditions(_Wrapped(student), x, s, [0, 1, 2]).square().mean().backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None]
    given = [p for p in student.parameters() if p.grad is not None and bool(p.grad.any())]
    assert len(given) > 0.8 * (len(given) + len(missing))
    assert all(p.grad is None for p in conditions.network.parameters())


def test_the_gradient_is_that_of_a_difference() -> None:
    pipe = flowkit.load_demo("digits")
    conditions = Conditions(pipe, range(10), 10)
    student = copy.deepcopy(pipe.unet).double().requires_grad_(True)
    x, s = random(4, 1, 8, 8).double(), torch.tensor([1.0, 0.1, 0.5, 0.7])
    weight = student.conv_in.weight
    way = random(*weight.shape, seed=3).double()

    def loss() -> Tensor:
        found: Tensor = conditions(student, x, s, [3, 1, 3, 9]).square().mean()
        return found

    loss().backward()
    assert weight.grad is not None
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weight.add_(step * way)
            ends.append(float(loss()))
    assert float((weight.grad * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_a_wide_student_of_a_narrow_teacher() -> None:
    """It is given all in its own dtype, time included, or runs under autocast."""
    inputs, call = arguments_of("sd3")
    narrow = build("sd3", stock_of("sd3"), torch.bfloat16)
    conditions = Conditions(narrow, inputs, 3, call=call)
    exact = Conditions(built("sd3"), inputs, 3, call=call)
    x, s = random(3, *conditions.shape), torch.tensor([0.9, 0.2, 0.501])
    student = copy.deepcopy(exact.network)
    with torch.no_grad():
        wanted = exact(exact.network, x, s, [0, 1, 2])
        wide = conditions(student, x, s, [0, 1, 2])
        with torch.autocast("cpu", torch.bfloat16):
            cast = conditions(student, x, s, [0, 1, 2])
        own = conditions(conditions.network, x, s, [0, 1, 2])
    assert conditions.dtype == torch.bfloat16
    assert wide.dtype == cast.dtype == own.dtype == torch.float32
    size = float(wanted.norm())
    assert float((wide - wanted).norm()) < 0.01 * size  # but for the rounded embeddings
    assert float((cast - wanted).norm()) < 0.05 * size
    assert float((own - wanted).norm()) < 0.05 * size


# Errors.


def test_bad_input() -> None:
    pipe = flowkit.load_demo("digits")
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        Conditions(pipe, range(10), 0)
    with pytest.raises(TypeError, match="num_inference_steps cannot be in call"):
        Conditions(pipe, range(10), 10, call={"num_inference_steps": 4})
    with pytest.raises(ValueError, match="batch_size=0"):
        Conditions(pipe, range(10), 10, batch_size=0)
    conditions = Conditions(pipe, range(10), 10)
    x, s = random(2, 1, 8, 8), torch.tensor([0.5, 0.5])
    for index in (10, -1):
        with pytest.raises(IndexError, match=f"sample {index} is not one of 10"):
            conditions(pipe.unet, x, s, [0, index])
    for at, samples in ((s, [0, 1, 2]), (s[:1], [0, 1])):
        with pytest.raises(ValueError, match=r"got samples of shape \(2, 1, 8, 8\), times of shape"):
            conditions(pipe.unet, x, at, samples)
    inputs, call = arguments_of("sd15-img2img")
    with pytest.raises(ValueError, match="took 1 of 2 steps; call it so that it starts from pure noise"):
        Conditions(built("sd15-img2img"), inputs, 3, call={**call, "strength": 0.5})
    inputs, call = arguments_of("flux")
    del call["height"]
    with pytest.raises(ValueError, match="give all inputs of one training the same size"):
        Conditions(built("flux"), [{**inputs[0], "height": 16}, {**inputs[0], "height": 32}], 2, call=call)


def test_the_pipeline_is_left_as_it_was() -> None:
    inputs, call = arguments_of("sd15-pag")
    pipe = built("sd15-pag")
    processors, scheduler = dict(pipe.unet.attn_processors), pipe.scheduler
    Conditions(pipe, inputs, 3, call=call)
    assert pipe.unet.attn_processors == processors
    assert pipe.scheduler is scheduler
    assert "_compiled_call_impl" not in vars(pipe.unet)


# Parts.


def test_arguments_apart_and_joined() -> None:
    """Joining any rows gives what cutting them from the batch gives."""
    rows = 4
    batch: dict[str, Any] = {
        "hidden_states": random(rows, 2, 3),
        "timestep": torch.full((rows,), 7.0),
        "encoder_hidden_states": random(2 * rows, 5),
        "encoder_hidden_states_llama3": random(3, rows, 5),
        "cap_feats": [random(rows, 3), random(2, 3), random(5, 3), random(1, 3)],
        "img_shapes": [[(1, 4, 4)]] * rows,
        "img_ids": random(rows, 3),
        "txt_ids": random(rows, 2, 3),
        "added_cond_kwargs": {"time_ids": random(rows, 6), "resolution": None},
        "blocks": [random(rows, 2), random(rows, 1)],
        "image_rotary_emb": (random(8, 2), random(8, 2)),
        "scale": random(3),
        "num_frames": 3,
        "return_dict": False,
        "label": "x",
    }
    found = apart(batch, rows)
    (key,) = {frame.key for frame, _ in found}
    for picked in ([0, 1, 2, 3], [3, 1], [2, 2, 0, 1, 3], [1]):
        joined = found[0][0].join([found[i][1] for i in picked], torch.device("cpu"))
        # What is cut by an index that repeats is cut in two.
        wanted = [Arguments((), batch).cut(rows, [i]) for i in picked]
        cut = Arguments((), batch).cut(rows, picked)
        assert not changes(Arguments((), {"x": 0, **cut.kwargs}), Arguments((), {"x": 0, **joined.kwargs}))
        assert torch.equal(joined.kwargs["hidden_states"], torch.cat([one.kwargs["hidden_states"] for one in wanted]))
        assert torch.equal(joined.kwargs["img_ids"], batch["img_ids"])
    other = apart({**batch, "num_frames": 4}, rows)
    assert other[0][0].key != key
    longer = apart({**batch, "encoder_hidden_states": random(3 * rows, 5)}, rows)
    assert longer[0][0].key != key
    moved = apart({**batch, "scale": random(3) + 1}, rows)
    assert moved[0][0].key != key
    with pytest.raises(TypeError, match="argument mask holds a Generator, which is not a tensor or a plain value"):
        apart({**batch, "mask": torch.Generator()}, rows)

"""Parts that change predictions or samples: every output that the pipeline sees is changed alike, in any way of guiding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit.guidance import GradientGuidance
from flowkit.hooks import Evaluation, Part, Recorder, attach
from flowkit.hooks.layout import networks, read, write

from .families import steps_of, stock_of
from .guided import Cut, Fixed, Seeing, counted, reference, scaled, trace
from .tiny import build, run
from .tiny_parts import random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 4
SKIPPED: dict[str, Any] = {
    "skip_guidance_layers": [0],
    "skip_layer_guidance_scale": 2.0,
    "skip_layer_guidance_start": -1.0,
    "skip_layer_guidance_stop": 1.0,
}


def _change(shape: torch.Size, rows: int) -> Tensor:
    return 0.1 * random(1, *shape[1:]).expand(rows, *shape[1:])


class Adding(Part):
    """Adds the same to every prediction."""

    def edit(self, evaluation: Evaluation, cond: Tensor) -> Tensor:
        return _change(cond.shape, len(cond))


@contextmanager
def _added(pipe: Any) -> Iterator[None]:
    """The same by hooks on the networks."""

    def add(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        value = read(output)
        half = value.shape[1] // (2 if "DiT" in type(module).__name__ else 1)  # a learned variance stays
        change = torch.zeros_like(value)
        change[:, :half] = _change(value[:, :half].shape, len(value))
        return write(output, value + change)

    handles = [network.register_forward_hook(add, with_kwargs=True) for network in networks(pipe)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("family", "call"),
    [(name, {}) for name in ("ddpm", "sd15", "sd3", "flux", "dit", "z-image", "lumina2", "sd15-instruct", "wan2.2")]
    + [("sd15-pag", {"guidance_scale": 5.0}), ("sd3", SKIPPED), ("sd15", {"guidance_scale": 1.0})],
)
def test_an_edit_reaches_every_output(family: str, call: dict[str, Any]) -> None:
    pipe, steps = build(family, stock_of(family)), steps_of(family)
    with _added(pipe):
        expected = run(pipe, steps, **call)
    plain = run(pipe, steps, **call)
    assert (expected - plain).abs().max() > 1e-3
    before = trace(pipe)
    with attach(pipe, Adding()) as attached:
        found = run(pipe, steps, **call)
    assert attached.rows == attached.asked
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert trace(pipe) == before
    assert torch.equal(run(pipe, steps, **call), plain)


@pytest.mark.parametrize("family", ["sd15", "flux", "dit"])
def test_an_edit_beside_guidance(family: str) -> None:
    """Guidance sees the network's outputs, the pipeline what is made of them and the edit."""
    pipe = build(family, stock_of(family))
    with _added(pipe):
        strong, cut = (run(pipe, STEPS, **scaled(family, w)) for w in (7.0, 1.0))
    for method, expected in ((Fixed(7.0), strong), (Cut(0), cut)):
        with attach(pipe, method, Adding()), counted(pipe):
            found = run(pipe, STEPS, **scaled(family, 2.0))
        assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


class Steering(Part):
    """Takes a gradient through the network: of a weighted sum of the conditional output."""

    through_network = True

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.seen: list[tuple[Tensor, Tensor]] = []

    def edit(self, evaluation: Evaluation, cond: Tensor) -> Tensor:
        with torch.enable_grad():
            gradient = torch.autograd.grad((random(*cond.shape) * cond).sum(), evaluation.x)[0]
        self.seen.append((evaluation.x.detach().clone(), gradient.clone()))
        return self.scale * gradient


@pytest.mark.parametrize("family", ["ddpm", "sd15", "sd3", "flux", "dit", "lumina2"])
def test_gradients_through_the_network(family: str) -> None:
    pipe = build(family, stock_of(family))
    plain = run(pipe, STEPS)
    before = trace(pipe)
    with attach(pipe, steering := Steering(0.0), recorder := Recorder()):
        found = run(pipe, STEPS)
    assert torch.allclose(found, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    assert not found.requires_grad
    call = recorder.trajectories[0].denoiser()
    sign = -1 if family == "lumina2" else 1
    for (x, gradient), time in zip(steering.seen, recorder.trajectories[0].timesteps, strict=True):
        leaf = x.clone().requires_grad_()
        expected = sign * torch.autograd.grad((random(*x.shape) * call(leaf, time)).sum(), leaf)[0]
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    with attach(pipe, Steering(0.05)):
        assert (run(pipe, STEPS) - plain).abs().max() > 1e-4
    assert trace(pipe) == before


def test_gradients_beside_a_cut() -> None:
    pipe = build("sd15", stock_of("sd15"))
    for family in ("sd15", "flux"):
        pipe = build(family, stock_of(family))
        with attach(pipe, Cut(0), Steering(0.0)) as attached:
            found = run(pipe, STEPS)
        assert torch.allclose(found, reference(family, 1.0), rtol=0, atol=1e-5)
        assert 2 * attached.rows == attached.asked


@pytest.mark.parametrize(
    ("family", "reason"), [("z-image", "a list of samples"), ("sd15-inpaint-9", "images beside the sample")]
)
def test_gradients_that_are_not_to_be_had(family: str, reason: str) -> None:
    pipe, steps = build(family, stock_of(family)), steps_of(family)
    plain, before = run(pipe, steps), trace(pipe)
    with (
        attach(pipe, Steering(0.1)),
        pytest.raises(ValueError, match=f"gives its network {reason}, through which no grad"),
    ):
        run(pipe, steps)
    assert trace(pipe) == before
    assert torch.equal(run(pipe, steps), plain)


def test_gradients_in_the_coordinates_of_the_path() -> None:
    """EDM's networks are given a scaled sample; parts are told of the sample itself."""
    scheduler = diffusers.EDMEulerScheduler(prediction_type="epsilon")
    pipe = build("sd15", scheduler)
    plain = run(pipe, STEPS)
    with attach(pipe, steering := Steering(0.0), seeing := Seeing(), recorder := Recorder()):
        found = run(pipe, STEPS)
    assert torch.allclose(found, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    kept = recorder.trajectories[0]
    call = kept.denoiser()
    told = zip(steering.seen, seeing.seen, kept.states, kept.timesteps, strict=False)
    for (x, gradient), (evaluation, _, _), state, time in told:
        assert torch.allclose(x, state, rtol=1e-5, atol=0)
        assert torch.equal(evaluation.x, x)
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad((random(*x.shape) * call(leaf, time)).sum(), leaf)[0]
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


class Moving(Part):
    """Puts another sample in the place of the next one."""

    def after_step(self, run: Any, sample: Tensor) -> Tensor | None:
        return sample + 1.0


@pytest.mark.parametrize("family", ["sd15", "flux", "dit"])
def test_moving_the_sample(family: str) -> None:
    pipe = build(family, stock_of(family))
    step = pipe.scheduler.step

    def moved(model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, return_dict=return_dict, **kwargs)
        if isinstance(result, tuple):
            return (result[0] + 1.0, *result[1:])
        result.prev_sample = result.prev_sample + 1.0
        return result

    pipe.scheduler.step = moved
    expected = run(pipe, STEPS)
    del pipe.scheduler.step
    with attach(pipe, Moving(), recorder := Recorder("state")):
        assert torch.equal(run(pipe, STEPS), expected)
    if family != "dit":
        assert torch.equal(recorder.trajectories[0].states[-1], expected)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_in_half_precision(family: str) -> None:
    pipe = build(family, stock_of(family), torch.bfloat16)
    expected, plain = (run(pipe, STEPS, **scaled(family, w)) for w in (7.0, 2.0))
    off = run(pipe, STEPS, **scaled(family, 1.0))
    with attach(pipe, Fixed(7.0), Recorder()):
        assert torch.equal(run(pipe, STEPS, **scaled(family, 2.0)), expected)
    with attach(pipe, Cut(0)):
        assert torch.equal(run(pipe, STEPS, **scaled(family, 2.0)), off)
    assert not torch.equal(plain, expected)


def test_inference_mode() -> None:
    """Guidance works in it, and what needs a gradient says that there is none."""
    pipe, expected = build("sd15", stock_of("sd15")), reference("sd15", 7.0)
    before = trace(pipe)

    def energy(x: Tensor, sigma: float, conditioning: Any) -> Tensor:
        return x.square().flatten(1).sum(1)

    with torch.inference_mode():
        for part in (
            GradientGuidance(energy),
            GradientGuidance(energy, at="x"),
            GradientGuidance(energy, 1.0, "x0", True),
        ):
            attach(pipe, part)
            with pytest.raises(
                ValueError, match=r"no gradient can be taken in torch\.inference_mode; call the pipeline w"
            ):
                run(pipe, STEPS)
            assert trace(pipe) == before
        with attach(pipe, Fixed(7.0)):
            assert torch.equal(run(pipe, STEPS), expected)

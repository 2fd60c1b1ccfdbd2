"""Distillation methods from end to end: recorded, trained, saved, loaded by plain diffusers, and right where they can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler
from flowkit.distill import Boss, OneStep, RectifiedDiffusion, Reflow, Reverse, Training, Trajectories, invert, run
from flowkit.distill.pairs import Held

from .tiny_parts import grey

PATHS: dict[str, dict[str, Any]] = {
    "flow": {},
    "vp epsilon": {
        "path": "vp", "prediction_type": "epsilon",
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    },
    "vp v": {"path": "vp", "prediction_type": "v_prediction"},
    "edm": {"path": "edm"},
}  # fmt: skip


def tiny(kind: str = "flow", classes: int = 4) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(grey(classes, block_out_channels=(16, 16)), RectifiedFlowScheduler(**PATHS[kind]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (OneStep(), 1),
        (OneStep(steps=3, metric="l2"), 3),
        (RectifiedDiffusion(), 2),
        (RectifiedDiffusion(phases=2), 2),
        (Boss(steps=2, anchors=6, search=8), 2),
        (Reverse(), 1),
    ],
    ids=str,
)
def test_a_student_of_any_method_is_an_ordinary_folder(method: Any, steps: int, tmp_path: Path) -> None:
    teacher, folder = tiny(), tmp_path / "student"
    arguments: dict[str, Any] = {"output": folder, "samples": 24, "steps": 3, "batch_size": 8, "progress": False}
    student = run(method, teacher, **arguments)
    facts = json.loads((folder / "distill.json").read_text())
    assert facts["method"] == method.name
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    plain = ClassConditionalPipeline(unet.eval(), RectifiedFlowScheduler.from_config(stock.config))
    plain.set_progress_bar_config(disable=True)
    assert plain.scheduler.grid == student.scheduler.grid
    assert (plain.scheduler.grid is not None) == (method.steps > 0 and method.name != "reverse")
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    images = [
        pipe([0, 3], generator=torch.Generator().manual_seed(0), **call).images for pipe in (student, plain, teacher)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    if plain.scheduler.grid is not None:
        with pytest.raises(ValueError, match=f"the grid has {steps}"):
            student([0], num_inference_steps=steps + 1)
    # Finished, it is only loaded; with other options it is another run.
    again = run(method, teacher, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), unet.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a run with"):
        run("reflow", teacher, **arguments)


FIT = Training(steps=80, batch_size=4, learning_rate=4e-3, weight_decay=0.0, ema=0.9)


@pytest.mark.parametrize(
    ("method", "kind", "steps"),
    [
        (OneStep(), "vp epsilon", 1),
        (OneStep(metric="l2"), "edm", 1),
        (Reflow(), "vp epsilon", 1),
        (RectifiedDiffusion(phases=2, metric="l2", times=(1.0,)), "vp v", 2),
        (Boss(steps=2, anchors=8, search=4), "edm", 2),
    ],
    ids=str,
)
def test_a_student_that_has_learnt_its_samples_draws_them(method: Any, kind: str, steps: int, tmp_path: Path) -> None:
    # Four pairs are learnt by heart; the sampler, on its own grid, then leads from each noise to the teacher's very sample.
    teacher = tiny(kind)
    student = run(method, teacher, output=tmp_path / "student", samples=4, training=FIT, batch_size=4, progress=False)
    data = Trajectories(tmp_path / "student" / "pairs-1")
    noise, wanted = Held(data, range(4))(torch.arange(4)).unbind(1)

    def draw(pipe: ClassConditionalPipeline) -> torch.Tensor:
        pipe.scheduler.set_timesteps(steps)
        images: torch.Tensor = pipe(
            range(4), latents=noise / pipe.scheduler.init_noise_sigma, num_inference_steps=steps, output_type="latent"
        ).images
        return images

    error = float((draw(student) - wanted).square().mean().sqrt())
    spread = float((wanted - wanted.mean(0)).square().mean().sqrt())
    assert error < 0.15 * spread
    # The control: the samples belong to their noise.
    assert float((draw(student) - wanted.roll(1, 0)).square().mean().sqrt()) > 0.5 * spread


@pytest.mark.parametrize("kind", ["flow", "vp epsilon"])
def test_an_encoder_that_has_learnt_its_samples_finds_their_noise(kind: str, tmp_path: Path) -> None:
    teacher = tiny(kind)
    student = run(
        Reverse(), teacher, output=tmp_path / "student", samples=4, training=FIT, batch_size=4, progress=False
    )
    noise, samples = Held(Trajectories(tmp_path / "student" / "pairs-1"), range(4))(torch.arange(4)).unbind(1)
    found = invert(student, samples, range(4), steps=1, progress=False)
    assert float((found - noise).norm()) < 0.15 * float(noise.norm())
    assert float((found - noise.roll(1, 0)).norm()) > float(noise.norm())


def test_a_recording_serves_several_methods(tmp_path: Path) -> None:
    teacher = tiny()
    arguments: dict[str, Any] = {"steps": 2, "batch_size": 8, "progress": False}
    run("reflow", teacher, output=tmp_path / "reflow", samples=16, **arguments)
    pairs = tmp_path / "reflow" / "pairs-1"
    for method in ("onestep", "reverse", "rectified-diffusion"):
        run(method, teacher, output=tmp_path / method, pairs=pairs, **arguments)
        assert not (tmp_path / method / "pairs-1").exists()
    with pytest.raises(ValueError, match="costs need states and outputs"):
        run("boss", teacher, output=tmp_path / "boss", pairs=pairs, **arguments)

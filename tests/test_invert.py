"""Inversion of samples to their noise, against exact networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowkit import ClassConditionalPipeline, MixtureDenoiser, paths
from flowkit.distill import invert
from flowkit.distill.fine import Runs
from flowkit.grids import Grid

from .test_methods import MEAN, STD, gaussian, near, normals


def encoded(path: paths.Path, s: float, x: Tensor) -> Tensor:
    """The state at flow time s on the exact path of a Gaussian through a state at the first level."""
    first = path.at_level(path.rhos[0]) if path.rhos else 0.0

    def spread(s: float) -> float:
        return math.hypot((1 - s) * STD, s)

    return ((1 - s) * MEAN + spread(s) / spread(first) * (path.norm(first) * x - (1 - first) * MEAN)) / path.norm(s)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [("flow", None), ("vp", "epsilon"), ("vp", "v_prediction"), ("cosine", "v_prediction"), ("edm", None)],
)
def test_the_inversion_of_a_gaussian_is_exact_up_to_its_order(name: str, prediction: str | None) -> None:
    pipe, x0 = gaussian(name, prediction), MEAN + STD * normals(6, 1, 2, 2)
    path = pipe.scheduler.path
    start = path.at_level(Runs(pipe, "heun", inputs=[0]).anchors(4).sigmas[0])
    wanted = encoded(path, start, x0)
    errors = []
    for steps in (32, 64, 128):
        found = invert(pipe, x0, [0], steps=steps, batch_size=4, progress=False)
        assert found.dtype == torch.float64
        errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] > 3.5  # 4 at second order
    assert errors[1] / errors[2] > 3.5


def test_inversion_and_sampler_lead_back() -> None:
    pipe, noise = gaussian(solver="heun"), normals(6, 1, 2, 2)
    errors = []
    for steps in (16, 32, 64):
        x0 = pipe([0] * 6, latents=noise, num_inference_steps=steps, output_type="latent").images
        errors.append(float((invert(pipe, x0, [0], steps=steps, progress=False) - noise).abs().max()))
    assert errors[-1] < 1e-2
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


class Encoder(MixtureDenoiser):
    """The network that reverse distillation finds for a Gaussian: right at flow time 0, where it is given the sample."""

    def posterior(self, x: Tensor, s: float, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().posterior(x, s, class_labels) if s else (x, (x - MEAN) / STD)


def test_one_step_with_a_reversed_student_is_the_noise() -> None:
    pipe, noise = gaussian(), normals(6, 1, 2, 2)
    pipe.unet = Encoder.of(torch.full((1, 1, 2, 2), MEAN), STD)
    assert near(invert(pipe, MEAN + STD * noise, [0], steps=1, progress=False), noise)


def test_what_cannot_be_inverted_is_refused() -> None:
    pipe, x0 = gaussian(), normals(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"samples have shape \(1, 2, 2\) and those given \(2, 2\)"):
        invert(pipe, x0[:, 0], [0], progress=False)
    with pytest.raises(ValueError, match="no samples"):
        invert(pipe, x0[:0], [0], progress=False)
    with pytest.raises(ValueError, match="belongs to the path 'vp', the pipeline walks 'flow'"):
        invert(pipe, x0, [0], steps=Grid.uniform(4, paths.named("vp")), progress=False)
    with pytest.raises(ValueError, match="predicts the sample says nothing of the noise"):
        invert(gaussian("flow", "sample"), x0, [0], progress=False)
    labelled = MixtureDenoiser.of(torch.zeros(2, 1, 2, 2), STD, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="invert with guidance_scale=1"):
        invert(
            ClassConditionalPipeline(labelled, pipe.scheduler), x0, [0], call={"guidance_scale": 2.0}, progress=False
        )

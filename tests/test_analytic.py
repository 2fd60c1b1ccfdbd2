"""The exact networks: against brute force, and in a diffusers pipeline's place."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline

from flowkit import MixtureDenoiser, RectifiedFlowScheduler, predictions

MEANS = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
STD = torch.tensor([[0.3], [0.1], [0.6]], dtype=torch.float64)


def by_quadrature(x: float, alpha: float, sigma: float) -> tuple[float, float]:
    """E[x0 | x] and E[eps | x] by integrating over x0."""
    x0 = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    prior = sum(w / s * torch.exp(-0.5 * ((x0 - m) / s) ** 2) for w, s, m in zip(WEIGHTS, STD, MEANS, strict=True))
    assert isinstance(prior, torch.Tensor)
    eps = (x - alpha * x0) / sigma
    density = prior * torch.exp(-0.5 * eps**2)
    return float((density * x0).sum() / density.sum()), float((density * eps).sum() / density.sum())


@pytest.mark.parametrize("path", ["flow", "vp", "ve"])
@pytest.mark.parametrize("s", [0.1, 0.5, 0.9])
def test_posterior_means_equal_quadrature(path: str, s: float) -> None:
    model = MixtureDenoiser.of(MEANS, STD, WEIGHTS, path=path)
    alpha, sigma = model.path.alpha(s), model.path.sigma(s)
    for x in (-1.3, 0.2, 1.9):
        x0, eps = model.posterior(torch.tensor([[x]], dtype=torch.float64), s)
        assert (x0.item(), eps.item()) == pytest.approx(by_quadrature(x, alpha, sigma), abs=1e-8)
        assert alpha * x0.item() + sigma * eps.item() == pytest.approx(x, abs=1e-12)


def test_a_gaussian_has_its_closed_form() -> None:
    model = MixtureDenoiser.of(torch.tensor([[0.7]], dtype=torch.float64), 0.5, path="flow")
    t, x, m, s2 = 0.3, 0.4, 0.7, 0.25  # noise level t: velocity eps - x0 of N(m, s^2)
    total = (1 - t) ** 2 * s2 + t**2
    velocity = -m + (t - (1 - t) * s2) / total * (x - (1 - t) * m)
    output = model(torch.tensor([[x]], dtype=torch.float64), 1000 * t).sample
    assert output.item() == pytest.approx(velocity, rel=1e-12)


def test_a_finite_set_is_a_softmax_that_memorises() -> None:
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = MixtureDenoiser.of(points, path="flow")
    s, x = 0.4, torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    share = (-((x - (1 - s) * points) ** 2).sum(1) / (2 * s**2)).softmax(0)
    assert torch.allclose(model.posterior(x, s)[0], (share[:, None] * points).sum(0, keepdim=True), atol=1e-12)
    scheduler = RectifiedFlowScheduler(solver="heun")
    scheduler.set_timesteps(50)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    assert torch.cdist(x, points).min(1).values.max() < 1e-2


def test_labels_restrict_the_mixture() -> None:
    model = MixtureDenoiser.of(MEANS, STD, WEIGHTS, labels=torch.tensor([0, 1, 1]))
    alone = MixtureDenoiser.of(MEANS[1:], STD[1:], WEIGHTS[1:])
    x = torch.tensor([[0.4], [0.4]])
    got = model.posterior(x, 0.5, torch.tensor([1, 2]))[0]  # 2 = num_classes: no label
    assert got[0].item() == pytest.approx(alone.posterior(x, 0.5)[0][0].item(), rel=1e-12)
    assert got[1].item() == pytest.approx(model.posterior(x, 0.5)[0][1].item(), rel=1e-12)


@pytest.mark.parametrize("s", [0.0, 1.0])
def test_both_ends_are_exact(s: float) -> None:
    model = MixtureDenoiser.of(MEANS, STD, WEIGHTS, path="flow")
    x0, eps = model.posterior(torch.tensor([[0.4]], dtype=torch.float64), s)
    mean = (WEIGHTS.double() * MEANS[:, 0].double()).sum().item()
    assert (x0.item(), eps.item()) == pytest.approx((0.4, 0.0) if s == 0 else (mean, 0.4), abs=1e-6)


def test_transport_keeps_the_distribution() -> None:
    """Samples of the ODE have the moments of the mixture; one step does not give them."""
    model = MixtureDenoiser.of(MEANS, STD, WEIGHTS)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = float((WEIGHTS * MEANS[:, 0]).sum())
    variance = float((WEIGHTS * (STD[:, 0] ** 2 + MEANS[:, 0] ** 2)).sum()) - mean**2
    spread = {}
    for steps in (1, 60):
        scheduler = RectifiedFlowScheduler()
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        assert abs(x.mean().item() - mean) < 4 * math.sqrt(variance / len(x))
        spread[steps] = x.var().item() / variance
    assert spread[60] == pytest.approx(1, abs=0.08)
    assert spread[1] < 0.01


def test_in_a_pipeline_and_from_disk(tmp_path: Path) -> None:
    points = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = MixtureDenoiser.of(points, 0.01, path="vp")
    pipe = DDPMPipeline(
        model, RectifiedFlowScheduler(path="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        batch_size=5, num_inference_steps=30, output_type="np", generator=torch.Generator().manual_seed(3)
    ).images
    x = torch.from_numpy(images).float().permute(0, 3, 1, 2) * 2 - 1
    assert torch.cdist(x.flatten(1), points.flatten(1)).min(1).values.max() < 0.25
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = MixtureDenoiser.from_pretrained(tmp_path)
    noise = torch.randn(2, 1, 4, 4)
    assert torch.equal(again(noise, 500).sample, model(noise, 500).sample)


def test_bad_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights have shape \(2,\) for 3 components"):
        MixtureDenoiser.of(MEANS, STD, WEIGHTS[:2])
    with pytest.raises(ValueError, match="must be positive"):
        MixtureDenoiser.of(MEANS, STD, -WEIGHTS)
    with pytest.raises(ValueError, match="must not be negative"):
        MixtureDenoiser.of(MEANS, -1.0)
    with pytest.raises(ValueError, match="unknown path 'line'"):
        MixtureDenoiser.of(MEANS, path="line")
    with pytest.raises(ValueError, match="unknown prediction type 'noise'"):
        MixtureDenoiser.of(MEANS, prediction_type="noise")
    assert set(predictions.PREDICTIONS) >= {"epsilon", "sample", "v_prediction", "flow_prediction"}

"""Trained evaluators: what they learn from an exact network, where the answer is known, and dynamic guidance in a pipeline."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit import ClassConditionalPipeline, MixtureDenoiser, RectifiedFlowScheduler
from flowkit.guidance import DynamicGuidance, LatentClassifier, LatentDiscriminator, train_evaluators
from flowkit.guidance.evaluator_training import predictions
from flowkit.hooks import attach

from . import tiny

MEANS = torch.tensor([-0.5, 0.5], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
STD, STEPS = 0.7, 8
CALL: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": STEPS}


def pipeline() -> ClassConditionalPipeline:
    """Two classes that overlap, and their exact network."""
    network = MixtureDenoiser.of(MEANS, STD, labels=torch.tensor([0, 1]))
    pipe = ClassConditionalPipeline(network, RectifiedFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    return (MEANS[labels] + STD * torch.randn(count, 1, 2, 2, generator=generator)).float(), labels


@functools.cache
def trained(*scales: float) -> tuple[LatentDiscriminator, LatentClassifier]:
    latents, labels = data(400, seed=0)
    discriminator, classifier = train_evaluators(
        pipeline(), latents, labels, call=CALL, scales=scales, steps=250, batch_size=64, width=8
    )
    assert classifier is not None
    return discriminator, classifier


def test_the_predictions_are_those_of_the_network() -> None:
    latents, labels = data(7, seed=3)
    pipe, done = pipeline(), list[int]()
    found = predictions(pipe, latents, labels.tolist(), CALL, (1.0, 3.0), batch_size=2, seed=5, on_samples=done.append)
    assert done == [2, 4, 6, 7]
    assert found.path == "flow"
    assert found.s.tolist() == [1 - k / STEPS for k in range(STEPS)]
    assert found.sampled.shape == found.cond.shape == found.uncond.shape == (STEPS, 7, 1, 2, 2)
    # At pure noise an exact network predicts the means; guidance with scale 3 triples them in every second batch of two.
    means = MEANS[labels].float()
    scale = torch.tensor([1.0, 1, 3, 3, 1, 1, 3]).reshape(7, 1, 1, 1)
    assert torch.allclose(found.sampled[0], means * scale, atol=1e-5)
    assert torch.allclose(found.cond[0], means, atol=1e-5)
    assert torch.allclose(found.uncond[0], torch.zeros(7, 1, 2, 2), atol=1e-5)
    # At low noise the prediction comes back to the data that was noised.
    assert (found.cond[-1] - latents).abs().mean() < 0.2
    assert (found.cond[-1] - latents).abs().max() > 0


def test_the_discriminator_tells_guided_trajectories_and_not_exact_ones() -> None:
    """Without guidance an exact network's trajectories have the right distribution: there is nothing to tell, on held-out data."""
    guided, exact = trained(5.0)[0].measured, trained(1.0)[0].measured
    assert len(guided) == len(exact) == STEPS
    assert min(value for _, value in guided) > 0.6
    assert max(value for _, value in exact) < 0.3
    discriminator = trained(5.0)[0]
    x0 = torch.tensor([0.5, 2.5]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    real, far = discriminator(x0, 1.0, {}).tolist()
    assert real > 0 > far


def test_the_classifier_is_right_where_the_noise_allows() -> None:
    """Against Bayes' rule: of four pixels at +-0.5 with std 0.7, the mean decides, ``P(right) = Phi(2 0.5 / 0.7) = 0.923``."""
    _, classifier = trained(5.0)
    x0, labels = data(2000, seed=9)
    score = classifier(x0, 1 / STEPS, {"class_labels": labels})
    other = classifier(x0, 1 / STEPS, {"class_labels": 1 - labels})
    assert (score > other).float().mean().item() == pytest.approx(0.923, abs=0.03)
    assert torch.allclose(score.exp() + other.exp(), torch.ones(2000), atol=1e-5)
    reliability = dict(classifier.measured)
    assert reliability[1.0] < 0.3  # pure noise tells no class
    assert reliability[1 / STEPS] == pytest.approx(2 * 0.923 - 1, abs=0.2)
    assert classifier.reliability(0.5) == reliability[0.5]


def test_training_repeats() -> None:
    latents, labels = data(20, seed=0)
    first, second = (
        train_evaluators(pipeline(), latents, labels, call=CALL, steps=3, batch_size=4, width=2) for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert one is not None
        assert two is not None
        assert one.measured == two.measured
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    alone, none = train_evaluators(pipeline(), latents, inputs=labels, call=CALL, steps=3, batch_size=4, width=2)
    assert none is None
    assert alone.measured == first[0].measured


def test_in_a_pipeline_it_costs_no_network_rows_and_chooses_for_each_sample() -> None:
    pipe, labels = pipeline(), [0, 1, 1, 0, 1]
    guidance = DynamicGuidance(trained(5.0), (1.0, 2.5, 5.0))

    def run(part: DynamicGuidance, some: list[int], seeds: list[int]) -> tuple[Tensor, Tensor, int]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with attach(pipe, part) as run:
            x = pipe(some, generator=generators, output_type="latent", **CALL).images
        return x, torch.stack([step.report["scale"] for step in run.steps]), run.rows

    together, scales, rows = run(guidance, labels, [0, 1, 2, 3, 4])
    assert rows == 2 * 5 * STEPS
    assert scales.shape == (STEPS, 5)
    assert len(scales.unique()) > 1
    for i, label in enumerate(labels):
        alone, own, _ = run(guidance, [label], [i])
        assert torch.equal(own[:, 0], scales[:, i])
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    # A single candidate is the pipeline's own guidance.
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    static = pipe(labels, generator=generators, output_type="latent", guidance_scale=2.5, num_inference_steps=STEPS)
    assert torch.equal(run(DynamicGuidance((), [2.5]), labels, [0, 1, 2, 3, 4])[0], static.images)


@pytest.mark.parametrize(("family", "shape"), [("sd15", (4, 8, 8)), ("flux", (16, 16))])
def test_pipelines_of_diffusers_train_and_use_them(family: str, shape: tuple[int, ...]) -> None:
    """One that predicts eps in one guided batch, and one that predicts the velocity of tokens in two calls."""
    stock = {
        "sd15": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        "flux": diffusers.FlowMatchEulerDiscreteScheduler(),
    }
    pipe, call = tiny.build(family, stock[family]), {**tiny.PIPELINES[family].call, "num_inference_steps": 3}
    own = {name: call.pop(name) for name in ("prompt", "negative_prompt")}
    prompts = [own, {**own, "prompt": "a green dog"}]
    latents, labels = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    discriminator, classifier = train_evaluators(
        pipe, latents, labels, inputs=prompts, call=call, scales=(1.0, 3.0), steps=2, batch_size=4, width=2
    )
    assert classifier is not None
    assert discriminator.path == classifier.path == {"sd15": "vp", "flux": "flow"}[family]
    assert len(discriminator.measured) == 3
    guidance = DynamicGuidance(discriminator, (1.0, 2.0, 4.0))
    call |= {name: [row[name] for row in prompts] for name in own}
    with attach(pipe, guidance) as run:
        images = pipe(**call, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    assert run.rows == run.asked == 12
    assert all(step.report["scale"].shape == (2,) for step in run.steps)
    assert torch.isfinite(images[0]).all()


def test_bad_training_data_is_refused() -> None:
    pipe, (latents, labels) = pipeline(), data(12, seed=0)
    with pytest.raises(ValueError, match="steps=0 and batch_size=128; both"):
        train_evaluators(pipe, latents, labels, steps=0)
    with pytest.raises(ValueError, match="5 samples do not suffice"):
        train_evaluators(pipe, latents[:5], labels[:5])
    with pytest.raises(ValueError, match=r"labels have shape \(11,\) .* give 12 whole numbers"):
        train_evaluators(pipe, latents, labels[:11])
    with pytest.raises(ValueError, match=r"latents have shape \(4, 1, 4, 4\), the pipeline's samples \(4, 1, 2, 2\)"):
        train_evaluators(pipe, torch.zeros(12, 1, 4, 4), labels, call=CALL)
    with pytest.raises(ValueError, match="2 samples do not suffice for 3 scales"):
        predictions(pipe, latents[:2], labels.tolist(), CALL)

"""Guidance by second networks, adapters and gradients: exact networks, closed forms, and a real model of diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from flowkit import MixtureDenoiser, paths, predictions
from flowkit.guidance import ByLevel, GradientGuidance, SecondModelGuidance
from flowkit.hooks.parts import Evaluation, Level

# Said of a second adapter, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

NATURAL = {"flow": "flow_prediction", "vp": "epsilon", "cosine": "v_prediction", "ve": "epsilon", "edm": "edm"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(x: Tensor, path: str, s: float, prediction: str | None = None, sign: int = 1, **conditioning: Any) -> Evaluation:
    return Evaluation(x, Level(paths.named(path), s, prediction or NATURAL[path], sign), 0, 10, conditioning)


def raw_of(evaluation: Evaluation, x0: Tensor, eps: Tensor) -> Tensor:
    level = evaluation.level
    assert level is not None
    a, b = predictions.pair(level.prediction, level.alpha, level.sigma, level.path.sigma_data)
    return level.sign * (a * x0 + b * eps)


# A second network


def test_the_second_network_is_called_with_the_same_arguments() -> None:
    """Gaussians of equal spread: guidance moves the mean, linearly in w, and is exact."""
    one = torch.ones(1, 1, dtype=torch.float64)
    positive, negative = MixtureDenoiser.of(one, 1.0), MixtureDenoiser.of(-one, 1.0)
    x = normal(5, 1)
    for w in (0.0, 1.5, 4.0):
        method = SecondModelGuidance(w, model=negative)
        for t in (100.0, 500.0, 900.0):
            c, u = positive(x, t).sample, method.uncond(positive, x, timestep=t).sample
            guided, state = method.combine(c, u, 0, t / 1000, {})
            assert torch.allclose(guided, MixtureDenoiser.of((2 * w - 1) * one, 1.0)(x, t).sample, atol=1e-12)
            assert state["report"]["scale"] == w


def test_equal_networks_are_plain_guidance_to_the_bit() -> None:
    model = MixtureDenoiser.of(torch.tensor([[-1.0], [1.0]]), 0.4, labels=torch.tensor([0, 1]))
    x, none, label = normal(4, 1).float(), torch.full((4,), 2), torch.ones(4, dtype=torch.long)
    c, u = model(x, 500, label).sample, model(x, 500, none).sample
    method = SecondModelGuidance(6.0, model=model, condition="negative")
    again = method.uncond(model, x, 500, class_labels=none).sample
    assert torch.equal(method.combine(c, again, 0, 0.5, {})[0], u + 6.0 * (c - u))


def test_which_rows_the_second_network_sees() -> None:
    model = torch.nn.Identity()
    same, negative = SecondModelGuidance(2.0, model), SecondModelGuidance(2.0, model, condition="negative")
    assert (same.second, same.needs_guidance) == ("cond", False)
    assert (negative.second, negative.needs_guidance) == ("uncond", True)
    assert same.plan(0, 1.0, {}) == "both"


def test_at_a_scale_of_one_the_second_network_is_not_called() -> None:
    method = SecondModelGuidance(1.0, model=torch.nn.Identity())
    c = normal(2, 3)
    assert method.plan(0, 1.0, {}) == "cond"
    assert method.combine(c, None, 0, 1.0, {})[0] is c


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def add(unet: Any, name: str, targets: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name=name)


def seen(unet: Any) -> tuple[Any, ...]:
    """Everything that a toggle could leave changed."""
    layers = [layer for layer in unet.modules() if hasattr(layer, "active_adapters") and hasattr(layer, "lora_A")]
    weights = [value.clone() for value in unet.state_dict().values()]
    flags = [(tuple(layer.active_adapters), layer.disable_adapters) for layer in layers]
    return unet.active_adapters(), flags, [p.requires_grad for p in unet.parameters()], weights


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:3] == b[:3] and all(map(torch.equal, a[3], b[3]))


def call(unet: Any) -> tuple[Any, ...]:
    return normal(2, 2, 8, 8).float(), 500, normal(2, 3, 8, seed=1).float()


@pytest.mark.parametrize("style", [True, False])
@torch.no_grad()
def test_an_adapter_is_active_in_the_second_call_alone(unet: Any, style: bool) -> None:
    if style:
        add(unet, "style", ["to_q"], 1)
    add(unet, "npo", ["to_k", "to_q"], 2)
    if style:
        unet.set_adapters(["style"], [0.5])
    else:
        unet.disable_adapters()
    before, own = seen(unet), unet(*call(unet)).sample
    method = SecondModelGuidance(3.0, adapter="npo")
    second = method.uncond(unet, *call(unet)).sample
    assert same(seen(unet), before)
    assert torch.equal(unet(*call(unet)).sample, own)
    # By hand, the style at its weight in both.
    unet.enable_adapters()
    unet.set_adapters(["style", "npo"] if style else ["npo"], [0.5, 1.0] if style else [1.0])
    assert torch.equal(unet(*call(unet)).sample, second)
    assert not torch.allclose(own, second, atol=1e-4)


def test_adapters_are_put_back_after_an_error(unet: Any) -> None:
    add(unet, "style", ["to_q"], 1)
    add(unet, "npo", ["to_k"], 2)
    unet.set_adapter("style")
    for parameter in unet.parameters():
        parameter.requires_grad_(False)
    before = seen(unet)
    with pytest.raises(RuntimeError):
        SecondModelGuidance(3.0, adapter="npo").uncond(unet, torch.zeros(1, 5, 8, 8), 1, torch.zeros(1, 3, 8))
    assert same(seen(unet), before)


def test_adapters_that_cannot_act_are_refused(unet: Any) -> None:
    method = SecondModelGuidance(3.0, adapter="npo")
    with pytest.raises(ValueError, match=r"no adapter 'npo' in the network, which has \[\]"):
        method.uncond(unet, *call(unet))
    add(unet, "style", ["to_q"], 1)
    add(unet, "npo", ["to_q"], 2)  # the last one added is active
    with pytest.raises(ValueError, match="is active in the pipeline's own passes, too"):
        method.uncond(unet, *call(unet))
    unet.set_adapter("style")
    unet.fuse_lora()
    with pytest.raises(ValueError, match="fused into the weights"):
        method.uncond(unet, *call(unet))


def test_bad_second_models_are_refused(unet: Any) -> None:
    for both, given in (({}, "neither"), ({"model": torch.nn.Identity(), "adapter": "npo"}, "both")):
        with pytest.raises(ValueError, match=f"got {given} of model and adapter"):
            SecondModelGuidance(2.0, **cast(Any, both))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        SecondModelGuidance(2.0, model=cast(Any, "xl"))
    with pytest.raises(TypeError, match=r"adapter must be a name, got \['npo'\]"):
        SecondModelGuidance(2.0, adapter=cast(Any, ["npo"]))
    with pytest.raises(ValueError, match="unknown condition 'positive'"):
        SecondModelGuidance(2.0, adapter="npo", condition=cast(Any, "positive"))
    other = MixtureDenoiser.of(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="has in_channels=3 and the pipeline's 2"):
        SecondModelGuidance(2.0, model=other).uncond(unet, *call(unet))


# Gradients

MIXTURE = MixtureDenoiser.of(
    torch.tensor([[-1.0, 0.3], [0.5, 1.0], [1.5, -0.7]], dtype=torch.float64),
    torch.tensor([[0.3], [0.5], [0.8]], dtype=torch.float64),
    torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    labels=torch.tensor([0, 1, 1]),
)


def classifier(path: paths.Path) -> Any:
    """-log p(y | x) of the mixture's own labels, for noisy x."""

    def negative_log(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        s = path.at_level(sigma)
        a, b = path.alpha(s), path.sigma(s)
        total = a**2 * MIXTURE.variances + b**2
        logits = MIXTURE.log_weights - 0.5 * ((x[:, None] - a * MIXTURE.means) ** 2 / total + total.log()).sum(-1)
        own = logits.masked_fill(conditioning["labels"][:, None] != MIXTURE.labels, -torch.inf)
        energy: Tensor = logits.logsumexp(1) - own.logsumexp(1)
        return energy

    return negative_log


@pytest.mark.parametrize("s", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("path", ["flow", "vp", "cosine", "ve", "edm"])
@pytest.mark.parametrize("prediction", [None, "sample", "v_prediction"])
def test_an_exact_classifier_makes_the_exact_conditional_network(path: str, s: float, prediction: str | None) -> None:
    model = MIXTURE
    known = paths.named(path)
    labels = torch.tensor([0, 1, 1, 0])
    a, b = known.alpha(s), known.sigma(s)
    x = a * model.means[torch.tensor([0, 1, 2, 2])] + b * normal(4, 2)
    exact = MixtureDenoiser.of(model.means, model.variances.sqrt(), model.log_weights.exp(), model.labels, path=path)
    evaluation = at(x, path, s, prediction, sign=-1, labels=labels)
    raw = raw_of(evaluation, *exact.posterior(x, s))
    method = GradientGuidance(classifier(known), at="x")
    with torch.no_grad():  # as in pipelines
        change = method.edit(evaluation, raw)
    assert change is not None
    wanted = exact.posterior(x, s, labels)[0]
    scale = max(1.0, b)  # of x, which rounding is relative to
    assert (evaluation.to(raw + change, "x0") - wanted).abs().max() < 1e-9 * scale
    assert (evaluation.to(raw, "x0") - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
def test_a_quadratic_energy_of_x0_pulls_towards_its_minimum(path: str) -> None:
    x, raw, goal = normal(3, 2), normal(3, 2, seed=1), normal(3, 2, seed=2)
    told: dict[str, Any] = {}

    def energy(x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        told.update(sigma=sigma, prompt=conditioning["prompt"])
        return 0.5 * (x0 - goal).square().sum(1)

    evaluation = at(x, path, 0.4, prompt="a cat")
    change = GradientGuidance(energy, strength=0.3).edit(evaluation, raw)
    assert change is not None
    x0 = evaluation.to(raw, "x0")
    assert torch.allclose(evaluation.to(raw + change, "x0"), x0 - 0.3 * (x0 - goal), atol=1e-12)
    assert told == {"sigma": paths.named(path).level(0.4), "prompt": "a cat"}


@pytest.mark.parametrize("path", ["flow", "vp", "ve", "edm"])
def test_through_the_network_a_gaussian_meets_its_observation_exactly(path: str) -> None:
    """An observation y of x0 with noise r: with the energy's width r^2 + Var[x0 | x] the result is E[x0 | x, y]."""
    m, v, r, y, s = 0.7, 0.5, 0.3, -0.4, 0.6
    known = paths.named(path)
    a, b = known.alpha(s), known.sigma(s)
    total = a**2 * v + b**2
    spread = v * b**2 / total
    x = normal(6, 1).requires_grad_()

    def energy(x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        return (x0 - y).square().sum(1) / (2 * (r**2 + spread))

    evaluation = at(x, path, s)
    x0, eps = m + a * v / total * (x - a * m), b / total * (x - a * m)
    raw = raw_of(evaluation, x0, eps)
    method = GradientGuidance(energy, through_network=True)
    assert method.through_network
    change = method.edit(evaluation, raw)
    assert change is not None
    precision = a**2 / b**2 + 1 / v + 1 / r**2
    wanted = (a * x / b**2 + m / v + y / r**2) / precision
    assert torch.allclose(evaluation.to(raw + change, "x0"), wanted, atol=1e-9)
    assert not change.requires_grad
    # Without the network's derivative the step is another one.
    plain = GradientGuidance(energy).edit(evaluation, raw)
    assert plain is not None
    assert not torch.allclose(evaluation.to(raw + plain, "x0"), wanted, atol=1e-2)


def square(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
    return x.flatten(1).square().sum(1)


def test_the_ends_of_the_path() -> None:
    x, raw = normal(2, 3), normal(2, 3, seed=1)
    noise, data = at(x, "flow", 1.0), at(x, "flow", 0.0)
    assert GradientGuidance(square, at="x").edit(noise, raw) is None
    assert GradientGuidance(square, through_network=True).edit(noise, raw) is None
    change = GradientGuidance(square, 0.25).edit(noise, raw)
    assert change is not None
    assert torch.allclose(noise.to(raw + change, "x0"), 0.5 * noise.to(raw, "x0"), atol=1e-12)
    for method in (GradientGuidance(square), GradientGuidance(square, at="x")):
        assert method.edit(data, raw) is None
    half = GradientGuidance(square, at="x").edit(at(x.half(), "vp", 0.5), raw.half())
    assert half is not None
    assert half.dtype == torch.float16


def mean_of_all(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
    return x.mean()


def detached(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
    return x.detach().flatten(1).sum(1)


def of_another(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
    return torch.ones(len(x), requires_grad=True) * 2


def root_of_zero(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
    return (0 * x).flatten(1).sum(1).sqrt()


def log_of_less(x: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
    return (-x.square()).flatten(1).sum(1).log()


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (mean_of_all, r"'mean_of_all' returned \(\) for 2 samples; return a tensor of shape \(2,\)"),
        (lambda *_: 0.5, r"'<lambda>' returned float for 2 samples"),
        (detached, "'detached' has no gradient"),
        (of_another, "'of_another' does not depend on its first argument"),
        (root_of_zero, "'root_of_zero' or its gradient is NaN at noise level 0.5"),
        (log_of_less, "'log_of_less' or its gradient is NaN"),
    ],
)
def test_energies_that_say_nothing_are_named(energy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientGuidance(energy).edit(at(normal(2, 3), "flow", 0.5), normal(2, 3))


def test_experts_serve_levels_up_to_and_with_their_own() -> None:
    def expert(value: float) -> Any:
        return lambda x, sigma, conditioning: torch.full((len(x),), value)

    energy = ByLevel([(0.2, expert(1)), (0.5, expert(2)), (0.9, expert(3))])
    assert [energy(normal(1, 2), sigma, {}).item() for sigma in (0.01, 0.2, 0.21, 0.5, 0.9)] == [1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match=r"no expert for noise level 1; the last one ends at 0\.9"):
        energy(normal(1, 2), 1.0, {})
    for levels in ([], [0.5, 0.2], [0.5, 0.5]):
        with pytest.raises(ValueError, match="must increase"):
            ByLevel([(level, square) for level in levels])


def test_bad_gradients_are_refused() -> None:
    with pytest.raises(TypeError, match="energy must be a function"):
        GradientGuidance(cast(Any, 1.0))
    with pytest.raises(ValueError, match="strength must not be NaN"):
        GradientGuidance(square, math.nan)
    with pytest.raises(ValueError, match="unknown at='eps'"):
        GradientGuidance(square, at=cast(Any, "eps"))
    with pytest.raises(ValueError, match="through_network=True takes an energy of x0_hat"):
        GradientGuidance(square, at="x", through_network=True)
    x = normal(2, 3)
    with pytest.raises(ValueError, match="needs the scheduler's path"):
        GradientGuidance(square).edit(Evaluation(x, None, 0, 1, {}), x)
    with pytest.raises(ValueError, match="does not determine the sample at alpha = 0"):
        GradientGuidance(square).edit(at(x, "cosine", 1.0, "epsilon"), x)

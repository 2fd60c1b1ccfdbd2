"""Training the evaluators of dynamic guidance on what they will see: predictions of x0 by the user's own pipeline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flowkit import rng
from flowkit.guidance.dynamic import DynamicGuidance
from flowkit.guidance.latent_evaluators import LatentClassifier, LatentDiscriminator, LatentNetwork
from flowkit.hooks import Recorder, attach
from flowkit.hooks.parts import Evaluation, Level, Part
from flowkit.pipelines import sampling

_HELD_OUT = 0.2


@dataclasses.dataclass
class Predictions:
    """Predictions of x0 at the L noise levels of a pipeline, for N samples each.

    Attributes:
        s: flow time of each level, (L,).
        path: name of the model's path.
        sampled: guided predictions while the pipeline samples, (L, N, ...).
        cond: conditional predictions from noised data, (L, N, ...).
        uncond: unconditional predictions from noised data, (L, N, ...).
    """

    s: Tensor
    path: str
    sampled: Tensor
    cond: Tensor
    uncond: Tensor


class _Guided(Part):
    """Keeps the guided predictions of x0 of a run under a static scale, and their levels."""

    needs_guidance = True

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.levels: list[Level] = []
        self.x0: list[Tensor] = []

    def before_step(self, run: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:  # noqa: ANN401
        step = run.step
        if step is None:
            return
        x0 = step.evaluation.to(step.uncond + self.scale * (step.cond - step.uncond), "x0")
        self.levels.append(step.evaluation.level)
        self.x0.append(x0.detach().float().cpu())


def predictions(
    pipe: Any,  # noqa: ANN401
    latents: Tensor,
    inputs: sampling.Inputs = None,
    call: Mapping[str, Any] | None = None,
    scales: Sequence[float] = (1.0, 2.5, 5.0),
    batch_size: int = 32,
    seed: int = 0,
    on_samples: Callable[[int], None] | None = None,
) -> Predictions:
    """Returns the predictions that `train_evaluators` learns from.

    Each batch is drawn by the pipeline under static guidance, with the scales in turn; then its network is called, with the very
    same conditioning, at data noised to each level of the run. Costs four network rows a sample and level, and the memory of three
    float32 copies of all samples at all levels.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance.
        latents: real data as the pipeline's scheduler sees its final sample, (N, ...).
        inputs: pipeline arguments of each sample, matching the data; see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all, with a guidance scale above 1, which is not used otherwise.
        scales: guidance scales to draw with.
        batch_size: samples a call of the pipeline, at most.
        seed: of the drawn samples and the noise.
        on_samples: called with the number of samples done.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for fewer samples than scales, data of another shape than the pipeline's, or a pipeline whose network cannot be
            called apart.
    """
    count, size = len(latents), max(1, min(batch_size, len(latents) // max(1, len(scales))))
    if not scales or count < len(scales):
        raise ValueError(f"{count} samples do not suffice for {len(scales)} scales; give more data")
    shared = {"output_type": "latent"} if "output_type" in sampling.parameters(pipe) else {}
    shared |= call or {}
    parts = []
    for number, block in enumerate(sampling.blocks(pipe, count, inputs=inputs, batch_size=size)):
        scale = float(scales[number % len(scales)])
        guided, recorder = _Guided(scale), Recorder("output")
        with attach(pipe, DynamicGuidance((), [scale]), guided, recorder):
            for _ in sampling.sample_outputs(pipe, [block], seed=seed, inputs=inputs, call=shared):
                pass
        found = recorder.trajectories[-1]
        denoiser, data = found.denoiser(), latents[block.start : block.stop].float()
        if data.shape != guided.x0[0].shape:
            raise ValueError(f"latents have shape {tuple(data.shape)}, the pipeline's samples {tuple(guided.x0[0].shape)}; encode "
                             "the data as the pipeline does")  # fmt: skip
        real: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
        for k, (level, time) in enumerate(zip(guided.levels, found.timesteps, strict=True)):
            noise = rng.normal(data.shape[1:], seed, list(block), step=k, tag=rng.DATA)
            output = found.outputs[k]
            x = (level.alpha * data + level.sigma * noise).to(pipe.device)
            for rows, kept in real.items():
                with torch.no_grad():
                    raw = denoiser(x.to(output.dtype), time, rows)
                evaluation = Evaluation(x, dataclasses.replace(level, sign=1), k, len(found.timesteps), {})
                kept.append(evaluation.to(raw, "x0").float().cpu())
        parts.append([torch.stack(values) for values in (guided.x0, real["cond"], real["uncond"])])
        levels = guided.levels
        if on_samples is not None:
            on_samples(block.stop)
    joined = [torch.cat(values, dim=1) for values in zip(*parts, strict=True)]
    return Predictions(torch.tensor([level.s for level in levels]), levels[0].path.name, *joined)


def train_evaluators(
    pipe: Any,  # noqa: ANN401
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    inputs: sampling.Inputs = None,
    call: Mapping[str, Any] | None = None,
    scales: Sequence[float] = (1.0, 2.5, 5.0),
    steps: int = 1000,
    batch_size: int = 128,
    width: int = 24,
    key: str = "class_labels",
    seed: int = 0,
    on_progress: Callable[[str, float], None] | None = None,
) -> tuple[LatentDiscriminator, LatentClassifier | None]:
    """Trains a discriminator and, with labels, a classifier for `DynamicGuidance` on one pipeline.

    The discriminator tells the network's conditional predictions of x0 at noised data, ``E[x0 | x_t, c]`` where x_t has the right
    distribution, from the guided predictions along the pipeline's own trajectories. The classifier learns the label of noised data
    from *unconditional* predictions: conditional ones would give it away, and every scale above 1 would look perfect at any noise.

    A fifth of the samples is held out; their figures at each level, ``2 AUC - 1`` and ``(accuracy - 1/n) / (1 - 1/n)``, become the
    `reliability` that the adaptive weights of `DynamicGuidance` use, negative ones being 0.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance.
        latents: real data as the pipeline's scheduler sees its final sample, (N, ...).
        labels: class of each, (N,), in 0, 1, ...; None means no classifier.
        inputs: pipeline arguments of each sample, matching the data; None means the labels, where there are some.
        call: arguments shared by all, such as the number of steps, with a guidance scale above 1, which is not used otherwise.
        scales: guidance scales of the trajectories; those that will be the candidates, or most of them.
        steps: updates of each network.
        batch_size: predictions an update.
        width: channels of the networks' first layer.
        key: name of the network's argument with the labels.
        seed: of the samples, the noise, the networks' start and the batches.
        on_progress: called with what is under way ("predictions", "discriminator", "classifier") and the part done, in (0, 1].

    Returns:
        The networks, on the CPU, in inference mode; None in place of the classifier without labels.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for numbers out of range, labels that do not fit the data, and as `predictions` does.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"got steps={steps} and batch_size={batch_size}; both must be at least 1")
    count = len(latents)
    if count < 10:
        raise ValueError(
            f"{count} samples do not suffice for training and held-out figures; give at least 10, better 500"
        )
    if labels is not None and (labels.shape != (count,) or labels.is_floating_point() or int(labels.min()) < 0):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; give {count} whole numbers from 0"
        )
    tell = on_progress or (lambda what, done: None)
    found = predictions(
        pipe,
        latents,
        labels.tolist() if inputs is None and labels is not None else inputs,
        call,
        scales,
        seed=seed,
        on_samples=lambda done: tell("predictions", done / count),
    )
    order = torch.randperm(count, generator=Generator().manual_seed(rng.sample_seed(seed, 1)))
    held, used = order[: int(count * _HELD_OUT)], order[int(count * _HELD_OUT) :]
    shape, levels = tuple(latents.shape[1:]), len(found.s)
    with torch.random.fork_rng([]):
        torch.manual_seed(rng.sample_seed(seed, 2))
        discriminator = LatentDiscriminator(shape, width, found.path)
        classifier = None if labels is None else LatentClassifier(shape, int(labels.max()) + 1, key, width, found.path)

    def both(network: LatentDiscriminator, samples: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of real and sampled predictions at each sample's level."""
        real, fake = found.cond[at, samples], found.sampled[at, samples]
        odds = network.logits(torch.cat([real, fake]), found.s[at].repeat(2))[:, 0]
        return odds[: len(real)], odds[len(real) :]

    def judge(samples: Tensor, at: Tensor) -> Tensor:
        real, fake = both(discriminator, samples, at)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    _fit(discriminator, judge, used, levels, steps, batch_size, seed, lambda done: tell("discriminator", done))
    with torch.no_grad():
        measured = []
        for k, s in enumerate(found.s.tolist()):
            real, fake = both(discriminator, held, torch.full_like(held, k))
            more = (real[:, None] > fake).float() + 0.5 * (real[:, None] == fake).float()
            measured.append((s, max(0.0, 2 * float(more.mean()) - 1)))
    discriminator.measured = tuple(measured)
    if classifier is None or labels is None:
        return discriminator, None
    network, classes = classifier, labels

    def outputs(samples: Tensor, at: Tensor) -> Tensor:
        return network.logits(found.uncond[at, samples], found.s[at])

    _fit(network, lambda samples, at: F.cross_entropy(outputs(samples, at), classes[samples]), used, levels, steps, batch_size,
         seed, lambda done: tell("classifier", done))  # fmt: skip
    chance = 1 / network.classes
    with torch.no_grad():
        right = [
            float((outputs(held, torch.full_like(held, k)).argmax(1) == classes[held]).float().mean())
            for k in range(levels)
        ]
    network.measured = tuple(
        (s, max(0.0, (r - chance) / (1 - chance))) for s, r in zip(found.s.tolist(), right, strict=True)
    )
    return discriminator, network


def _fit(
    network: LatentNetwork,
    loss: Callable[[Tensor, Tensor], Tensor],
    samples: Tensor,
    levels: int,
    steps: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[float], None],
) -> nn.Module:
    """AdamW with a learning rate that falls from 2e-3 as a half cosine; samples and levels are drawn uniformly."""
    generator = Generator().manual_seed(rng.sample_seed(seed, 3))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        chosen = samples[torch.randint(len(samples), (batch_size,), generator=generator)]
        at = torch.randint(levels, (batch_size,), generator=generator)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(chosen, at).backward()
        optimizer.step()
        on_step((step + 1) / steps)
    return network.eval().requires_grad_(False)

"""Reflow: straight paths, so that one step is enough (Liu, Gong & Liu 2022, arXiv 2209.03003).

The teacher's own pairs of noise and sample, ``x0 = ODE(eps)``, are a coupling with the right marginals. On the lines between
them, ``x_s = (1 - s) x0 + s eps``, the student v learns

    min_v  E || v(x_s, s) - (eps - x0) ||^2                  (equation 1 of the paper, in diffusers' direction of time)

The pairs being deterministic, the same v is best for every distribution of s: most of each batch goes to s = 1, the one time
that a one-step sampler asks for, the rest keeps the paths in between.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Generator, Tensor, nn

from flowkit import rng, weights
from flowkit.analytic import MixtureDenoiser
from flowkit.distill import trainer
from flowkit.distill.trainer import Training
from flowkit.eval.provenance import describe
from flowkit.pipelines import ClassConditionalPipeline
from flowkit.pipelines.sampling import Inputs, as_inputs
from flowkit.schedulers import RectifiedFlowScheduler

SAMPLES, STEPS = 10_000, 3_000
# UniPC is at the teacher's own FD after 6 steps, Euler after 32.
_SOLVER, _EVALUATIONS = "unipc", 8
_SHARE = 0.75
PAIRS, CHECKPOINT = "pairs.safetensors", "checkpoint.safetensors"


def loss(velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """Returns the mean of ``(v(x_s, s) - (eps - x0))^2`` over batch and elements.

    Args:
        velocity: (x (B, ...), s (B,)) -> v (B, ...).
        x0: data, (B, ...).
        noise: the noise that it came from, same shape, in the same order.
        s: flow times in [0, 1], (B,).
    """
    at = s.view(-1, *[1] * (x0.ndim - 1))
    return (velocity((1 - at) * x0 + at * noise, s) - (noise - x0)).square().mean()


def times(count: int, generator: Generator) -> Tensor:
    """Draws flow times: a fixed share of them 1, the rest uniform."""
    s = torch.rand(count, generator=generator)
    s[: round(_SHARE * count)] = 1.0
    return s


class Reflow:
    """One round of reflow of a class-conditional flow.

    Args:
        teacher: a `ClassConditionalPipeline` on the flow path; it is not changed.
        inputs: class label of each pair, see `flowkit.pipelines.sampling.as_inputs`; None means the classes in turn.
        samples: number of pairs; None means one for each input, 10,000 at least.
        steps: number of updates; None means 3,000.
        seed: of the noise and of the batches.
        batch_size: of the updates, and of the teacher.

    Raises:
        TypeError: for a teacher of another kind, or inputs that are not labels.
        ValueError: for a teacher on another path or without weights, or numbers out of range.
    """

    def __init__(
        self,
        teacher: Any,  # noqa: ANN401
        inputs: Inputs,
        samples: int | None,
        steps: int | None,
        seed: int,
        batch_size: int,
    ) -> None:
        self.scheduler = _check_teacher(teacher)
        self.teacher: ClassConditionalPipeline = teacher
        least = len(inputs) if isinstance(inputs, Sized) and not isinstance(inputs, Mapping) else 0
        self.samples = max(SAMPLES, least) if samples is None else samples
        self.training = Training(STEPS if steps is None else steps)
        self.seed, self.batch_size = seed, batch_size
        numbers = {"samples": self.samples, "steps": self.training.steps, "batch_size": batch_size}
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"{name} must be a whole number of at least 1, got {value!r}; leave it out for the default"
                )
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        self.labels = torch.tensor(_labels(teacher, inputs, self.samples))

    def settings(self) -> dict[str, Any]:
        """Returns all that the student depends on, but for the teacher."""
        scheduler = {k: v for k, v in describe(dict(self.scheduler.config)).items() if not k.startswith("_")}
        labels = hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
        pairs = {"samples": self.samples, "seed": self.seed, "labels": labels, "evaluations": _EVALUATIONS}
        training = {"batch_size": self.batch_size, "share_at_noise": _SHARE, **asdict(self.training)}
        return {**pairs, **training, "scheduler": scheduler}

    def forecast(self, folder: Path) -> str:
        """Returns what is left to do and about how long it takes, by timing the teacher."""
        pipe, seconds = self._sampler(), []
        labels = self.labels[: self.batch_size]
        for _ in range(2):
            began = time.perf_counter()
            pipe(class_labels=labels, num_inference_steps=1, generator=Generator(), output_type="latent")
            seconds.append(time.perf_counter() - began)
        pairs = self.samples - len(_stored(folder / PAIRS))
        steps = self.training.steps - trainer.steps_done(folder / CHECKPOINT)
        # An update is a forward pass and twice that backwards.
        total = min(seconds) * (pairs / self.batch_size * _EVALUATIONS + steps * 3)
        return f"reflow: {pairs:,} pairs of {_EVALUATIONS} evaluations, {steps:,} updates; about {total:.0f} s"

    def student(self, folder: Path, display: Progress) -> ClassConditionalPipeline:
        """Makes the pairs and trains on them, going on with what the folder holds.

        Raises:
            ValueError: for samples of the teacher, a loss or a gradient that are not finite.
        """
        pairs = display.add_task("pairs", total=self.samples)
        updates = display.add_task("updates", total=self.training.steps)
        noise, x0 = self.pairs(folder / PAIRS, lambda done: display.update(pairs, completed=done))
        unet = copy.deepcopy(self.teacher.unet).float().eval().requires_grad_(True)
        unet = trainer.train(
            unet,
            lambda model, step: self._loss(model, step, noise, x0),
            self.training,
            folder / CHECKPOINT,
            lambda done: display.update(updates, completed=done),
        )
        scheduler = RectifiedFlowScheduler.from_config(self.teacher.scheduler, solver="euler", grid="uniform")
        return ClassConditionalPipeline(unet.requires_grad_(False), scheduler)

    def pairs(self, file: Path, on_batch: Callable[[int], None] = lambda done: None) -> tuple[Tensor, Tensor]:
        """Returns the noise and the samples of all pairs, (samples, C, H, W); only the samples are stored.

        Args:
            file: where samples and labels are kept, from one call to the next.
            on_batch: called with the number of pairs done: once at the start, then after each batch.
        """
        config = self.teacher.unet.config
        size = config["sample_size"]
        shape = (config["in_channels"], *((size, size) if isinstance(size, int) else size))
        noise = rng.normal(shape, self.seed, range(self.samples), tag=rng.DATA)
        pipe, x0, before, saved = self._sampler(), noise.clone(), _stored(file), time.monotonic()
        done = len(before)
        if done:
            x0[:done] = before
        on_batch(done)
        while done < self.samples:
            batch = slice(done, done + self.batch_size)
            x0[batch] = pipe(
                class_labels=self.labels[batch],
                num_inference_steps=_EVALUATIONS,
                latents=noise[batch],
                output_type="latent",
                return_dict=False,
            )[0]
            done = min(batch.stop, self.samples)
            if done == self.samples or time.monotonic() - saved >= trainer.SAVE_SECONDS:
                weights.write(file, {"samples": x0[:done], "labels": self.labels[:done]})
                saved = time.monotonic()
            on_batch(done)
        return noise, x0

    def _sampler(self) -> ClassConditionalPipeline:
        pipe = ClassConditionalPipeline(self.teacher.unet, self.scheduler.fork())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _loss(self, model: nn.Module, step: int, noise: Tensor, x0: Tensor) -> Tensor:
        generator = Generator().manual_seed(rng.sample_seed(self.seed, step))
        picked = torch.randint(self.samples, (self.batch_size,), generator=generator)
        device = next(model.parameters()).device
        drawn = (x0[picked], noise[picked], self.labels[picked], times(self.batch_size, generator))
        x, eps, labels, s = (v.to(device) for v in drawn)
        scale = self.scheduler.path.num_train_timesteps
        return loss(lambda x, s: model(x, scale * s, class_labels=labels).sample, x, eps, s)


def _check_teacher(teacher: Any) -> RectifiedFlowScheduler:  # noqa: ANN401
    """The scheduler that makes the pairs, of a teacher that can have a student."""
    name = type(teacher).__name__
    if not isinstance(teacher, ClassConditionalPipeline):
        raise TypeError(f"reflow cannot teach from a {name}: it needs the class labels of a flowkit ClassConditionalPipeline; "
                        "build one around the UNet")  # fmt: skip
    scheduler = RectifiedFlowScheduler.from_config(teacher.scheduler, solver=_SOLVER, grid="uniform")
    path, prediction = scheduler.path.name, scheduler.config["prediction_type"]
    if (path, prediction) != ("flow", "flow_prediction"):
        raise ValueError(f"the teacher predicts {prediction!r} on the path {path!r}, and reflow straightens flow velocity alone; "
                         "take a flow-matching teacher")  # fmt: skip
    if isinstance(teacher.unet, MixtureDenoiser):
        raise ValueError("the teacher's MixtureDenoiser has no weights that a student could train; take a UNet2DModel")
    if teacher.unet.config["num_class_embeds"] is None:
        raise ValueError(
            "the teacher's unet takes no class labels; give it num_class_embeds, one more than there are classes"
        )
    trained: RectifiedFlowScheduler = scheduler
    return trained


def _labels(teacher: ClassConditionalPipeline, inputs: Inputs, samples: int) -> list[int]:
    """The class of every pair."""
    classes = teacher.num_classes
    own = as_inputs(teacher, range(classes) if inputs is None else inputs)
    labels = []
    for index in range(samples):
        given = own(index)
        if given.keys() != {"class_labels"}:
            raise TypeError(f"input {index} holds {sorted(given)}; reflow takes class_labels alone, and guidance 1")
        label = given["class_labels"]
        if not isinstance(label, int) or not 0 <= label < classes:
            raise ValueError(f"input {index} is class {label!r}; labels are whole numbers from 0 to {classes - 1}")
        labels.append(label)
    return labels


def _stored(file: Path) -> Tensor:
    """The samples of the pairs so far."""
    return weights.read(file)[0]["samples"] if file.exists() else torch.empty(0)

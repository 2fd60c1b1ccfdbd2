"""What guidance costs and what it can do without: network rows against the distance to full guidance, on the same noise.

    python benchmarks/guidance.py                   # some ten minutes on one core; prints tables, writes benchmarks/guidance.json
    python benchmarks/guidance.py --table           # prints the tables of docs/guidance.md from the committed JSON

Every method is set to save a given share of the network rows that full guidance takes, on samples of its own, and is then measured on
others. RMSE is over the elements of a sample in [-1, 1] and over all samples; the standard error is over samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch
from rich.progress import Progress
from torch import Tensor

import flowkit
from flowkit import assets
from flowkit.guidance import AdaptiveGuidance, IntervalGuidance, LinearAdaptiveGuidance
from flowkit.hooks import Part
from flowkit.pipelines.sampling import blocks, sample_outputs
from flowkit.weights import write_bytes

STEPS, SAMPLES, FITTED, SCALES = 16, 480, 120, (2.0, 5.0)
SAVINGS = (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4, 0.4375)
ROUNDS = 60


@dataclass(frozen=True)
class Case:
    """A pipeline and the labels that it is asked for."""

    name: str
    pipe: Any
    labels: list[int]


def cases() -> list[Case]:
    """The embedded models, and exact networks of Gaussian mixtures with the same labels."""
    found = []
    for name in assets.NAMES:
        found.append(Case(name, flowkit.load_demo(name), list(range(assets.num_classes(name)))))
    images, labels = assets.images("digits")
    means = torch.stack([images[labels == k].float().div(127.5).sub(1).mean(0) for k in range(10)])
    exact = flowkit.MixtureDenoiser.of(means, 0.25, labels=torch.arange(10))
    found.append(Case("mixture of digits", _around(exact), list(range(10))))
    angle = torch.arange(8) * torch.pi / 4
    ring = torch.stack([angle.cos(), angle.sin()], 1).view(8, 2, 1, 1)
    found.append(Case("mixture on a ring", _around(flowkit.MixtureDenoiser.of(ring, 0.2, labels=torch.arange(8))), list(range(8))))
    return found


def _around(network: flowkit.MixtureDenoiser) -> Any:  # noqa: ANN401
    pipe = flowkit.ClassConditionalPipeline(network.float(), flowkit.RectifiedFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(case: Case, scale: float, *parts: Part, steps: int = STEPS, seed: int = 1) -> tuple[Tensor, float]:
    """Final samples, and network rows a sample."""
    call = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "latent"}
    done = []
    with flowkit.attach(case.pipe, *parts, flowkit.Recorder("state")) as attached:
        for _, output in sample_outputs(
            case.pipe, blocks(case.pipe, SAMPLES, inputs=case.labels), seed=seed, inputs=case.labels, call=call
        ):
            done.append(output.images)
    return torch.cat(done), attached.rows / SAMPLES


def distance(x: Tensor, full: Tensor) -> tuple[float, float]:
    """RMSE and its standard error."""
    squares = (x - full).double().square().flatten(1).mean(1)
    rmse = float(squares.mean().sqrt())
    return rmse, float(squares.std() / len(squares) ** 0.5) / (2 * rmse) if rmse else 0.0

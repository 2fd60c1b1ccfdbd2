"""Swapping schedulers in pipelines, and looking at what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor

from flowkit import RectifiedFlowScheduler

from .tiny import networks


def stock(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest one, in units of the largest value where that exceeds 1; inf for anything that is not finite."""
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all()
    found = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)).item()
    return found if math.isfinite(found) else math.inf


# Classes with the same parameters, which a configuration in memory does not tell apart.
_ALIKE = ("LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def swapped(pipe: Any, **knobs: Any) -> Any:
    """The pipeline itself, with our scheduler from the configuration of the one that it has."""
    told_apart = type(pipe.scheduler).__name__ not in _ALIKE
    pipe.scheduler = RectifiedFlowScheduler.from_config(
        pipe.scheduler.config if told_apart else pipe.scheduler, **knobs
    )
    return pipe


@contextmanager
def watched(pipe: Any, output: Callable[[int, Tensor], Tensor] = lambda _, x: x) -> Iterator[list[Tensor]]:
    """Collects the networks' outputs; ``output`` may change the one of the call with a given number."""
    outputs: list[Tensor] = []

    def hook(_module: torch.nn.Module, _inputs: Any, result: Any) -> Any:
        outputs.append(output(len(outputs), result[0]))
        if outputs[-1] is result[0]:
            return result
        return (outputs[-1],) if isinstance(result, tuple) else type(result)(sample=outputs[-1])

    handles = [network.register_forward_hook(hook) for network in networks(pipe)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()

"""Guidance methods that are known by heart, and what tests of `flowkit.attach` look at from outside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from flowkit.hooks import Guidance
from flowkit.hooks.arguments import Arguments
from flowkit.hooks.layout import networks

from .families import steps_of, stock_of
from .tiny import PIPELINES, build, run
from .tiny_parts import random

# The scale has other names, or other values for the same.
_SCALE = {
    **dict.fromkeys(("flux", "flux-img2img", "flux-inpaint"), "true_cfg_scale"),
    **dict.fromkeys(("qwen-image", "qwen-image-img2img", "qwen-image-inpaint", "flux-kontext"), "true_cfg_scale"),
    "hunyuan-video": "true_cfg_scale",
}
_NEGATIVE = {
    "flux-kontext": {
        "negative_prompt_embeds": random(1, 4, 16, seed=2),
        "negative_pooled_prompt_embeds": random(1, 16, seed=3),
    }
}


class Idle(Guidance):
    """Selects what there is."""

    needs_guidance = False

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
        return (cond, cond if uncond is None else uncond), state


class Fixed(Guidance):
    """Plain guidance with a scale of its own."""

    combines = True

    def __init__(self, w: float) -> None:
        self.w = w

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
        return (cond if uncond is None else uncond + self.w * (cond - uncond)), state


class Cut(Idle):
    """The pipeline's guidance until a step, one for all samples or one for each."""

    needs_guidance = True

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def plan(self, step: int, sigma: float, state: Any) -> Any:
        needed = [step < last for last in self.steps]
        return torch.tensor(needed) if len(needed) > 1 else "both" if needed[0] else "cond"


class Seeing(Idle):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Tensor, Tensor | None]] = []
        self.sigmas: list[float] = []

    def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
        evaluation = replace(state["evaluation"], x=state["evaluation"].x.clone())  # some pipelines write into it later
        self.seen.append((evaluation, cond.clone(), None if uncond is None else uncond.clone()))
        self.sigmas.append(sigma)
        return super().combine(cond, uncond, step, sigma, state)


def scaled(family: str, w: float) -> dict[str, Any]:
    """Arguments of a call that give a family plain guidance with a scale; 1 turns it off."""
    if family == "svd":
        return {"min_guidance_scale": w, "max_guidance_scale": w}
    if family.startswith("z-image"):
        return {"guidance_scale": w - 1}  # counted from the conditional output
    if family == "ltx2":
        return {"guidance_scale": w, "audio_guidance_scale": w}
    return {_SCALE.get(family, "guidance_scale"): w, **_NEGATIVE.get(family, {})}


@functools.cache
def reference(family: str, w: float | None = None) -> Tensor:
    """What the pipeline of a family gives with its own guidance; None: with the scale that it is called with in tests/tiny.py."""
    return run(build(family, stock_of(family)), steps_of(family), **({} if w is None else scaled(family, w)))


def noises(*seeds: int) -> list[Generator]:
    """One generator for each sample."""
    return [Generator().manual_seed(seed) for seed in seeds]


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Notes the rows of every call that really reaches a network."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(Arguments(args, kwargs).latents))

    handles = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks(pipe)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def returned(pipe: Any) -> Iterator[list[Tensor]]:
    """Keeps copies of what the networks really return."""
    outputs: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        outputs.append((torch.stack(list(first)) if isinstance(first, (list, tuple)) else first).detach().clone())

    handles = [network.register_forward_hook(note) for network in networks(pipe)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


_OF_A_RUN = ("timesteps", "sigmas", "num_inference_steps")  # what every call of a pipeline changes in its scheduler


def trace(pipe: Any) -> dict[str, Any]:
    """What is put into networks and scheduler would show here."""
    found: dict[str, Any] = {}
    for name, thing in [("scheduler", pipe.scheduler), *((f"network {i}", n) for i, n in enumerate(networks(pipe)))]:
        found[f"{name} has"] = {k for k in vars(thing) if name != "scheduler" or not k.startswith("_")} - {*_OF_A_RUN}
        for method in ("forward", "__call__", "step", "set_timesteps", "cache_context", "_call_impl"):
            if hasattr(thing, method):
                bound = getattr(thing, method)
                found[f"{name}.{method}"] = (getattr(bound, "__func__", bound), inspect.signature(bound))
        if isinstance(thing, torch.nn.Module):
            slots = ("_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl", "_hf_hook", "_diffusers_hook")
            found[f"{name} slots"] = {slot: str(vars(thing).get(slot)) for slot in slots}
    return found


def family_of(pipe: Any) -> str:
    """The first family with a pipeline's class."""
    return next(name for name, family in PIPELINES.items() if type(pipe) is family.pipeline)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Results of single samples as a batch."""
    return torch.cat(list(tensors))

"""How the pipelines of diffusers run classifier-free guidance, and reading and writing what a network returns.

Guided pipelines either give one batch to the network, such as [unconditional, conditional], or call it twice, first with the
condition. Facts of diffusers 0.42; what tells them apart is the batch itself, the names that a pipeline gives to its calls
(``cache_context``), and for a few pipelines their class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.hooks.arguments import Arguments, take

Roles = tuple[str, ...]

# Components of pipelines that are called at every step.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder", "image_unet", "dit")
# Conditional rows before unconditional ones.
_COND_FIRST = ("DiTPipeline", "LuminaPipeline", "StableCascade", "Wuerstchen", "ZImage", "AceStep")
# Two calls, but no names for them.
_SEPARATE = (
    *("BriaFibo2", "Chroma", "ChronoEdit", "CogView4Control", "Cosmos", "FluxControlNetPipeline", "FluxImg2Img"),
    *("FluxInpaint", "FluxKontext", "GlmImage", "HunyuanSkyreels", "HunyuanVideo", "JoyImage", "Kandinsky5", "Krea2"),
    *("LongCat", "Lumina2", "Nucleus", "WanVideoToVideo"),
)
# The network's output is negated on its way to the scheduler.
_NEGATED = ("HiDreamImage", "LTXCondition", "Lumina", "Nucleus", "SanaWM", "ZImage")
_NULL_CLASS = 1000  # of DiT
_LEARNED: dict[type, int] = {}


def _is(pipe: Any, names: Sequence[str]) -> bool:  # noqa: ANN401
    return type(pipe).__name__.startswith(tuple(names))


def networks(pipe: Any) -> list[torch.nn.Module]:  # noqa: ANN401
    """Returns the networks that a pipeline calls at every step, or takes turns with, each once."""
    found = (getattr(pipe, key, None) for key in DENOISERS)
    return list(dict.fromkeys(net for net in found if isinstance(net, torch.nn.Module)))


def sign(pipe: Any) -> int:  # noqa: ANN401
    """Returns -1 for pipelines known to negate the network's output, otherwise 1."""
    return _LEARNED.get(type(pipe), -1 if _is(pipe, _NEGATED) else 1)


def learn(pipe: Any, sign: int) -> None:  # noqa: ANN401
    """Notes what `sign` is to return for pipelines of this class."""
    _LEARNED[type(pipe)] = sign


def roles(pipe: Any, latents: Any, context: str | None) -> Roles:  # noqa: ANN401
    """Returns what the equal parts of a batch are, in order.

    Args:
        pipe: the pipeline.
        latents: the noisy samples, (rows, ...) or a list of as many.
        context: the name that the pipeline gave to the call; None where it gave none.

    Returns:
        ("cond",) for a batch of its own; otherwise "uncond" and "cond" in either order, with "image" between the two where there
        is image guidance as well (InstructPix2Pix), or "perturbed" after them (PAG).
    """
    alone: Roles = ("cond",)
    if context in ("cond", "uncond") or "Modular" in type(pipe).__name__ or _is(pipe, _SEPARATE):
        return alone
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if getattr(pipe, "do_classifier_free_guidance", None) is False:
        return ("cond", "perturbed") if perturbed else alone
    found: Roles = ("uncond", "cond")
    if "InstructPix2Pix" in type(pipe).__name__:
        found = ("cond", "image", "uncond")
    elif perturbed:
        found = ("uncond", "cond", "perturbed")
    elif _is(pipe, _COND_FIRST):
        found = ("cond", "uncond")
    return found if _repeats(latents, len(found)) else alone


def _repeats(latents: Any, times: int) -> bool:  # noqa: ANN401
    """Whether a batch is the same samples several times, but for images beside them."""
    rows, size = len(latents), len(latents) // times
    if rows % times or not size:
        return False
    if not isinstance(latents, Tensor):
        return all(torch.equal(latents[i], latents[i % size]) for i in range(size, rows))
    copies = latents.unflatten(0, (times, size))
    if torch.equal(copies[1:], copies[:1].expand_as(copies[1:])):
        return True
    # Images come after the sample along the channels, and may be zero in one part: the first channel tells.
    channels = (copies.select(axis, 0) for axis in range(2, min(4, copies.ndim)))
    return any(torch.equal(first[1:], first[:1].expand_as(first[1:])) for first in channels)


def doubled(pipe: Any, uncond: Arguments | None) -> bool:  # noqa: ANN401
    """Returns whether a pipeline steps both halves of its batch, as that of DiT does where it is guided: with the null class.

    Args:
        pipe: the pipeline.
        uncond: arguments of the network for what is taken to be the unconditional half.
    """
    labels = None if uncond is None else uncond.kwargs.get("class_labels")
    return _is(pipe, ("DiTPipeline",)) and labels is not None and bool((labels == _NULL_CLASS).all())


def read(output: Any) -> Tensor:  # noqa: ANN401
    """Returns the prediction in what a network returned: a tensor, the first entry of a tuple or output object, or a list."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first


def write(output: Any, value: Tensor, index: Sequence[int] | None = None) -> Any:  # noqa: ANN401
    """Returns what a network returned with another prediction in it, in the same kind of container.

    Args:
        output: what it returned, for n rows.
        value: the prediction, for as many rows as the pipeline expects.
        index: of each row that the pipeline expects, its place among the n; the other entries of the container are laid out by
            it. None: as they are.
    """

    def laid(item: Any) -> Any:  # noqa: ANN401
        return take(item, index) if index is not None and isinstance(item, Tensor) and item.ndim else item

    if isinstance(output, Tensor):
        return value
    first: Any = value
    if isinstance(output[0], (list, tuple)):
        first = type(output[0])(value.unbind(0))
    if isinstance(output, (tuple, list)):
        return type(output)([first, *(laid(item) for item in output[1:])])
    keys = list(output.keys())  # a ModelOutput
    return type(output)(**{keys[0]: first}, **{key: laid(output[key]) for key in keys[1:]})


def split(value: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the prediction, and a learned variance, which comes after it along the channels, or None.

    Args:
        value: what a network returned.
        x: the noisy sample.
    """
    if value.ndim > 1 and value.ndim == x.ndim and value.shape[1] == 2 * x.shape[1] and value.shape[2:] == x.shape[2:]:
        return value[:, : x.shape[1]], value[:, x.shape[1] :]
    return value, None


def first_like(x: Tensor, shape: torch.Size) -> Tensor | None:
    """Returns the part of a network's input that has its output's shape, or None: channels or tokens of images come after it."""
    if x.ndim != len(shape) or any(a < b for a, b in zip(x.shape, shape, strict=True)):
        return None
    for axis, size in enumerate(shape):
        x = x if x.shape[axis] == size else x.narrow(axis, 0, size)
    return x

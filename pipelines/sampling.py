"""From a pipeline to images: the one place where inputs, seeds and batches meet.

Sample i of a run has its own inputs and its own generator, seeded by ``rng.sample_seed(seed, i)``. So a run is cut into any
batches, or any ranges of indices on any machines, and gives the same images, up to the network's own rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit import rng

Arguments = dict[str, Any]
Inputs = (
    None
    | Mapping[str, Any]
    | Sequence[Any]
    | Tensor
    | np.ndarray[Any, np.dtype[Any]]
    | Callable[[int], Mapping[str, Any]]
)

# What the sampler passes itself; in call= or inputs= these would fight with it.
_RESERVED = frozenset({"generator", "return_dict", "batch_size", "num_images_per_prompt"})


def as_inputs(pipe: Any, inputs: Inputs) -> Callable[[int], Arguments]:  # noqa: ANN401
    """Returns the function from a sample's index to its own pipeline arguments.

    Args:
        pipe: the pipeline.
        inputs: None (no argument of its own); a dict (the same for every sample); a sequence of dicts, or of values of the
            pipeline's first parameter, such as prompts or class labels (one-dimensional tensors and arrays too), which starts
            again at its end; or a function from the index to a dict.

    Raises:
        TypeError: for anything else, one string, or plain values where the pipeline's first parameter takes none.
        ValueError: for an empty sequence, or an array of more than one axis.
    """
    if inputs is None:
        return lambda index: {}
    if isinstance(inputs, Mapping):
        same = dict(inputs)
        return lambda index: same
    if isinstance(inputs, (str, bytes)):
        raise TypeError(f"inputs is one string, {inputs!r}; write inputs=[{inputs!r}] for one prompt")
    if isinstance(inputs, (Tensor, np.ndarray)):
        if inputs.ndim != 1:
            raise ValueError(f"inputs must be one value a sample, got an array of shape {tuple(inputs.shape)}; pass a sequence "
                             "of dicts for arguments that are tensors")  # fmt: skip
        inputs = inputs.tolist()
    if isinstance(inputs, Sequence):
        return _cycle(pipe, inputs)
    if callable(inputs):
        return lambda index: _as_dict(inputs(index), index)
    raise TypeError(f"inputs must be None, a dict, a sequence or a function of the index, got {type(inputs).__name__}")


def _cycle(pipe: Any, values: Sequence[Any]) -> Callable[[int], Arguments]:  # noqa: ANN401
    if not values:
        raise ValueError("inputs is empty; pass at least one input, or None for a pipeline that needs none")
    if isinstance(values[0], Mapping):
        return lambda index: _as_dict(values[index % len(values)], index)
    first = next(iter(_parameters(pipe)), None)
    if first is None or first in _RESERVED:
        raise TypeError(
            f"{type(pipe).__name__} takes no input of its own (its first parameter is {first}); pass inputs=None"
        )
    return lambda index: {first: values[index % len(values)]}


def _as_dict(value: Any, index: int) -> Arguments:  # noqa: ANN401
    if not isinstance(value, Mapping):
        raise TypeError(f"the input of sample {index} must be a dict of pipeline arguments, got {type(value).__name__}")
    return dict(value)


def sample_images(
    pipe: Any,  # noqa: ANN401
    count: int,
    *,
    seed: int = 0,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    start: int = 0,
) -> Iterator[Tensor]:
    """Samples images number start, ..., start + count - 1 of a run.

    Args:
        pipe: a diffusers pipeline that returns images.
        count: number of images, >= 1.
        seed: of the run; any integer.
        inputs: arguments of each sample, see `as_inputs`. None needs a pipeline that takes ``batch_size``, or a prompt in
            ``call`` and ``num_images_per_prompt``.
        call: arguments shared by all, e.g. ``dict(num_inference_steps=8)``. ``output_type`` is "pt" unless given.
        batch_size: images per call of the pipeline, >= 1; it does not change the images.
        start: index of the first image, >= 0.

    Returns:
        An iterator over batches in order of the index: uint8 (B, C, H, W) on the CPU, [0, 1] rounded half to even.

    Raises:
        TypeError: for arguments that the pipeline does not take, or inputs of a wrong kind; before anything is sampled.
        ValueError: for numbers out of range; while sampling, for images that are not finite or not images.
    """
    if count < 1 or batch_size < 1 or start < 0:
        raise ValueError(
            f"got count={count}, batch_size={batch_size}, start={start}; the first two must be at least 1, start 0"
        )
    own, shared = as_inputs(pipe, inputs), dict(call or {})
    _check(pipe, own(start), shared)

    def batches() -> Iterator[Tensor]:
        with _no_progress_bar(pipe):
            for first in range(start, start + count, batch_size):
                indices = range(first, min(first + batch_size, start + count))
                output = pipe(**_batch(pipe, [own(i) for i in indices], shared), generator=_generators(seed, indices))
                images = output.images if hasattr(output, "images") else output[0]
                yield _as_uint8(images, indices)

    return batches()


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:  # noqa: ANN401
    return dict(inspect.signature(pipe.__call__).parameters)


def _check(pipe: Any, own: Arguments, shared: Arguments) -> None:  # noqa: ANN401
    """Refuses, before anything is sampled, what the pipeline would refuse or ignore."""
    name, parameters = type(pipe).__name__, _parameters(pipe)
    if reserved := _RESERVED & (own.keys() | shared.keys()):
        raise TypeError(f"{', '.join(sorted(reserved))} cannot be given: the sampler sets it from seed and batch_size")
    if twice := own.keys() & shared.keys():
        raise TypeError(f"{', '.join(sorted(twice))} is in inputs and in call; keep one")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not open_ended and (unknown := (own.keys() | shared.keys() | {"generator"}) - parameters.keys()):
        raise TypeError(f"{name} takes no {', '.join(sorted(unknown))}; it takes {', '.join(parameters)}")
    if not own and not parameters.keys() & {"batch_size", "num_images_per_prompt"}:
        raise TypeError(f"{name} takes its batch from {next(iter(parameters))}; pass inputs=, one value a sample")


def _batch(pipe: Any, rows: list[Arguments], shared: Arguments) -> Arguments:  # noqa: ANN401
    """The pipeline's arguments for a batch: values in lists, tensors stacked."""
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"samples of one batch have different arguments, {[sorted(row) for row in rows[:3]]} ...; give each "
                         "sample the same ones, with None where it has none")  # fmt: skip
    own: Arguments = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        own[name] = torch.stack(values) if all(isinstance(v, Tensor) for v in values) else values
    parameters = _parameters(pipe)
    if "batch_size" in parameters:
        own["batch_size"] = len(rows)
    elif not own:
        own["num_images_per_prompt"] = len(rows)
    output_type = {"output_type": "pt"} if "output_type" in parameters else {}
    return output_type | shared | own


def _generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(rng.sample_seed(seed, i)) for i in indices]


@contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:  # noqa: ANN401
    """Keeps the pipeline's own bar, one a batch, off."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _as_uint8(images: Any, indices: Sequence[int]) -> Tensor:  # noqa: ANN401
    """uint8 (B, C, H, W) from what output_type "pt" (B, C, H, W), "np" (B, H, W, C) or "pil" gives."""
    if not isinstance(images, Tensor):
        array = np.stack([np.asarray(image) for image in images])
        images = torch.from_numpy(array[..., None] if array.ndim == 3 else array).movedim(-1, 1)
    x: Tensor = images.detach().cpu()
    if x.ndim != 4 or len(x) != len(indices) or x.shape[1] not in (1, 3):
        raise ValueError(f"expected {len(indices)} images of 1 or 3 channels from the pipeline, got an array of shape "
                         f"{tuple(x.shape)}; video, alpha and latents are not images")  # fmt: skip
    if x.dtype == torch.uint8:
        return x.contiguous()
    x = x.float()
    broken = [i for i, image in zip(indices, x, strict=True) if not image.isfinite().all()]
    if broken:
        raise ValueError(f"NaN or infinity in samples {', '.join(map(str, broken[:8]))}{' ...' if len(broken) > 8 else ''}; "
                         "debug=True on the scheduler finds the step")  # fmt: skip
    low, high = float(x.min()), float(x.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"the pipeline's images run from {low:.3g} to {high:.3g}, not within [0, 1]; with output_type 'pt' or "
                         "'np' it must map its sample to [0, 1]")  # fmt: skip
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()

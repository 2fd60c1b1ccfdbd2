"""From a pipeline to images: the one place where inputs, seeds and batches meet.

Sample i of a run has its own inputs and its own generator, seeded by ``rng.sample_seed(seed, i)``. So a run is cut into any
batches, or any ranges of indices on any machines, and gives the same images, up to the network's own rounding.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# An annotation that admits one value for each sample; any other ("float", "int | None") wants one for the whole call.
_MANY = re.compile("list|sequence|tensor|image|array|any", re.IGNORECASE)


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
    first = next(iter(parameters(pipe)), None)
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
    _check_numbers(count, batch_size, start)
    own, shared = as_inputs(pipe, inputs), dict(call or {})
    check_arguments(pipe, own(start), shared)

    def batches() -> Iterator[Tensor]:
        with _reporting(pipe, None):
            for indices, rows in _cut(pipe, own, range(start, start + count), batch_size):
                output = _draw(pipe, rows, shared, [rng.sample_seed(seed, i) for i in indices])
                yield as_uint8(output.images if hasattr(output, "images") else output[0], indices)

    return batches()


def blocks(
    pipe: Any,  # noqa: ANN401
    count: int,
    *,
    inputs: Inputs = None,
    batch_size: int = 64,
    start: int = 0,
) -> list[range]:
    """Returns the batches that `sample_images` cuts a run into: a function of its arguments alone.

    Whoever draws whole blocks, in any order and in any process, draws the same bits.

    Args:
        pipe: the pipeline.
        count: number of samples, >= 1.
        inputs: arguments of each sample, see `as_inputs`. Samples whose inputs differ in an argument that holds for a whole call
            (``guidance_scale``, ``height``) share no block.
        batch_size: samples of a block, at most.
        start: index of the first sample, >= 0.

    Raises:
        ValueError: for numbers out of range.
    """
    _check_numbers(count, batch_size, start)
    return [block for block, _ in _cut(pipe, as_inputs(pipe, inputs), range(start, start + count), batch_size)]


def sample_outputs(
    pipe: Any,  # noqa: ANN401
    blocks: Iterable[range],
    *,
    seed: int = 0,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> Iterator[tuple[range, Any]]:
    """Samples blocks of a run from a pipeline of any kind: images, video, sound.

    Args:
        pipe: a diffusers pipeline.
        blocks: indices of the samples of each call, see `blocks`.
        seed: of the run; any integer.
        inputs: arguments of each sample, see `as_inputs`.
        call: arguments shared by all; ``output_type`` is "pt" unless given.
        on_step: called after each denoising step with the part of the block that is done, in (0, 1].

    Yields:
        Each block with what the pipeline returned for it.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for what the pipeline refuses or cannot do; names the samples.
    """
    own, shared = as_inputs(pipe, inputs), dict(call or {})
    with _reporting(pipe, on_step):
        for indices in blocks:
            rows = [own(i) for i in indices]
            check_arguments(pipe, rows[0], shared)
            try:
                output = _draw(pipe, rows, shared, [rng.sample_seed(seed, i) for i in indices])
            except ValueError as error:
                raise ValueError(f"samples {indices[0]} to {indices[-1]}: {error}") from error
            yield indices, output


def _check_numbers(count: int, batch_size: int, start: int) -> None:
    if count < 1 or batch_size < 1 or start < 0:
        raise ValueError(
            f"got count={count}, batch_size={batch_size}, start={start}; the first two must be at least 1, start 0"
        )


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:  # noqa: ANN401
    """Returns the parameters of a pipeline's call by name."""
    return dict(inspect.signature(pipe.__call__).parameters)


def check_arguments(pipe: Any, own: Mapping[str, Any], shared: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Refuses, before anything is sampled, what the pipeline would refuse or ignore.

    Args:
        pipe: the pipeline.
        own: arguments of one sample.
        shared: arguments of all samples.

    Raises:
        TypeError: for an argument that the pipeline does not take, that is given twice, or that the sampler sets; and where the
            pipeline could not tell how many samples to draw.
    """
    name, known = type(pipe).__name__, parameters(pipe)
    if reserved := _RESERVED & (own.keys() | shared.keys()):
        raise TypeError(f"{', '.join(sorted(reserved))} cannot be given: the sampler sets it from seed and batch_size")
    if twice := own.keys() & shared.keys():
        raise TypeError(f"{', '.join(sorted(twice))} is in inputs and in call; keep one")
    # Pipelines of diffusers take any keyword for the sake of two deprecated ones, and ignore the others.
    ignores = type(pipe).__module__.startswith("diffusers.")
    open_ended = not ignores and any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not open_ended and (unknown := (own.keys() | shared.keys() | {"generator"}) - known.keys()):
        raise TypeError(f"{name} takes no {', '.join(sorted(unknown))}; it takes {', '.join(known)}")
    if not own and not known.keys() & {"batch_size", "num_images_per_prompt"}:
        raise TypeError(f"{name} takes its batch from {next(iter(known))}; pass inputs=, one value a sample")


def _cut(
    pipe: Any,  # noqa: ANN401
    own: Callable[[int], Arguments],
    indices: range,
    batch_size: int,
) -> Iterator[tuple[range, list[Arguments]]]:
    """Cuts a run into batches of samples that can share a call, each with the inputs of its samples."""
    whole = _of_a_call(pipe)
    rows: list[Arguments] = []
    for index in indices:
        row = own(index)
        if len(rows) == batch_size or (rows and not _share(whole, rows[0], row)):
            yield range(index - len(rows), index), rows
            rows = []
        rows.append(row)
    yield range(indices.stop - len(rows), indices.stop), rows


def _share(whole: set[str], row: Arguments, other: Arguments) -> bool:
    """Whether two samples can be drawn by one call: the same arguments, and the same values of those that hold for all."""
    return row.keys() == other.keys() and all(row[name] == other[name] for name in whole & row.keys())


def _of_a_call(pipe: Any) -> set[str]:  # noqa: ANN401
    """Names of the arguments that take one value for a whole call."""
    empty = inspect.Parameter.empty
    return {k for k, p in parameters(pipe).items() if p.annotation is not empty and not _MANY.search(str(p.annotation))}


def _batch(pipe: Any, rows: list[Arguments], shared: Arguments) -> Arguments:  # noqa: ANN401
    """The pipeline's arguments for a batch: values in lists, tensors stacked, and those of the whole call as they are."""
    whole = _of_a_call(pipe)
    if not all(_share(whole, rows[0], row) for row in rows):
        raise ValueError(
            f"samples of one block have different arguments, {rows[:3]!r:.200} ...; cut the run with blocks()"
        )
    own: Arguments = {}
    for name in rows[0].keys() - whole:
        values = [row[name] for row in rows]
        own[name] = torch.stack(values) if all(isinstance(v, Tensor) for v in values) else values
    known = parameters(pipe)
    if "batch_size" in known:
        own["batch_size"] = len(rows)
    elif not own:
        own["num_images_per_prompt"] = len(rows)
    output_type = {"output_type": "pt"} if "output_type" in known else {}
    return output_type | shared | {name: rows[0][name] for name in rows[0].keys() & whole} | own


def _draw(pipe: Any, rows: list[Arguments], shared: Arguments, seeds: Sequence[int]) -> Any:  # noqa: ANN401
    """One call of the pipeline, with a seed for each sample."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with rng.default_seeds(seeds), torch.random.fork_rng(devices):
        torch.manual_seed(seeds[0])  # what a pipeline draws past its generators is at least a function of the batch
        return pipe(**_batch(pipe, rows, shared), generator=generators)


class _Steps:
    """Stands in for a pipeline's own bar, and reports the steps done."""

    def __init__(self, iterable: Any, total: int, report: Callable[[float], None]) -> None:  # noqa: ANN401
        self._steps, self._total, self._report, self._done = iterable, total, report, 0

    def update(self, steps: int = 1) -> None:
        self._done += steps
        self._report(min(1.0, self._done / self._total))

    def __iter__(self) -> Iterator[Any]:
        for step in self._steps:
            yield step
            self.update()

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def set_description(self, text: str) -> None:
        pass


@contextmanager
def _reporting(pipe: Any, on_step: Callable[[float], None] | None) -> Iterator[None]:  # noqa: ANN401
    """Keeps the pipeline's own bar, one a batch, off; what it would have shown goes to ``on_step``."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    if on_step is not None:

        def bar(iterable: Any = None, total: int | None = None) -> _Steps:  # noqa: ANN401
            return _Steps(iterable, total or len(iterable), on_step)

        pipe.progress_bar = bar
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
        if on_step is not None:
            del pipe.progress_bar


def as_uint8(images: Any, indices: Sequence[int], video: bool = False) -> Tensor:  # noqa: ANN401
    """Returns the images or videos of a pipeline as bytes.

    Args:
        images: what output_type "pt", (B, C, H, W), "np", (B, H, W, C), or "pil" gives, with an axis of frames after the first
            for videos; of 1 or 3 channels, in [0, 1] or already uint8.
        indices: number of each of the B samples, for messages.
        video: whether there is the axis of frames.

    Returns:
        uint8 (B, C, H, W) or (B, F, C, H, W) on the CPU, [0, 1] rounded half to even.

    Raises:
        ValueError: for another number of samples, values that are not finite or not in [0, 1], or other channels.
    """
    if not isinstance(images, Tensor):
        images = _stacked(images)
    x: Tensor = images.detach().cpu()
    if x.ndim != 4 + video or len(x) != len(indices) or x.shape[-3] not in (1, 3):
        kind, others = ("videos", "images") if video else ("images", "video")
        raise ValueError(f"expected {len(indices)} {kind} of 1 or 3 channels from the pipeline, got an array of shape "
                         f"{tuple(x.shape)}; {others}, alpha and latents are not {kind}")  # fmt: skip
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


def _stacked(images: Any) -> Tensor:  # noqa: ANN401
    """A tensor, channels before height and width, from an array or (lists of) pictures and arrays, channels last or absent."""

    def array(item: Any) -> np.ndarray[Any, np.dtype[Any]]:  # noqa: ANN401
        if isinstance(item, (list, tuple)):
            return np.stack([array(part) for part in item])
        values = np.asarray(item)
        return values[..., None] if values.ndim == 2 else values

    values = array(images)
    return torch.from_numpy(values[..., None] if values.ndim == 3 else values).movedim(-1, -3)

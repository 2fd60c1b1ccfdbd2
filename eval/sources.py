"""Where samples come from: a pipeline that draws them, or images that are there, in blocks of sample indices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowkit.eval import provenance
from flowkit.eval.images import Images, images
from flowkit.pipelines.sampling import Inputs, as_inputs, sample_images

PIPELINE_IMAGES = 50_000
_PROBES = 16


class Source(Protocol):
    """Images by index, in a fixed order.

    Attributes:
        count: how many are used.
        batch_size: how many at a time, at most.
        divisible: whether several processes can share it.
    """

    count: int
    batch_size: int
    divisible: bool

    def describe(self) -> dict[str, Any]:
        """Returns what the images depend on, in JSON's terms: equal descriptions mean equal images."""

    def batches(self, blocks: Sequence[range]) -> Iterator[Tensor]:
        """Yields the images of blocks of indices in order, uint8 (B, C, H, W); no batch crosses the end of a block."""

    def rows(self) -> int:
        """Returns how many rows a denoiser has been given so far; 0 where there is none."""

    def levels(self) -> dict[str, Any]:
        """Returns the noise levels that the scheduler last visited; empty where there is none."""


class PipelineSource:
    """Samples of a diffusers pipeline.

    Args:
        pipe: the pipeline.
        count: number of samples; None means 50,000.
        seed: of the run.
        inputs: arguments of each sample.
        call: arguments of all.
        batch_size: samples of a call.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for numbers out of range.
    """

    divisible = True

    def __init__(
        self,
        pipe: Any,  # noqa: ANN401
        count: int | None,
        seed: int,
        inputs: Inputs,
        call: Mapping[str, Any] | None,
        batch_size: int,
    ) -> None:
        self.pipe, self.count = pipe, PIPELINE_IMAGES if count is None else count
        self.batch_size, self._seed, self._inputs, self._call = batch_size, seed, inputs, dict(call or {})
        self._sample(range(self.count))  # checks the arguments; nothing is drawn before the first batch is asked for
        self._rows: Callable[[], int] = lambda: 0

    def _sample(self, block: range) -> Iterator[Tensor]:
        return sample_images(self.pipe, len(block), seed=self._seed, inputs=self._inputs, call=self._call,
                             batch_size=self.batch_size, start=block.start)  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Returns seeds, inputs, arguments, and the pipeline with its weights' fingerprint."""
        pipeline = provenance.describe_pipeline(self.pipe)
        for name in ("timesteps", "sigmas"):
            pipeline["scheduler"].pop(name, None)
        return {
            "kind": "pipeline",
            "count": self.count,
            "seed": self._seed,
            "seeds": "torch.Generator('cpu').manual_seed(flowkit.rng.sample_seed(seed, index)) for each sample",
            "inputs_sha256": provenance.hash_inputs(as_inputs(self.pipe, self._inputs), self.count),
            "call": provenance.describe(self._call),
            "batch_size": self.batch_size,
            "pipeline": {**pipeline, "weights_sha256": provenance.fingerprint(self.pipe)},
        }

    def batches(self, blocks: Sequence[range]) -> Iterator[Tensor]:
        """Draws the samples of blocks."""
        with count_rows(self.pipe) as self._rows:
            for block in blocks:
                yield from self._sample(block)

    def rows(self) -> int:
        """Returns how many rows the denoiser has been given so far."""
        return self._rows()

    def levels(self) -> dict[str, Any]:
        """Returns timesteps and sigmas of the last call."""
        scheduler: dict[str, Any] = provenance.describe_pipeline(self.pipe)["scheduler"]
        return {name: scheduler[name] for name in ("timesteps", "sigmas") if name in scheduler}


class ImageSource:
    """Images that are there.

    Args:
        found: the images.
        count: how many of the first are used; None means all.
        batch_size: images at a time.

    Raises:
        ValueError: where there are fewer, or where nobody knows how many there are.
    """

    def __init__(self, found: Images, count: int | None, batch_size: int) -> None:
        count = found.count if count is None else count
        if count is None:
            raise ValueError("the number of these images is not known before they are read; pass num_images=")
        if found.count is not None and count > found.count:
            place = found.description.get("path", found.description["kind"])
            raise ValueError(f"{count:,} images are asked for, and there are {found.count:,} in {place}; ask for fewer, or add "
                             "images")  # fmt: skip
        if count < 1 or batch_size < 1:
            raise ValueError(f"got num_images={count}, batch_size={batch_size}; both must be at least 1")
        self._images, self.count, self.batch_size = found, count, batch_size
        self.divisible = found.read is not None

    def describe(self) -> dict[str, Any]:
        """Returns kind, place, how pixels were made, and a hash of up to 16 of the images, evenly spaced."""
        digest = hashlib.sha256()
        if self.divisible:
            wanted = min(_PROBES, self.count)
            for index in [k * (self.count - 1) // max(1, wanted - 1) for k in range(wanted)]:
                image = self._images[index]
                digest.update(f"{index} {tuple(image.shape)} ".encode() + image.cpu().contiguous().numpy().tobytes())
        probe = {"probe_sha256": digest.hexdigest()} if self.divisible else {}
        own = {**self._images.description, "count": self.count, "batch_size": self.batch_size}
        return {**provenance.describe(own), **probe}

    def batches(self, blocks: Sequence[range]) -> Iterator[Tensor]:
        """Reads the images of blocks; a source without indices is read from its start, and what is not wanted is passed over."""
        if self.divisible:
            for block in blocks:
                yield from self._images.blocks(self.batch_size, block.start, block.stop)
        elif blocks:
            wanted = {index for block in blocks for index in block}
            start = blocks[0].start
            for batch in self._images.blocks(self.batch_size, start, blocks[-1].stop):
                if start in wanted:
                    yield batch
                start += len(batch)

    def rows(self) -> int:
        """Returns 0: no denoiser."""
        return 0

    def levels(self) -> dict[str, Any]:
        """Returns nothing: no scheduler."""
        return {}


def open_source(
    source: Any,  # noqa: ANN401
    count: int | None,
    seed: int,
    inputs: Inputs,
    call: Mapping[str, Any] | None,
    batch_size: int,
) -> Source:
    """Returns the source of samples that `flowkit.eval.evaluate` was given.

    Raises:
        TypeError: for arguments that do not fit the kind of source.
        ValueError: for numbers out of range, and for fewer images than asked for.
    """
    if is_pipeline(source):
        return PipelineSource(source, count, seed, inputs, call, batch_size)
    if inputs is not None or call:
        raise TypeError(
            f"inputs and call are arguments of a pipeline, and the source is {type(source).__name__}; leave them out"
        )
    if seed:
        raise ValueError(
            f"seed={seed} is of a pipeline's noise, and the source is {type(source).__name__}; leave it out"
        )
    # A function's end is not known to it; that there are too few files is said with their folder.
    found = source if isinstance(source, Images) else images(source, count=count if _endless(source) else None)
    return ImageSource(found, count, batch_size)


def is_pipeline(source: Any) -> bool:  # noqa: ANN401
    """Tells a diffusers pipeline from other callables."""
    return callable(source) and hasattr(source, "set_progress_bar_config")


def _endless(source: Any) -> bool:  # noqa: ANN401
    """Whether a source is a function or an iterable, whose length only the caller knows."""
    return not isinstance(source, PathLike) and (not hasattr(source, "__len__") or isinstance(source, (list, tuple)))


@contextmanager
def count_rows(pipe: Any) -> Iterator[Callable[[], int]]:  # noqa: ANN401
    """Counts what the denoiser is given while it lasts: rows of its batch, so that a CFG pair counts as two.

    Args:
        pipe: the pipeline; its denoiser is ``unet``, ``transformer`` or ``transformer_2``.

    Yields:
        A function that returns the number so far; 0 for a pipeline without such a denoiser.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total
        # The latents come first, as a tensor or (packed transformers) as a list with one for each sample.
        total += len(next(value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, list))))

    parts = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    handles = [part.register_forward_pre_hook(count, with_kwargs=True) for part in parts if isinstance(part, nn.Module)]
    try:
        yield lambda: total
    finally:
        for handle in handles:
            handle.remove()


def device_of(source: Any) -> torch.device:  # noqa: ANN401
    """Returns where extractors shall compute: the pipeline's device, or for images a GPU where there is one."""
    if is_pipeline(source):
        return torch.device(source.device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

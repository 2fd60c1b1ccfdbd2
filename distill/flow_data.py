"""What a pipeline is trained on: its kind of condition, the size of its images, and each condition as a call of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkit.distill.data import Examples, open_examples
from flowkit.distill.student import denoiser_name
from flowkit.eval.decoding import Decoding
from flowkit.pipelines.sampling import parameters


@dataclass(frozen=True)
class Material:
    """Images and conditions as a pipeline takes them.

    Attributes:
        examples: the images.
        decoding: of their files.
        inputs: the pipeline's arguments for each condition.
        numbers: number of each image's condition, int64 (N,).
        null: number of the condition that stands for none.
        shown: numbers of the conditions that samples are drawn for.
        call: the pipeline's arguments for all.
    """

    examples: Examples
    decoding: Decoding
    inputs: list[dict[str, Any]]
    numbers: Tensor
    null: int
    shown: list[int]
    call: dict[str, Any]


def prepare(
    pipe: Any,  # noqa: ANN401
    data: Any,  # noqa: ANN401
    *,
    size: int | None,
    alpha: str,
    call: Mapping[str, Any],
    **columns: Any,  # noqa: ANN401
) -> Material:
    """Opens data as a pipeline needs them.

    A pipeline that takes ``class_labels`` is trained with labels, one that takes a ``prompt`` with captions, any other without
    conditions. No condition is the number after the last class, or the empty prompt.

    Args:
        pipe: of images, in pixels or latents.
        data: see `flowkit.distill.data.open_examples`, as are the columns.
        size: pixels along each side of the images; None means those that the pipeline makes unless told otherwise.
        alpha: what becomes of transparent images, see `flowkit.eval.decoding.Decoding`.
        call: arguments of the pipeline that hold for all.
        **columns: split, image_column and condition_column.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as of `open_examples`; and for labels that the pipeline does not
            have, or a size that it cannot make or does not tell.
    """
    known = parameters(pipe)
    wanted = "label" if "class_labels" in known else "caption" if "prompt" in known else None
    network, vae = getattr(pipe, denoiser_name(pipe)), getattr(pipe, "vae", None)
    channels = int(network.config["in_channels"] if vae is None else vae.config.get("in_channels", 3))
    side = _side(pipe, network, size)
    decoding = Decoding(channels, side, alpha)
    examples = open_examples(data, wanted, decoding, **columns)
    shared = dict(call)
    if "height" in known:
        shared |= {"height": side, "width": side}
    if wanted is None:
        numbers = torch.zeros(len(examples), dtype=torch.int64)
        return Material(examples, decoding, [{}], numbers, 0, [0], shared)
    conditions = examples.conditions
    if conditions is None:
        raise ValueError(
            f"{type(pipe).__name__} takes a {wanted} with each image, and the data have none; give them some"
        )
    if wanted == "label":
        count = _classes(pipe, network)
        labels = torch.tensor([int(label) for label in conditions])
        if not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, and {type(pipe).__name__} has {count} classes, "
                             "from 0 on; give each image one of them")  # fmt: skip
        inputs: list[dict[str, Any]] = [{"class_labels": label} for label in range(count + 1)]
        return Material(examples, decoding, inputs, labels, count, labels.unique().tolist(), shared)
    texts = dict.fromkeys([*(str(text) for text in conditions), ""])
    places = {text: number for number, text in enumerate(texts)}
    numbers = torch.tensor([places[str(text)] for text in conditions])
    shown = list(dict.fromkeys(numbers.tolist()))
    return Material(examples, decoding, [{"prompt": text} for text in texts], numbers, places[""], shown, shared)


def _classes(pipe: Any, network: Any) -> int:  # noqa: ANN401
    """Number of classes, the one for none not counted."""
    if hasattr(pipe, "num_classes"):
        return int(pipe.num_classes)
    config = network.config
    count = config.get("num_embeds_ada_norm") or (config.get("num_class_embeds") or 0) - 1
    if count < 1:
        raise ValueError(
            f"the {type(network).__name__} of {type(pipe).__name__} has no classes; train a model with some"
        )
    return int(count)


def _side(pipe: Any, network: Any, size: int | None) -> int:  # noqa: ANN401
    """Pixels along each side of the images."""
    vae = getattr(pipe, "vae", None)
    own = getattr(pipe, "default_sample_size", None) or network.config.get("sample_size")
    blocks = (
        []
        if vae is None
        else vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels") or [1]
    )
    factor = getattr(pipe, "vae_scale_factor", None) or 2 ** max(0, len(blocks) - 1)
    if isinstance(own, (list, tuple)):
        own = own[0] if len(set(own)) == 1 else None
    usual = None if own is None else int(own) * (1 if vae is None else int(factor))
    if size is None and usual is None:
        raise ValueError(f"{type(pipe).__name__} does not tell the size of its images as squares; pass size=")
    if size is not None and size != usual and "height" not in parameters(pipe):
        raise ValueError(
            f"size={size}, and {type(pipe).__name__} makes images of {usual} pixels and no others; leave size out"
        )
    return int(usual if size is None else size)  # type: ignore[arg-type]

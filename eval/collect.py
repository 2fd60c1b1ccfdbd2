"""The one pass over images: every network sees each batch once, and its features go into the spools, block by block."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkit.eval.features import FeatureExtractor, Layer
from flowkit.eval.runs import Spools
from flowkit.eval.sources import Source
from flowkit.eval.statistics import Identity

LOGITS = "logits_unbiased"


@dataclass(frozen=True)
class Slot:
    """One kind of feature to collect.

    Attributes:
        extractor: makes it.
        logits: whether its classifier's outputs are meant, not its features.
    """

    extractor: FeatureExtractor
    logits: bool = False

    @property
    def name(self) -> str:
        """Name of the extractor, with the layer behind an equals sign for logits."""
        return f"{self.extractor.name}={LOGITS}" if self.logits else self.extractor.name

    def network(self) -> tuple[Any, str | None]:
        """Returns the network and its layer; None where it has one output only.

        Raises:
            ValueError: for logits of an extractor without any.
        """
        owner: Any = self.extractor.parent if isinstance(self.extractor, Layer) else self.extractor
        layers = getattr(owner, "layers", None) or {}
        if self.logits and LOGITS not in layers:
            raise ValueError(f"the inception score needs logits, which {self.extractor.name!r} does not have; name an extractor "
                             "that has them: 'is/fid-tf'")  # fmt: skip
        own = LOGITS if self.logits else self.extractor.identity.get("layer")
        return owner, own if own in layers else None

    def kind(self) -> tuple[int, Identity]:
        """Returns dimension and identity."""
        owner, layer = self.network()
        if not self.logits or layer is None:
            return self.extractor.dim, dict(self.extractor.identity)
        return owner.layers[layer], {**self.extractor.identity, "layer": layer}


def networks(slots: Sequence[Slot]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Returns the function from images to features by slot, in which each network runs once, whatever the layers wanted of it."""
    grouped: dict[int, list[tuple[Slot, Any, str | None]]] = defaultdict(list)
    for slot in slots:
        owner, layer = slot.network()
        grouped[id(owner)].append((slot, owner, layer))

    def extract(images: Tensor) -> dict[str, Tensor]:
        found = {}
        for group in grouped.values():
            layers = list(dict.fromkeys(layer for _, _, layer in group if layer is not None))
            outputs = group[0][1].features(images, layers) if layers else {}
            found.update({s.name: s.extractor(images) if layer is None else outputs[layer] for s, _, layer in group})
        return found

    return extract


def collect(
    source: Source,
    slots: Sequence[Slot],
    spools: Spools,
    blocks: Sequence[int],
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Collects blocks of a source into spools.

    On a GPU the extractors run on a stream of their own: the host queues a batch's features and goes on to draw the next batch,
    and fetches the features afterwards, so that the two overlap. On a CPU, where both want the same cores, they take turns.

    Args:
        source: of the images.
        slots: what to extract.
        spools: where to.
        blocks: numbers of the blocks of this process, rising.
        done: called after each batch with its number of images.

    Raises:
        ValueError: for images or features that are not finite, and for a source that ends early.
    """
    extract, lane = networks(slots), _Lane(slots)
    waiting: deque[tuple[Tensor, Mapping[str, Tensor]]] = deque()
    block, todo = _Block(source), deque(blocks)
    batches = iter(source.batches([spools.blocks[k] for k in blocks]))
    while todo:
        began = time.perf_counter()
        images = next(batches, None)
        came = time.perf_counter()
        block.sampling += came - began
        if images is not None:
            with lane.here():
                waiting.append((images, extract(images)))
        while len(waiting) > (lane.ahead if images is not None else 0):
            drawn, outputs = waiting.popleft()
            with lane.here():
                block.add(drawn, {name: x.detach().cpu() for name, x in outputs.items()}, spools.kept_of(todo[0]))
            block.extracting += time.perf_counter() - came
            came = time.perf_counter()
            if block.count == len(spools.blocks[todo[0]]):
                spools.write(todo.popleft(), *block.close())
            done(len(drawn))
        if images is None and todo:
            span = spools.blocks[todo[0]]
            raise ValueError(
                f"the images ended before number {span.stop - 1}, {source.count:,} were promised; ask for fewer"
            )


class _Block:
    """A block in the making."""

    def __init__(self, source: Source) -> None:
        self._source, self._rows, self.sampling, self.extracting = source, 0, 0.0, 0.0
        self._begin()

    def _begin(self) -> None:
        self.count, self._shape, self._digest = 0, list[int](), hashlib.sha256()
        self._kept, self._features = list[Tensor](), defaultdict[str, list[Tensor]](list)

    def add(self, images: Tensor, features: Mapping[str, Tensor], keep: int) -> None:
        """Adds a batch, of whose images those among the first ``keep`` of the block are kept."""
        images = images.cpu().contiguous()
        self._shape = list(images.shape[1:])
        self._digest.update(f"{self._shape} ".encode() + images.numpy().tobytes())
        self._kept.append(images[: max(0, keep - self.count)])
        self.count += len(images)
        for name, x in features.items():
            self._features[name].append(x)

    def close(self) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        """Features, kept images and ledger entry; the next block begins."""
        rows = self._source.rows()
        entry = {
            "images": self.count,
            "shape": self._shape,
            "sha256": self._digest.hexdigest(),
            "seconds": {"sampling": self.sampling, "features": self.extracting},
            "rows": rows - self._rows,
            "levels": self._source.levels(),
        }
        features, kept = {name: torch.cat(parts) for name, parts in self._features.items()}, torch.cat(self._kept)
        self._rows, self.sampling, self.extracting = rows, 0.0, 0.0
        self._begin()
        return features, kept, entry


class _Lane:
    """Where extractors compute: a CUDA stream of their own, or in line."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        device = torch.device(next((getattr(s.extractor, "device", "cpu") for s in slots), "cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights must be there
        # Batches whose features may be under way while the next is drawn.
        self.ahead = 0 if self._stream is None else 1

    def here(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

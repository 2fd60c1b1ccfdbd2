"""From features on disk to figures: which metrics are asked of which extractor, what they need, and the sums that they read."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowkit.eval import provenance, runs
from flowkit.eval.collect import Slot
from flowkit.eval.exact import ExactStats
from flowkit.eval.intervals import Figure
from flowkit.eval.kid import SUBSET_SIZE
from flowkit.eval.metrics import METRICS, FeatureSet, Track, measure, required
from flowkit.eval.references import Extractor, Match, Reference, match
from flowkit.eval.runs import Spools
from flowkit.eval.spool import Rows, StatsSpool
from flowkit.eval.statistics import FeatureStats, Identity

# Each is left out in turn for the standard error. Where inputs repeat (labels i % 10), choose N so that a chunk holds whole rounds
# of them, or the error counts unequal labels as noise.
CHUNKS = 20
_READ = 1000
_LEAST = {"is": 10, "kid_subsets": SUBSET_SIZE, "precision": 4}  # by a metric's first name; others take 2


@dataclass(frozen=True)
class Request:
    """What is asked of one extractor.

    Attributes:
        match: the extractor and its reference.
        keys: metrics by the key of their figure, in order.
    """

    match: Match
    keys: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the extractor."""
        return self.match.extractor.name

    @property
    def metrics(self) -> list[str]:
        """The metrics, each once."""
        return list(dict.fromkeys(self.keys.values()))

    def slots(self) -> list[Slot]:
        """Returns what must be extracted from the samples."""
        parts = required(self.metrics)[0]
        features = [Slot(self.match.extractor)] if parts & {"moments", "features"} else []
        return features + ([Slot(self.match.extractor, logits=True)] if "logits" in parts else [])

    def needs_reference_images(self) -> bool:
        """Tells whether the reference's features must be made from its images.

        Raises:
            ValueError: where they must be, and there are no images.
        """
        lacking = {"features"} if self.match.stats is not None else {"features", "moments"}
        needing = [key for key, metric in self.keys.items() if METRICS[metric].reference in lacking]
        if needing and self.match.images is None:
            known = "there is no reference" if self.match.origin == "none" else f"{self.match.origin} holds statistics"
            raise ValueError(f"{needing[0]!r} is measured against images, and {known}; pass a folder, .zip, .tar or .npz of images "
                             "as the reference, or leave the metric out")  # fmt: skip
        return bool(needing)


def plan(
    metrics: Sequence[str],
    reference: Reference | Sequence[Reference],
    extractor: Extractor | Sequence[Extractor] | None,
    device: torch.device,
) -> list[Request]:
    """Returns what is asked of which extractor.

    Args:
        metrics: "METRIC", of every extractor in ``extractor``, or "METRIC/EXTRACTOR", of that one.
        reference: see `flowkit.eval.references.match`.
        extractor: likewise.
        device: where extractors given by name compute.

    Raises:
        FileNotFoundError: for a reference or weights that are not there.
        ValueError: for unknown metrics, and extractors that share a name or do not fit.
    """
    split = [name.partition("/") for name in metrics]
    required(metric for metric, _, _ in split)
    named = list(dict.fromkeys(own for _, _, own in split if own))
    if extractor is None and all(own for _, _, own in split):
        extractor = named
    matches = match(reference, extractor, device)
    names = [m.extractor.name for m in matches]
    if len(set(names)) < len(names):
        raise ValueError(f"extractors share a name ({', '.join(names)}), so their figures would too; give each its own")
    first = len(names)
    for own in (own for own in named if own not in names):
        if isinstance(reference, (list, tuple)):
            raise ValueError(
                f"the extractor {own!r} of a metric has no reference; name it in extractor= and give it one"
            )
        matches += match(reference, own, device)
        names.append(own)
    requests = []
    for number, (name, one) in enumerate(zip(names, matches, strict=True)):
        keys = {}
        for metric, _, own in split:
            if own == name:
                keys[f"{metric}/{own}"] = metric
            elif not own and number < first:
                keys[metric if number == 0 else f"{metric}/{name}"] = metric
        if keys:
            requests.append(Request(one, keys))
    return requests


def check_counts(request: Request, count: int, references: int | None) -> None:
    """Refuses, before anything is drawn, numbers of images that a metric cannot work with.

    Args:
        request: the metrics.
        count: number of samples.
        references: number of the reference's images; None where it has no say.

    Raises:
        ValueError: names the metric and how many it takes.
    """
    for key, name in request.keys.items():
        metric = METRICS[name]
        fewest = count if metric.reference != "features" or references is None else min(count, references)
        least = _LEAST.get(metric.names[0], 2)
        if name == "fid_infinity":
            # Three nested sets of chunks must be longer than twice the dimension.
            least = max(6, math.ceil(2 * request.match.extractor.dim * CHUNKS / (CHUNKS - 2)))
        if fewest < least:
            raise ValueError(f"{key!r} takes at least {least:,} images, got {fewest:,}; draw more")


def edges(count: int) -> list[int]:
    """Returns where the chunks of a run begin, and its end."""
    chunks = max(1, min(CHUNKS, count // 2))
    return [count * k // chunks for k in range(chunks + 1)]


def measure_all(
    request: Request, samples: Spools, reference: Spools | None, folder: Path, exact: bool, track: Track
) -> Iterator[tuple[dict[str, Figure], dict[str, Any], float]]:
    """Measures what is asked of one extractor.

    Args:
        request: what.
        samples: features of the samples.
        reference: features of the reference's images; None where they were not needed.
        folder: of the run, for the sums of the chunks while they are needed.
        exact: whether sums are of whole numbers.
        track: shows the progress of standard errors.

    Yields:
        For metrics that are computed together: figures by key, the reference's description, and seconds.
    """
    began = time.perf_counter()
    parts, identity = required(request.metrics), dict(request.match.extractor.identity)
    rows, chunks = samples.features.get(request.name), StatsSpool(folder / "chunks" / runs.file_name(request.name), 1)
    if "moments" in parts[0] and rows is not None:
        cuts = edges(len(rows))
        chunks = StatsSpool(chunks.folder, len(cuts) - 1)
        bound = largest(rows) if exact else None
        for k, (low, high) in enumerate(itertools.pairwise(cuts)):
            chunks.write(k, sums(rows, range(low, high), identity, bound))
    theirs = None if reference is None else reference.features[request.name]
    stats = request.match.stats
    if stats is None and theirs is not None and "moments" in parts[1]:
        stats = sums(theirs, range(len(theirs)), identity, largest(theirs) if exact else None).stats()
    own = FeatureSet(chunks, rows, samples.features.get(Slot(request.match.extractor, logits=True).name))
    other = FeatureSet(() if stats is None else (stats,), theirs)
    described = Match(request.match.extractor, stats, request.match.origin).describe()
    for metric in dict.fromkeys(METRICS[name] for name in request.metrics):
        keys = {key: name for key, name in request.keys.items() if METRICS[name] is metric}
        found = measure(list(dict.fromkeys(keys.values())), own, other, track)
        by_images = metric.reference == "features" or request.match.stats is None
        origin = {**described, "images": len(theirs)} if theirs is not None and by_images else described
        yield {key: found[name] for key, name in keys.items()}, origin, time.perf_counter() - began
        began = time.perf_counter()


def sums(rows: Rows, span: range, identity: Identity, bound: float | None) -> FeatureStats | ExactStats:
    """Returns the sums of a range of features, added in the order of their indices, a thousand at a time.

    Args:
        rows: the features.
        span: their indices.
        identity: of the extractor.
        bound: of the exact sums; None means those in float64.
    """
    found: FeatureStats | ExactStats = (
        FeatureStats.empty(rows.shape[1], identity)
        if bound is None
        else ExactStats.empty(rows.shape[1], identity, bound=bound)
    )
    for low in range(span.start, span.stop, _READ):
        found.update(rows[low : min(low + _READ, span.stop)])
    return found


def largest(rows: Rows) -> float:
    """Returns the least power of two that no feature exceeds: a function of the set of features, whatever their order."""
    most = max(float(rows[low : low + _READ].abs().max()) for low in range(0, len(rows), _READ))
    mantissa, exponent = math.frexp(most)
    return 1.0 if most == 0 else 2.0 ** (exponent - (mantissa == 0.5))


def record(figure: Figure, identity: Identity, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a figure's details with its extractor and reference, as values of JSON."""
    return {"extractor": dict(identity), "reference": dict(reference), **provenance.describe(dict(figure.details))}

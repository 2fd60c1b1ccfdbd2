"""The metrics of sets of features by name: what each needs to be collected, and how it is computed from that.

A harness asks `required` what to collect in its one sampling pass, sums of chunks or features on disk, and `measure` for figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flowkit.eval.cmmd import cmmd
from flowkit.eval.frechet import FrechetReference, jackknife_distances
from flowkit.eval.inception_score import inception_score, inception_score_adm
from flowkit.eval.infinity import fid_infinity
from flowkit.eval.intervals import Figure, jackknife
from flowkit.eval.kid import kid, kid_subsets
from flowkit.eval.neighbours import neighbours
from flowkit.eval.spool import Rows
from flowkit.eval.statistics import Accumulator, merged


class Track(Protocol):
    """Passes on what it is given and may show progress, as ``rich.progress.Progress.track`` does."""

    def __call__(self, sequence: Iterable[float], *, total: float, description: str) -> Iterable[float]:
        """Returns an iterable over the same values."""


@dataclass(eq=False)
class FeatureSet:
    """What was collected of one set of images with one extractor; parts that no metric asked for are left out.

    Attributes:
        chunks: sums of the features ("moments"), cut in the order of the images; a reference has one chunk.
        features: the vectors themselves.
        logits: of the extractor's classifier.
    """

    chunks: Sequence[Accumulator] = ()
    features: Rows | None = None
    logits: Rows | None = None

    @functools.cached_property
    def gaussian(self) -> FrechetReference:
        """The moments of all chunks, factored once for any number of comparisons."""
        return FrechetReference.of(merged(self.chunks).stats())

    def has(self, part: str) -> bool:
        """Tells whether "moments", "features" or "logits" were collected."""
        return bool(len(self.chunks)) if part == "moments" else getattr(self, part) is not None


Compute = Callable[[Collection[str], FeatureSet, FeatureSet, Track], Mapping[str, Figure]]


@dataclass(frozen=True)
class Metric:
    """Figures that are computed together.

    Attributes:
        names: of the figures.
        samples: what it needs of the samples: "moments", "features" or "logits".
        reference: what it needs of the reference: "moments" or "features"; None for none.
        compute: from the names wanted, samples, reference and progress to figures by name, at least those wanted.
    """

    names: tuple[str, ...]
    samples: str
    reference: str | None
    compute: Compute


def _frechet(wanted: Collection[str], samples: FeatureSet, reference: FeatureSet, track: Track) -> dict[str, Figure]:
    chunks, gaussian = samples.chunks, reference.gaussian
    terms = gaussian.terms_of(merged(chunks).stats(), overwrite=True)
    figure = Figure(terms.distance)
    if len(chunks) > 1:
        left_out = jackknife_distances(chunks, gaussian)
        figure = jackknife(terms.distance, track(left_out, total=len(chunks), description="standard error"))
    figures = {"fid": Figure(figure.value, figure.se, {**figure.details, "terms": terms._asdict()})}
    if "fid_infinity" in wanted:
        figures["fid_infinity"] = fid_infinity(chunks, gaussian, figure.se)
    return figures


def _pairwise(function: Callable[[Rows, Rows], Mapping[str, Figure]]) -> Compute:
    def compute(
        wanted: Collection[str], samples: FeatureSet, reference: FeatureSet, track: Track
    ) -> Mapping[str, Figure]:
        return function(_present(samples.features), _present(reference.features))

    return compute


def _scored(name: str, function: Callable[[Rows], Figure]) -> Compute:
    def compute(wanted: Collection[str], samples: FeatureSet, reference: FeatureSet, track: Track) -> dict[str, Figure]:
        return {name: function(_present(samples.logits))}

    return compute


def _present(rows: Rows | None) -> Rows:
    if rows is None:
        raise ValueError("features or logits were not collected; call `measure`, which says for which metric")
    return rows


def _cmmd(x: Rows, y: Rows) -> dict[str, Figure]:
    figure = cmmd(x, y)
    return {"cmmd": figure, "cmmd_unbiased": Figure(figure.details["unbiased"], figure.se, figure.details)}


_ALL = (
    Metric(("fid", "fid_infinity"), "moments", "moments", _frechet),
    Metric(("kid",), "features", "features", _pairwise(lambda x, y: {"kid": kid(x, y)})),
    Metric(("kid_subsets",), "features", "features", _pairwise(lambda x, y: {"kid_subsets": kid_subsets(x, y)})),
    Metric(("precision", "recall", "density", "coverage"), "features", "features", _pairwise(neighbours)),
    Metric(("cmmd", "cmmd_unbiased"), "features", "features", _pairwise(_cmmd)),
    Metric(("is",), "logits", None, _scored("is", inception_score)),
    Metric(("is_adm",), "logits", None, _scored("is_adm", inception_score_adm)),
)
# By the name of a figure. "fid" is the Frechet distance in whatever features: FD-DINOv2 and sFID are other extractors.
METRICS: Mapping[str, Metric] = {name: metric for metric in _ALL for name in metric.names}
_HIGHER_IS_BETTER = {"is", "is_adm", "precision", "recall", "density", "coverage", "clip", "accuracy"}


def lower_is_better(key: str) -> bool:
    """Tells the direction of a figure by its key, "METRIC" or "METRIC/EXTRACTOR"; costs and unknown ones are better low."""
    return key.partition("/")[0] not in _HIGHER_IS_BETTER


def required(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Returns what must be collected of the samples and of the reference: "moments", "features", "logits".

    Raises:
        ValueError: for an unknown name.
    """
    metrics = list(_chosen(names))
    return {m.samples for m in metrics}, {m.reference for m in metrics if m.reference is not None}


def measure(
    names: Collection[str], samples: FeatureSet, reference: FeatureSet | None = None, track: Track | None = None
) -> dict[str, Figure]:
    """Computes figures from what was collected.

    Args:
        names: of `METRICS`, in the order in which they are returned.
        samples: what `required` says of the samples.
        reference: the same of the reference, of the same extractor; None where no metric needs one.
        track: shows the progress of the standard error; None shows nothing.

    Returns:
        The figures by name.

    Raises:
        ValueError: for an unknown name, or where something that a metric needs was not collected.
    """
    metrics, reference = list(_chosen(names)), reference or FeatureSet()
    for metric in metrics:
        for side, part, what in ((samples, metric.samples, "samples"), (reference, metric.reference, "reference")):
            if part is not None and not side.has(part):
                raise ValueError(f"{metric.names[0]} needs the {part} of the {what}, which are not there; collect them "
                                 "(`required`), or leave the metric out")  # fmt: skip
    figures: dict[str, Figure] = {}
    for metric in metrics:
        figures.update(metric.compute(names, samples, reference, track or _silent))
    return {name: figures[name] for name in names}


def _chosen(names: Iterable[str]) -> Iterator[Metric]:
    """Each metric once, in the order of its first name."""
    seen: list[Metric] = []
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; choose {', '.join(METRICS)}")
        if METRICS[name] not in seen:
            seen.append(METRICS[name])
    yield from seen


def _silent(sequence: Iterable[float], *, total: float, description: str) -> Iterable[float]:
    return sequence

"""What samples are compared with: embedded statistics, a file, or statistics in memory, each matched with its extractor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from flowkit import assets, weights
from flowkit.eval import features, formats
from flowkit.eval.features import ClassifierExtractor, FeatureExtractor, PixelExtractor
from flowkit.eval.statistics import FeatureStats, as_moments

Reference = str | PathLike[str] | FeatureStats
Extractor = str | FeatureExtractor


@dataclass(frozen=True)
class Match:
    """An extractor and the statistics that its features are compared with.

    Attributes:
        extractor: makes the samples' features.
        stats: of the reference.
        origin: where the reference comes from: "embedded digits", a path, or "in memory".
    """

    extractor: FeatureExtractor
    stats: FeatureStats
    origin: str

    def describe(self) -> dict[str, object]:
        """Returns origin, count, hash and extractor of the reference, for the record; None means unknown."""
        identity = self.stats.identity
        return {
            "origin": self.origin,
            "count": self.stats.count,
            "sha256": self.stats.sha256(),
            "extractor": "unknown, taken to be the one above" if identity is None else dict(identity),
        }


def match(
    reference: Reference | Sequence[Reference],
    extractor: Extractor | Sequence[Extractor] | None,
    device: torch.device | str = "cpu",
) -> list[Match]:
    """Returns a reference for each extractor, checked to be made by it as far as the reference says.

    Args:
        reference: "digits" or "shapes" (embedded); a path to statistics of ours or of another tool, see
            `flowkit.eval.formats`; a `FeatureStats`; or a list with one for each extractor.
        extractor: a name that `flowkit.eval.features.create` knows or an extractor; a list of them; None means the reference's
            own: the classifier of an embedded one, and "fid-tf" for another tool's file, which does not say.
        device: where extractors given by name compute.

    Raises:
        FileNotFoundError: for a reference or weights that are not there.
        ValueError: where reference and extractor do not belong together.
    """
    extractors: list[Extractor | None] = _listed(extractor, 1)
    references: list[Reference] = _listed(reference, len(extractors))
    if not extractors or len(references) != len(extractors):
        raise ValueError(
            f"got {len(references)} references for {len(extractors)} extractors; give one, or one for each"
        )
    return [_match(r, e, device) for r, e in zip(references, extractors, strict=True)]


def _listed(value: Any, count: int) -> list[Any]:  # noqa: ANN401
    """A list as it is, one value as often as asked for."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _match(reference: Reference, extractor: Extractor | None, device: torch.device | str) -> Match:
    origin, candidates = _load(reference)
    known = [stats.identity for stats in candidates if stats.identity is not None]
    if extractor is None and not known and not origin.endswith(formats.FOREIGN):
        raise ValueError(f"the reference ({origin}) does not say which extractor made it; pass extractor=")
    if extractor is None:
        extractor = features.create(known[0] if known else {"name": "fid-tf"}, device)
    elif isinstance(extractor, str):
        own = [identity for identity in known if identity["name"] == extractor]
        extractor = features.create(own[0] if own else {"name": extractor}, device)
    wrong = [None if s.identity is None else features.difference(s.identity, extractor.identity) for s in candidates]
    fitting = [s for s, reason in zip(candidates, wrong, strict=True) if reason is None]
    # Files of other tools hold statistics of several extractors without saying which; their dimension tells them apart.
    stats = next((s for s in fitting if s.dim == extractor.dim), fitting[0] if fitting else None)
    if stats is None:
        found = " and ".join(reason for reason in wrong if reason is not None)
        raise ValueError(f"the reference ({origin}) was not made by the extractor {extractor.name!r}: {found}; use the same "
                         "extractor for both")  # fmt: skip
    if stats.dim != extractor.dim:
        raise ValueError(f"the reference ({origin}) has {stats.dim} features, the extractor {extractor.name!r} {extractor.dim}; "
                         "use the same extractor for both")  # fmt: skip
    as_moments(stats.mean, stats.covariance(), f"{origin}: ")
    return Match(extractor, stats, origin)


def _load(reference: Reference) -> tuple[str, list[FeatureStats]]:
    """Where the reference comes from, and its statistics, the default first."""
    if isinstance(reference, FeatureStats):
        return "in memory", [reference]
    if isinstance(reference, str) and reference in assets.NAMES:
        return f"embedded {reference}", embedded(reference)
    path = Path(reference)
    if not path.exists() and not path.suffix:
        raise FileNotFoundError(
            f"no reference {str(path)!r}; choose {', '.join(assets.NAMES)}, or a .safetensors or .npz file"
        )
    return str(path), formats.read_statistics(path)


def embedded(dataset: str) -> list[FeatureStats]:
    """Returns the statistics of an embedded data set's held-out images: classifier features, then pixels.

    Raises:
        ValueError: for an unknown data set, or statistics made with another classifier than the one beside them.
    """
    path = assets.folder(dataset) / "reference.safetensors"
    classifier = ClassifierExtractor(dataset)
    if weights.read(path)[1].get("classifier_sha256") != classifier.identity["weights"]:
        raise ValueError(
            f"{path} was made with another classifier; run examples/build_assets.py {dataset} --part reference"
        )
    pixels = PixelExtractor(channels=classifier.network.image_shape[0])
    return [
        replace(FeatureStats.load(path, prefix=f"{extractor.name}."), identity=extractor.identity)
        for extractor in (classifier, pixels)
    ]

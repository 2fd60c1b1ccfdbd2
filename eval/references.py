"""What samples are compared with: embedded statistics, a file, or statistics in memory, each matched with its extractor."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from flowkit import assets, weights
from flowkit.eval import features, formats
from flowkit.eval.features import ClassifierExtractor, FeatureExtractor, PixelExtractor
from flowkit.eval.images import Images, images
from flowkit.eval.statistics import FeatureStats, as_moments

Reference = Any  # a name, a path, FeatureStats, Images, or what `flowkit.eval.images.images` opens; None for none
Extractor = str | FeatureExtractor


@dataclass(frozen=True)
class Match:
    """An extractor, and what its features are compared with.

    Attributes:
        extractor: makes the samples' features.
        stats: of the reference; None where they are to be made from its images, or where there is no reference.
        origin: where the reference comes from: "embedded digits", a path, "in memory", "images", or "none".
        images: of the reference; None where there are none.
    """

    extractor: FeatureExtractor
    stats: FeatureStats | None
    origin: str
    images: Images | None = None

    def describe(self) -> dict[str, object]:
        """Returns origin, count, hash and extractor of the reference, for the record; None means unknown."""
        if self.stats is None:
            return {"origin": self.origin}
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
            `flowkit.eval.formats`; a `FeatureStats`; images: a folder, .zip, .tar or .npz, a tensor, a data set, or
            `flowkit.eval.images.Images`; None for none; or a list with one for each extractor. An .npz may hold both, mu and sigma
            and images, as ADM's do.
        extractor: a name that `flowkit.eval.features.create` knows or an extractor; a list of them; None means the reference's
            own: the classifier of an embedded one, and "fid-tf" for another tool's file, which does not say, and for images.
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
    origin, candidates, found = _load(reference)
    known = [stats.identity for stats in candidates if stats.identity is not None]
    silent = reference is not None and found is None and not origin.endswith(formats.FOREIGN)
    if extractor is None and not known and silent:
        raise ValueError(f"the reference ({origin}) does not say which extractor made it; pass extractor=")
    if extractor is None:
        extractor = features.create(known[0] if known else {"name": "fid-tf"}, device)
    elif isinstance(extractor, str):
        own = [identity for identity in known if identity["name"] == extractor]
        extractor = features.create(own[0] if own else {"name": extractor}, device)
    # Statistics of another extractor are no obstacle where the images are there; those of its namesake with other settings are.
    if not candidates or (found is not None and all(i["name"] != extractor.name for i in known) and known):
        return Match(extractor, None, origin, found)
    wrong = [None if s.identity is None else features.difference(s.identity, extractor.identity) for s in candidates]
    fitting = [s for s, reason in zip(candidates, wrong, strict=True) if reason is None]
    # Files of other tools hold statistics of several extractors without saying which; their dimension tells them apart.
    stats = next((s for s in fitting if s.dim == extractor.dim), fitting[0] if fitting else None)
    if stats is None:
        why = " and ".join(reason for reason in wrong if reason is not None)
        raise ValueError(f"the reference ({origin}) was not made by the extractor {extractor.name!r}: {why}; use the same "
                         "extractor for both")  # fmt: skip
    if stats.dim != extractor.dim:
        raise ValueError(f"the reference ({origin}) has {stats.dim} features, the extractor {extractor.name!r} {extractor.dim}; "
                         "use the same extractor for both")  # fmt: skip
    as_moments(stats.mean, stats.covariance(), f"{origin}: ")
    return Match(extractor, stats, origin, found)


def _load(reference: Reference) -> tuple[str, list[FeatureStats], Images | None]:
    """Where the reference comes from, its statistics, the default first, and its images."""
    if reference is None:
        return "none", [], None
    if isinstance(reference, FeatureStats):
        return "in memory", [reference], None
    if isinstance(reference, Images):
        return str(reference.description.get("path", "images")), [], reference
    if isinstance(reference, str) and reference in assets.NAMES:
        stats = embedded(reference)
        return f"embedded {reference}", stats, _held_out(reference, stats[0].count)
    if not isinstance(reference, (str, PathLike)):
        return "images", [], images(reference)
    path = Path(reference)
    if not path.exists() and not path.suffix:
        raise FileNotFoundError(
            f"no reference {str(path)!r}; choose {', '.join(assets.NAMES)}, a .safetensors or .npz file, or a folder of images"
        )
    if path.is_dir() or path.suffix in (".zip", ".tar"):
        return str(path), [], images(path)
    arrays = _arrays(path) if path.suffix == ".npz" else {"mu"}
    found = images(path) if "arr_0" in arrays else None
    return str(path), formats.read_statistics(path) if "mu" in arrays or found is None else [], found


def _held_out(dataset: str, count: int | None) -> Images:
    """The images that the embedded statistics are of, drawn when the first is asked for."""
    drawn = functools.cache(lambda: assets.images(dataset, "held-out")[0])
    return Images({"kind": "embedded", "path": dataset, "split": "held-out"}, count, lambda index: drawn()[index])


def _arrays(path: Path) -> set[str]:
    """Names of the arrays of an .npz; none where it cannot be read, which its reader says better."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {Path(name).stem for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


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

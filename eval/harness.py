"""`evaluate`: from a pipeline and a reference to a figure with its standard error and everything needed to repeat it.

Images go from the pipeline through the extractors into statistics, batch by batch; none touches the disk. The samples are cut,
in order, into `CHUNKS` chunks of nearly equal size whose statistics are kept, K d^2 numbers an extractor (20 x 32 MiB for
Inception): together they give the distance, and leaving one out in turn its standard error. Where inputs repeat (labels
``i % 10``), choose N so that a chunk holds whole rounds of them, or the error counts unequal labels as noise.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from flowkit.eval import provenance
from flowkit.eval.features import FeatureExtractor
from flowkit.eval.frechet import FrechetTerms, frechet_terms, jackknife_distances
from flowkit.eval.intervals import jackknife_error
from flowkit.eval.references import Extractor, Reference, match
from flowkit.eval.statistics import FeatureStats, merged
from flowkit.pipelines.sampling import Inputs, as_inputs, sample_images

METRICS = ("fid",)
CHUNKS = 20
# The usual N is 50,000; the bias of a smaller one, about c / N, differs between models and can turn their order.
FEW = 10_000


class Result(Mapping[str, float]):
    """Figures by metric: the first extractor's under the metric's name ("fid"), others' as "fid/pixels".

    Attributes:
        se: standard errors under the same keys: sampling noise by the jackknife, for the reference as it is; NaN where there
            are fewer than 4 images.
        spec: what was measured and how, ready for JSON: everything needed to repeat it.
        images: the first ``keep`` samples, uint8 (keep, C, H, W).
    """

    def __init__(
        self, figures: Mapping[str, float], se: Mapping[str, float], spec: Mapping[str, Any], images: Tensor
    ) -> None:
        self._figures, self.se, self.spec, self.images = dict(figures), dict(se), dict(spec), images

    def __getitem__(self, key: str) -> float:
        """Returns the figure of a metric."""
        return self._figures[key]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the metrics."""
        return iter(self._figures)

    def __len__(self) -> int:
        """Returns the number of figures."""
        return len(self._figures)

    def __repr__(self) -> str:
        """Shows figures, standard errors and the number of images."""
        figures = ", ".join(f"{key}={value:.4g}±{self.se[key]:.2g}" for key, value in self.items())
        return f"Result({figures}, num_images={self.spec['samples']['count']})"


def evaluate(
    pipe: Any,  # noqa: ANN401
    reference: Reference | Sequence[Reference],
    num_images: int,
    metrics: Sequence[str] = METRICS,
    extractor: Extractor | Sequence[Extractor] | None = None,
    seed: int = 0,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    keep: int = 0,
    progress: bool = True,
) -> Result:
    """Samples from a pipeline and measures the Frechet distance to a reference.

    Args:
        pipe: a diffusers pipeline that returns images.
        reference: "digits" or "shapes" (embedded: held-out images); a path to .safetensors statistics of ours or an .npz with
            mu and sigma; a `FeatureStats`; or a list with one for each extractor.
        num_images: number of samples N, at least 2. Figures of different N do not compare.
        metrics: "fid", the Frechet distance in whatever features.
        extractor: "classifier", "pixels", "fid-tf", or any `FeatureExtractor`; a list of them shares one sampling pass. None
            means the reference's own, "fid-tf" for an .npz that does not say.
        seed: of the run; sample i has its own seed from (seed, i).
        inputs: arguments of each sample, cycled when there are fewer: prompts or labels, dicts, or index -> dict; see
            `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all samples, e.g. ``dict(num_inference_steps=8)``.
        batch_size: images per call of the pipeline; it does not change them.
        keep: how many of the first images to return.
        progress: show a bar with the time left.

    Returns:
        Figures, standard errors, record and images.

    Raises:
        FileNotFoundError: for a reference or weights that are not there.
        TypeError: for arguments that the pipeline does not take.
        ValueError: for an unknown metric, too few images, a reference of another extractor, or images that are not finite.
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if unknown := [m for m in metrics if m not in METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r}; choose {', '.join(METRICS)}")
    if not metrics or num_images < 2 or keep < 0:
        raise ValueError(f"got metrics={metrics}, num_images={num_images}, keep={keep}; at least one metric and 2 images are "
                         "needed, and keep must not be negative")  # fmt: skip
    matches = match(reference, extractor, pipe.device)
    names = [m.extractor.name for m in matches]
    if len(set(names)) < len(names):
        raise ValueError(f"extractors share a name ({', '.join(names)}), so their figures would too; give each its own")
    batches = sample_images(pipe, num_images, seed=seed, inputs=inputs, call=call, batch_size=batch_size)
    if num_images < FEW:
        warnings.warn(f"a Frechet distance of {num_images:,} images is biased upwards; compare it only with others of the same "
                      f"number, and use {FEW:,} or more for figures to quote", stacklevel=2)  # fmt: skip

    keys = ["fid", *(f"fid/{name}" for name in names[1:])]
    figures, se, features = {}, {}, {}
    with _bar(progress) as bar:
        with count_rows(pipe) as rows:
            stats, images, seconds = _sample(batches, [m.extractor for m in matches], num_images, keep, bar)
        for key, one, chunks in zip(keys, matches, stats, strict=True):
            began = time.perf_counter()
            terms, se[key] = _measure(chunks, one.stats, bar, key)
            figures[key] = terms.distance
            seconds[key] = time.perf_counter() - began
            features[key] = {
                "extractor": dict(one.extractor.identity),
                "reference": one.describe(),
                "terms": terms._asdict(),
            }
    spec = {
        "samples": {
            "count": num_images,
            "seed": seed,
            "seeds": "torch.Generator('cpu').manual_seed(flowkit.rng.sample_seed(seed, index)) for each sample",
            "inputs_sha256": provenance.hash_inputs(as_inputs(pipe, inputs), num_images),
            "call": provenance.describe(call or {}),
            "batch_size": batch_size,
        },
        "pipeline": provenance.describe_pipeline(pipe),
        "features": features,
        "network_evaluations": rows() / num_images if rows() else None,
        "seconds": seconds,
        "versions": provenance.versions(),
    }
    return Result(figures, se, spec, images)


def _sample(
    batches: Iterable[Tensor], extractors: Sequence[FeatureExtractor], count: int, keep: int, bar: Progress
) -> tuple[list[list[FeatureStats]], Tensor, dict[str, float]]:
    """The one pass: statistics by extractor and chunk, the first ``keep`` images, and seconds spent."""
    chunks = max(1, min(CHUNKS, count // 2))
    bounds = [count * k // chunks for k in range(chunks + 1)]
    stats = [[FeatureStats.empty(e.dim, e.identity) for _ in range(chunks)] for e in extractors]
    task, kept, done = bar.add_task("sampling", total=count), [], 0
    began, extracting = time.perf_counter(), 0.0
    for batch in batches:
        came = time.perf_counter()
        for extractor, own in zip(extractors, stats, strict=True):
            features = extractor(batch)
            for chunk, low, high in zip(own, bounds[:-1], bounds[1:], strict=True):
                chunk.update(features[max(0, low - done) : max(0, high - done)])
        kept.append(batch[: max(0, keep - done)])
        done += len(batch)
        bar.update(task, completed=done)
        extracting += time.perf_counter() - came
    sampling = time.perf_counter() - began - extracting
    return stats, torch.cat(kept), {"sampling": sampling, "features": extracting}


def _measure(
    chunks: Sequence[FeatureStats], reference: FeatureStats, bar: Progress, key: str
) -> tuple[FrechetTerms, float]:
    """The distance of all chunks together, and its standard error."""
    total = merged(chunks)
    terms = frechet_terms(reference.mean, reference.covariance(), total.mean, total.covariance())
    if len(chunks) < 2:
        return terms, math.nan
    distances = jackknife_distances(chunks, reference)
    return terms, jackknife_error(bar.track(distances, total=len(chunks), description=f"error of {key}"))


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


def _bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)

"""`evaluate`: from samples and a reference to figures with standard errors and everything needed to repeat them.

Images go from their source through the extractors into features on disk, in blocks of sample indices (`flowkit.eval.runs`); no image
touches the disk. One process then reads the features in the order of their indices and measures. So the samples, the batches that
networks see and the order of every sum depend on the arguments alone: not on the number of processes, nor on stops and resumptions.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowkit.eval import provenance, runs
from flowkit.eval.collect import Slot, collect
from flowkit.eval.measuring import CHUNKS, Request, check_counts, measure_all, plan
from flowkit.eval.processes import Processes
from flowkit.eval.references import Extractor, Match, Reference
from flowkit.eval.results import Result
from flowkit.eval.runs import Spools
from flowkit.eval.sources import ImageSource, Source, device_of, open_source
from flowkit.eval.sources import count_rows as count_rows
from flowkit.pipelines.sampling import Inputs

# The usual N is 50,000; the bias of a smaller one, about c / N, differs between models and can turn their order.
FEW = 10_000


def evaluate(
    pipe: Any,  # noqa: ANN401
    reference: Reference | Sequence[Reference] = None,
    num_images: int | None = None,
    metrics: str | Sequence[str] = ("fid",),
    extractor: Extractor | Sequence[Extractor] | None = None,
    seed: int = 0,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    keep: int = 0,
    progress: bool = True,
    exact: bool = False,
    output: str | PathLike[str] | None = None,
    resume: bool = True,
) -> Result:
    """Measures samples against a reference, with standard errors and a record.

    Started by ``accelerate launch`` or ``torchrun``, all processes call it with the same arguments, share the work and get the same
    result; the main one prints and writes.

    The same arguments give the same figures bit for bit on any number of processes, and however often the run was stopped and gone on
    with, where the networks give the same bits for the same batch (one kind of machine, one version of torch). ``exact`` adds sums
    without rounding, so that the order of the features does not count either: see `flowkit.eval.exact`.

    Args:
        pipe: a diffusers pipeline that returns images; or images: a folder, .zip, .tar or .npz, a tensor, a data set, a function of an
            index, an iterable of batches, or `flowkit.eval.images.Images`, which also says how files are decoded and floats rounded.
        reference: "digits" or "shapes" (embedded: held-out images); a file of statistics, ours or another tool's; a `FeatureStats`;
            images, as above; None where no metric needs one; or a list with one for each extractor. KID, CMMD, precision, recall,
            density and coverage need images.
        num_images: number of samples N, at least 2; figures of different N do not compare. None means all images, or 50,000 of a
            pipeline.
        metrics: names of `flowkit.eval.metrics.METRICS`, measured with every extractor; "METRIC/EXTRACTOR" is measured with that one
            alone, which need not be in ``extractor``. The figure of "kid" is "kid" for the first extractor and "kid/NAME" for others.
        extractor: a name that `flowkit.eval.features.create` knows, or any `FeatureExtractor`; a list of them shares one pass. None
            means the reference's own, and "fid-tf" where it does not say or is images.
        seed: of the pipeline's noise; sample i has its own from (seed, i).
        inputs: arguments of each sample, cycled when there are fewer: prompts or labels, dicts, or index -> dict; see
            `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all samples, e.g. ``dict(num_inference_steps=8)``.
        batch_size: images at a time. Networks round differently in other batches, so it is part of what makes the figure.
        keep: how many of the first images to return.
        progress: show how far it is, and the time left.
        exact: sums of whole numbers, at the cost of one more pass over the features and of rounding them to 2^-20 of their range.
        output: folder of the run, which all processes must see; a run that was stopped there goes on, and one that is finished is
            measured again without drawing anything, also with more metrics. None uses a temporary folder.
        resume: go on with the run in ``output``; False refuses a folder that holds one.

    Returns:
        Figures, standard errors, record and images.

    Raises:
        FileNotFoundError: for a source, a reference or weights that are not there.
        OSError: for a disk without room for the features.
        TypeError: for arguments that the source does not take.
        ValueError: for an unknown metric, too few images, a reference that does not fit, a folder with another run, processes with
            different arguments; and for images or features that are not finite.
    """
    began = time.perf_counter()
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics or (num_images is not None and num_images < 2) or keep < 0:
        raise ValueError(f"got metrics={metrics}, num_images={num_images}, keep={keep}; at least one metric and 2 images are "
                         "needed, and keep must not be negative")  # fmt: skip
    device = device_of(pipe)
    processes = Processes.join(device)
    job = processes.agree(lambda: _prepare(pipe, reference, num_images, metrics, extractor, seed, inputs, call, batch_size, device,
                                           processes))  # fmt: skip
    if processes.main and job.source.count < FEW and any("fid" in r.metrics for r in job.requests):
        warnings.warn(f"a Frechet distance of {job.source.count:,} images is biased upwards; compare it only with others of the "
                      f"same number, and use {FEW:,} or more for figures to quote", stacklevel=2)  # fmt: skip
    settings = _agreed_settings(job, processes)
    with _folder(output, processes) as folder, _bar(progress and processes.main) as bar:
        if processes.main or processes.count > 1:
            processes.agree(lambda: runs.open_run(folder, settings, resume or output is None) if processes.main else None)
        spools = processes.agree(lambda: _collect_all(job, folder, keep, processes, bar))
        result = processes.share(
            processes.agree(
                lambda: _measure(job, spools, folder, settings, exact, processes, bar, began) if processes.main else None
            )
        )
    assert result is not None
    return result


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        source: of the samples.
        requests: by extractor.
        references: images that references are made from, by name of the extractor.
    """

    source: Source
    requests: Sequence[Request]
    references: Mapping[str, ImageSource]

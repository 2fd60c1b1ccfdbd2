"""`evaluate`: from samples and a reference to figures with standard errors and everything needed to repeat them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from flowkit.eval.collect import Slot
from flowkit.eval.features import FeatureExtractor
from flowkit.eval.job import carry_out, check_alike, check_whole, collect_share, plans_of, prepare, run_folder
from flowkit.eval.measuring import largest, plan, sums
from flowkit.eval.processes import Processes
from flowkit.eval.references import Extractor, Reference, match
from flowkit.eval.results import Result as Result
from flowkit.eval.sources import Source, device_of, open_source
from flowkit.eval.sources import count_rows as count_rows
from flowkit.eval.statistics import FeatureStats
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar as progress_bar

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

    The same arguments give the same figures bit for bit on any number of processes, and however often the run was stopped and
    resumed, where the networks give the same bits for the same batch (one kind of machine, one version of torch). ``exact`` adds
    sums without rounding, so that the order of the features does not count either: see `flowkit.eval.exact`.

    Args:
        pipe: a diffusers pipeline that returns images; or images: a folder, .zip, .tar or .npz, a tensor, a data set, a function
            of an index, an iterable of batches, or `flowkit.eval.images.Images`, which says how files and floats are read.
        reference: "digits" or "shapes" (embedded: held-out images); a file of statistics, ours or another tool's; a `FeatureStats`;
            images, as above; None where no metric needs one; or a list with one for each extractor. KID, CMMD, precision, recall,
            density and coverage need images.
        num_images: number of samples N, at least 2; figures of different N do not compare. None means all images, or 50,000 of a
            pipeline.
        metrics: names of `flowkit.eval.metrics.METRICS`, measured with every extractor; "METRIC/EXTRACTOR" is measured with that
            one alone, which need not be in ``extractor``. The key of "kid" is "kid" for the first extractor, "kid/NAME" for others.
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
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics or (num_images is not None and num_images < 2) or keep < 0:
        raise ValueError(f"got metrics={metrics}, num_images={num_images}, keep={keep}; at least one metric and 2 images are "
                         "needed, and keep must not be negative")  # fmt: skip
    processes = Processes.join(device_of(pipe))
    sampling = {"seed": seed, "inputs": inputs, "call": call}
    device = device_of(pipe)
    job = processes.agree(
        lambda: prepare(pipe, plan(metrics, reference, extractor, device), num_images, batch_size, sampling, processes)
    )
    if processes.main and job.source.count < FEW and any("fid" in r.metrics for r in job.requests):
        warnings.warn(f"a Frechet distance of {job.source.count:,} images is biased upwards; compare it only with others of the "
                      f"same number, and use {FEW:,} or more for figures to quote", stacklevel=2)  # fmt: skip
    with progress_bar(progress and processes.main) as bar:
        return carry_out(job, processes, bar, output, resume, keep, exact)


def make_statistics(
    source: Any,  # noqa: ANN401
    extractor: Extractor | None = None,
    num_images: int | None = None,
    like: Reference = None,
    seed: int = 0,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    progress: bool = True,
    exact: bool = False,
) -> FeatureStats:
    """Returns the statistics of images, to be saved and passed to `evaluate` as a reference.

    Args:
        source: images or a pipeline, as for `evaluate`, as are the others.
        extractor: one. None means that of ``like``, or "fid-tf".
        num_images: how many; None means all, or 50,000 of a pipeline.
        like: a reference whose extractor is used.
        seed: of a pipeline's noise.
        inputs: arguments of each sample.
        call: arguments of all.
        batch_size: images at a time.
        progress: show how far it is.
        exact: sums without rounding.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `evaluate`.
    """
    processes = Processes.join(device_of(source))

    def opened() -> tuple[Source, FeatureExtractor]:
        own = match(like, extractor, device_of(source))[0].extractor
        return open_source(source, num_images, seed, inputs, call, batch_size), own

    images, own = processes.agree(opened)
    check_alike(processes.gather({"samples": images.describe(), "extractor": dict(own.identity)}))
    with run_folder(None, processes) as folder, progress_bar(progress and processes.main) as bar:
        (one,) = processes.agree(lambda: plans_of([(None, images, [Slot(own)])], folder))
        processes.agree(lambda: collect_share(one, processes, bar))
        processes.agree(lambda: check_whole([one]) if processes.main else None)
        rows = one.spools.features[own.name]
        bound = largest(rows) if exact else None
        stats = sums(rows, range(len(rows)), dict(own.identity), bound).stats()
        processes.wait()
    return stats

"""`evaluate`: from samples and a reference to figures with standard errors and everything needed to repeat them.

Images go from their source through the extractors into features on disk, in blocks of sample indices (`flowkit.eval.runs`); no
image touches the disk. One process then reads the features in the order of their indices and measures. So the samples, the batches
that networks see and the order of every sum depend on the arguments alone, not on the number of processes or on stops.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from flowkit.eval import provenance, runs
from flowkit.eval.collect import Slot, collect
from flowkit.eval.features import FeatureExtractor
from flowkit.eval.measuring import Request, check_counts, largest, measure_all, plan, record, sums
from flowkit.eval.processes import Processes
from flowkit.eval.references import Extractor, Reference, match
from flowkit.eval.results import Result as Result
from flowkit.eval.runs import Spools
from flowkit.eval.sources import ImageSource, Source, device_of, open_source
from flowkit.eval.sources import count_rows as count_rows
from flowkit.eval.statistics import FeatureStats
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar as progress_bar

# The usual N is 50,000; the bias of a smaller one, about c / N, differs between models and can turn their order.
FEW = 10_000
# Seconds of waiting that are worth a word.
NOTABLE = 10


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
    began = time.perf_counter()
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics or (num_images is not None and num_images < 2) or keep < 0:
        raise ValueError(f"got metrics={metrics}, num_images={num_images}, keep={keep}; at least one metric and 2 images are "
                         "needed, and keep must not be negative")  # fmt: skip
    processes = Processes.join(device_of(pipe))
    sampling = {"seed": seed, "inputs": inputs, "call": call}
    job = processes.agree(
        lambda: _prepare(pipe, reference, num_images, metrics, extractor, batch_size, sampling, processes)
    )
    if processes.main and job.source.count < FEW and any("fid" in r.metrics for r in job.requests):
        warnings.warn(f"a Frechet distance of {job.source.count:,} images is biased upwards; compare it only with others of the "
                      f"same number, and use {FEW:,} or more for figures to quote", stacklevel=2)  # fmt: skip
    settings = processes.agree(lambda: _settings(job))
    _check_alike(processes.gather(settings))
    with _folder(output, processes) as folder, progress_bar(progress and processes.main) as bar:
        if processes.main or processes.count > 1:
            fresh = resume or output is None
            processes.agree(lambda: runs.open_run(folder, settings, fresh) if processes.main else None)
        # What is missing is looked up in all processes before any fills a gap.
        plans = processes.agree(lambda: _spools(_sets(job), folder, keep))
        for one in plans:
            processes.agree(lambda one=one: _collect(one, processes, bar))  # type: ignore[misc]
        processes.agree(lambda: _check_whole(plans) if processes.main else None)
        result = processes.agree(
            lambda: (
                _measure(job, plans, folder, settings, exact, processes.count, bar, began) if processes.main else None
            )
        )
        shared = processes.share(result)
        if shared is not None and output is not None and processes.main:
            shared.save(folder / runs.RESULT)
        processes.wait()
    return cast(Result, shared)


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

    def prepare() -> tuple[Source, FeatureExtractor]:
        own = match(like, extractor, device_of(source))[0].extractor
        return open_source(source, num_images, seed, inputs, call, batch_size), own

    images, own = processes.agree(prepare)
    _check_alike(processes.gather({"samples": images.describe(), "extractor": dict(own.identity)}))
    with _folder(None, processes) as folder, progress_bar(progress and processes.main) as bar:
        (one,) = processes.agree(lambda: _spools([(None, images, [Slot(own)])], folder))
        processes.agree(lambda: _collect(one, processes, bar))
        processes.agree(lambda: _check_whole([one]) if processes.main else None)
        rows = one.spools.features[own.name]
        bound = largest(rows) if exact else None
        stats = sums(rows, range(len(rows)), dict(own.identity), bound).stats()
        processes.wait()
    return stats


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


def _prepare(
    pipe: Any,  # noqa: ANN401
    reference: Any,  # noqa: ANN401
    num_images: int | None,
    metrics: Sequence[str],
    extractor: Any,  # noqa: ANN401
    batch_size: int,
    sampling: Mapping[str, Any],
    processes: Processes,
) -> Job:
    """Opens everything and checks that it fits together, before anything is drawn."""
    requests = plan(metrics, reference, extractor, device_of(pipe))
    source = open_source(pipe, num_images, batch_size=batch_size, **sampling)
    if source.count < 2:
        raise ValueError(f"num_images={source.count} is too few; statistics need at least 2 images")
    references = {
        r.name: ImageSource(r.match.images, None, batch_size)
        for r in requests
        if r.needs_reference_images() and r.match.images is not None
    }
    for request in requests:
        theirs = references.get(request.name)
        check_counts(request, source.count, None if theirs is None else theirs.count)
        for slot in request.slots():
            slot.network()
    if processes.count > 1 and not all(s.divisible for s in (source, *references.values())):
        raise ValueError("images that are read once, in order, cannot be shared by processes; pass a data set, a folder or a "
                         "function of the index, or use one process")  # fmt: skip
    return Job(source, requests, references)


def _settings(job: Job) -> dict[str, Any]:
    """What the run depends on."""
    names = [r.name for r in job.requests]
    images = {name: source.describe() for name, source in job.references.items()}
    samples = job.source.describe()
    if "pipeline" in samples:
        # Processes differ in its number.
        samples["pipeline"]["device"] = samples["pipeline"]["device"].partition(":")[0]
    return {
        "samples": samples,
        "extractors": {r.name: dict(r.match.extractor.identity) for r in job.requests},
        "references": {
            name: {"statistics": r.match.stats and r.match.stats.sha256(), "images": images.get(name)}
            for name, r in zip(names, job.requests, strict=True)
        },
        "versions": provenance.versions(),
    }


def _check_alike(settings: Sequence[Mapping[str, Any]]) -> None:
    """Refuses processes that were given different arguments: the same refusal in all of them."""
    for rank, other in enumerate(settings):
        if found := provenance.first_difference(settings[0], other):
            place, here, there = found
            raise ValueError(
                f"process {rank} has {place} {there!r:.80}, process 0 has {here!r:.80}; give all the same arguments"
            )


@dataclass(frozen=True)
class Plan:
    """A set of images to collect: the samples (name None), or an extractor's reference."""

    name: str | None
    source: Source
    slots: Sequence[Slot]
    spools: Spools
    missing: Sequence[int]


_Set = tuple[str | None, Source, Sequence[Slot]]


def _sets(job: Job) -> list[_Set]:
    """The references and then the samples."""
    slots = [slot for request in job.requests for slot in request.slots()]
    references = [
        (r.name, job.references[r.name], [Slot(r.match.extractor)]) for r in job.requests if r.name in job.references
    ]
    return [*references, (None, job.source, slots)]


def _spools(sets: Sequence[_Set], folder: Path, keep: int = 0) -> list[Plan]:
    """What of the sets is missing in a folder."""
    plans = []
    for name, source, slots in sets:
        place = folder / ("samples" if name is None else f"reference-{runs.file_name(name)}")
        kinds = {slot.name: slot.kind() for slot in slots}
        spools = Spools(place, source.count, source.batch_size, kinds, keep if name is None else 0)
        plans.append(Plan(name, source, slots, spools, spools.missing()))
    runs.check_space(folder, [one.spools for one in plans])
    return plans


def _collect(plan: Plan, processes: Processes, bar: Progress) -> None:
    """This process's share of what is missing."""
    mine = plan.missing[processes.rank :: processes.count]
    title = "sampling" if plan.name is None else f"reference ({plan.name})"
    title += f", process 1 of {processes.count}" if processes.count > 1 else ""
    total = sum(len(plan.spools.blocks[k]) for k in mine)
    if total:
        collect(plan.source, plan.slots, plan.spools, mine, _shown(bar, title, total))


def _check_whole(plans: Sequence[Plan]) -> None:
    for spools in (one.spools for one in plans):
        if absent := spools.missing():
            raise ValueError(f"{len(absent)} of {len(spools.blocks)} blocks are not in {spools.folder}; all processes must see the "
                             "same folder: pass one that they share as output=")  # fmt: skip


def _shown(bar: Progress, title: str, total: int) -> Callable[[int], None]:
    """Returns what counts images on a bar, and says after the first batch how long all will take."""
    task, began, count = bar.add_task(title, total=total), time.perf_counter(), 0

    def done(images: int) -> None:
        nonlocal count
        first, count = count == 0, count + images
        bar.update(task, completed=count)
        seconds = time.perf_counter() - began
        whole = seconds * total / count
        if first and not bar.disable and whole - seconds > NOTABLE:
            time_needed = f"{whole / 60:.0f} min" if whole > 100 else f"{whole:.0f} s"
            bar.console.print(f"{title}: the first {count:,} images took {seconds:.1f} s, all {total:,} will take about "
                              f"{time_needed}", highlight=False)  # fmt: skip

    return done


def _measure(
    job: Job,
    plans: Sequence[Plan],
    folder: Path,
    settings: Mapping[str, Any],
    exact: bool,
    world: int,
    bar: Progress,
    began: float,
) -> Result:
    """Figures and record."""
    spools = {one.name: one.spools for one in plans}
    entries = spools[None].entries()
    figures, se, features = {}, {}, {}
    seconds = {part: math.fsum(e["seconds"][part] for e in entries) for part in ("sampling", "features")}
    for request in job.requests:
        theirs = spools.get(request.name)
        for found, reference, spent in measure_all(request, spools[None], theirs, folder, exact, bar.track):
            seconds[next(iter(found))] = spent
            for key, figure in found.items():
                figures[key], se[key] = figure.value, figure.se
                features[key] = record(figure, request.match.extractor.identity, reference)
    shutil.rmtree(folder / "chunks", ignore_errors=True)
    samples = dict(settings["samples"])
    pipeline = samples.pop("pipeline", None)
    if pipeline is not None:
        pipeline = {**pipeline, "scheduler": {**pipeline["scheduler"], **entries[0]["levels"]}}
    rows = sum(e["rows"] for e in entries)
    spec = {
        "samples": {**samples, "sha256": hashlib.sha256("".join(e["sha256"] for e in entries).encode()).hexdigest()},
        "pipeline": pipeline,
        "metrics": list(figures),
        "features": features,
        "exact": exact,
        "network_evaluations": rows / job.source.count if rows else None,
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - began,
        "processes": world,
        "versions": settings["versions"],
    }
    return Result(figures, se, spec, spools[None].kept())


@contextmanager
def _folder(output: str | PathLike[str] | None, processes: Processes) -> Iterator[Path]:
    """The run's folder: the given one, or a temporary one that all processes of this machine see."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="flowkit-") if processes.main else nullcontext("") as own:
        folder = Path(processes.share(own))
        yield folder

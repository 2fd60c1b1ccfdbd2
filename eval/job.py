"""One evaluation, from its parts to its result: collect what is missing in the run's folder, then measure.

Images go from their source through the extractors into features on disk, in blocks of sample indices (`flowkit.eval.runs`); no
image touches the disk. One process then reads the features in the order of their indices and measures. So the samples, the batches
that networks see and the order of every sum depend on the arguments alone, not on the number of processes or on stops.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from flowkit.eval import provenance, runs
from flowkit.eval.collect import Slot, collect
from flowkit.eval.measuring import Request, check_counts, measure_all, record
from flowkit.eval.processes import Processes
from flowkit.eval.results import Result
from flowkit.eval.runs import Spools
from flowkit.eval.sources import ImageSource, Source, open_source

# Seconds of waiting that are worth a word.
NOTABLE = 10


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


def prepare(
    pipe: Any,  # noqa: ANN401
    requests: Sequence[Request],
    num_images: int | None,
    batch_size: int,
    sampling: Mapping[str, Any],
    processes: Processes,
) -> Job:
    """Opens the source and checks that everything fits together, before anything is drawn.

    Args:
        pipe: a pipeline or images, as the other arguments as `flowkit.eval.harness.evaluate` takes it.
        requests: from `flowkit.eval.measuring.plan`.
        num_images: number of samples; None means all, or 50,000 of a pipeline.
        batch_size: images at a time.
        sampling: seed, inputs and call.
        processes: that share the work.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """
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


def carry_out(
    job: Job,
    processes: Processes,
    bar: Progress,
    output: str | PathLike[str] | None = None,
    resume: bool = True,
    keep: int = 0,
    exact: bool = False,
    references: Path | None = None,
) -> Result:
    """Collects what is missing, measures, and returns the result in all processes.

    Args:
        job: from `prepare`, the same in all processes.
        processes: that share the work.
        bar: shows how far it is.
        output: folder of the run; None means a temporary one.
        resume: go on with the run in ``output``.
        keep: how many of the first images to return.
        exact: sums of whole numbers.
        references: folder that runs share for the references' features; None means the run's own.

    Raises:
        OSError: for a disk without room.
        ValueError: for a folder with another run, or processes with different arguments.
    """
    began = time.perf_counter()
    settings = processes.agree(lambda: _settings(job))
    check_alike(processes.gather(settings))
    with run_folder(output, processes) as folder:
        if processes.main or processes.count > 1:
            fresh = resume or output is None
            processes.agree(lambda: runs.open_run(folder, settings, fresh) if processes.main else None)
        # What is missing is looked up in all processes before any fills a gap.
        plans = processes.agree(lambda: plans_of(_sets(job), folder, keep, references))
        for one in plans:
            processes.agree(lambda one=one: collect_share(one, processes, bar))  # type: ignore[misc]
        processes.agree(lambda: check_whole(plans) if processes.main else None)
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


def check_alike(settings: Sequence[Mapping[str, Any]]) -> None:
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


ImageSet = tuple[str | None, Source, Sequence[Slot]]


def _sets(job: Job) -> list[ImageSet]:
    """The references and then the samples."""
    slots = [slot for request in job.requests for slot in request.slots()]
    references = [
        (r.name, job.references[r.name], [Slot(r.match.extractor)]) for r in job.requests if r.name in job.references
    ]
    return [*references, (None, job.source, slots)]


def plans_of(sets: Sequence[ImageSet], folder: Path, keep: int = 0, references: Path | None = None) -> list[Plan]:
    """Returns what of the sets is missing in a folder.

    Args:
        sets: name, source and what is extracted; the samples have no name.
        folder: of the run.
        keep: of the first samples to keep as they are.
        references: folder that runs share for the references' features; None means the run's own.
    """
    plans = []
    for name, source, slots in sets:
        kinds = {slot.name: slot.kind() for slot in slots}
        place = folder / "samples"
        if name is not None:
            place = (references or folder) / f"reference-{runs.file_name(name)}"
        if name is not None and references is not None:  # other images, or read otherwise, go elsewhere
            what = json.dumps([source.describe(), kinds, provenance.versions()], sort_keys=True)
            place = place.with_name(f"{place.name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}")
        spools = Spools(place, source.count, source.batch_size, kinds, keep if name is None else 0)
        plans.append(Plan(name, source, slots, spools, spools.missing()))
    runs.check_space(folder, [one.spools for one in plans])
    return plans


def collect_share(plan: Plan, processes: Processes, bar: Progress) -> None:
    """Collects this process's share of what is missing."""
    mine = plan.missing[processes.rank :: processes.count]
    title = "sampling" if plan.name is None else f"reference ({plan.name})"
    title += f", process 1 of {processes.count}" if processes.count > 1 else ""
    total = sum(len(plan.spools.blocks[k]) for k in mine)
    if total:
        collect(plan.source, plan.slots, plan.spools, mine, _shown(bar, title, total))


def check_whole(plans: Sequence[Plan]) -> None:
    """Refuses what other processes wrote where this one cannot see it."""
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
def run_folder(output: str | PathLike[str] | None, processes: Processes) -> Iterator[Path]:
    """Yields the run's folder: the given one, or a temporary one that all processes of this machine see."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="flowkit-") if processes.main else nullcontext("") as own:
        folder = Path(processes.share(own))
        yield folder

"""``flowkit sample``: from a model and inputs to a folder of samples.

The samples are cut into blocks of fixed indices. One call of the pipeline draws a block, one process has it, and its files are
written when it is done; so any number of processes, killed at any moment, leave the same files in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import typer
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object, parse_flag_from_env  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowkit import assets, weights
from flowkit.cli import USER_ERRORS, media, options, store
from flowkit.cli.options import Options, Request
from flowkit.eval.provenance import describe, versions
from flowkit.pipelines import loading, swap
from flowkit.pipelines.sampling import blocks, check_arguments, parameters, sample_outputs
from flowkit.progress import duration
from flowkit.weights import check_writable

_BATCH = {"video": 1, "sound": 1}
_HOW = {"class_labels": "--labels 0-9", "prompt": "--prompt TEXT", "image": "--arg image=FILE"}
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """All that a run needs.

    Attributes:
        pipe: the pipeline with its scheduler, on its device.
        request: inputs and arguments.
        kind: what the pipeline makes.
        blocks: of all samples.
        settings: what ``sample.json`` says.
        store: the folder.
        rate: frames a second, or Hz of sound.
    """

    pipe: Any
    request: Request
    kind: media.Kind
    blocks: list[range]
    settings: dict[str, Any]
    store: store.Store
    rate: int


def run(given: Options) -> None:
    """Samples, or goes on with what an earlier run with the same options left.

    Raises:
        ValueError, TypeError, OSError, ImportError: for options, a model or a folder that cannot be used, before anything is
            sampled; while sampling, for samples that are not finite, too little memory, or a full disk.
    """
    state = join(given.device)
    console = Console(stderr=True, quiet=not state.is_main_process)
    if state.num_processes > 1:  # one downloads, the others find it there
        agreed(state, lambda: loading.find(given.model, given.variant) if state.is_main_process else None)
    job = agreed(state, lambda: prepare(given, state.device, console))
    agreed(state, lambda: job.store.open(job.settings, given.overwrite) if state.is_main_process else None)
    absent = job.store.missing(job.blocks)
    state.wait_for_everyone()  # before anyone fills a gap that another has yet to see
    mine = absent[state.process_index :: state.num_processes]
    began = time.perf_counter()
    title = f"process 1 of {state.num_processes}" if state.num_processes > 1 else "sampling"
    with store.disk_full_told(given.output):
        draw(job, mine, given.seed, console, title)
        state.wait_for_everyone()
        if state.is_main_process:
            overview = job.store.finish(job.blocks, _labels(job))
            _report(job, sum(map(len, absent)), time.perf_counter() - began, overview)
    if state.num_processes > 1:
        state.destroy_process_group()


def prepare(given: Options, here: torch.device, console: Console) -> Job:
    """Reads the options, loads the model and checks that it can do what is asked.

    Args:
        given: the options.
        here: the device of this process.
        console: for what goes on.
    """
    check_writable(given.output)
    pipe, request, source, device = open_model(given, here, console)
    kind = media.kind(pipe)
    file_format = media.choose_format(type(pipe).__name__, kind, given.file_format)
    count = given.count if given.count is not None else len(request.rows)
    size = given.batch_size or _BATCH.get(kind) or (4 if "prompt" in request.rows[0] else 16)
    indices = range(given.start, given.start + count)
    settings = {
        "model": given.model,
        "revision": source.revision,
        "variant": given.variant,
        "weights": source.fingerprint,
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": _described(getattr(pipe, "scheduler", None)),
        "call": describe(request.call),
        "seed": given.seed,
        "start": given.start,
        "count": count,
        "batch_size": size,
        "file_format": file_format,
        "samples": [options.describe_sample(request, given.seed, i) for i in indices],
        "device": str(device),
        "versions": versions(),
    }
    rate = given.fps if kind == "video" else media.sampling_rate(pipe) if kind == "sound" else 0
    if given.lora is not None:
        settings["lora"] = weights.fingerprint(loading.lora_files(given.lora))
    if kind == "video":
        settings["fps"] = rate
    cut = blocks(pipe, count, inputs=request.rows, batch_size=size, start=given.start)
    return Job(pipe, request, kind, cut, settings, store.Store(given.output, file_format, indices), rate)


def open_model(
    given: Options, here: torch.device, console: Console
) -> tuple[Any, Request, loading.Source, torch.device]:
    """Reads the options, loads the model with its scheduler, and checks that it takes what is asked.

    Args:
        given: the options.
        here: the device of this process.
        console: for what goes on.

    Returns:
        The pipeline on its device, inputs and arguments, where the model came from, and the device.
    """
    request = options.read(given)
    device = loading.choose_device(given.device, here)
    dtype = loading.choose_dtype(given.dtype, device)
    if given.offload and device.type != "cuda":
        raise ValueError(
            f"--offload moves networks to a GPU when they are needed, and the device is {device}; leave it out"
        )
    source = loading.find(given.model, given.variant)
    request = _as_student(source.folder if given.lora is None else given.lora, request)
    scheduler: Any = None
    if given.lora is not None:
        loading.lora_files(given.lora)
        scheduler = loading.own_scheduler(given.lora)
    current = loading.scheduler_config(source) if scheduler is None else scheduler
    if current is not None:  # a wrong name is cheaper to find before the weights are read
        swap.make(current, given.scheduler, request.knobs, given.eta)
    console.print(f"loading {given.model} ({source.pipeline})", highlight=False)
    pipe = for_task(loading.load(source, dtype, given.variant), request)
    if given.lora is not None:
        loading.load_lora(pipe, given.lora)
        pipe.scheduler = pipe.scheduler if scheduler is None else scheduler
    if source.name in assets.NAMES and device.type == "cpu":
        torch.set_num_threads(1)  # so small a network gains nothing from more
    request = _scheduled(pipe, given, request)
    _check_inputs(pipe, request)
    if given.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe, request, source, device


def _as_student(folder: Path, request: Request) -> Request:
    """The request with the arguments that a distilled student is called with, where others are not given."""
    call = loading.student_call(folder)
    if "grid" in request.knobs:
        call.pop("num_inference_steps", None)
    own = {name for row in request.rows for name in row}
    call = {name: value for name, value in call.items() if name not in own}
    return Request(request.rows, {**call, **request.call}, request.knobs)


def for_task(pipe: Any, request: Request) -> Any:  # noqa: ANN401
    """Returns the pipeline, or its sibling for image-to-image or inpainting where pictures are given that it does not take."""
    names = {name for row in request.rows for name in row} | request.call.keys()
    if "image" not in names or "image" in parameters(pipe):
        return pipe
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting  # they import every pipeline there is

    kind = AutoPipelineForInpainting if "mask_image" in names else AutoPipelineForImage2Image
    try:
        return kind.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(
            f"{type(pipe).__name__} takes no image, and diffusers has no sibling of it that does"
        ) from error


def _scheduled(pipe: Any, given: Options, request: Request) -> Request:  # noqa: ANN401
    """Puts the scheduler in; returns the request with the arguments that go with it."""
    call = dict(request.call)
    current = getattr(pipe, "scheduler", None)
    if current is None:
        if given.scheduler != "keep" or request.knobs or given.eta is not None:
            raise ValueError(f"{type(pipe).__name__} has no scheduler to change; pass --scheduler keep")
        return request
    pipe.scheduler = scheduler = swap.make(current, given.scheduler, request.knobs, given.eta)
    steps = swap.steps(scheduler, call.get("num_inference_steps"))
    if steps is not None:
        call["num_inference_steps"] = steps
    if given.eta is not None and scheduler.config.get("eta") != given.eta:
        call["eta"] = given.eta
    return Request(request.rows, call, request.knobs)


def _check_inputs(pipe: Any, request: Request) -> None:  # noqa: ANN401
    """Refuses what the pipeline does not take, and what it lacks."""
    name, known = type(pipe).__name__, parameters(pipe)
    top = _classes(pipe)
    for number, row in enumerate(request.rows):
        taken = row.keys() | request.call.keys()
        if "output_type" in taken:
            raise TypeError("output_type cannot be given: --format says what is written")
        needed = [
            k for k, p in known.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if "prompt" in known and not taken & {"image", "video"}:
            needed.append("prompt")
        if lacking := [k for k in needed if k not in taken and k != "generator"]:
            how = _HOW.get(lacking[0], f"--arg {lacking[0]}=VALUE")
            raise TypeError(f"{name} needs {lacking[0]}; pass {how}")
        check_arguments(pipe, row, request.call)
        label = row.get("class_labels")
        if top is not None and label is not None and not (isinstance(label, int) and 0 <= label < top):
            raise ValueError(f"input {number} has the class label {label!r}; {name} has classes 0 to {top - 1}")


def _classes(pipe: Any) -> int | None:  # noqa: ANN401
    """Number of classes of a class-conditional model; None where it does not say."""
    if hasattr(pipe, "num_classes"):
        return int(pipe.num_classes)
    for part, key in (("transformer", "num_embeds_ada_norm"), ("unet", "num_class_embeds")):
        found = getattr(getattr(pipe, part, None), "config", {}).get(key)
        if found is not None:
            return int(found)
    return None


def draw(job: Job, mine: Sequence[range], seed: int, console: Console, title: str) -> None:
    """Samples blocks and writes each when it is done.

    Args:
        job: the run.
        mine: the blocks of this process.
        seed: of the run.
        console: for the bar, with the time left.
        title: of the bar.
    """
    total, done, number, began = sum(map(len, mine)), 0, 0, time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console.quiet or not mine) as bar, memory_told():
        task = bar.add_task(title, total=total)

        def on_step(part: float) -> None:
            bar.update(task, completed=done + part * len(mine[number]))

        inputs, call = job.request.inputs(), job.request.call
        for block, output in sample_outputs(job.pipe, mine, seed=seed, inputs=inputs, call=call, on_step=on_step):
            samples = media.content(output, job.kind, block)
            flagged = getattr(output, "nsfw_content_detected", None) or ()
            if black := [str(i) for i, flag in zip(block, flagged, strict=False) if flag]:
                bar.console.print(f"the model's safety checker blacked out {', '.join(black)}")
            if number == 0 and job.kind == "video" and getattr(output, "audio", None) is not None:
                bar.console.print("the sound of the videos is not written")
            job.store.write(block, samples, job.rate, [_note(job, index) for index in block])
            done, number = done + len(block), number + 1
            bar.update(task, completed=done)
            seconds = time.perf_counter() - began
            if number == 1 and (rest := seconds * (total / done - 1)) > 10:
                bar.console.print(
                    f"the first {done} took {duration(seconds)}, all will take {duration(seconds + rest)}"
                )


def _note(job: Job, index: int) -> dict[str, Any]:
    """What a PNG says about itself."""
    scheduler = job.settings["scheduler"] or {}
    return {
        **job.settings["samples"][index - job.settings["start"]],
        "model": job.settings["model"],
        "scheduler": scheduler.get("class"),
        "solver": scheduler.get("solver"),
        "call": job.settings["call"],
        "flowkit": job.settings["versions"]["flowkit-diffusion"],
    }


def _described(scheduler: Any) -> dict[str, Any] | None:  # noqa: ANN401
    if scheduler is None:
        return None
    method = getattr(scheduler, "method", None)
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return {"class": type(scheduler).__name__, "solver": getattr(method, "name", None), "config": describe(config)}


def _labels(job: Job) -> list[int] | None:
    """The class of each sample, where all have one."""
    labels = [row.get("class_labels") for row in job.settings["samples"]]
    return None if None in labels else labels


def _report(job: Job, drawn: int, seconds: float, overview: Path | None) -> None:
    """The closing line."""
    count, folder = job.settings["count"], job.store.folder
    noun = job.kind if count == 1 else f"{job.kind}s"
    speed = (
        f"{drawn} drawn in {duration(seconds)}, {drawn / seconds:.3g} a second" if drawn else "all were there already"
    )
    look = f"; overview: {overview}" if overview else ""
    typer.echo(f"{count} {noun} in {folder} ({speed}){look}")


@contextmanager
def memory_told() -> Iterator[None]:
    """Says what to do where the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            "the device has too little memory; use a smaller --batch-size, --dtype bfloat16 or --offload"
        ) from error


def join(device: str) -> PartialState:
    """Returns this process among those that a launcher started with it; one alone without a launcher."""
    # Without a GPU accelerate joins processes only where it is told that the CPU is meant; blocks of video take long.
    cpu = device == "cpu" or not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def agreed(state: PartialState, work: Callable[[], _Result]) -> _Result:
    """Does work in all processes; where it fails in any, none goes on, and the main one says why."""
    if state.num_processes == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except USER_ERRORS as caught:
        error = caught
    failures = [text for text in gather_object([None if error is None else str(error)]) if text is not None]
    if failures and state.is_main_process:
        raise error or ValueError(f"another process failed: {failures[0]}")
    if failures:
        raise typer.Exit(2)
    return cast(_Result, result)

"""What ``flowkit distill`` does: options and file to `flowkit.distill.run`, and how to use what came out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from flowkit import assets
from flowkit.cli.evaluation import one_voice
from flowkit.cli.options import Options, Request, assignments
from flowkit.cli.sample import join, memory_told, open_model
from flowkit.distill import distillation, runs, watch
from flowkit.distill.card import CARD
from flowkit.distill.method import Method
from flowkit.distill.settings import Training
from flowkit.distill.shards import Trajectories
from flowkit.distill.student import LoRA
from flowkit.eval.references import match
from flowkit.pipelines import ClassConditionalPipeline, loading
from flowkit.weights import check_writable

_SETTINGS = tuple(field.name for field in fields(Training))


@dataclass(frozen=True)
class Job:
    """What is to be done, checked as far as it can be before a model is loaded; None means the default.

    Attributes:
        method: with its options.
        how: the teacher and its inputs.
        training: its settings.
        lora: adapters; None for all weights.
        samples: of the teacher.
        real: real images beside them.
        pairs: an earlier recording.
        reference: of the Fréchet distance.
        num_images: of each.
        overwrite: whether what an earlier run left goes.
    """

    method: Method
    how: Options
    training: Training
    lora: LoRA | None
    samples: int | None
    real: str | None
    pairs: Path | None
    reference: str | None
    num_images: int
    overwrite: bool


def run(method: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Carries out ``flowkit distill METHOD``.

    Args:
        method: name of the method.
        own: those of its options that are given.
        given: the options of all methods, see `flowkit.cli.distill`; None where they are not.

    Raises:
        ValueError, TypeError, OSError, ImportError: for a file, options, a model or a folder that cannot be used, before anything
            is recorded; and as `flowkit.distill.run`.
    """
    job = prepare(method, own, given)
    state = join(job.how.device)
    console = Console(stderr=True, quiet=not state.is_main_process)
    with one_voice(state), memory_told():
        pipe, request, _, device = open_model(job.how, state.device, console)
        if job.reference is not None:
            match(job.reference, None, device)
        call = {name: value for name, value in request.call.items() if name != "num_inference_steps"}
        batch = job.how.batch_size or (4 if "prompt" in request.rows[0] else 64)
        runs.run(
            job.method, pipe, request.inputs() if request.rows != [{}] else None, output=job.how.output,
            samples=_samples(job, request), call=call, pairs=job.pairs, lora=job.lora, real=job.real, training=job.training,
            reference=job.reference, num_images=job.num_images, resume=not job.overwrite, seed=job.how.seed, batch_size=batch,
        )  # fmt: skip
        if state.is_main_process:
            _say_how(job, pipe, request)


def prepare(method: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> Job:
    """Puts options and file together, and checks them; options win.

    Raises:
        FileNotFoundError: for a file or a recording that is not there.
        ImportError: for a file, without what reads it; and for a tracker that is not installed.
        ValueError, TypeError: for values that cannot be used.
    """
    fields = {} if given["config"] is None else _read(given["config"], method)
    options = _as_fields(own, given)
    if {"labels", "prompts"} & options.keys():
        fields = {name: value for name, value in fields.items() if name not in ("labels", "prompts")}
    for name, value in options.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    for name, cure in {"model": "name one", "output": "add --output DIR"}.items():
        if name not in fields:
            raise ValueError(f"no {name} is given; {cure}, or write {name}: into the file of --config")
    chosen = runs.METHODS[method](**fields.get("options", {}))
    training = Training(**{**chosen.training, **fields.get("training", {})})
    if training.tracker is not None:
        training.check_tracker()
    output, reference, count = Path(fields["output"]), fields.get("reference"), fields.get("num_images", 2_000)
    check_writable(output)
    if count < 2:
        raise ValueError(f"--num-images {count} is out of range; give at least 2")
    if reference is not None and reference not in assets.NAMES and not Path(reference).exists():
        raise FileNotFoundError(
            f"no reference {reference!r}; choose {', '.join(assets.NAMES)}, a file or a folder of images"
        )
    if "pairs" in fields:
        Trajectories(fields["pairs"])
    lora = LoRA(**fields["lora"]) if "lora" in fields else None
    return Job(
        chosen, _options(fields, output), training, lora, fields.get("samples"), fields.get("real"), fields.get("pairs"),
        reference, count, given["overwrite"] or False,
    )  # fmt: skip


def _read(file: Path, method: str) -> dict[str, Any]:
    """The fields of a file."""
    try:
        from flowkit.cli.distill_file import read
    except ModuleNotFoundError as error:
        if error.name not in ("pydantic", "yaml"):
            raise
        raise ImportError(f'--config needs {error.name}: pip install "flowkit-diffusion[sweep]"') from error
    return read(file, method)


def _as_fields(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as fields of the file."""
    found = {name: value for name, value in given.items() if value is not None and name not in ("config", "overwrite")}
    names = {name: name for name in _SETTINGS} | {"train_batch_size": "batch_size"}
    del names["batch_size"]  # that of the teacher
    training = {field: found.pop(name) for name, field in names.items() if name in found}
    if "profiles" in training:
        training["profiles"] = _numbers(training["profiles"], "--profiles")
    for name, value in assignments(found.pop("setting", ()), "--setting").items():
        if name in training or name not in _SETTINGS:
            why = "is given twice; keep one" if name in training else f"is none; choose {', '.join(_SETTINGS)}"
            raise ValueError(f"--setting {name}={value} {why}")
        if name in ("betas", "profiles") and not isinstance(value, list):
            raise ValueError(f"--setting {name}={value} is no list; write it like {name}=[0.9,0.99]")
        training[name] = tuple(value) if isinstance(value, list) else value
    if "prompt" in found and "prompts" in found:
        raise ValueError("--prompt and --prompts both say what to draw; keep one")
    if "prompt" in found:
        found["prompts"] = found.pop("prompt")
    if "guidance" in found:
        found["guidance_scale"] = found.pop("guidance")
    groups = {
        "call": assignments(found.pop("arg", ()), "--arg"),
        "lora": {"rank": found.pop("lora")} if "lora" in found else {},
        "training": training,
        "options": own,
    }
    return found | {name: dict(values) for name, values in groups.items() if values}


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text!r} is no list of numbers; write it as {option} 0.05,0.1") from error


def _options(fields: Mapping[str, Any], output: Path) -> Options:
    """The fields that ``flowkit sample`` has too."""
    prompts, labels = fields.get("prompts"), fields.get("labels")
    same = ("negative_prompt", "batch_size", "seed", "dtype", "device", "variant")
    return Options(
        model=fields["model"],
        output=output,
        prompts=prompts if isinstance(prompts, list) else (),
        prompts_file=prompts if isinstance(prompts, Path) else None,
        labels=",".join(map(str, labels)) if isinstance(labels, list) else labels,
        guidance=fields.get("guidance_scale"),
        arguments=[f"{name}={json.dumps(value)}" for name, value in fields.get("call", {}).items()],
        scheduler="keep",
        **{name: fields[name] for name in same if name in fields},
    )


def _samples(job: Job, request: Request) -> int | None:
    """Number of the teacher's samples; None for those of a recording."""
    if job.samples is not None or job.pairs is not None:
        return job.samples
    return max(distillation.SAMPLES, len(request.rows))


def _say_how(job: Job, pipe: Any, request: Request) -> None:  # noqa: ANN401
    """What came out, and the lines that put it to use."""
    folder = job.how.output
    call = loading.student_call(folder)
    for course in sorted(folder.glob("training-*"), key=lambda path: int(path.name.partition("-")[2])):
        for row in watch.rows(course)[-1:]:
            typer.echo(f"{course.name}, {_figures(row)}")
    steps = call.pop("num_inference_steps", None)
    if job.method.encodes:
        aim = "for the noise of a sample in one step"
    else:
        aim = f"for {'any number of steps, such as one' if steps is None else _plural(steps)}"
    typer.echo(f"student:   {folder}, {aim}")
    typer.echo(f"figures:   {folder / CARD}")
    if not job.method.encodes:
        typer.echo(f"to sample: {_sampling(job, steps)}")
    kind = "flowkit" if isinstance(pipe, ClassConditionalPipeline) else "diffusers"
    if job.lora is None:
        typer.echo(f'in Python: pipe = {kind}.{type(pipe).__name__}.from_pretrained("{folder}")')
    else:
        typer.echo(f'in Python: pipe.load_lora_weights("{folder}")  # and its scheduler, see {folder / CARD}')
    own = ", ".join(f"{name}=..." for name in request.rows[0])
    if job.method.encodes:
        typer.echo(
            f"           flowkit.distill.invert(pipe, samples, dict({own}), steps=1{f', call={call}' if call else ''})"
        )
        return
    arguments = {"num_inference_steps": steps or 1, **call}
    typer.echo(
        f"           pipe({', '.join([*([own] if own else []), *(f'{k}={v!r}' for k, v in arguments.items())])})"
    )


def _sampling(job: Job, steps: int | None) -> str:
    """The command that samples from a student."""
    model = [str(job.how.output)] if job.lora is None else [job.how.model, "--lora", str(job.how.output)]
    words = ["flowkit", "sample", *model]
    words += ["--labels", job.how.labels] if job.how.labels is not None else []
    words += [word for prompt in job.how.prompts for word in ("--prompt", prompt)]
    words += ["--prompts", str(job.how.prompts_file)] if job.how.prompts_file is not None else []
    words += ["--steps", "1"] if steps is None else []
    return shlex.join([*words, "--output", "samples"])


def _plural(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _figures(row: Mapping[str, float]) -> str:
    """What was measured last."""
    told = [f"after {row['step']:,.0f} updates"]
    if "fd" in row:
        told.append(f"FD {row['fd']:.3g}" + (f" ± {row['fd_se']:.1g}" if "fd_se" in row else ""))
    names = {"rmse": "error to the teacher", "straightness": "straightness"}
    told += [f"{words} {row[name]:.3g}" for name, words in names.items() if name in row]
    return ", ".join(told)

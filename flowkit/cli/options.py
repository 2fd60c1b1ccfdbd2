"""What ``flowkit sample`` was asked for: its options, read and checked before any model is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowkit import rng, solvers
from flowkit.pipelines.requests import IMAGE, read_grid, read_labels, read_prompts, spread

FORMATS = ("png", "npz", "webp", "gif", "mp4", "wav")


@dataclass(frozen=True)
class Options:
    """The options of ``flowkit sample``; None means not given.

    Attributes:
        model: "digits", "shapes", a folder or a hub repository.
        output: folder of the samples.
        prompts: texts, one a sample.
        prompts_file: file of one prompt a line, or (.jsonl) of one dict of pipeline arguments a line.
        negative_prompt: of all samples.
        labels: class labels, such as "0,3,7" or "0-9".
        count: number of samples, >= 1; None means one for each input.
        start: index of the first, >= 0.
        seed: of the run.
        batch_size: samples of a call, >= 1; None means 1 for video and sound, 4 with prompts, 16 otherwise.
        scheduler: "flowkit", "keep", or a class of diffusers.
        solver: for our scheduler.
        grid: for our scheduler, a name or a file.
        steps: denoising steps, >= 1; None means the grid's, or the pipeline's default.
        shift: static shift of the grid.
        eta: noise of stochastic steps.
        guidance: ``guidance_scale``.
        knobs: ``name=value`` for the scheduler.
        arguments: ``name=value`` for the pipeline.
        file_format: one of `FORMATS`; None means png for images, webp for video, wav for sound.
        fps: frames a second of a video.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto" or a name of torch's.
        variant: of the weights.
        offload: whether networks wait on the CPU until they are needed.
        overwrite: whether samples of other settings in the folder are removed.
        lora: file or folder of adapters; the scheduler of a distilled student in it is taken too.
    """

    model: str
    output: Path
    prompts: Sequence[str] = ()
    prompts_file: Path | None = None
    negative_prompt: str | None = None
    labels: str | None = None
    count: int | None = None
    start: int = 0
    seed: int = 0
    batch_size: int | None = None
    scheduler: str = "flowkit"
    solver: str | None = None
    grid: str | None = None
    steps: int | None = None
    shift: float | None = None
    eta: float | None = None
    guidance: float | None = None
    knobs: Sequence[str] = ()
    arguments: Sequence[str] = ()
    file_format: str | None = None
    fps: int = 16
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None
    offload: bool = False
    overwrite: bool = False
    lora: Path | None = None


@dataclass(frozen=True)
class Request:
    """The options as values.

    Attributes:
        rows: pipeline arguments of each input, cycled over the samples; [{}] where there are none.
        call: pipeline arguments of all samples.
        knobs: of the scheduler.
    """

    rows: list[dict[str, Any]]
    call: dict[str, Any]
    knobs: dict[str, Any]

    def inputs(self) -> Callable[[int], dict[str, Any]]:
        """Returns the function from a sample's index to its pipeline arguments, pictures opened."""

        def own(index: int) -> dict[str, Any]:
            return {name: _opened(name, value) for name, value in self.rows[index % len(self.rows)].items()}

        return own


def read(options: Options) -> Request:
    """Reads files, lists and assignments.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for values that are none, or out of range.
        TypeError: for an argument given twice.
    """
    _check_numbers(options)
    if options.lora is not None and not options.lora.exists():
        raise FileNotFoundError(f"no LoRA at {options.lora}; check the path")
    knobs = assignments(options.knobs, "--knob")
    grid = None if options.grid is None else read_grid(options.grid)
    for name, value in {"solver": options.solver, "shift": options.shift, "grid": grid}.items():
        if value is not None:
            _once(name, knobs, "--knob")
            knobs[name] = value
    if options.solver is not None:
        solvers.find(options.solver)
    call = assignments(options.arguments, "--arg")
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    for name, value in {**given, "negative_prompt": options.negative_prompt}.items():
        if value is not None:
            _once(name, call, "--arg")
            call[name] = value
    rows, call = spread(_rows(options), call)
    for name, value in {(n, v) for row in rows for n, v in row.items() if isinstance(v, str) and IMAGE.fullmatch(n)}:
        if not Path(value).is_file():
            raise FileNotFoundError(f"no picture at {value!r}, given as {name}; check the path")
    return Request(rows, call, knobs)


def _check_numbers(options: Options) -> None:
    least = {"count": 1, "start": 0, "batch_size": 1, "steps": 1, "fps": 1}
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range; give at least {low}")
    if options.file_format not in (None, *FORMATS):
        raise ValueError(f"unknown --format {options.file_format!r}; choose {', '.join(FORMATS)}")


def _rows(options: Options) -> list[dict[str, Any]]:
    given = {"--prompt": options.prompts, "--prompts": options.prompts_file, "--labels": options.labels}
    named = [name for name, value in given.items() if value]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} both say what to draw; keep one")
    if options.prompts_file is not None:
        return read_prompts(options.prompts_file)
    if options.labels is not None:
        return [{"class_labels": label} for label in read_labels(options.labels)]
    return [{"prompt": prompt} for prompt in options.prompts] or [{}]


def assignments(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """Reads ``name=value``, the value as JSON where it is, else as text.

    Raises:
        ValueError: for anything else.
        TypeError: for a name given twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name.isidentifier():
            raise ValueError(f"{option} {pair!r} is no assignment; write {option} name=value")
        _once(name, found, option)
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _once(name: str, found: dict[str, Any], option: str) -> None:
    if name in found:
        raise TypeError(f"{name} is given twice, once by {option} {name}={found[name]}; keep one")


def _opened(name: str, value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str) or not IMAGE.fullmatch(name):
        return value
    from PIL import Image, ImageOps

    with Image.open(value) as picture:
        return ImageOps.exif_transpose(picture).convert("L" if name == "mask_image" else "RGB")


def describe_sample(request: Request, seed: int, index: int) -> dict[str, Any]:
    """Returns what makes one sample: its index, its seed, and the pipeline arguments of its own."""
    return {"index": index, "seed": rng.sample_seed(seed, index), **request.rows[index % len(request.rows)]}

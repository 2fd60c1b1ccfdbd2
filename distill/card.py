"""The model card of a student: how it was made, how it is used, what it was measured at, and where it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from flowkit.eval.intervals import Figure
from flowkit.grids import Grid
from flowkit.pipelines import ClassConditionalPipeline
from flowkit.pipelines.sampling import parameters
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.weights import write_bytes

CARD = "README.md"
_FOLDER = 'folder = "."  # of this file; or the id on the Hub'


@dataclass(frozen=True)
class Score:
    """A row of the table.

    Attributes:
        name: "student", "teacher" or another.
        steps: that it was sampled with.
        figure: its Frechet distance.
    """

    name: str
    steps: int
    figure: Figure


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        method: of the distillation, "reflow".
        teacher: id on the Hub, folder or name; None where there was none, but data.
        pipeline: class of the pipeline.
        steps: that the student is for.
        updates: of its training.
        example: arguments of a sample, plain values: a prompt, or labels.
        call: arguments shared by all, without the number of steps; ``guidance_scale`` 1 where guidance is baked in.
        component: of the pipeline that was trained.
        output: attribute of the pipeline's result.
        guidance: scale of the guidance that is baked in; None for none.
        pairs: number of the teacher's samples that it learned from; None where it was not taught by samples.
        images: number of images that it was trained on; None for what was distilled. The teacher is then what it began with.
        settings: others, by name.
        lora: file of the adapters; None for a whole pipeline.
        scores: Frechet distances.
        measured: how: extractor, number of images, reference.
        command: that measured them; empty for none.
        picture: file in the folder; None for none, as of ``panel``.
        panel: file of the diagnosis.
        notes: of `flowkit.distill.panel.notes`.
        encoder: whether it maps samples to noise, and draws none.
        license: of the student, as the Hub names it; None where it is not known.
    """

    method: str
    teacher: str | None
    pipeline: str
    steps: int
    updates: int
    example: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    component: str = "unet"
    output: str = "images"
    guidance: float | None = None
    pairs: int | None = None
    images: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora: str | None = None
    scores: Sequence[Score] = ()
    measured: str = ""
    command: str = ""
    picture: str | None = None
    panel: str | None = None
    notes: Sequence[str] = ()
    encoder: bool = False
    license: str | None = None


def write(folder: Path, facts: Facts) -> Path:
    """Writes the card of a student into its folder.

    Args:
        folder: of the student, as saved: its scheduler is read.
        facts: what the card says.

    Returns:
        The file.

    Raises:
        OSError: where the folder has no scheduler.
    """
    parts = [
        f"---\n{_header(facts).to_yaml()}\n---",
        f"# {Path(facts.teacher or facts.pipeline).name} in {_steps(facts.steps)}",
        _summary(facts),
        *([f"![samples of the student]({facts.picture})"] if facts.picture else []),
        *_use(folder, facts),
        *_figures(facts),
        *_made(facts),
        *_limits(facts),
    ]
    file = folder / CARD
    write_bytes(file, ("\n\n".join(parts) + "\n").encode())
    return file


def named(pipe: Any, lora: bool) -> str:  # noqa: ANN401
    """Returns what a pipeline is called: its id on the Hub, or its folder, whose place is nobody's business but a LoRA's."""
    given = getattr(pipe, "name_or_path", None)
    if not given:
        return type(pipe).__name__
    return str(given) if lora or not Path(given).exists() else Path(given).resolve().name


def hub_id(teacher: str) -> str | None:
    """Returns where a teacher came from if that is an id on the Hub, "owner/name", and not a folder here."""
    try:
        validate_repo_id(teacher)
    except HFValidationError:
        return None
    return teacher if "/" in teacher and not Path(teacher).exists() else None


def _header(facts: Facts) -> ModelCardData:
    base = None if facts.teacher is None else hub_id(facts.teacher)
    text = facts.output == "images" and isinstance(facts.example.get("prompt"), str)
    return ModelCardData(
        library_name="diffusers",
        tags=[
            "flowkit",
            *(["few-step"] if facts.images is None else []),
            facts.method,
            *(["lora"] if facts.lora else []),
        ],
        base_model=base,
        license=facts.license,
        pipeline_tag="text-to-image" if text else None,
        base_model_relation=("adapter" if facts.lora else "finetune") if base else None,
    )


def _summary(facts: Facts) -> str:
    what = f"LoRA of {facts.pipeline}" if facts.lora else facts.pipeline
    made = "trained on data" if facts.teacher is None else f"distilled from `{facts.teacher}`"
    if facts.images is not None:
        made = f"trained on {facts.images:,} images" + (f", beginning with `{facts.teacher}`," if facts.teacher else "")
    taught = "" if facts.pairs is None else f" on {facts.pairs:,} of its samples"
    baked = "" if facts.guidance is None else f" Guidance of scale {facts.guidance:g} is baked in."
    return f"A {what} for {_steps(facts.steps)}, {made}{taught} by {facts.method}, with flowkit.{baked}"


def _use(folder: Path, facts: Facts) -> list[str]:
    if facts.encoder:
        shape = "samples as the pipeline's scheduler sees them, (N, ...): images in [-1, 1], or latents"
        return ["## Use", f"With flowkit (`pip install flowkit-diffusion`), on {shape}:", _block(_encode(facts))]
    config = RectifiedFlowScheduler.load_config(folder / "scheduler")
    scheduler = config["_class_name"]
    levels, exact = _stock_levels(config, facts)
    own = facts.pipeline == ClassConditionalPipeline.__name__
    title = "In plain diffusers" + (", without its pipeline, which is flowkit's" if own else "")
    stock = _loop(scheduler, levels, facts) if own else _stock(scheduler, levels, facts)
    advice = [] if exact else [f"Plain diffusers walks other levels than the student was made for: its {scheduler} cannot be put "
                               "on them here. Samples are better with flowkit."]  # fmt: skip
    return ["## Use", "With flowkit (`pip install flowkit-diffusion`), on the solver and the levels that the student was made "
            "for:", _block(_flowkit(facts)), f"{title}:", _block(stock), *advice]  # fmt: skip


def _flowkit(facts: Facts) -> list[str]:
    call = f"images = {_call({**facts.example, 'num_inference_steps': facts.steps, **facts.call}, facts)}"
    if facts.pipeline == ClassConditionalPipeline.__name__:
        return ["import flowkit", "", _FOLDER, f"pipe = flowkit.{facts.pipeline}.from_pretrained(folder)", call]
    scheduler = "flowkit.RectifiedFlowScheduler"
    config = f'{scheduler}.load_config(folder, subfolder="scheduler")' if facts.lora else "pipe.scheduler.config"
    lines = [*_loaded(facts), f"config = {config}", f"pipe.scheduler = {scheduler}.from_config(config)", call]
    return ["import diffusers", "import flowkit", "", *lines]


def _encode(facts: Facts) -> list[str]:
    example = {name: value[0] if isinstance(value, list) else value for name, value in facts.example.items()}
    call = f", call={dict(facts.call)!r}" if facts.call else ""
    line = f"noise = flowkit.distill.invert(pipe, samples, {example!r}, steps=1{call})"
    if facts.pipeline == ClassConditionalPipeline.__name__:
        return ["import flowkit", "", _FOLDER, f"pipe = flowkit.{facts.pipeline}.from_pretrained(folder)", line]
    return ["import diffusers", "import flowkit", "", *_loaded(facts), line]


def _loaded(facts: Facts) -> list[str]:
    if facts.lora is None:
        return [_FOLDER, "pipe = diffusers.DiffusionPipeline.from_pretrained(folder)"]
    return [_FOLDER, f'pipe = diffusers.DiffusionPipeline.from_pretrained("{facts.teacher}")',
            f'pipe.load_lora_weights(folder, weight_name="{facts.lora}")']  # fmt: skip


def _stock(scheduler: str, levels: Mapping[str, Any], facts: Facts) -> list[str]:
    swapped = [f'pipe.scheduler = diffusers.{scheduler}.from_pretrained(folder, subfolder="scheduler")']
    arguments = {**facts.example, **levels, **facts.call}
    return ["import diffusers", "", *_loaded(facts), *(swapped if facts.lora else []),
            f"images = {_call(arguments, facts)}"]  # fmt: skip


def _loop(scheduler: str, levels: Mapping[str, Any], facts: Facts) -> list[str]:
    """Sampling without a pipeline, for the network of a `ClassConditionalPipeline`."""
    # The one class of diffusers without these.
    scaled = scheduler != "FlowMatchEulerDiscreteScheduler"
    x = "scheduler.scale_model_input(x, t)" if scaled else "x"
    return [
        "import diffusers",
        "import torch",
        "",
        _FOLDER,
        'unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")',
        f'scheduler = diffusers.{scheduler}.from_pretrained(folder, subfolder="scheduler")',
        f"scheduler.set_timesteps({_arguments(levels)})",
        f"labels = torch.tensor({facts.example['class_labels']!r})",
        "size = unet.config.sample_size",
        f"x = {'scheduler.init_noise_sigma * ' if scaled else ''}torch.randn(len(labels), unet.config.in_channels, size, size)",
        "for t in scheduler.timesteps:",
        "    with torch.no_grad():",
        f"        output = unet({x}, t, class_labels=labels).sample",
        "    x = scheduler.step(output, t, x).prev_sample",
        "images = (x / 2 + 0.5).clamp(0, 1)",
    ]


def _stock_levels(config: Mapping[str, Any], facts: Facts) -> tuple[dict[str, Any], bool]:
    """What puts the stock scheduler on the student's levels, and whether it does."""
    stock = getattr(diffusers, config["_class_name"]).from_config({k: v for k, v in config.items() if k != "flowkit"})
    ours: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(config)
    steps = {"num_inference_steps": facts.steps}
    try:
        plan = ours.plan(facts.steps, None, None, None)
    except ValueError:  # dynamic shifting: the pipeline gives the levels to either scheduler
        return steps, True
    kind = getattr(diffusers, facts.pipeline, None)
    try:
        ((name, values),) = Grid(tuple(plan.levels), plan.path.name).for_stock(stock).items()
        if isinstance(values, list) and (kind is None or name in parameters(kind)):
            return {name: values}, True
    except ValueError:
        pass
    try:
        stock.set_timesteps(**steps)
    except ValueError:
        return steps, False
    times = stock.timesteps.double().numpy()
    return steps, times.shape == (len(plan.times),) and bool(np.allclose(times, plan.times, atol=1e-3))


def _figures(facts: Facts) -> list[str]:
    if not facts.scores:
        return []
    rows = [f"| {s.name} | {s.steps} | {_figure(s.figure)} |" for s in facts.scores]
    table = "\n".join(["| | steps | Frechet distance |", "|---|---:|---:|", *rows])
    command = [f"```bash\n{facts.command}\n```"] if facts.command else []
    how = (
        f"Lower is better. Measured on {facts.measured}; with standard errors. Only figures of one extractor and one number of "
        "images compare."
    )
    return ["## Figures", table, how, *command]


def _figure(figure: Figure) -> str:
    return f"{figure.value:.4g}" + (f" ± {figure.se:.2g}" if math.isfinite(figure.se) else "")


def _made(facts: Facts) -> list[str]:
    values = {
        "method": facts.method,
        **({} if facts.images is None else {"images": f"{facts.images:,}"}),
        **({} if facts.teacher is None else {"teacher" if facts.images is None else "began with": facts.teacher}),
        **({} if facts.pairs is None else {"pairs of noise and sample": f"{facts.pairs:,}"}),
        "updates": f"{facts.updates:,}",
        "trained": f"adapters (LoRA) of the {facts.component}" if facts.lora else f"the whole {facts.component}",
        **facts.settings,
    }
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
    panel = [f"![loss, gradient, and what was watched while it trained]({facts.panel})"] if facts.panel else []
    return ["## How it was made", "\n".join(["| | |", "|---|---|", *rows]), *panel]


def _limits(facts: Facts) -> list[str]:
    if facts.images is not None:
        lines = [f"It was looked at with {_steps(facts.steps)}: with fewer, samples are worse, and more cost more."]
    else:
        lines = ["It maps samples to their noise, and draws none."] if facts.encoder else []
        lines.append(f"It is made for {_steps(facts.steps)}; with others, or another solver, it was not measured.")
    if facts.images is None and facts.teacher is not None:
        lines.append(
            "It is bounded by its teacher: what that cannot draw, or draws wrongly, this does not draw better."
        )
    if facts.guidance is not None:
        lines.append(f"Guidance of scale {facts.guidance:g} is part of the weights: sample with guidance_scale=1. The scale cannot "
                     "be changed, and a negative prompt does nothing.")  # fmt: skip
    if facts.lora:
        lines.append(f"The adapters fit `{facts.teacher}`; on other models they were not tried.")
    lines += [f"Of its training: {note}." for note in facts.notes]
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _call(arguments: Mapping[str, Any], facts: Facts) -> str:
    return f"pipe({_arguments(arguments)}).{facts.output}"


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _block(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

"""What is known of diffusers' pipelines with our scheduler; tests/test_families.py proves it and writes it into the docs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import diffusers

from flowkit import RectifiedFlowScheduler
from flowkit.schedulers.stock_classes import REFUSED
from flowkit.solvers import SOLVERS

from .tiny import PIPELINES, build, run

# Of the tiny pipelines, those that no scheduler of ours can drive; `CANNOT` says why.
_STUCK = ("mochi", "consistency", "lcm", "sana-sprint", "cosmos2", "sd15-sag")
WORKING = [name for name in PIPELINES if name not in _STUCK]

# They pass sigmas, take the number of calls for the number of steps, and slice by calls times calls: with more than one call a
# step they begin too late.
LATE = ("flux-img2img", "flux-inpaint", "qwen-image-img2img", "qwen-image-inpaint", "z-image-img2img", "chroma-img2img")
# Their noise and input keep the scale 1, which Euler and Heun of diffusers do not expect.
UNSCALED = ("ddpm", "dit", "kandinsky2.2")
PER_TOKEN = ("ltx-condition",)
# They have an argument for timesteps and fail with it: they always pass sigmas too, or set the grid again by number.
DEAF = ("ltx", "ltx-i2v", "bria", "allegro")

NOTES = {
    "ddpm": "stock Heun and UniPC refuse its generator, stock Euler gets noise of the wrong scale",
    "dit": "stock Euler and Heun get noise of the wrong scale",
    "kandinsky2.2": "stock Heun and UniPC refuse its generator, stock Euler gets input of the wrong scale",
    **dict.fromkeys(("ltx", "ltx-i2v", "allegro"), "its argument timesteps fails"),
    "easyanimate": "swap with use_dynamic_shifting=False: the shift is for its own class only",
    "bria": "its argument timesteps fails; swap with use_dynamic_shifting=False: the shift is for its own class only",
    "cogview4": "always passes sigmas and timesteps; of the stock schedulers only FlowMatchEulerDiscreteScheduler takes both",
    "kandinsky5": "overwrites samples in place: stock Heun and UniPC read what was overwritten",
    "ltx-condition": "a model time for each token",
    "ltx2": "a copy of the scheduler drives the sound",
    "sd15-inpaint": "of a text-to-image checkpoint, by a mask at every step",
    "sdxl-inpaint": "of a text-to-image checkpoint, by a mask at every step",
    "sd15-inpaint-9": "of an inpainting checkpoint, whose network sees mask and image",
    "wan2.2": "two networks, by noise level",
    "wan-i2v": "a model time for each token, with every solver",
    "cogvideox": "built in memory, a configuration does not tell its DDIM from its DPM: pass `pipe.scheduler` itself",
    "cogview3-plus": "built in memory, a configuration does not tell its DDIM from its DPM: pass `pipe.scheduler` itself",
    "deepfloyd": "wants variance_type in the scheduler's configuration, as DDPMScheduler has it",
    "stable-audio": "its own CosineDPMSolverMultistepScheduler needs torchsde, ours does not",
    **dict.fromkeys(LATE, "with k calls a step it begins too late: pass 1 - (1 - strength) / k for strength"),
}

# Pipelines made for classes that cannot be imitated.
MADE_FOR = {
    "ConsistencyModelPipeline": "CMStochasticIterativeScheduler",
    **dict.fromkeys(("StableCascadePriorPipeline", "StableCascadeDecoderPipeline"), "DDPMWuerstchenScheduler"),
    **dict.fromkeys(("WuerstchenPriorPipeline", "WuerstchenDecoderPipeline"), "DDPMWuerstchenScheduler"),
    **dict.fromkeys(("AnyFlowPipeline", "AnyFlowFARPipeline"), "FlowMapEulerDiscreteScheduler"),
    **dict.fromkeys(("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"), "AmusedScheduler"),
    "VQDiffusionPipeline": "VQDiffusionScheduler",
    "LLaDA2Pipeline": "BlockRefinementScheduler",
    "DiffusionGemmaPipeline": "BlockRefinementScheduler",
    "KarrasVePipeline": "KarrasVeScheduler",
    "ScoreSdeVePipeline": "ScoreSdeVeScheduler",
    "RePaintPipeline": "RePaintScheduler",
    "RFD4ProteinaPipeline": "RFD4ProteinaScheduler",
}

_PRIOR = "passes prev_timestep to step"
# What they read of their scheduler, and only some stock classes have.
READ = {
    "TextToVideoZeroPipeline": "alphas",
    "TextToVideoZeroSDXLPipeline": "alphas",
    "StableDiffusionParadigmsPipeline": "batch_step_no_noise",
}

# Classes of diffusers -> why our scheduler cannot drive them.
CANNOT: dict[str, str] = {
    "DDIMPipeline": "puts a DDIMScheduler in the place of any scheduler",
    **dict.fromkeys(
        ("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL"),
        "puts a DPMSolverMultistepScheduler in the place of all but that and DDIMScheduler",
    ),
    "LongCatAudioDiTPipeline": "puts a FlowMatchEulerDiscreteScheduler in the place of any other; its flow runs from 0 to 1",
    "MochiPipeline": "its flow runs from 0 to 1 (invert_sigmas=True)",
    "StableDiffusionSAGPipeline": "takes schedulers by the names of their classes",
    "LTXI2VLongMultiPromptPipeline": "leaves out the last timestep, which only LTXEulerAncestralRFScheduler has at the terminal",
    "Cosmos2TextToImagePipeline": "passes rising sigmas, which stand for levels up to 80, and edits those of its scheduler",
    **dict.fromkeys(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        "passes original_inference_steps to set_timesteps",
    ),
    **dict.fromkeys(("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), "passes max_timesteps to set_timesteps"),
    **dict.fromkeys(("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"), "passes pred_original_sample to step"),
    "HeliosPyramidPipeline": "passes is_amplify_first_chunk to set_timesteps, for a pyramid of sizes",
    **dict.fromkeys(("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"), _PRIOR),
    **dict.fromkeys(("UnCLIPPipeline", "UnCLIPImageVariationPipeline"), _PRIOR),
    **{pipeline: f"reads {name} of a stock class" for pipeline, name in READ.items()},
    **{pipeline: f"made for {name}: {REFUSED[name][0]}" for pipeline, name in MADE_FOR.items()},
}  # fmt: skip


def stock_of(family: str) -> Any:
    """The scheduler that the models of a family come with."""
    name, config = PIPELINES[family].stock
    return getattr(diffusers, name)(**config)


def built(family: str, solver: str | None, **knobs: Any) -> Any:
    """A pipeline with our scheduler in the place of its own."""
    return build(family, RectifiedFlowScheduler.from_config(stock_of(family), solver=solver, **knobs))


def steps_of(family: str) -> int:
    """A number of steps of which four are executed."""
    return round(4 / PIPELINES[family].strength)


def solvers_of(family: str) -> list[str]:
    """The solvers that give right results in a family."""
    if family in PER_TOKEN:
        return [name for name, solver in SOLVERS.items() if solver.first_order and not solver.noise]
    return [name for name, solver in SOLVERS.items() if family not in LATE or solver.stages == 1]


@dataclass
class Calls:
    """What a pipeline hands to its scheduler.

    Attributes:
        passed: names of what reaches set_timesteps beside the number of steps and the device.
        mu: the amount of dynamic shift.
        generators: for every step, whether it brought a generator.
    """

    passed: set[str] = field(default_factory=set)
    mu: float | None = None
    generators: list[bool] = field(default_factory=list)


class Listening(RectifiedFlowScheduler):
    """Our scheduler, which notes what it is given; copies write into the same notes. ``noise_share`` is added as eta."""

    calls = Calls()
    noise_share = 0.0

    @functools.wraps(RectifiedFlowScheduler.set_timesteps)  # pipelines look for names in the signature
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        given = inspect.signature(RectifiedFlowScheduler.set_timesteps).bind(self, *args, **kwargs).arguments
        self.calls.passed |= {name for name in ("timesteps", "sigmas", "mu") if given.get(name) is not None}
        self.calls.mu = given.get("mu")
        super().set_timesteps(*args, **kwargs)

    @functools.wraps(RectifiedFlowScheduler.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls.generators.append(kwargs.get("generator") is not None)
        return super().step(*args, **kwargs | ({"eta": self.noise_share} if self.noise_share else {}))


@functools.cache
def listened(family: str) -> Calls:
    """What the pipeline of a family hands to its scheduler in the call of tests/tiny.py."""
    Listening.calls = calls = Calls()
    run(build(family, Listening.from_config(stock_of(family), solver="euler")), steps_of(family))
    Listening.calls = Calls()  # what comes after is no affair of these notes
    return calls


def accepts(pipeline: Any) -> list[str]:
    """Which lists of a grid the call of a pipeline has arguments for."""
    known = inspect.signature(pipeline.__call__).parameters
    return [name for name in ("sigmas", "timesteps") if name in known]


def takes(family: str) -> list[str]:
    """Which lists of a grid a family really takes from its user."""
    return [] if family in DEAF else accepts(PIPELINES[family].pipeline)


def _spelled(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "neither"


def table() -> str:
    """The table of the families, in Markdown."""
    lines = [
        "| family | pipeline | takes | passes | noise | solvers | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in WORKING:
        calls, pipeline = listened(family), PIPELINES[family].pipeline.__name__
        noise = "none" if family in PER_TOKEN else "`generator`" if all(calls.generators) else "global"
        which = ", ".join(solvers_of(family)) if family in PER_TOKEN else "one call a step" if family in LATE else "all"
        passes = _spelled(sorted(calls.passed))
        row = (family, pipeline, _spelled(takes(family)), passes, noise, which, NOTES.get(family, ""))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def refusals() -> str:
    """The list of the pipelines that our scheduler cannot drive, in Markdown."""
    reasons: dict[str, list[str]] = {}
    for pipeline, reason in CANNOT.items():
        reasons.setdefault(reason, []).append(pipeline)
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in reasons.items())


def untested() -> str:
    """The list of the other pipelines of diffusers with a scheduler, in Markdown."""
    known = {family.pipeline.__name__ for family in PIPELINES.values()} | CANNOT.keys()
    found: dict[str, list[str]] = {}
    for pipeline in _pipelines():
        if pipeline.__name__ not in known:
            found.setdefault(_spelled(accepts(pipeline)), []).append(pipeline.__name__)
    return "\n".join(f"- takes {key}: {', '.join(names)}." for key, names in sorted(found.items()))


def _pipelines() -> list[Any]:
    """The pipelines of diffusers that have a scheduler; this imports them all."""
    found = []
    for name in dir(diffusers):
        # Modular ones are assembled from blocks; those for ONNX have numpy in the place of tensors.
        if name.endswith("Pipeline") and not name.startswith("Onnx") and "Modular" not in name:
            pipeline = getattr(diffusers, name)
            if any("scheduler" in argument for argument in inspect.signature(pipeline.__init__).parameters):
                found.append(pipeline)
    return found

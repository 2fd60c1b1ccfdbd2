"""Pipelines of diffusers that our scheduler cannot drive, each with its reason: tests/families.py lists them all."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

import diffusers
import pytest
import torch

from flowkit import RectifiedFlowScheduler

from .families import CANNOT, MADE_FOR, READ, stock_of
from .swaps import stock
from .tiny import PIPELINES, build, run
from .tiny_parts import DDIM, DPM, MATCH, SD, V, pixels, unet, vae

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")


# They put another scheduler in the place of ours.


def test_ddim_pipeline_replaces_the_scheduler() -> None:
    ours = RectifiedFlowScheduler.from_config(stock(DDIM, **V))
    pipe = diffusers.DDIMPipeline(unet=pixels(), scheduler=ours)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    pipe = diffusers.DDPMPipeline(unet=pipe.unet, scheduler=ours)  # what takes its place
    assert pipe.scheduler is ours


def test_ledits_replaces_the_scheduler() -> None:
    parts = {**PIPELINES["sd15"].parts(), "scheduler": RectifiedFlowScheduler.from_config(stock(DPM, **SD))}
    pipe = diffusers.LEditsPPPipelineStableDiffusion(**parts)
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    parts = {**PIPELINES["sdxl"].parts(), "scheduler": parts["scheduler"]}
    pipe = diffusers.LEditsPPPipelineStableDiffusionXL(**parts)
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler


def test_longcat_audio_replaces_the_scheduler() -> None:
    ours = RectifiedFlowScheduler.from_config(stock(MATCH, shift=3.0))
    pipe = diffusers.LongCatAudioDiTPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, transformer=unet(), scheduler=ours
    )
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert pipe.scheduler.config.invert_sigmas


# They pass what only their own class takes.


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("lcm", (DDIM, {**SD, **V}), "unexpected keyword argument 'original_inference_steps'"),
        ("sana-sprint", (MATCH, {}), "unexpected keyword argument 'max_timesteps'"),
        ("sd15-sag", (DDIM, {**SD, **V}), "does not support using a scheduler of type RectifiedFlowScheduler"),
        ("cosmos2", (MATCH, {"use_karras_sigmas": True}), r"^sigmas must be finite and fall strictly .* \[0\. .* 1\. "),
        *(
            (family, (MATCH, {"use_dynamic_shifting": True}), "needs a number mu, got None; pass mu=")
            for family in ("bria", "easyanimate")
        ),
    ],
)
def test_pipelines_that_pass_what_ours_does_not_take(family: str, config: tuple[str, Any], message: str) -> None:
    name, values = config
    pipe = build(family, RectifiedFlowScheduler.from_config(stock(name, **values)))
    with pytest.raises((TypeError, ValueError), match=message):
        run(pipe)


@pytest.mark.parametrize("family", ["mochi", "consistency", "sana-sprint"])
def test_configurations_that_cannot_be_imitated(family: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be imitated: .*; keep the stock class$"):
        RectifiedFlowScheduler.from_config(stock_of(family), solver="euler")
    assert PIPELINES[family].pipeline.__name__ in CANNOT
    assert run(build(family, stock_of(family))).isfinite().all()


def test_ltx_long_leaves_out_what_it_takes_for_the_terminal() -> None:
    own = stock("LTXEulerAncestralRFScheduler", eta=0.0)
    ours = RectifiedFlowScheduler.from_config(own)
    for scheduler, count in ((own, 4), (ours, 3)):
        scheduler.set_timesteps(sigmas=torch.tensor([1.0, 0.7, 0.3, 0.0]))
        assert len(scheduler.timesteps) == count
    assert "in enumerate(self.progress_bar(self.scheduler.timesteps[:-1]))" in _source("LTXI2VLongMultiPromptPipeline")


# What the sources say.


def _source(pipeline: str) -> str:
    return inspect.getsource(sys.modules[getattr(diffusers, pipeline).__module__])


_TAKEN = {
    "set_timesteps": set(inspect.signature(RectifiedFlowScheduler.set_timesteps).parameters),
    "step": set(inspect.signature(RectifiedFlowScheduler.step).parameters),
}
_TAKEN["retrieve_timesteps"] = _TAKEN["set_timesteps"] | {"scheduler"}


def _foreign(pipeline: str) -> set[str]:
    """Names of arguments that a pipeline passes to its scheduler and ours does not take."""
    found = set()
    for node in ast.walk(ast.parse(_source(pipeline))):
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            name = text.rpartition(".")[2]
            if name in _TAKEN and (name == "retrieve_timesteps" or "scheduler" in text):
                found |= {k.arg for k in node.keywords if k.arg} - _TAKEN[name]
    return found


@pytest.mark.parametrize("pipeline", [name for name, reason in CANNOT.items() if reason.startswith("passes ")])
def test_reasons_that_name_an_argument_are_true(pipeline: str) -> None:
    foreign = _foreign(pipeline)
    if pipeline == "Cosmos2TextToImagePipeline":  # it passes rising sigmas: see above
        assert not foreign
    else:
        assert any(f"passes {name} " in CANNOT[pipeline] for name in foreign)


@pytest.mark.slow
def test_no_other_pipeline_passes_what_ours_does_not_take() -> None:
    names = [
        name for name in dir(diffusers) if name.endswith("Pipeline") and "Modular" not in name and name[:4] != "Onnx"
    ]
    foreign = {name for name in names if inspect.isclass(getattr(diffusers, name)) and _foreign(name)}
    assert foreign <= CANNOT.keys()


@pytest.mark.parametrize("pipeline", READ)
def test_reasons_that_name_an_attribute_are_true(pipeline: str) -> None:
    assert f"scheduler.{READ[pipeline]}" in _source(pipeline)
    assert not hasattr(RectifiedFlowScheduler.from_config(stock(DDIM)), READ[pipeline])


@pytest.mark.parametrize("pipeline", MADE_FOR)
def test_reasons_that_name_a_class_are_true(pipeline: str) -> None:
    assert MADE_FOR[pipeline] in _source(pipeline)

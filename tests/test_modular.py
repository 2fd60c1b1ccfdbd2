"""Our scheduler in modular pipelines of diffusers, which are assembled from blocks without a hub."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers import modular_pipelines
from torch import Generator, Tensor

from flowkit import RectifiedFlowScheduler
from flowkit.solvers import SOLVERS

from .families import solvers_of, steps_of, stock_of
from .swaps import difference, watched
from .tiny import PIPELINES, parts

# Blocks and the tiny pipelines that do the same.
BLOCKS = {
    "StableDiffusionXLAutoBlocks": ("sdxl", "sdxl-img2img", "sdxl-inpaint"),
    "StableDiffusion3AutoBlocks": ("sd3", "sd3-img2img"),
    "FluxAutoBlocks": ("flux", "flux-img2img"),
    "Flux2KleinBaseAutoBlocks": ("flux2-klein",),
    "QwenImageAutoBlocks": ("qwen-image", "qwen-image-img2img", "qwen-image-inpaint"),
    "ZImageAutoBlocks": ("z-image", "z-image-img2img"),
    "WanBlocks": ("wan",),
    "LTXAutoBlocks": ("ltx", "ltx-i2v"),
}
# They tell the guider the number of steps but count calls: guidance ends after that many, for stock Heun too.
CUT_SHORT = ("StableDiffusionXLAutoBlocks", "StableDiffusion3AutoBlocks", "WanBlocks")
CASES = [(blocks, family) for blocks, families in BLOCKS.items() for family in families]


def assembled(name: str, family: str, scheduler: Any) -> Any:
    """A modular pipeline that ends with latents, and begins with embeddings where the tiny one does."""
    blocks = getattr(modular_pipelines, name)()
    components = {key: part for key, part in parts(family).items() if part is not None}
    for block in [
        key for key in blocks.sub_blocks if key == "decode" or (key == "text_encoder" and key not in components)
    ]:
        blocks.sub_blocks.pop(block)
    pipe = blocks.init_pipeline()
    if "guider" in pipe.components:
        components["guider"] = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    pipe.update_components(
        **{key: part for key, part in components.items() if key in pipe.components}, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, family: str) -> Tensor:
    known = {k: v for k, v in PIPELINES[family].call.items() if k in pipe.blocks.input_names and k != "output_type"}
    result: Tensor = pipe(
        **known, num_inference_steps=steps_of(family), generator=Generator().manual_seed(0), output="latents"
    )
    return result


@pytest.mark.parametrize(("blocks", "family"), CASES)
def test_stock_configuration_gives_the_stock_images(blocks: str, family: str) -> None:
    pipe = assembled(blocks, family, stock_of(family))
    theirs = run(pipe, family)
    ours = RectifiedFlowScheduler.from_config(pipe.scheduler.config)
    pipe.update_components(scheduler=ours)
    assert pipe.scheduler is ours
    assert difference(run(pipe, family), theirs) < 1e-5


@pytest.mark.parametrize(("blocks", "family"), CASES)
def test_solvers(blocks: str, family: str, pytestconfig: pytest.Config) -> None:
    """All solvers in the slow run, otherwise three, others for every pipeline."""
    results: dict[str, Tensor] = {}
    names = solvers_of(family)
    if not pytestconfig.getoption("--run-slow"):
        first = 3 * CASES.index((blocks, family))
        names = [names[(first + k) % len(names)] for k in range(3)]
    for solver in dict.fromkeys(("euler", *names)):
        method = SOLVERS[solver]
        pipe = assembled(blocks, family, RectifiedFlowScheduler.from_config(stock_of(family), solver=solver))
        with watched(pipe) as outputs:
            results[solver] = run(pipe, family)
        assert results[solver].isfinite().all()
        first = round(steps_of(family) * (1 - PIPELINES[family].strength)) * pipe.scheduler.order
        executed = len(pipe.scheduler.timesteps) - first
        guided = 0 if "guider" not in pipe.components else 4 if blocks in CUT_SHORT else executed
        assert len(outputs) == executed + guided
        if not method.first_order:
            assert difference(results[solver], results["euler"]) > 1e-4


@pytest.mark.parametrize("blocks", CUT_SHORT)
def test_guidance_ends_early_with_two_calls_a_step(blocks: str) -> None:
    """Stock Heun has the same; a solver of one call a step is guided to the end."""
    family = BLOCKS[blocks][0]
    heun = "FlowMatchHeunDiscreteScheduler" if family == "sd3" else "HeunDiscreteScheduler"
    config = {"prediction_type": "v_prediction"} if family == "sdxl" else {}
    for scheduler, calls in (
        (getattr(diffusers, heun)(**config), 7 + 4),
        (RectifiedFlowScheduler.from_config(stock_of(family), solver="heun"), 7 + 4),
        (RectifiedFlowScheduler.from_config(stock_of(family), solver="unipc"), 4 + 4),
    ):
        pipe = assembled(blocks, family, scheduler)
        with watched(pipe) as outputs:
            run(pipe, family)
        assert len(outputs) == calls

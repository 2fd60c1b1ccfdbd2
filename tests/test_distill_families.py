"""A pipeline of any family goes through record, reflow, save, reload in plain diffusers, and sample."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit import RectifiedFlowScheduler
from flowkit.distill import LoRA, Reflow, Training, run
from flowkit.distill.method import sampler
from flowkit.distill.watch import rows
from flowkit.schedulers.saving import stand_in

from .families import stock_of
from .test_conditions import arguments_of
from .tiny import PIPELINES, build
from .tiny import run as draw

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SMALL: dict[str, Any] = {"samples": 40, "steps": 2, "batch_size": 2, "progress": False}
QUICK = ("sd15", "sd3", "flux", "wan")
MORE = ("dit", "ddpm", "sdxl", "ltx", "stable-audio")


def plain(folder: Path, teacher: Any) -> Any:
    """The student as diffusers loads it, without flowkit's scheduler."""
    absent = {name: None for name, part in teacher.components.items() if part is None}  # of the tiny pipelines alone
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is type(teacher)
    assert type(pipe.scheduler).__module__.startswith("diffusers.")
    return pipe


def weights_of(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part, network in pipe.components.items()
        if isinstance(network, torch.nn.Module)
        for name, value in network.state_dict().items()
    }


def inputs_of(family: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    each, shared = arguments_of(family)
    shared.pop("output_type", None)
    return each, shared


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_family_is_distilled(family: str, tmp_path: Path) -> None:
    teacher = build(family, stock_of(family))
    before, scheduler = weights_of(teacher), teacher.scheduler
    each, shared = inputs_of(family)
    student = run(Reflow(evaluations=2), teacher, each, call=shared, output=tmp_path / "student", **SMALL)
    assert teacher.scheduler is scheduler
    after = weights_of(teacher)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())

    unguided: dict[str, Any] = {
        name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if name in PIPELINES[family].call
    }
    stock = plain(tmp_path / "student", teacher)
    moved = draw(stock, 2, **unguided)
    assert moved.isfinite().all()
    assert not torch.equal(moved, draw(teacher, 2, **unguided))
    if "num_train_timesteps" in stock.scheduler.config and not stock.scheduler.config.get("use_dynamic_shifting"):
        stock.scheduler.set_timesteps(1)  # in plain diffusers too, one step begins at noise
        assert float(stock.scheduler.timesteps[0]) > 900 or family == "stable-audio"
    stock.scheduler = RectifiedFlowScheduler.from_config(stock.scheduler.config)
    assert stock.scheduler.config["solver"] == "euler"
    noisiest = pytest.approx(stock.scheduler.path.level(stock.scheduler.path.start), rel=1e-4)
    assert float(student.scheduler.fork().plan(1, None, None, 1.0).levels[0]) == noisiest or family == "stable-audio"
    assert torch.equal(draw(stock, 1, **unguided), draw(student, 1, **unguided))


@pytest.mark.parametrize("family", ["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def test_adapters_are_distilled_and_load_in_plain_diffusers(family: str, tmp_path: Path) -> None:
    teacher = build(family, stock_of(family))
    before = weights_of(teacher)
    each, shared = inputs_of(family)
    student = run(Reflow(evaluations=2), teacher, each, call=shared, lora=LoRA(4), output=tmp_path / "student", **SMALL)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(teacher).items())
    other = build(family, stock_of(family))
    network = next(name for name in ("unet", "transformer") if name in other.components)
    setattr(other, network, copy.deepcopy(getattr(other, network)))
    other.load_lora_weights(tmp_path / "student")
    other.scheduler = RectifiedFlowScheduler.from_pretrained(tmp_path / "student" / "scheduler")
    assert torch.equal(draw(other, 1), draw(student, 1))
    assert not torch.equal(draw(other, 1), draw(teacher, 1))


@pytest.mark.parametrize(
    ("family", "lora"), [("wan", None), ("flux", LoRA(2)), pytest.param("sd3", LoRA(2), marks=pytest.mark.slow)]
)
def test_half_precision_with_less_memory(family: str, lora: LoRA | None, tmp_path: Path) -> None:
    each, shared = inputs_of(family)
    how = Training(2, batch_size=2, precision="bf16", checkpointing=True)
    teacher = build(family, stock_of(family), torch.bfloat16)
    student = run(Reflow(evaluations=2), teacher, each, call=shared, lora=lora, output=tmp_path / "s", **{**SMALL, "steps": None},
                  training=how)  # fmt: skip
    assert student.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_student_begins_at_the_noise_however_the_teacher_spaces_its_steps(name: str, spacing: str) -> None:
    own = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}  # the others it cannot do in one step
    teacher = getattr(diffusers, name)(steps_offset=1, timestep_spacing=spacing, **own)
    student = sampler(teacher)
    for steps in (1, 3):
        levels = student.fork().plan(steps, None, None, None).levels
        assert levels[0] == student.path.level(student.path.start)
        assert levels[-1] == 0
    stock = stand_in(student)
    stock.set_timesteps(1)
    assert stock.timesteps.tolist() == [999]


def test_a_stable_diffusion_is_watched_on_held_out_pairs(tmp_path: Path) -> None:
    each, shared = inputs_of("sd15")
    run(
        Reflow(evaluations=2),
        build("sd15", stock_of("sd15")),
        each,
        call=shared,
        output=tmp_path / "s",
        **{**SMALL, "samples": 40},
    )
    (row,) = rows(tmp_path / "s" / "training-1")
    assert {"mean_drift", "variance_ratio", "rmse", "straightness"} < row.keys()
    assert row["variance_ratio"] > 0

"""What a distillation refuses before hours are spent, and what it says."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import AutoencoderTiny
from torch import nn

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler
from flowkit.distill import LoRA, Training, record, run

from .families import stock_of
from .students import SMALL, tiny, weightless
from .tiny import build
from .tiny_parts import grey


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["student", "student.unfinished"])
def test_what_is_not_ours_is_left_alone(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is not the folder of a distillation; choose another output"):
        run("reflow", tiny(), output=tmp_path / "student", resume=resume, **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == [name, "thesis.txt"]


def blind() -> ClassConditionalPipeline:
    """A network that says nothing of the sample at pure noise."""
    pipe = tiny()
    pipe.scheduler = RectifiedFlowScheduler(prediction_type="epsilon")
    return pipe


def stock_blind() -> Any:
    pipe = build("sd15", stock_of("sd15"))
    pipe.scheduler = diffusers.DDIMScheduler(
        prediction_type="epsilon", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return pipe


def wide() -> nn.Module:
    network: nn.Module = grey(4, out_channels=3)
    return network


@pytest.mark.parametrize(
    ("teacher", "arguments", "error", "message"),
    [
        (
            tiny,
            {"method": "rewind"},
            ValueError,
            "unknown method 'rewind'; choose reflow, onestep, reverse, boss, rectified-diffusion",
        ),
        (weightless, {}, ValueError, "no weights that a student could train"),
        (blind, {}, ValueError, "does not determine the sample"),
        (stock_blind, {"inputs": [{"prompt": "a cat"}]}, ValueError, "does not determine the sample"),
        (tiny, {"student": wide()}, ValueError, "a UNet2DModel, cannot take the place .* shape"),
        (tiny, {"student": nn.Linear(8, 8)}, TypeError, "a Linear, which could not be saved in a diffusers folder"),
        (
            tiny,
            {"student": AutoencoderTiny()},
            ValueError,
            "a AutoencoderTiny, cannot take the place of the teacher's network",
        ),
        (tiny, {"lora": LoRA(2)}, ValueError, "diffusers loads no LoRA into the unet of a ClassConditionalPipeline"),
        (tiny, {"samples": 0}, ValueError, "samples must be .* got 0"),
        (tiny, {"steps": 0}, ValueError, "steps must be .* got 0"),
        (tiny, {"steps": 1.5}, ValueError, "steps must be .* got 1.5"),
        (tiny, {"steps": 5, "training": Training(5)}, ValueError, "steps=5 is given beside training"),
        (tiny, {"batch_size": -1}, ValueError, "batch_size must be .* got -1"),
        (tiny, {"seed": "0"}, ValueError, "seed must be a whole number, got '0'"),
        (tiny, {"inputs": [0, 5]}, ValueError, "from 0 to 3"),
        (tiny, {"inputs": ["cat"]}, (ValueError, TypeError), "cat"),
        (tiny, {"inputs": []}, ValueError, "inputs is empty"),
        (tiny, {"call": {"num_inference_steps": 3}}, TypeError, "num_inference_steps cannot be in call"),
        (tiny, {"call": {"guidance": 3}}, TypeError, "takes no guidance"),
        (tiny, {"training": Training(5, batch_size=9, accumulate=2)}, ValueError, "9 rows cannot be cut into 2"),
        (tiny, {"pairs": "nowhere"}, FileNotFoundError, "no complete recording in nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    teacher: Callable[[], Any], arguments: dict[str, Any], error: Any, message: str, tmp_path: Path
) -> None:
    small = {k: v for k, v in SMALL.items() if "training" not in arguments or k != "steps" or "steps" in arguments}
    with pytest.raises(error, match=message):
        run(**{"method": "reflow", "teacher": teacher(), "output": tmp_path / "student", **small, **arguments})
    assert not any(tmp_path.iterdir())


def test_pairs_of_another_teacher_path_or_guidance_are_refused(tmp_path: Path) -> None:
    teacher, labels = tiny(), range(4)
    kept: dict[str, Any] = {"keep": ["state"], "at": [0, 2], "inputs": labels, "batch_size": 8, "progress": False}
    record(teacher, tmp_path / "pairs", 20, 2, **kept)
    small = {k: v for k, v in SMALL.items() if k != "samples"}
    for change, message in (
        ({"teacher": tiny(seed=1)}, "were made with weights"),
        ({"inputs": [1, 2]}, "were made with inputs"),
        ({"call": {"guidance_scale": 2.0}}, "were made with call"),
        ({"samples": 21}, "holds 20 samples, and samples=21"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"method": "reflow", "teacher": teacher, "inputs": labels, "output": tmp_path / "s", "pairs": tmp_path / "pairs",
                   **small, **change})  # fmt: skip
    other, config = tiny(), {"prediction_type": "v_prediction"}
    other.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", **config)
    record(other, tmp_path / "linear", 20, 2, **kept)
    other.scheduler = diffusers.DDIMScheduler(**config)
    with pytest.raises(ValueError, match=r"were made with path\.rhos"):
        run("reflow", other, labels, output=tmp_path / "s", pairs=tmp_path / "linear", **small)
    record(teacher, tmp_path / "ends", 20, 2, **{**kept, "at": [1, 2]})
    with pytest.raises(ValueError, match=r"holds states at \[1, 2\]; a method needs the first and the last"):
        run("reflow", teacher, labels, output=tmp_path / "s", pairs=tmp_path / "ends", **small)
    shard = tmp_path / "pairs" / "shard-000000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes(40))
    with pytest.raises(ValueError, match="checksum"):
        run("reflow", teacher, labels, output=tmp_path / "s", pairs=tmp_path / "pairs", **small)
    shard.write_bytes(whole)
    run("reflow", teacher, labels, output=tmp_path / "s", pairs=tmp_path / "pairs", **small)
    assert not (tmp_path / "s" / "pairs-1").exists()


def test_a_teacher_that_fails_is_told(tmp_path: Path) -> None:
    teacher = tiny()
    next(teacher.unet.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        run("reflow", teacher, output=tmp_path / "student", **SMALL)
    assert not (tmp_path / "student").exists()


def test_settings_that_cannot_work_are_refused_before_the_teacher_is_asked(tmp_path: Path) -> None:
    teacher = tiny()
    teacher.unet.register_forward_pre_hook(lambda *given: pytest.fail("the teacher was called"))
    small = {**SMALL, "steps": None}
    with pytest.raises(ValueError, match="unknown tracker 'paper'"):
        run("reflow", teacher, output=tmp_path / "s", **small, training=Training(5, tracker="paper"))
    teacher.unet._supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="UNet2DModel cannot recompute its activations"):
        run("reflow", teacher, output=tmp_path / "s", **small, training=Training(5, checkpointing=True))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_settings_that_are_broken_are_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "distill.json").write_text(content)
    with pytest.raises(ValueError, match="start anew with resume=False"):
        run("reflow", tiny(), output=tmp_path / "s", **SMALL)


def test_guidance_that_stays_on_is_refused(tmp_path: Path) -> None:
    each = [{"prompt": "a cat", "guidance_scale": 3.0}]
    with pytest.raises(ValueError, match=r"guidance_scale=1\.0 in call does not end that of a StableDiffusionPipeline"):
        run(
            "reflow",
            build("sd15", stock_of("sd15")),
            each,
            call={"height": 16, "width": 16},
            output=tmp_path / "s",
            **SMALL,
        )
    assert not any(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"takes .* more on the disk, and .* has 1 kB left"):
        run("reflow", tiny(), output=tmp_path / "student", **SMALL)
    assert not (tmp_path / "student.unfinished" / "pairs-1").exists()

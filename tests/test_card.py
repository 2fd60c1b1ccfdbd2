"""Model cards: what the Hub reads, and code that runs as it stands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard

from flowkit import Grid, RectifiedFlowScheduler, load_demo, save_pretrained
from flowkit.distill import card
from flowkit.distill.card import Facts, Score
from flowkit.eval.intervals import Figure

from . import tiny

FACTS = Facts(
    method="reflow",
    teacher="digits",
    pipeline="ClassConditionalPipeline",
    steps=2,
    updates=3000,
    example={"class_labels": [3, 7]},
    call={"guidance_scale": 1.0},
    guidance=2.0,
    pairs=10_000,
    settings={"learning rate": 1e-3, "metric": "l2|huber"},
    scores=[Score("student", 2, Figure(1.234, 0.05)), Score("teacher", 16, Figure(1.1))],
    measured="2,000 samples against the held-out digits, extractor digits",
    command="flowkit fid . --reference digits",
    picture="samples-003000.png",
    panel="panel.png",
    notes=["the loss does not fall: 1 over the first third, 1 over the last; look"],
)


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n((?:.*\n)*?)```", text)


def run(code: str, **before: Any) -> dict[str, Any]:
    names: dict[str, Any] = dict(before)
    torch.manual_seed(0)
    exec(code, names)
    return names


def student(folder: Path, sigmas: tuple[float, ...] = (1.0, 0.4, 0.0)) -> None:
    pipe = load_demo("digits")
    pipe.scheduler = RectifiedFlowScheduler(solver="euler")
    pipe.scheduler.set_grid(Grid(sigmas))
    save_pretrained(pipe, folder)


def test_the_code_runs_as_it_stands_on_the_levels_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student(tmp_path)
    text = card.write(tmp_path, FACTS).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ours, stock = blocks(text)
    first = run(ours)
    assert len(first["images"]) == 2
    assert first["pipe"].scheduler.sigmas.tolist() == pytest.approx([1.0, 0.4, 0.0])
    second = run(stock)
    assert "flowkit" not in stock
    assert second["scheduler"].sigmas.tolist() == pytest.approx([1.0, 0.4, 0.0])
    # From the same noise both draw the same images.
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 8, 8)
    same = first["pipe"]([3, 7], latents=noise, num_inference_steps=2, output_type="pt").images
    assert torch.allclose(same, second["images"], atol=1e-5)


def test_the_code_without_a_pipeline_runs_on_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_demo("digits")
    pipe.scheduler = RectifiedFlowScheduler(solver="euler", path="vp", prediction_type="v_prediction")
    save_pretrained(pipe, tmp_path)
    text = card.write(tmp_path, FACTS).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ours, stock = (run(code) for code in blocks(text))
    assert type(stock["scheduler"]) is diffusers.DDIMScheduler
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 8, 8)
    same = ours["pipe"]([3, 7], latents=noise, num_inference_steps=2, output_type="pt").images
    assert torch.allclose(same, stock["images"], atol=1e-4)


def test_the_hub_can_read_it(tmp_path: Path) -> None:
    student(tmp_path)
    card.write(tmp_path, FACTS)
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == {"library_name": "diffusers", "tags": ["flowkit", "few-step", "reflow"]}
    facts = replace(
        FACTS, teacher="owner/model", pipeline="StableDiffusionPipeline", example={"prompt": "a cat"}, license="mit"
    )
    card.write(tmp_path, facts)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {
        "base_model": "owner/model",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "text-to-image",
        "tags": ["flowkit", "few-step", "reflow"],
    }


def test_it_says_how_it_was_made_and_measured(tmp_path: Path) -> None:
    student(tmp_path)
    text = card.write(tmp_path, FACTS).read_text(encoding="utf-8")
    for line in (
        "# digits in 2 steps",
        "distilled from `digits` on 10,000 of its samples by reflow",
        "| student | 2 | 1.234 ± 0.05 |",
        "| teacher | 16 | 1.1 |",
        "Measured on 2,000 samples against the held-out digits, extractor digits; with standard errors.",
        "```bash\nflowkit fid . --reference digits\n```",
        "| metric | l2\\|huber |",
        "| updates | 3,000 |",
        "![samples of the student](samples-003000.png)",
        "(panel.png)",
        "Guidance of scale 2 is part of the weights: sample with guidance_scale=1.",
        "It is made for 2 steps",
        "- Of its training: the loss does not fall",
    ):
        assert line in text
    bare = replace(
        FACTS, scores=[], picture=None, panel=None, guidance=None, notes=[], pairs=None, teacher=None, steps=1
    )
    student(tmp_path, (1.0, 0.0))
    text = card.write(tmp_path, bare).read_text(encoding="utf-8")
    for word in ("Figures", "![", "Guidance", "Of its training", "pairs", "teacher"):
        assert word not in text
    assert "# ClassConditionalPipeline in 1 step\n" in text
    assert "for 1 step, trained on data by reflow" in text


@pytest.mark.parametrize(
    ("family", "base", "sigmas"),
    [
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (1.0, 0.3, 0.0)),
        ("sd15", RectifiedFlowScheduler(path="vp", prediction_type="epsilon"), None),
    ],
)
def test_a_text_pipeline_runs_from_its_card(
    family: str,
    base: Any,
    sigmas: tuple[float, ...] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = RectifiedFlowScheduler.from_config(base, solver="euler")
    if sigmas:
        scheduler.set_grid(Grid(sigmas))
    save_pretrained(tiny.build(family, scheduler), tmp_path)
    small = tiny.PIPELINES[family]
    call = {k: v for k, v in small.call.items() if "prompt" not in k} | {"guidance_scale": 1.0}
    facts = replace(FACTS, pipeline=small.pipeline.__name__, example={"prompt": "a red cat"}, call=call)
    text = card.write(tmp_path, facts).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ours, theirs = (run(code) for code in blocks(text))
    assert type(ours["pipe"].scheduler) is RectifiedFlowScheduler
    assert ours["pipe"].scheduler.timesteps.tolist() == pytest.approx(
        theirs["pipe"].scheduler.timesteps.tolist(), abs=1e-3
    )
    assert torch.allclose(ours["images"], theirs["images"], rtol=1e-3, atol=1e-4)
    assert "walks other levels" not in text
    assert ("sigmas=[" in text) is bool(sigmas)


def test_levels_that_plain_diffusers_cannot_walk_are_told(tmp_path: Path) -> None:
    scheduler = RectifiedFlowScheduler(solver="euler", path="vp", prediction_type="epsilon")
    scheduler.set_grid(Grid((12.0, 1.7, 0.0), "vp"))
    save_pretrained(tiny.build("sd15", scheduler), tmp_path)
    facts = replace(FACTS, pipeline="StableDiffusionPipeline", example={"prompt": "a red cat"})
    assert "walks other levels than the student was made for" in card.write(tmp_path, facts).read_text(encoding="utf-8")


def test_adapters_run_from_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    teacher, folder = tmp_path / "teacher", tmp_path / "student"
    pipe = tiny.build("sd15", diffusers.DDIMScheduler())
    pipe.save_pretrained(teacher)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(teacher)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder, unet_lora_layers=layers)
    pipe.scheduler = RectifiedFlowScheduler(solver="euler", path="vp", prediction_type="epsilon")
    save_pretrained(pipe, tmp_path / "whole")
    (tmp_path / "whole" / "scheduler").rename(folder / "scheduler")
    facts = replace(
        FACTS,
        pipeline="StableDiffusionPipeline",
        teacher=str(teacher),
        example={"prompt": "a red cat"},
        call={"guidance_scale": 1.0, "output_type": "latent"},
        lora="pytorch_lora_weights.safetensors",
    )
    text = card.write(folder, facts).read_text(encoding="utf-8")
    monkeypatch.chdir(folder)
    ours, stock = (run(code) for code in blocks(text))
    assert torch.allclose(ours["images"], stock["images"], rtol=1e-3, atol=1e-4)
    assert type(ours["pipe"].scheduler) is RectifiedFlowScheduler
    plain = diffusers.StableDiffusionPipeline.from_pretrained(teacher)
    plain.scheduler = stock["pipe"].scheduler
    torch.manual_seed(0)
    without = plain("a red cat", guidance_scale=1.0, num_inference_steps=2, output_type="latent").images
    assert not torch.allclose(without, stock["images"], atol=1e-4)
    assert "lora" in ModelCard.load(folder / "README.md").data.tags
    assert f"The adapters fit `{teacher}`" in text


@pytest.mark.parametrize(
    ("teacher", "found"),
    [("owner/model", "owner/model"), ("digits", None), ("/some/where", None), ("a/b/c", None), ("flowkit/cli", None)],
)
def test_ids_of_the_hub_are_told_from_folders(teacher: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert card.hub_id(teacher) == found


def test_a_folder_without_a_scheduler_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="scheduler"):
        card.write(tmp_path, FACTS)

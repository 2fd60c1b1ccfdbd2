"""`train_flow`: whole trainings from data, stopped, resumed, of latents and adapters, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, assets
from flowkit.distill import flow_runs, panel, student, train_flow, trainer
from flowkit.distill.data import tensors
from flowkit.distill.encode import Encoder
from flowkit.distill.feed import Feed
from flowkit.distill.settings import Training

from .families import stock_of
from .tiny import PIPELINES, build
from .tiny_parts import grey


def tiny_digits() -> ClassConditionalPipeline:
    return ClassConditionalPipeline(grey(10, block_out_channels=(8, 16), add_attention=True), RectifiedFlowScheduler())


def weights_of(pipe: Any) -> dict[str, Tensor]:
    network = getattr(pipe, student.denoiser_name(pipe))
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


QUICK: dict[str, Any] = {
    "training": Training(steps=6, batch_size=8),
    "workers": 0,
    "progress": False,
    "sample_steps": 1,
}


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture of a training's course, which takes longer than these trainings, and few images to compare with."""
    monkeypatch.setattr(panel, "draw", lambda *_: None)
    monkeypatch.setattr(flow_runs, "_COMPARED", 50)


def test_training_from_new_weights_learns_the_digits(tmp_path: Path) -> None:
    pipe = tiny_digits()
    before = weights_of(pipe)
    how = Training(steps=100, batch_size=32, learning_rate=8e-3, ema=0.97)
    made = train_flow(pipe, "digits", output=tmp_path / "m", training=how, workers=1, sample_steps=4, progress=False)
    assert same(weights_of(pipe), before)
    (row, *_, last) = json.loads((tmp_path / "m" / "training" / "training.json").read_text())["history"]
    # A network that says nothing of x, the mean of eps - x0, has the loss 1 + Var x0.
    x0 = assets.images("digits")[0] / 127.5 - 1
    mean_predictor = 1 + float(x0.var(0).mean())
    assert last["loss"] < 0.7 * mean_predictor
    assert row["loss"] > mean_predictor
    drawn = made(
        class_labels=list(range(10)) * 5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        num_inference_steps=4,
    ).images
    assert float((drawn.mean(0) - x0.mean(0)).square().mean()) < 0.2 * float(x0.mean(0).square().mean())
    assert (tmp_path / "m" / "training" / "samples-000100.png").is_file()
    assert not list(tmp_path.glob("m/**/checkpoint*"))
    (seen,) = json.loads((tmp_path / "m" / "training" / "watch.json").read_text())["rows"]
    assert seen.keys() == {"step", "mean_drift", "variance_ratio"}
    assert seen["mean_drift"] < 0.4
    assert 0.5 < seen["variance_ratio"] < 1.5
    card = (tmp_path / "m" / "README.md").read_text()
    assert "trained on 1,297 images by flow" in card
    assert "teacher" not in card
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path / "m")
    assert same(weights_of(loaded), weights_of(made))


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_stopped_and_started_again_is_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coupling: str
) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "_SAVE_SHARE", 0.0)
    call: dict[str, Any] = {**QUICK, "coupling": coupling, "flip": True, "dropout": 0.3}
    whole = train_flow(tiny_digits(), "digits", output=tmp_path / "whole", **call)
    own = Feed.__call__

    def killed(feed: Feed, step: int, rows: range) -> tuple[Tensor, Tensor]:
        if step == 4:
            raise KeyboardInterrupt
        return own(feed, step, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Feed, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_flow(tiny_digits(), "digits", output=tmp_path / "cut", **call)
    assert trainer.steps_done(tmp_path / "cut.unfinished" / "training") == 4
    assert not (tmp_path / "cut").exists()
    resumed = train_flow(tiny_digits(), "digits", output=tmp_path / "cut", **call)
    assert same(weights_of(resumed), weights_of(whole))
    with monkeypatch.context() as patched:  # a finished one is loaded, and nothing is trained
        patched.setattr(Feed, "__call__", killed)
        again = train_flow(tiny_digits(), "digits", output=tmp_path / "cut", **call)
    assert same(weights_of(again), weights_of(whole))
    if coupling == "independent":
        other = train_flow(tiny_digits(), "digits", output=tmp_path / "seed", **{**call, "seed": 1})
        assert not same(weights_of(other), weights_of(whole))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of 20 by 16 pixels, four captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for number in range(6):
        pixels = torch.randint(256, (20, 16, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("abcdab"[number])
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_latent_models_train_on_captions(tmp_path: Path, captioned: Path, family: str) -> None:
    pipe = build(family, stock_of(family))
    call = {
        k: v
        for k, v in PIPELINES[family].call.items()
        if "prompt" not in k and k not in ("output_type", "height", "width")
    }
    before = weights_of(pipe)
    how = Training(steps=2, batch_size=4, learning_rate=1e-3)
    made = train_flow(
        pipe, captioned, output=tmp_path / "m", training=how, init="weights", size=16, call=call, workers=0, progress=False,
        sample_steps=2,
    )  # fmt: skip
    assert same(weights_of(pipe), before)
    after = weights_of(made)
    moved = [float((after[name] - value).abs().max()) for name, value in before.items()]
    assert 0 < max(moved) < 0.1
    reloaded = type(pipe).from_pretrained(tmp_path / "m")
    assert same(weights_of(reloaded), after)


@pytest.mark.filterwarnings("ignore")
def test_latents_that_the_pipeline_would_not_decode_are_refused(
    tmp_path: Path, captioned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The control of the check: a shift that is left out, as on Stable Diffusion's own latents.
    monkeypatch.setattr(Encoder, "_scaled", lambda self, z: z * self._vae.config["scaling_factor"])
    pipe = build("sd3", stock_of("sd3"))
    with pytest.raises(
        ValueError, match="StableDiffusion3Pipeline decodes something else than its AutoencoderKL encodes"
    ):
        train_flow(pipe, captioned, output=tmp_path / "m", size=16, **QUICK)


def test_images_without_conditions(tmp_path: Path, captioned: Path) -> None:
    pipe = build("ddpm", stock_of("ddpm"))
    made = train_flow(pipe, captioned, output=tmp_path / "m", **{**QUICK, "sample_steps": 2})
    assert not same(weights_of(made), weights_of(pipe))
    assert json.loads((tmp_path / "m" / "distill.json").read_text())["data"]["size"] == 8


@pytest.mark.filterwarnings("ignore")
def test_adapters_alone(tmp_path: Path, captioned: Path) -> None:
    pytest.importorskip("peft")
    pipe = build("sd15", stock_of("sd15"))
    before = weights_of(pipe)
    made = train_flow(
        pipe,
        captioned,
        output=tmp_path / "m",
        init="weights",
        lora=student.LoRA(2),
        size=16,
        **{**QUICK, "sample_steps": 2},
    )
    assert (tmp_path / "m" / student.LORA_FILE).is_file()
    assert (
        "trained on 6 images, beginning with `StableDiffusionPipeline`, by flow"
        in (tmp_path / "m" / "README.md").read_text()
    )
    assert same(weights_of(pipe), before)
    assert made.unet.peft_config


def test_what_cannot_be_trained_is_refused_before_it_starts(tmp_path: Path, captioned: Path) -> None:
    pipe, output = tiny_digits(), tmp_path / "m"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"init": "zeros"}, "unknown init 'zeros'"),
        ({"lora": student.LoRA(2)}, "pass init='weights'"),
        ({"dropout": 1.5}, "dropout is a probability, got 1.5"),
        ({"times": "gaussian"}, "no law of flow times is called 'gaussian'"),
        ({"coupling": "best"}, "unknown coupling 'best'"),
        ({"size": 16}, "size=16, and ClassConditionalPipeline makes images of 8 pixels"),
    ]
    for more, message in wrong:
        with pytest.raises(ValueError, match=message):
            train_flow(pipe, "digits", output=output, **{**QUICK, **more})
    with pytest.raises(ValueError, match="has no label; put each class into a folder"):
        train_flow(pipe, captioned, output=output, **QUICK)
    with pytest.raises(ValueError, match="labels run from 0 to 11, and ClassConditionalPipeline has 10 classes"):
        train_flow(pipe, tensors(torch.zeros(12, 1, 8, 8), list(range(12))), output=output, **QUICK)
    with pytest.raises(ValueError, match=r"make samples of \(3, 8, 8\), and ClassConditionalPipeline has \(1, 8, 8\)"):
        train_flow(pipe, tensors(torch.zeros(4, 3, 8, 8), [0] * 4), output=output, **QUICK)
    assert not output.exists()
    with pytest.raises(ValueError, match="captions are no classes; leave it out"):
        train_flow(build("sd15", stock_of("sd15")), captioned, output=output, size=16, coupling="ot", **QUICK)


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    train_flow(tiny_digits(), "digits", output=tmp_path / "m", **QUICK)
    with pytest.raises(ValueError, match=r"holds a run with dropout=0\.1, this one has 0\.2"):
        train_flow(tiny_digits(), "digits", output=tmp_path / "m", dropout=0.2, **QUICK)
    with pytest.raises(ValueError, match=r"holds a run with data\."):
        train_flow(tiny_digits(), tensors(torch.zeros(12, 1, 8, 8), [0] * 12), output=tmp_path / "m", **QUICK)
    made = train_flow(tiny_digits(), "digits", output=tmp_path / "m", dropout=0.2, resume=False, **QUICK)
    assert isinstance(made, ClassConditionalPipeline)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another output"):
        train_flow(tiny_digits(), "digits", output=tmp_path / "other", resume=False, **QUICK)
    assert (tmp_path / "other" / "notes.txt").is_file()

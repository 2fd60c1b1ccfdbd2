"""The class-conditional pipeline and the embedded models in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL.Image import Image

import flowkit
from flowkit import ClassConditionalPipeline, Grid, MixtureDenoiser, RectifiedFlowScheduler, assets, rng

POINTS = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(12) % 3


def exact_pipeline(**knobs: Any) -> Any:
    model = MixtureDenoiser.of(POINTS, 0.05, labels=LABELS)
    pipe = ClassConditionalPipeline(model, RectifiedFlowScheduler(**knobs))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=assets.NAMES)
def demo(request: pytest.FixtureRequest) -> Any:
    pipe = flowkit.load_demo(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_embedded_models_draw_their_classes(demo: Any) -> None:
    from flowkit.eval.classifier import Classifier

    name = "digits" if demo.num_classes == 10 else "shapes"
    labels = torch.arange(60) % demo.num_classes
    images = demo(labels, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (60, *((1, 8, 8) if name == "digits" else (3, 16, 16)))
    assert images.min() >= 0
    assert images.max() <= 1
    classifier = Classifier.load(assets.folder(name) / "classifier.safetensors")
    found = classifier(images * 2 - 1).argmax(1)
    assert (found == labels).float().mean() > 0.9
    assert (found == (labels + 1) % demo.num_classes).float().mean() < 0.1


def test_output_types_agree(demo: Any) -> None:
    def draw(kind: str, **options: Any) -> Any:
        return demo(
            [3, 7], num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type=kind, **options
        )

    tensor, latent = draw("pt").images, draw("latent").images
    assert torch.allclose(tensor, (latent / 2 + 0.5).clamp(0, 1))
    array = draw("np").images
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = draw("pil", return_dict=False)[0]
    assert isinstance(pictures[0], Image)
    assert pictures[0].size == tensor.shape[:1:-1]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_images_do_not_depend_on_the_batch(batch: int) -> None:
    pipe = exact_pipeline()
    generators = [torch.Generator().manual_seed(rng.sample_seed(0, i)) for i in range(64)]
    labels = [i % 3 for i in range(64)]

    def draw(first: int, size: int) -> torch.Tensor:
        part = slice(first, first + size)
        images: torch.Tensor = pipe(
            labels[part], num_inference_steps=4, generator=generators[part], output_type="pt"
        ).images
        return images

    whole = draw(0, 64)
    parts = torch.cat([draw(first, batch) for first in range(0, 64, batch)])
    assert torch.allclose(parts, whole, atol=1e-6)


def test_guidance_is_the_usual_combination() -> None:
    pipe = exact_pipeline(solver="euler")
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    got = pipe([0, 2], guidance_scale=3.0, num_inference_steps=1, latents=noise, output_type="latent").images
    uncond, cond = (pipe.unet(noise, 1000.0, class_labels=torch.tensor(labels)).sample for labels in ([3, 3], [0, 2]))
    assert torch.allclose(got, noise - (uncond + 3 * (cond - uncond)), atol=1e-6)


def test_steps_come_from_the_grid_or_the_lists() -> None:
    pipe = exact_pipeline()
    times: list[float] = []

    def watch(pipe: Any, step: int, t: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        times.append(float(t))
        return values

    pipe([0], callback_on_step_end=watch)
    assert len(times) == 16
    for arguments, expected in (
        ({"num_inference_steps": 2}, [1000, 500]),
        ({"sigmas": [1.0, 0.3]}, [1000, 300]),
        ({"timesteps": [900]}, [900]),
    ):
        times.clear()
        pipe([0], callback_on_step_end=watch, **arguments)
        assert times == pytest.approx(expected)
    times.clear()
    pipe.scheduler.set_grid(Grid((1.0, 0.6, 0.0)))
    pipe([0], callback_on_step_end=watch)
    assert times == pytest.approx([1000, 600])


def test_stock_schedulers_run_in_it(demo: Any) -> None:
    ours = demo.scheduler
    try:
        demo.scheduler = FlowMatchEulerDiscreteScheduler()
        noise = torch.randn(2, demo.unet.config["in_channels"], *[demo.unet.config["sample_size"]] * 2)
        stock = demo([1, 2], num_inference_steps=4, latents=noise, output_type="latent").images
        demo.scheduler = RectifiedFlowScheduler.from_config(demo.scheduler.config)
        mine = demo([1, 2], num_inference_steps=4, latents=noise, output_type="latent").images
        assert torch.allclose(stock, mine, atol=1e-5)
    finally:
        demo.scheduler = ours


def test_saving_with_and_without_our_scheduler(tmp_path: Path, demo: Any) -> None:
    noise = torch.randn(2, demo.unet.config["in_channels"], *[demo.unet.config["sample_size"]] * 2)
    pipe: Any = ClassConditionalPipeline(demo.unet, RectifiedFlowScheduler(solver="heun"))
    pipe.scheduler.set_grid(Grid((1.0, 0.5, 0.0)))
    expected = pipe([1, 2], latents=noise, output_type="latent").images
    flowkit.save_pretrained(pipe, tmp_path / "stock")
    pipe.save_pretrained(tmp_path / "ours")
    assert (
        '"_class_name": "FlowMatchEulerDiscreteScheduler"'
        in (tmp_path / "stock/scheduler/scheduler_config.json").read_text()
    )
    FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "stock" / "scheduler")
    for folder in ("stock", "ours"):
        again = ClassConditionalPipeline.from_pretrained(tmp_path / folder)
        assert isinstance(again.scheduler, RectifiedFlowScheduler)
        assert again.scheduler.method.name == "heun"
        assert torch.allclose(again([1, 2], latents=noise, output_type="latent").images, expected, atol=1e-5)


def test_bad_arguments_are_refused_before_work() -> None:
    pipe = exact_pipeline()
    for arguments, message in (
        ({"class_labels": [3, 4]}, r"from 0 to 2, got \[3, 4\]"),
        ({"class_labels": [-1]}, r"got \[-1\]"),
        ({"class_labels": []}, r"got \[\]"),
        ({"class_labels": [0.5]}, "whole numbers"),
        ({"class_labels": [0], "output_type": "jpeg"}, "unknown output_type 'jpeg'"),
        (
            {"class_labels": [0], "latents": torch.zeros(2, 1, 4, 4)},
            r"shape \(2, 1, 4, 4\), the labels ask for \(1, 1, 4, 4\)",
        ),
        ({"class_labels": [0], "num_inference_steps": 0}, "at least 1, got 0"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for a batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    with pytest.raises(ValueError, match="unknown embedded data set 'letters'"):
        flowkit.load_demo("letters")


def test_nan_is_found_at_the_end_and_named_with_debug() -> None:
    pipe = exact_pipeline()
    noise = torch.randn(3, 1, 4, 4)
    noise[1] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\] hold NaN or inf; .*debug=True"):
        pipe([0, 1, 2], num_inference_steps=2, latents=noise)
    pipe = exact_pipeline(debug=True)
    with pytest.raises(ValueError, match=r"step 0 of 2, sigma 1 to 0\.5"):
        pipe([0, 1, 2], num_inference_steps=2, latents=noise)


def test_hostile_folders_are_refused(tmp_path: Path) -> None:
    def damaged(name: str) -> tuple[Path, Path]:
        folder = tmp_path / name
        shutil.copytree(assets.folder("digits"), folder)
        return folder, folder / "unet" / "diffusion_pytorch_model.safetensors"

    folder, file = damaged("cut")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="corrupt, cut short"):
        ClassConditionalPipeline.from_pretrained(folder)
    folder, file = damaged("pickled")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickled weight file"):
        ClassConditionalPipeline.from_pretrained(folder)
    folder, file = damaged("empty")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        ClassConditionalPipeline.from_pretrained(folder)


def test_vp_models_too() -> None:
    model = MixtureDenoiser.of(POINTS, 0.05, labels=LABELS, path="vp")
    pipe = ClassConditionalPipeline(
        model, DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    pipe.set_progress_bar_config(disable=True)
    draw: dict[str, Any] = {"num_inference_steps": 10, "output_type": "latent"}
    stock = pipe([0, 1], generator=torch.Generator().manual_seed(0), **draw).images
    pipe.scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler.config)
    assert torch.allclose(pipe([0, 1], generator=torch.Generator().manual_seed(0), **draw).images, stock, atol=1e-5)

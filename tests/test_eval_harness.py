"""From pipeline to figure: inputs, seeds and batches, the record, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from flowkit import assets, rng
from flowkit.eval import harness
from flowkit.eval.features import ClassifierExtractor, PixelExtractor
from flowkit.eval.frechet import frechet_distance
from flowkit.eval.harness import count_rows, evaluate
from flowkit.eval.statistics import FeatureStats
from flowkit.pipelines.sampling import Inputs, as_inputs, blocks, sample_images, sample_outputs

pytestmark = pytest.mark.filterwarnings("ignore:a Frechet distance of")


def tiny_unet(channels: int = 3, classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        add_attention=False,
        num_class_embeds=classes,
    )


class LabelPipeline(DiffusionPipeline):
    """Two network calls, then the noise of each sample's own generator, shifted by its label: exact in any batch."""

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        labels: list[int],
        shift: float = 0.0,
        scale: list[float] | None = None,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        assert generator is not None
        assert len(generator) == len(labels)
        x = torch.stack([torch.rand(1, 8, 8, generator=g) for g in generator])
        for t in self.progress_bar([1, 2]):
            self.unet(torch.cat([x, x]), t)
        gain = torch.ones(len(labels)) if scale is None else torch.tensor(scale)
        x = (gain[:, None, None, None] * x + torch.tensor(labels)[:, None, None, None] + shift) / 10
        if output_type == "pt":
            return ImagePipelineOutput(images=x)
        array = x.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(array) if output_type == "pil" else array)


class ShowPipeline(DiffusionPipeline):
    """Shows given images, whatever their type: no denoiser, no scheduler steps."""

    def __init__(self, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, image: list[Any], generator: list[torch.Generator], **kwargs: object) -> tuple[Any]:
        return (image,)


@pytest.fixture
def labelled() -> LabelPipeline:
    return LabelPipeline(tiny_unet(1), DDIMScheduler())


@pytest.fixture
def unconditional() -> DDPMPipeline:
    return DDPMPipeline(tiny_unet(), DDPMScheduler())


def show(images: Tensor) -> tuple[ShowPipeline, Callable[[int], Mapping[str, Any]]]:
    """A pipeline and inputs whose sample i is image i, over and over."""
    floats = images.double() / 255
    return ShowPipeline(DDIMScheduler()), lambda i: {"image": floats[i % len(floats)]}


def sample(pipe: DiffusionPipeline, count: int, **kwargs: Any) -> Tensor:
    return torch.cat(list(sample_images(pipe, count, **kwargs)))


# Inputs.


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([3, 1, 2], [{"labels": 3}, {"labels": 1}, {"labels": 2}, {"labels": 3}]),
        ((3, 1), [{"labels": 3}, {"labels": 1}, {"labels": 3}, {"labels": 1}]),
        (range(2), [{"labels": 0}, {"labels": 1}, {"labels": 0}, {"labels": 1}]),
        (torch.tensor([5, 6]), [{"labels": 5}, {"labels": 6}] * 2),
        (np.array([5, 6]), [{"labels": 5}, {"labels": 6}] * 2),
        (["a", "b"], [{"labels": "a"}, {"labels": "b"}] * 2),
        (
            [{"labels": 1, "scale": 2.0}, {"labels": 2, "scale": 0.5}],
            [{"labels": 1, "scale": 2.0}, {"labels": 2, "scale": 0.5}] * 2,
        ),
        ({"labels": 7}, [{"labels": 7}] * 4),
        (lambda i: {"labels": i * i}, [{"labels": i * i} for i in range(4)]),
        (None, [{}] * 4),
    ],
)
def test_every_kind_of_inputs(labelled: LabelPipeline, inputs: Inputs, expected: list[dict[str, Any]]) -> None:
    own = as_inputs(labelled, inputs)
    assert [own(i) for i in range(4)] == expected
    assert all(type(value) in (int, str, float) for i in range(4) for value in own(i).values())


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("a cat", TypeError, r"one string, 'a cat'; write inputs=\['a cat'\]"),
        ([], ValueError, "inputs is empty"),
        (torch.zeros(3, 2), ValueError, r"one value a sample, got an array of shape \(3, 2\)"),
        (5, TypeError, "got int"),
    ],
)
def test_bad_inputs_are_refused(labelled: LabelPipeline, inputs: Inputs, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_inputs(labelled, inputs)


# Images.


def test_images_are_those_of_the_samples_own_seed_and_input(labelled: LabelPipeline) -> None:
    images = sample(labelled, 7, seed=5, inputs=[0, 4, 8], call={"shift": 0.5}, batch_size=3)
    assert (images.dtype, images.shape) == (torch.uint8, (7, 1, 8, 8))
    for i in range(7):
        x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(rng.sample_seed(5, i)))
        expected = np.rint(((x + [0, 4, 8][i % 3] + 0.5) / 10).numpy() * 255)
        assert np.array_equal(images[i].numpy(), expected)
    assert not torch.equal(images, sample(labelled, 7, seed=6, inputs=[0, 4, 8], call={"shift": 0.5}))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_and_ranges_do_not_change_the_images(labelled: LabelPipeline, batch_size: int) -> None:
    whole = sample(labelled, 20, inputs=range(7), batch_size=20)
    assert torch.equal(sample(labelled, 20, inputs=range(7), batch_size=batch_size), whole)
    assert torch.equal(sample(labelled, 9, inputs=range(7), batch_size=batch_size, start=11), whole[11:])
    assert whole.unique(dim=0).shape == whole.shape


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_an_unconditional_pipeline_is_batch_independent_up_to_its_network(scheduler: type) -> None:
    """DDPM draws noise in every step. One level apart is the network's own rounding."""
    pipe = DDPMPipeline(tiny_unet(), scheduler())
    whole = sample(pipe, 10, call={"num_inference_steps": 3}, batch_size=64)
    for batch_size in (1, 3):
        other = sample(pipe, 10, call={"num_inference_steps": 3}, batch_size=batch_size)
        assert (other.int() - whole.int()).abs().max() <= 1
        assert (other == whole).float().mean() > 0.999
    assert whole.float().std() > 10


def test_batches_come_in_order_and_only_when_asked_for(labelled: LabelPipeline) -> None:
    with count_rows(labelled) as rows:
        batches = sample_images(labelled, 10, inputs=[1], batch_size=4)
        assert rows() == 0
        assert len(next(batches)) == 4
        assert rows() == 16
        assert [len(batch) for batch in batches] == [4, 2]
        assert rows() == 40


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_every_output_type_gives_the_same_images(labelled: LabelPipeline, output_type: str) -> None:
    expected = sample(labelled, 6, inputs=[2, 7])
    assert torch.equal(sample(labelled, 6, inputs=[2, 7], call={"output_type": output_type}), expected)


def test_colour_pictures_keep_their_axes() -> None:
    pixels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    pipe = ShowPipeline(DDIMScheduler())
    assert torch.equal(sample(pipe, 2, inputs=[{"image": p} for p in pictures]), pixels)
    arrays = [{"image": p.permute(1, 2, 0).numpy() / np.float32(255)} for p in pixels]
    assert torch.equal(sample(pipe, 2, inputs=arrays), pixels)


def test_values_round_half_to_even() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, 3.49999, 254.5, 255.0], dtype=torch.float64) / 255
    pipe, inputs = ShowPipeline(DDIMScheduler()), [{"image": values.reshape(1, 1, 6)}]
    assert sample(pipe, 1, inputs=inputs).flatten().tolist() == [0, 2, 2, 3, 254, 255]


def test_own_arguments_are_listed_and_tensors_stacked(labelled: LabelPipeline) -> None:
    rows = [{"labels": 1, "scale": 1.0}, {"labels": 1, "scale": 0.0}]
    images = sample(labelled, 4, inputs=rows, batch_size=4)
    assert images[1].unique().tolist() == images[3].unique().tolist() == [26]
    assert len(images[0].unique()) > 10


def test_the_pipelines_own_progress_bar_is_off_and_comes_back(
    labelled: LabelPipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    labelled.set_progress_bar_config(desc="mine")
    batches = sample_images(labelled, 4, inputs=[1], batch_size=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert capfd.readouterr().err == ""
    assert labelled._progress_bar_config == {"desc": "mine"}
    labelled([1], generator=[torch.Generator()])
    assert "mine" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"count": 0}, ValueError, "count=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"start": -1}, ValueError, "start=-1"),
        ({"inputs": None}, TypeError, "LabelPipeline takes its batch from labels; pass inputs="),
        ({"call": {"steps": 4}}, TypeError, "LabelPipeline takes no steps; it takes labels, shift"),
        ({"inputs": {"prompt": "a"}}, TypeError, "LabelPipeline takes no prompt"),
        ({"call": {"labels": 4}}, TypeError, "labels is in inputs and in call"),
        ({"call": {"generator": None}}, TypeError, "generator cannot be given"),
        ({"inputs": lambda i: i}, TypeError, "sample 0 must be a dict of pipeline arguments, got int"),
    ],
)
def test_bad_arguments_are_refused_before_sampling(
    labelled: LabelPipeline, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sample_images(labelled, **{"count": 4, "inputs": [1], **kwargs})


def test_an_unconditional_pipeline_has_no_inputs(unconditional: DDPMPipeline) -> None:
    with pytest.raises(TypeError, match=r"DDPMPipeline takes no input of its own.*batch_size.*inputs=None"):
        sample_images(unconditional, 4, inputs=[1, 2])


def test_samples_of_a_batch_share_what_holds_for_a_call(labelled: LabelPipeline) -> None:
    inputs = [{"labels": 1}, {"labels": 1, "shift": 1.0}, {"labels": 2, "shift": 1.0}, {"labels": 2, "shift": 0.5}]
    assert blocks(labelled, 6, inputs=inputs) == [range(1), range(1, 3), range(3, 4), range(4, 5), range(5, 6)]
    assert blocks(labelled, 3, inputs=inputs, batch_size=1, start=1) == [range(1, 2), range(2, 3), range(3, 4)]
    together = sample(labelled, 4, inputs=inputs)
    assert torch.equal(together, torch.cat([sample(labelled, 1, inputs=inputs, start=i) for i in range(4)]))
    assert not torch.equal(together[2:3], sample(labelled, 1, inputs=inputs[:2], start=2))
    for block in (range(2), range(2, 4)):
        with pytest.raises(ValueError, match="samples of one block have different arguments"):
            list(sample_outputs(labelled, [block], inputs=inputs))


class ForgetfulPipeline(ShowPipeline):
    """Keeps its generators from what draws the noise, as Flux does from ``scheduler.step``."""

    def __call__(self, image: list[Any], generator: list[torch.Generator], **kwargs: object) -> tuple[Any]:
        keyed = rng.normal((1, 4, 4), *rng.keys(None, len(image))) / 20 + 0.5
        return (torch.cat([keyed.clamp(0, 1), torch.rand(1, 1, 4, 4).expand(len(image), -1, -1, -1)], dim=2),)


def test_noise_past_the_generators_is_keyed_too() -> None:
    pipe, state = ForgetfulPipeline(DDIMScheduler()), torch.get_rng_state()
    images = sample(pipe, 6, inputs=[0], batch_size=3)
    assert torch.equal(images, sample(pipe, 6, inputs=[0], batch_size=3))
    assert torch.equal(images[:, :, :4], sample(pipe, 6, inputs=[0], batch_size=2)[:, :, :4])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_images_that_are_not_finite_name_their_samples() -> None:
    images = torch.full((10, 1, 4, 4), 0.5, dtype=torch.float64)
    images[3, 0, 1, 1], images[7, 0, 0, 0] = math.nan, math.inf
    pipe = ShowPipeline(DDIMScheduler())
    with pytest.raises(ValueError, match=r"NaN or infinity in samples 13, 17; debug=True"):
        sample(pipe, 10, inputs=lambda i: {"image": images[i - 10]}, start=10)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 4, 4), -1.0), r"run from -1 to -1, not within \[0, 1\]"),
        (torch.full((1, 4, 4), 255.0), r"run from 255 to 255"),
        (torch.zeros(4, 4, 4), "alpha and latents"),
        (torch.zeros(2, 3, 4, 4), "video"),
    ],
)
def test_what_is_not_an_image_is_refused(image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(ShowPipeline(DDIMScheduler()), 1, inputs={"image": image})


# Figures.


def test_the_reference_images_themselves_are_at_distance_zero() -> None:
    def measure(images: Tensor) -> Mapping[str, float]:
        pipe, inputs = show(images)
        return evaluate(pipe, "digits", 500, extractor=["classifier", "pixels"], inputs=inputs, progress=False)

    held_out = measure(assets.images("digits", "held-out")[0])
    train = measure(assets.images("digits", "train", 500)[0])
    assert set(held_out) == {"fid", "fid/pixels"}
    for key in held_out:
        assert held_out[key] < 1e-6 < 1e-2 < train[key]


def test_the_figure_is_the_distance_of_the_images_statistics(labelled: LabelPipeline) -> None:
    """Against numpy over all images at once, for any batch size; the standard error by hand."""
    reference = FeatureStats.empty(64, PixelExtractor(1).identity)
    reference.update(torch.randn(200, 64))
    x = sample(labelled, 50, seed=3, inputs=range(9)).flatten(1).double().numpy() / 127.5 - 1

    def distance(keep: np.ndarray[Any, Any]) -> float:
        return frechet_distance(reference.mean, reference.covariance(), keep.mean(axis=0), np.cov(keep, rowvar=False))

    bounds = [50 * k // 20 for k in range(21)]
    left_out = [distance(np.delete(x, np.s_[a:b], axis=0)) for a, b in itertools.pairwise(bounds)]
    for batch_size in (1, 7, 64):
        result = evaluate(
            labelled,
            reference,
            50,
            extractor=PixelExtractor(1),
            seed=3,
            inputs=range(9),
            batch_size=batch_size,
            progress=False,
        )
        assert result["fid"] == pytest.approx(distance(x), rel=1e-6)
        assert result.se["fid"] == pytest.approx(math.sqrt(19) * np.std(left_out), rel=1e-5)


def test_the_record_holds_what_repeats_the_figure(labelled: LabelPipeline) -> None:
    arguments: dict[str, Any] = {
        "inputs": torch.arange(9),
        "call": {"shift": 0.5},
        "progress": False,
        "seed": 11,
        "batch_size": 3,
    }
    result = evaluate(labelled, "digits", 30, keep=4, **arguments)
    spec = json.loads(json.dumps(result.spec, allow_nan=False))
    assert spec["samples"]["count"] == 30
    assert spec["samples"]["seed"] == 11
    assert spec["samples"]["call"] == {"shift": 0.5}
    assert spec["pipeline"]["class"] == "LabelPipeline"
    assert spec["pipeline"]["scheduler"]["config"]["num_train_timesteps"] == 1000
    assert (spec["pipeline"]["dtype"], spec["pipeline"]["device"]) == ("float32", "cpu")
    assert spec["features"]["fid"]["extractor"] == ClassifierExtractor("digits").identity
    reference = spec["features"]["fid"]["reference"]
    assert (reference["origin"], reference["count"]) == ("embedded digits", 500)
    assert reference["extractor"] == spec["features"]["fid"]["extractor"]
    assert spec["network_evaluations"] == 4
    assert set(spec["seconds"]) == {"sampling", "features", "fid"}
    assert spec["versions"]["torch"] == metadata.version("torch")
    assert torch.equal(result.images, sample(labelled, 4, **{k: arguments[k] for k in ("inputs", "call", "seed")}))

    again = evaluate(labelled, "digits", 30, **arguments)
    assert again["fid"] == result["fid"]
    assert again.spec["samples"] == result.spec["samples"]
    assert again.images.shape == (0, 1, 8, 8)
    other = evaluate(labelled, "digits", 30, **arguments | {"inputs": [3]})
    assert other.spec["samples"]["inputs_sha256"] != result.spec["samples"]["inputs_sha256"]
    assert other["fid"] != result["fid"]
    assert "fid=" in repr(result)


def test_network_evaluations_are_rows_an_image_and_the_hook_goes(unconditional: DDPMPipeline) -> None:
    result = evaluate(
        unconditional, "shapes", 4, extractor=PixelExtractor(3), call={"num_inference_steps": 3}, progress=False
    )
    assert result.spec["network_evaluations"] == 3
    assert not unconditional.unet._forward_pre_hooks
    pipe, inputs = show(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert evaluate(pipe, "digits", 4, inputs=inputs, progress=False).spec["network_evaluations"] is None


@pytest.mark.parametrize(("count", "chunks"), [(2, 0), (3, 0), (4, 2), (11, 5), (60, 20)])
def test_few_images_have_fewer_chunks_and_very_few_no_error(labelled: LabelPipeline, count: int, chunks: int) -> None:
    result = evaluate(labelled, "digits", count, inputs=[1, 5], progress=False)
    assert math.isfinite(result["fid"])
    assert math.isnan(result.se["fid"]) == (chunks == 0)
    if chunks:
        assert result.se["fid"] > 0


def test_few_images_are_warned_about(labelled: LabelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="of 12 images is biased upwards") as caught:
        evaluate(labelled, "digits", 12, inputs=[1], progress=False)
    assert caught[0].filename == __file__
    monkeypatch.setattr(harness, "FEW", 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(labelled, "digits", 12, inputs=[1], progress=False)


def test_a_bar_shows_the_time_left(labelled: LabelPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate(labelled, "digits", 8, inputs=[1])
    out, err = capfd.readouterr()
    assert out == ""
    assert "sampling" in err
    assert "8/8" in err


# References.


@pytest.fixture
def pixels(labelled: LabelPipeline) -> FeatureStats:
    """Pixel statistics of what the pipeline draws under seed 0."""
    stats = FeatureStats.empty(64, PixelExtractor(1).identity)
    for batch in sample_images(labelled, 40, inputs=[1, 2]):
        stats.update(PixelExtractor(1)(batch))
    return stats


def test_a_reference_in_memory_a_file_and_an_npz_are_one(
    labelled: LabelPipeline, pixels: FeatureStats, tmp_path: Path
) -> None:
    """The extractor is the reference's own, and the images that made it are at distance zero."""
    pixels.save(tmp_path / "stats.safetensors")
    pixels.to_npz(tmp_path / "stats.npz")
    for reference in (pixels, tmp_path / "stats.safetensors", str(tmp_path / "stats.npz")):
        result = evaluate(labelled, reference, 40, inputs=[1, 2], progress=False)
        assert result["fid"] < 1e-10
        assert result.spec["features"]["fid"]["extractor"] == PixelExtractor(1).identity
        assert evaluate(labelled, reference, 40, inputs=[1, 2], seed=1, progress=False)["fid"] > 0.1
        record = result.spec["features"]["fid"]["reference"]
        assert record["origin"] == ("in memory" if reference is pixels else str(reference))
        if not str(reference).endswith("npz"):
            assert record["sha256"] == pixels.sha256()


def test_an_npz_of_unknown_origin_is_taken_as_fid_tf_and_says_so(
    labelled: LabelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    extractor = PixelExtractor(1)
    extractor.identity = {"name": "fid-tf"}
    monkeypatch.setattr(
        "flowkit.eval.features.create", lambda identity, device: {"fid-tf": extractor}[identity["name"]]
    )
    record = evaluate(labelled, path, 4, inputs=[1], progress=False).spec["features"]["fid"]
    assert record["extractor"] == {"name": "fid-tf"}
    assert record["reference"]["extractor"].startswith("unknown")
    assert record["reference"]["count"] is None


def test_each_extractor_may_have_its_own_reference(labelled: LabelPipeline, pixels: FeatureStats) -> None:
    result = evaluate(
        labelled, ["digits", pixels], 40, extractor=["classifier", PixelExtractor(1)], inputs=[1, 2], progress=False
    )
    assert result["fid/pixels"] < 1e-10 < result["fid"]


def refuse(match: str, error: type[Exception] = ValueError, **kwargs: object) -> Any:
    return pytest.param(kwargs, error, match, id=match)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        refuse("unknown metric 'fvd'; choose fid", metrics=["fid", "fvd"]),
        refuse("num_images=1", num_images=1),
        refuse("keep=-1", keep=-1),
        refuse(r"metrics=\(\)", metrics=()),
        refuse("'imagenet'; choose digits, shapes", FileNotFoundError, reference="imagenet"),
        refuse("no statistics at gone.npz", FileNotFoundError, reference="gone.npz"),
        refuse("no weight file at gone.safetensors", FileNotFoundError, reference="gone.safetensors"),
        refuse("no statistics at gone.pkl", FileNotFoundError, reference="gone.pkl"),
        refuse("unknown extractor 'vgg'", extractor="vgg"),
        refuse(
            "extractor 'classifier': its dataset is 'digits', not 'shapes'", extractor=ClassifierExtractor("shapes")
        ),
        refuse("'pixels': its name is 'classifier', not 'pixels' and its channels", extractor=PixelExtractor(3)),
        refuse("extractors share a name", extractor=["pixels", "pixels"]),
        refuse("2 references for 1 extractors", reference=["digits", "digits"]),
        refuse("takes no steps", TypeError, call={"steps": 3}),
    ],
)
def test_bad_requests_are_refused_before_sampling(
    labelled: LabelPipeline, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with count_rows(labelled) as rows, pytest.raises(error, match=message):
        evaluate(labelled, **{"reference": "digits", "num_images": 4, "inputs": [1], "progress": False, **kwargs})
    assert rows() == 0


def test_a_reference_of_another_extractor_is_refused(
    labelled: LabelPipeline, pixels: FeatureStats, tmp_path: Path
) -> None:
    changed = dict(pixels.identity or {}) | {"preprocessing": "x / 255"}
    pixels.identity = changed
    pixels.save(tmp_path / "stats.safetensors")
    with pytest.raises(
        ValueError, match=r"stats.safetensors.*'pixels': its preprocessing is 'x / 255', not 'x / 127.5 - 1'"
    ):
        evaluate(labelled, tmp_path / "stats.safetensors", 4, inputs=[1], progress=False)
    pixels.identity = None
    with pytest.raises(ValueError, match="does not say which extractor made it; pass extractor="):
        evaluate(labelled, pixels, 4, inputs=[1], progress=False)
    with count_rows(labelled) as rows, pytest.raises(ValueError, match="at least 2 images, got 0"):
        evaluate(labelled, FeatureStats.empty(64, PixelExtractor(1).identity), 4, inputs=[1], progress=False)
    assert rows() == 0
    with pytest.raises(ValueError, match="has 64 features, the extractor 'classifier' 32"):
        evaluate(labelled, pixels, 4, extractor=ClassifierExtractor("digits"), inputs=[1], progress=False)


def test_images_that_are_not_finite_stop_the_run(labelled: LabelPipeline) -> None:
    with pytest.raises(ValueError, match="NaN or infinity in samples 0, 1, 2, 3"):
        evaluate(labelled, "digits", 4, inputs=[1], call={"shift": math.nan}, progress=False)
    assert not labelled.unet._forward_pre_hooks


class Broken(PixelExtractor):
    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images) * math.nan


def test_features_that_are_not_finite_stop_the_run(labelled: LabelPipeline, pixels: FeatureStats) -> None:
    with pytest.raises(ValueError, match="feature vectors hold NaN"):
        evaluate(labelled, pixels, 4, extractor=Broken(1), inputs=[1], progress=False)


def test_sequences_of_prompts_fill_num_images_per_prompt() -> None:
    """A pipeline without batch_size whose prompt is in call= draws its batch through num_images_per_prompt."""

    class PromptPipeline(ShowPipeline):
        def __call__(  # type: ignore[override]
            self, prompt: str | Sequence[str], num_images_per_prompt: int, generator: list[torch.Generator]
        ) -> tuple[Tensor]:
            assert isinstance(prompt, str)
            return (torch.full((num_images_per_prompt, 1, 4, 4), len(prompt) / 255),)

    assert sample(PromptPipeline(DDIMScheduler()), 5, call={"prompt": "seven77"}, batch_size=2).unique().tolist() == [7]

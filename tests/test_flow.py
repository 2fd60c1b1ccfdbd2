"""Training from data: the closed form of a Gaussian, couplings that straighten, conditions that are dropped, latents as encoded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, assets, paths, predictions
from flowkit.distill import flow_runs, objective, panel, student, train_flow, trainer
from flowkit.distill.data import tensors
from flowkit.distill.draw import Draw
from flowkit.distill.encode import Encoder
from flowkit.distill.feed import Feed
from flowkit.distill.flow import FlowLoss
from flowkit.distill.settings import Training

from .families import stock_of
from .tiny import PIPELINES, build
from .tiny_parts import grey

MEAN, STD = 0.7, 0.5


class Predict:
    """The network as `flowkit.distill.Conditions` calls it, without a pipeline."""

    def __init__(self, path: paths.Path, prediction: str, shape: tuple[int, ...], start: float = 1.0) -> None:
        self.path, self.prediction, self.shape, self.start = path, prediction, shape, start
        self.conditions: list[list[int]] = []

    def __call__(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor, samples: Tensor) -> Tensor:
        self.conditions.append(samples.tolist())
        return network(x, s)


def gaussian_loss(
    batch: int = 256,
    coupling: str = "independent",
    times: str | Sequence[float] = "uniform",
    prediction: str = "flow_prediction",
    path: paths.Path | None = None,
    start: float = 1.0,
    data: Tensor | None = None,
    labels: Sequence[int] | None = None,
    dropout: float = 0.0,
    parts: Sequence[range] | None = None,
) -> FlowLoss:
    """The loss on quantiles of a Gaussian, so that the data have its moments."""
    if data is None:
        normal = torch.distributions.Normal(MEAN, STD)
        data = normal.icdf((torch.arange(4096) + 0.5) / 4096).float()
    data = data.reshape(-1, 1, 1, 1)
    predict: Any = Predict(path or paths.flow(), prediction, (1, 1, 1), start)
    pipe: Any = SimpleNamespace(device="cpu")
    numbers = torch.tensor(labels) if labels is not None else torch.zeros(len(data), dtype=torch.int64)
    feed = Feed(tensors(data), batch, 0, parts or [range(batch)])
    encode = Encoder(pipe, (1, 1, 1))
    return FlowLoss(predict, feed, encode, numbers, 9, dropout, objective.times(times), coupling)


def velocity(x: Tensor, s: Tensor) -> Tensor:
    """The best velocity of independent noise, E[eps - x0 | x_s], of Gaussian data."""
    s = s.view(-1, 1, 1, 1)
    spread = (1 - s).square() * STD**2 + s.square()
    return -MEAN + (s - (1 - s) * STD**2) / spread * (x - (1 - s) * MEAN)


def mean_loss(loss: FlowLoss, network: Any, batch: int, steps: int) -> tuple[float, Tensor, Tensor]:
    """Mean over updates, and all losses and times."""
    found = [loss(network, Draw(0, step, batch)) for step in range(steps)]
    losses, s = (torch.cat(values) for values in zip(*found, strict=True))
    return float(losses.mean()), losses, s


def test_the_best_velocity_has_the_loss_that_cannot_be_removed() -> None:
    # V = std pi / 2 (Liu et al. 2022, section 3), std^2 / a(s) at each time.
    value, losses, s = mean_loss(gaussian_loss(), velocity, 256, 40)
    assert value == pytest.approx(STD * math.pi / 2, rel=0.05)
    spread = (1 - s).square() * STD**2 + s.square()
    assert float((losses * spread / STD**2).mean()) == pytest.approx(1, abs=0.05)
    # The controls: no other velocity does as well, nor the right one with time the other way.
    for wrong in (lambda x, s: velocity(x, s) + 0.3, lambda x, s: velocity(x, 1 - s), lambda x, s: -velocity(x, s)):
        assert mean_loss(gaussian_loss(), wrong, 256, 10)[0] > value + 0.05


@pytest.mark.parametrize(("coupling", "updates", "close"), [("independent", 60, 0.1), ("ot", 12, 0.06)])
def test_an_affine_model_of_a_gaussian_finds_the_closed_form(coupling: str, updates: int, close: float) -> None:
    levels, batch = torch.tensor([0.1, 0.4, 0.7, 1.0]), 256
    loss = gaussian_loss(batch, coupling, levels.tolist())

    def mean(table: Tensor) -> Tensor:
        """The loss of v = a_k x + b_k at level k."""

        def network(x: Tensor, s: Tensor) -> Tensor:
            at = table[(s[:, None] - levels).abs().argmin(1)]
            return at[:, 0].view(-1, 1, 1, 1) * x + at[:, 1].view(-1, 1, 1, 1)

        return torch.stack([loss(network, Draw(0, step, batch))[0].mean() for step in range(updates)]).mean()  # type: ignore[arg-type]

    # It is quadratic in (a, b), so that one step of Newton's method ends at its minimum.
    zero = torch.zeros(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(mean(zero), zero)
    hessian = torch.autograd.functional.hessian(mean, zero).reshape(8, 8)
    best = -torch.linalg.solve(hessian, gradient.flatten()).reshape(4, 2)
    for level, (a, b) in zip(levels.tolist(), best.tolist(), strict=True):
        if coupling == "independent":
            spread = (1 - level) ** 2 * STD**2 + level**2
            slope = (level - (1 - level) * STD**2) / spread
        else:  # sorted pairs: x0 = mean + std eps, so that all paths are straight
            slope = (1 - STD) / ((1 - level) * STD + level)
        assert a == pytest.approx(slope, abs=close)
        assert b == pytest.approx(-MEAN - slope * (1 - level) * MEAN, abs=close)


def test_transport_straightens_and_keeps_both_marginals() -> None:
    def straight(x: Tensor, s: Tensor) -> Tensor:
        at = s.view(-1, 1, 1, 1)
        return (1 - STD) * (x - (1 - at) * MEAN) / ((1 - at) * STD + at) - MEAN

    apart, _, _ = mean_loss(gaussian_loss(), straight, 256, 10)
    coupled, _, _ = mean_loss(gaussian_loss(coupling="ot"), straight, 256, 10)
    assert coupled < 0.02
    assert apart > STD * math.pi / 2
    free, bound = gaussian_loss(), gaussian_loss(coupling="ot")
    one, other = free._drawn(Draw(0, 3, 256)), bound._coupled(Draw(0, 3, 256))
    assert torch.equal(one.x0, other.x0)
    assert torch.equal(one.s, other.s)
    assert torch.equal(one.noise.flatten().sort().values, other.noise.flatten().sort().values)
    assert not torch.equal(one.noise, other.noise)


@pytest.mark.parametrize(
    ("path", "prediction", "start"),
    [
        (paths.vp(paths.betas()), "epsilon", None),
        (paths.vp(paths.betas()), "v_prediction", None),
        (paths.cosine(), "sample", None),
        (paths.edm(), "edm", 80 / 81),
        (paths.flow(), "flow_prediction", None),
    ],
)
def test_on_every_path_the_exact_network_has_the_least_loss(
    path: paths.Path, prediction: str, start: float | None
) -> None:
    # E[x0 | x] of the Gaussian, as each prediction; times that are not the data's alone.
    start = path.start if start is None else start

    def exact(x: Tensor, s: Tensor, off: float = 0.0) -> Tensor:
        found = []
        for row, level in zip(x.double(), s.double().tolist(), strict=True):
            alpha, sigma = path.alpha(level), path.sigma(level)
            x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (row - alpha * MEAN) + off
            eps = (row - alpha * x0) / sigma
            big_a, big_b = predictions.pair(prediction, alpha, sigma, path.sigma_data)
            found.append(big_a * x0 + big_b * eps)
        return torch.stack(found).float()

    made = gaussian_loss(times=(0.2, 0.5, 0.9), path=path, prediction=prediction, start=start)
    best = mean_loss(made, exact, 256, 8)[0]
    for off in (-0.1, 0.1):
        assert mean_loss(made, lambda x, s, off=off: exact(x, s, off), 256, 8)[0] > best * 1.001


def test_conditions_are_dropped_as_often_as_asked_and_noise_stays_with_its_condition() -> None:
    labels = [i % 3 for i in range(600)]
    data = torch.tensor([[-2.0, 0.0, 2.0][label] for label in labels])
    loss = gaussian_loss(300, "ot", data=data, labels=labels, dropout=0.2)
    kept: dict[int, list[float]] = {}
    for step in range(10):
        batch = loss._coupled(Draw(0, step, 300))
        picked = batch.x0.flatten()
        for x, eps, condition in zip(
            picked.tolist(), batch.noise.flatten().tolist(), batch.conditions.tolist(), strict=True
        ):
            assert condition == 9 or condition == labels[data.tolist().index(x)]
            kept.setdefault(condition, []).append(eps)
    assert len(kept[9]) / 3000 == pytest.approx(0.2, abs=0.03)
    for noise in kept.values():
        assert float(torch.tensor(noise).mean()) == pytest.approx(0, abs=0.12)
        assert float(torch.tensor(noise).std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_a_batch_in_parts_is_the_same_batch(coupling: str) -> None:
    halves = [range(4), range(4, 8)]
    parts = halves if coupling == "independent" else None
    whole: Any = gaussian_loss(8, coupling, dropout=0.5)
    cut: Any = gaussian_loss(8, coupling, dropout=0.5, parts=parts)
    for step in (0, 1, 5):
        expected = whole(velocity, Draw(4, step, 8))
        found = [cut(velocity, Draw(4, step, 8, rows)) for rows in halves]
        assert torch.equal(torch.cat([losses for losses, _ in found]), expected[0])
        assert torch.equal(torch.cat([s for _, s in found]), expected[1])
    (first, *_), (one, other, *_) = whole.predict.conditions, cut.predict.conditions
    assert first == one + other


# ------------------------------------------------------------------------------------------------------------ train_flow


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

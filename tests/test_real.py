"""Real images among the pairs of a distillation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from flowkit import ClassConditionalPipeline, RectifiedFlowScheduler, rng
from flowkit.cli import app
from flowkit.distill import Boss, OneStep, RectifiedDiffusion, Reflow, Trajectories, record, run, shards
from flowkit.distill import real as module
from flowkit.distill.conditions import Conditions
from flowkit.distill.data import tensors
from flowkit.distill.draw import Draw
from flowkit.distill.fine import Runs
from flowkit.distill.method import ends
from flowkit.distill.real import Beside, Real
from flowkit.eval.processes import Processes

from .families import stock_of
from .students import SMALL, tiny
from .test_invert import encoded
from .test_methods import MEAN, STD, Exact, gaussian, right
from .tiny import build


def pictures(count: int, *shape: int) -> Tensor:
    """Images that no teacher here makes."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def labelled(count: int, classes: int = 4) -> Any:
    return tensors(pictures(count, 1, 8, 8), [i % classes for i in range(count)])


class Recorded:
    """Pairs of ten samples of a teacher, and of images beside them."""

    def __init__(self, pipe: ClassConditionalPipeline, real: Real, folder: Path, evaluations: int = 64) -> None:
        wanted = ends(Runs(pipe, "heun", inputs=[0]), evaluations, guided=False)
        self.pairs = record(
            pipe, folder / "pairs", 10, wanted.grid, solver="heun", inputs=[0], keep=wanted.keep, at=wanted.at, progress=False
        )  # fmt: skip
        self.predict = Conditions(
            pipe, lambda i: {"class_labels": 0} if i < 10 else real.inputs(i - 10), 10 + len(real)
        )
        real.check(self.predict)
        self.folder, self._real, self.rows = folder / "real", real, list[int]()

    def _told(self, rows: int, total: int) -> None:
        self.rows.append(rows)
        self.total = total

    def again(self) -> Trajectories:
        return self._real.record(
            self.predict, self.predict.network, self.pairs, self.folder, 10, 4, Processes.join(torch.device("cpu")),
            self._told,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_images_stand_beside_their_noise(name: str, tmp_path: Path) -> None:
    # Of a Gaussian the noise is known.
    pipe = gaussian(name)
    images = MEAN + STD * torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    real = Real(pipe, tensors(images, [0] * 6), {}, 0)
    made = Recorded(pipe, real, tmp_path)
    noise, samples = made.again().states(range(6)).unbind(1)
    assert torch.equal(samples, images.to(samples.dtype))
    path = pipe.scheduler.path
    wanted = encoded(path, path.at_level(made.pairs.grid.sigmas[0]), images.double())
    assert float((noise - wanted).abs().max() / wanted.abs().max()) < 5e-3
    assert sum(made.rows) == made.total == real.evaluations(made.predict, made.pairs.grid)
    # They lie on the teacher's coupling: the network that is right on its pairs is right on theirs, and not on shuffled ones.
    predict: Exact = right(pipe, made.pairs, made.pairs.at)
    beside = Beside(made.pairs, made.again(), 10)
    loss = Reflow(times=(0.5, 1.0)).loss(predict, beside, range(10, 16))  # type: ignore[arg-type]
    found = float(loss(nn.Linear(1, 1), Draw(0, 0, 64))[0].mean())
    loss.pairs._held[:, 1] = loss.pairs._held[:, 1].roll(1, 0)  # type: ignore[attr-defined]
    assert found < 0.1 * float(loss(nn.Linear(1, 1), Draw(0, 0, 64))[0].mean())


def test_a_killed_recording_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny()
    monkeypatch.setattr(module, "batches_of_shard", lambda *_: 1)
    one, other = (Recorded(pipe, Real(pipe, labelled(10), {}, 0), tmp_path / name, 4) for name in ("one", "other"))
    one.again()
    write = shards.write_shard

    def failing(folder: Path, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(folder, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            other.again()
    assert [p.name for p in other.folder.glob("shard*")] == ["shard-000000.safetensors"]
    other.rows.clear()
    other.again()
    assert sum(other.rows) == other.total == 0.6 * sum(one.rows)  # of 4, 4 and 2 images the first are there
    files = sorted(p.name for p in one.folder.iterdir())
    assert len(files) == 3 + 2
    for file in files:
        assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes(), file


def test_samples_and_images_are_told_apart(tmp_path: Path) -> None:
    pipe = tiny()
    made = Recorded(pipe, Real(pipe, labelled(6), {}, 0), tmp_path, 4)
    real = made.again()
    for first in (10, 7):  # not all samples need be used
        beside = Beside(made.pairs, real, first)
        found = beside.states([first + 5, 2, first, 0], [1, 0])
        assert torch.equal(found[[1, 3]], made.pairs.states([2, 0], [1, 0]))
        assert torch.equal(found[[0, 2]], real.states([5, 0], [1, 0]))
        assert torch.equal(beside.states([2, 0]), made.pairs.states([2, 0]))
        assert torch.equal(beside.states([first + 5]), real.states([5]))
    # Each image has its own label: with another one its noise is another.
    assert [made.predict._number[10 + i] for i in range(5)] == [0, 1, 2, 3, 0]


def test_a_student_of_samples_and_images(tmp_path: Path) -> None:
    # Of 40 samples two are held out, which are samples alone.
    teacher, images, short = tiny(), labelled(12), {**SMALL, "samples": 40}
    alone = run(Reflow(rounds=2), teacher, output=tmp_path / "alone", **short)
    student = run(Reflow(rounds=2), teacher, output=tmp_path / "real", real=images, **short)
    assert any(not torch.equal(a, b) for a, b in zip(alone.unet.parameters(), student.unet.parameters(), strict=True))
    found = [Trajectories(tmp_path / "real" / f"real-{number}").states(range(12)) for number in (1, 2)]
    assert torch.equal(found[0][:, 1], found[1][:, 1])
    assert not torch.equal(found[0][:, 0], found[1][:, 0])  # the second round's teacher is another
    assert "| real images | 12 |" in (tmp_path / "real" / "README.md").read_text()
    stored = json.loads((tmp_path / "real" / "distill.json").read_text())
    assert stored["real"]["data"]["count"] == 12
    with pytest.raises(ValueError, match=r"holds a run with real\."):
        run(Reflow(rounds=2), teacher, output=tmp_path / "real", real=labelled(11), **short)


def test_latents_and_captions(tmp_path: Path) -> None:
    pipe = small_sd()
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = tensors(pictures(3, 3, side, side), ["a cat", "a dog", "a cat"])
    student = run(
        OneStep(evaluations=3), pipe, [{"prompt": "a hat"}], output=tmp_path / "student", real=images, samples=4, steps=2,
        call={"guidance_scale": 1.0}, batch_size=2, progress=False,
    )  # fmt: skip
    assert type(student) is type(pipe)
    noise, latents = Trajectories(tmp_path / "student" / "real-1").states(range(3)).unbind(1)
    encoded = pipe.vae.encode(torch.stack([images[i] for i in range(3)])).latent_dist
    drawn = encoded.mean + encoded.std * rng.normal(latents.shape[1:], 0, range(3), tag=rng.DATA)
    assert torch.allclose(latents, drawn * pipe.vae.config.scaling_factor, atol=1e-5)
    assert noise.isfinite().all()


def small_sd() -> Any:
    return build("sd15", stock_of("sd15"))


def unlike(prediction: str) -> Callable[[], ClassConditionalPipeline]:
    def make() -> ClassConditionalPipeline:
        pipe = tiny()
        pipe.scheduler = RectifiedFlowScheduler(prediction_type=prediction)
        return pipe

    return make


CAPTIONS = tensors(pictures(3, 3, 32, 32), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("teacher", "method", "images", "call", "message"),
    [
        (tiny, Boss(), labelled(4), {}, "boss learns from whole trajectories, and of a real image only its noise is known"),
        (tiny, RectifiedDiffusion(phases=2), labelled(4), {}, "rectified-diffusion learns from whole trajectories"),
        (tiny, Reflow(), tensors(pictures(4, 1, 8, 8)), {}, "takes a label with each image, and the data have none"),
        (tiny, Reflow(), tensors(pictures(4, 1, 8, 8), [4] * 4), {}, "labels run from 4 to 4, .* has 4 classes"),
        (tiny, Reflow(), tensors(pictures(4, 1, 9, 9), [0] * 4), {}, "images of .1, 9, 9. make samples of .1, 9, 9."),
        (unlike("sample"), Reflow(), labelled(4), {}, "predicts the sample says nothing of the noise"),
        (small_sd, Reflow(), CAPTIONS, {"guidance_scale": 5.0}, "led to noise without guidance"),
        (small_sd, Reflow(), CAPTIONS, {"height": 32, "width": 64}, "square, and call asks for 32 x 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_before_any_work(
    teacher: Callable[[], Any], method: Any, images: Any, call: dict[str, Any], message: str, tmp_path: Path
) -> None:
    inputs = [{"prompt": "a hat"}] if teacher is small_sd else None
    with pytest.raises(ValueError, match=message):
        run(method, teacher(), inputs, output=tmp_path / "student", real=images, call=call, **SMALL)
    assert not any(tmp_path.iterdir())


def test_the_command_takes_images(tmp_path: Path) -> None:
    levels = ((pictures(12, 1, 8, 8) + 1) * 127.5).round().byte().numpy()
    np.savez(tmp_path / "images.npz", arr_0=levels, arr_1=np.arange(12) % 10)
    (tmp_path / "run.yaml").write_text("model: digits\nreal: images.npz\nsamples: 20\ntraining: {steps: 2}\n")
    call = [
        "distill",
        "reflow",
        "--config",
        str(tmp_path / "run.yaml"),
        "--labels",
        "0-9",
        "--output",
        str(tmp_path / "student"),
    ]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert len(Trajectories(tmp_path / "student" / "real-1")) == 12
    call = ["distill", "reflow", "digits", "--labels", "0-9", "--real", "no.npz", "--output", str(tmp_path / "other")]
    told = CliRunner().invoke(app, call)
    assert told.exit_code != 0
    assert "no images at no.npz" in told.output

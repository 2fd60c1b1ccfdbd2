from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowkit import (
    ClassConditionalPipeline,
    MixtureDenoiser,
    RectifiedFlowScheduler,
    load_demo,
    paths,
    rng,
    solvers,
    table,
    weights,
)
from flowkit.distill import reflow, run, trainer
from flowkit.distill.trainer import Training
from flowkit.eval.harness import evaluate
from flowkit.grids import Grid

Velocity = Callable[[Tensor, float], Tensor]

# ------------------------------------------------------------------------------------------------- theory, on exact flows


def flow(velocity: Velocity, noise: Tensor, steps: int, solver: str = "unipc") -> tuple[Tensor, float]:
    """Ends of the flow from s = 1 to 0, and its straightness ``S = int E |Z_1 - Z_0 - v(Z_s, s)|^2 ds``."""
    path, x = paths.flow(), noise
    speeds: list[Tensor] = []
    history: tuple[Tensor, ...] = ()
    for row in table.build(solvers.solver(solver, path), path, "flow_prediction", Grid.uniform(steps).sigmas):
        speeds.append(velocity(x, row.s))
        x, history = table.step(row, x, speeds[-1], history)
    speeds.append(velocity(x, 0.0))
    gaps = torch.stack([(noise - x - v).square().sum(-1) for v in speeds])
    return x, float(torch.trapezoid(gaps, dx=1 / steps, dim=0).mean())


def cost(x: Tensor, noise: Tensor) -> float:
    return float((x - noise).square().sum(-1).mean())


def crossing(velocity: Velocity, x: Tensor, noise: Tensor, nodes: int = 40) -> float:
    """The reflow loss over uniform times, as a sum over elements: V of Liu et al. 2022 (section 3) for the best velocity."""

    def at(x: Tensor, s: Tensor) -> Tensor:
        return velocity(x, float(s[0]))

    middles = [(i + 0.5) / nodes for i in range(nodes)]
    losses = [reflow.loss(at, x, noise, torch.full((len(x),), s, dtype=x.dtype)) for s in middles]
    return float(sum(losses)) / nodes * x.shape[-1]


def exact(model: MixtureDenoiser) -> Velocity:
    return lambda x, s: model(x, 1000 * s).sample


def normals(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("std", "straightness", "crossed"), [(0.25, 0.107301, 0.392699), (1, 0.429204, 1.570796), (2, 0.858407, 3.141593)]
)
def test_a_gaussian_has_closed_forms(std: float, straightness: float, crossed: float) -> None:
    # Closed forms: S = std (2 - pi/2), V = std pi/2, cost drop 2 std = S + V, map m + std z. Quadrature, no random numbers.
    velocity = exact(MixtureDenoiser.of(torch.full((1, 1), 0.7), std))
    nodes, shares = np.polynomial.hermite_e.hermegauss(8)
    z, share = torch.tensor(nodes)[:, None], torch.tensor(shares / shares.sum())
    end, _ = flow(velocity, z, 400)
    assert torch.allclose(end, 0.7 + std * z, atol=1e-5)
    one = torch.ones(1, 1, dtype=torch.float64)  # the gap is linear in z, E z^2 = 1
    assert flow(velocity, one, 400)[1] == pytest.approx(straightness, rel=1e-3)
    x, noise = (v.reshape(-1, 1) for v in torch.meshgrid(0.7 + std * z[:, 0], z[:, 0], indexing="ij"))
    joint = torch.outer(share, share).reshape(-1, 1)
    middles = [(i + 0.5) / 400 for i in range(400)]
    gaps = [(velocity((1 - s) * x + s * noise, s) - (noise - x)).square() * joint for s in middles]
    assert float(torch.stack(gaps).sum(1).mean()) == pytest.approx(crossed, rel=1e-4)
    drop = float(((x - noise).square() * joint).sum() - ((end - z).square() * share[:, None]).sum())
    assert drop == pytest.approx(2 * std, rel=1e-4)
    assert drop == pytest.approx(straightness + crossed, rel=1e-4)


@pytest.mark.parametrize("std", [0.25, 1.0, 2.0])
def test_the_reflow_of_a_gaussian_is_straight(std: float) -> None:
    # On the pairs (z, m + std z) the best velocity is (1 - std) z - m, z read off the line through x.
    noise = normals(64, 1, 0)
    x = 0.7 + std * noise

    def straight(x: Tensor, s: float | Tensor) -> Tensor:
        z = (x - (1 - s) * 0.7) / ((1 - s) * std + s)
        return (1 - std) * z - 0.7

    end, bend = flow(straight, noise, 1, "euler")
    assert torch.allclose(end, x, rtol=0, atol=1e-14)
    assert bend < 1e-28
    assert (
        float(reflow.loss(lambda x, s: straight(x, s[:, None]), x, noise, torch.rand(64, dtype=torch.float64))) < 1e-28
    )
    # The control: the teacher's own velocity is not, and neither is any on other pairs.
    teacher = exact(MixtureDenoiser.of(torch.full((1, 1), 0.7), std))
    assert (flow(teacher, noise, 1, "euler")[0] - x).abs().max() > 0.1
    assert crossing(straight, x.roll(1, 0), noise) > 0.1


@pytest.fixture(scope="module")
def ring() -> tuple[Velocity, Tensor, Tensor, Tensor, float]:
    """Velocity, data and noise (independent), ends of the flow from that noise, and S, of 8 Gaussians on a circle."""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = 4 * torch.stack([angles.cos(), angles.sin()], 1)
    noise = normals(2000, 2, 1)
    data = means[torch.arange(2000) % 8] + 0.3 * normals(2000, 2, 2)
    velocity = exact(MixtureDenoiser.of(means, 0.3))
    return velocity, data, noise, *flow(velocity, noise, 100)


def test_the_flow_of_a_ring_keeps_its_marginals(ring: tuple[Velocity, Tensor, Tensor, Tensor, float]) -> None:
    *_, end, _ = ring
    error = 4 / 2000**0.5
    assert (end.mean(0).abs() < 3 * error).all()
    assert torch.allclose(end.T.cov(), (8 + 0.09) * torch.eye(2, dtype=torch.float64), atol=6 * error)
    radius = end.norm(dim=1)
    assert float(radius.mean()) == pytest.approx((16 + 0.09) ** 0.5, rel=0.01)
    assert 0.2 < float(radius.std()) < 0.4
    arcs = torch.atan2(end[:, 1], end[:, 0]).mul(4 / math.pi).round().long() % 8
    assert torch.bincount(arcs, minlength=8).min() > 190


def test_the_flow_of_a_ring_costs_less(ring: tuple[Velocity, Tensor, Tensor, Tensor, float]) -> None:
    # Found with another program: costs 18.18 and 7.82, S = 2.93.
    velocity, data, noise, end, straightness = ring
    before, after = cost(data, noise), cost(end, noise)
    assert before == pytest.approx(18.18, rel=0.02)
    assert after == pytest.approx(7.82, rel=0.05)
    assert straightness == pytest.approx(2.93, rel=0.05)
    assert after < 0.5 * before
    crossed = crossing(velocity, data, noise)
    # The identity holds in expectation; data and ends are two draws of one law, so their own norms are taken out.
    drop = before - after - float(data.square().sum(1).mean() - end.square().sum(1).mean())
    assert drop == pytest.approx(straightness + crossed, rel=0.05)


def test_shuffled_pairs_break_the_loss(ring: tuple[Velocity, Tensor, Tensor, Tensor, float]) -> None:
    # Negative control.
    velocity, data, noise, end, _ = ring
    paired, independent = crossing(velocity, end, noise), crossing(velocity, data, noise)
    shuffled = crossing(velocity, end[torch.randperm(2000, generator=torch.Generator().manual_seed(0))], noise)
    assert shuffled == pytest.approx(independent, rel=0.05)
    assert paired < 0.6 * independent


def test_times_are_mostly_noise() -> None:
    s = reflow.times(64, torch.Generator().manual_seed(0))
    at_noise = s == 1
    assert int(at_noise.sum()) == round(64 * reflow._SHARE)
    assert 0 <= float(s[~at_noise].min()) < 0.3
    assert 0.7 < float(s[~at_noise].max()) < 1


# ------------------------------------------------------------------------------------------------- the trainer


class Affine(nn.Module):
    """``w x + b``, a velocity at s = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


def gaussian_loss(model: nn.Module, step: int) -> Tensor:
    noise = normals(32, 1, step).float()
    return reflow.loss(lambda x, s: model(x), 0.7 + 0.25 * noise, noise, torch.ones(32))


HOW = Training(steps=120, learning_rate=0.1, ema=0.9)


def test_the_trainer_finds_the_straight_flow(tmp_path: Path) -> None:
    model = trainer.train(Affine(), gaussian_loss, HOW, tmp_path / "c.safetensors")
    weight, bias = model.parameters()
    assert float(weight.detach()) == pytest.approx(0.75, abs=0.01)
    assert float(bias.detach()) == pytest.approx(-0.7, abs=0.01)


def test_a_stopped_training_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    whole = trainer.train(Affine(), gaussian_loss, HOW, tmp_path / "whole.safetensors")
    part = tmp_path / "part.safetensors"
    for end in (1, 7, 60, 119):

        def stop(done: int, end: int = end) -> None:
            if done == end:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer.train(Affine(), gaussian_loss, HOW, part, stop)
        assert trainer.steps_done(part) == end
    resumed = trainer.train(Affine(), gaussian_loss, HOW, part)
    for got, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    file = tmp_path / "c.safetensors"

    def loss(model: nn.Module, step: int) -> Tensor:
        value = gaussian_loss(model, step)
        if step < 5:
            return value
        # The root of zero is finite, its slope is not.
        return value * math.nan if broken == "loss" else value + (model(torch.zeros(())) * 0).sqrt()

    with pytest.raises(ValueError, match=r"at step 5 of 120 \(.*c\.safetensors is kept\)"):
        trainer.train(Affine(), loss, HOW, file)
    assert trainer.steps_done(file) == 5
    assert all(bool(t.isfinite().all()) for t in weights.read(file)[0].values())


def test_the_rate_rises_and_falls() -> None:
    how = Training(steps=400, learning_rate=2.0, warmup=0.05, final=0.1)
    rates = [how.rate(step) for step in range(400)]
    assert rates[:19] == sorted(rates[:19])
    assert rates[0] == pytest.approx(2.0 / 20)
    assert max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert Training(steps=1).rate(0) > 0


# ------------------------------------------------------------------------------------------------- runs


def tiny(classes: int | None = 4, seed: int = 0) -> ClassConditionalPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            num_class_embeds=classes and classes + 1,
        )
    return ClassConditionalPipeline(unet.eval(), RectifiedFlowScheduler())


SMALL: dict[str, Any] = {"samples": 20, "steps": 6, "batch_size": 8, "progress": False}
# A child a file: each is killed just before the file after next takes its name, so that every state is resumed from once.
KILLED_AGAIN_AND_AGAIN = """
import os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from flowkit.distill import run, trainer
from flowkit.pipelines import ClassConditionalPipeline

trainer.SAVE_SECONDS = 0
output = pathlib.Path(sys.argv[1]) / "student"
teacher = pathlib.Path(sys.argv[1]) / "teacher"


def child():
    left = 2

    def guard(real):
        def guarded(*arguments, **named):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        return guarded

    os.replace, os.rename, os.unlink = guard(os.replace), guard(os.rename), guard(os.unlink)
    run("reflow", ClassConditionalPipeline.from_pretrained(teacher), output=output, samples=16, steps=5, batch_size=8,
        progress=False)


while True:
    pid = os.fork()
    if not pid:
        child()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    folder = output if output.exists() else output.with_name("student.unfinished")
    print(code, folder.name, *sorted(p.name for p in folder.iterdir()), flush=True)
    if code != -signal.SIGKILL:
        break
"""


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    teacher = tiny()
    teacher.save_pretrained(tmp_path / "teacher")
    root = Path(__file__).resolve().parents[1]
    script = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(tmp_path), str(root)]
    child = subprocess.run(script, capture_output=True, text=True)
    lines = [line.split() for line in child.stdout.splitlines()]
    assert [line[0] for line in lines] == ["-9"] * (len(lines) - 1) + ["0"], child.stderr
    unfinished = [line for line in lines if line[1] == "student.unfinished"]
    assert len(unfinished) >= 7  # settings, 2 batches of pairs, 5 checkpoints
    assert sum("checkpoint.safetensors" in line for line in unfinished) >= 4
    files = ["distill.json", "model_index.json", "pairs.safetensors", "scheduler", "unet"]
    assert lines[-1][1:] == ["student", *files]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "teacher"]
    run("reflow", teacher, output=tmp_path / "whole", samples=16, steps=5, batch_size=8, progress=False)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == files
    for name in ("pairs.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "student" / name).read_bytes()


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline]:
    """A teacher, the folder of its student, and the student."""
    teacher, folder = tiny(), tmp_path_factory.mktemp("run") / "student"
    return teacher, folder, run("reflow", teacher, output=folder, **SMALL)


def test_the_student_is_an_ordinary_folder(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    teacher, folder, student = finished
    assert isinstance(student, ClassConditionalPipeline)
    assert student.scheduler.config["solver"] == "euler"
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    changed = 0
    for name, weight in student.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])
        changed += not torch.equal(weight, teacher.unet.state_dict()[name])
    assert changed > 20
    noise = rng.normal((1, 8, 8), 5, [0])
    one = student(class_labels=[1], latents=noise, num_inference_steps=1, output_type="latent").images
    with torch.no_grad():
        velocity = unet(noise, 1000.0, class_labels=torch.tensor([1])).sample
    assert torch.allclose(one, noise - velocity, atol=1e-6)
    stock.set_timesteps(sigmas=[1.0])
    assert torch.allclose(stock.step(velocity, stock.timesteps[0], noise).prev_sample, one, atol=1e-6)


def test_only_samples_and_labels_are_stored(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    teacher, folder, _ = finished
    stored, _ = weights.read(folder / "pairs.safetensors")
    assert stored["labels"].tolist() == [i % 4 for i in range(20)]
    assert sorted(stored) == ["labels", "samples"]
    # Noise from its keys and the teacher give sample 13 again, drawn by itself.
    noise = rng.normal((1, 8, 8), 0, [13], tag=rng.DATA)
    teacher.set_progress_bar_config(disable=True)
    drawn = teacher(
        [1], latents=noise, num_inference_steps=reflow._EVALUATIONS, output_type="latent", return_dict=False
    )[0]
    assert torch.allclose(drawn, stored["samples"][13:14], atol=1e-5)
    # No evaluation draws this noise: it has another tag.
    assert not torch.isclose(noise, rng.normal((1, 8, 8), 0, [13], tag=rng.INITIAL)).all()


def test_a_finished_run_is_only_loaded(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline],
) -> None:
    teacher, folder, student = finished

    def fail(*args: Any) -> None:
        raise AssertionError("the teacher was called")

    handle = teacher.unet.register_forward_pre_hook(fail)
    again = run("reflow", teacher, [0, 1, 2, 3], output=str(folder), **SMALL)  # the same labels, said in another way
    handle.remove()
    for a, b in zip(again.unet.parameters(), student.unet.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 21}, "samples=20, this one has 21"),
        ({"steps": 7}, "steps=6, this one has 7"),
        ({"seed": 1}, "seed=0, this one has 1"),
        ({"batch_size": 4}, "batch_size=8, this one has 4"),
        ({"inputs": [2]}, "labels="),
        ({"teacher": 1}, "teacher="),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    finished: tuple[ClassConditionalPipeline, Path, ClassConditionalPipeline], change: dict[str, Any], message: str
) -> None:
    teacher, folder, _ = finished
    before = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    arguments = {**SMALL, "teacher": teacher, **change}
    if "teacher" in change:
        arguments["teacher"] = tiny(seed=1)
    with pytest.raises(ValueError, match=f"{message}.*resume=False"):
        run("reflow", output=folder, **arguments)
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    teacher, folder = tiny(), tmp_path / "student"
    folder.mkdir()  # an empty folder is free
    first = run("reflow", teacher, output=folder, **SMALL)
    again = run("reflow", teacher, output=folder, resume=False, **{**SMALL, "steps": 7, "seed": 3})
    assert json.loads((folder / "distill.json").read_text())["seed"] == 3
    pairs = zip(first.unet.parameters(), again.unet.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["student", "student.unfinished"])
def test_what_is_not_ours_is_left_alone(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is not the folder of a distillation; choose another output"):
        run("reflow", tiny(), output=tmp_path / "student", resume=resume, **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == [name, "thesis.txt"]


def flow_free() -> ClassConditionalPipeline:
    pipe = tiny()
    pipe.scheduler = diffusers.DDIMScheduler()
    return pipe


def weightless() -> ClassConditionalPipeline:
    model = MixtureDenoiser.of(torch.zeros(2, 1, 8, 8), 0.5, labels=torch.tensor([0, 1]))
    return ClassConditionalPipeline(model, RectifiedFlowScheduler())


@pytest.mark.parametrize(
    ("teacher", "arguments", "error", "message"),
    [
        (tiny, {"method": "onestep"}, ValueError, "unknown method 'onestep'; choose reflow"),
        (
            lambda: diffusers.DDPMPipeline(tiny(None).unet, diffusers.DDPMScheduler()),
            {},
            TypeError,
            "from a DDPMPipeline",
        ),
        (flow_free, {}, ValueError, "predicts 'epsilon' on the path 'vp'"),
        (weightless, {}, ValueError, "no weights that a student could train"),
        (lambda: tiny(None), {}, ValueError, "takes no class labels"),
        (tiny, {"samples": 0}, ValueError, "samples must be .* got 0"),
        (tiny, {"steps": 0}, ValueError, "steps must be .* got 0"),
        (tiny, {"steps": 1.5}, ValueError, "steps must be .* got 1.5"),
        (tiny, {"steps": True}, ValueError, "steps must be .* got True"),
        (tiny, {"batch_size": -1}, ValueError, "batch_size must be .* got -1"),
        (tiny, {"seed": "0"}, ValueError, "seed must be a whole number, got '0'"),
        (tiny, {"inputs": [0, 4]}, ValueError, "input 1 is class 4; labels are whole numbers from 0 to 3"),
        (tiny, {"inputs": ["cat"]}, ValueError, "input 0 is class 'cat'"),
        (tiny, {"inputs": []}, ValueError, "inputs is empty"),
        (tiny, {"inputs": {"class_labels": 1, "guidance_scale": 2.0}}, TypeError, "class_labels alone"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    teacher: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(**{"method": "reflow", "teacher": teacher(), "output": tmp_path / "student", **SMALL, **arguments})
    assert not any(tmp_path.iterdir())


def test_a_teacher_that_fails_is_told(tmp_path: Path) -> None:
    teacher = tiny()
    next(teacher.unet.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        run("reflow", teacher, output=tmp_path / "student", **SMALL)
    assert not (tmp_path / "student").exists()


def test_defaults_are_one_pair_for_each_input(tmp_path: Path) -> None:
    teacher = tiny()
    assert reflow.Reflow(teacher, None, None, None, 0, 64).samples == reflow.SAMPLES
    assert reflow.Reflow(teacher, [1] * 12_345, None, None, 0, 64).samples == 12_345
    assert reflow.Reflow(teacher, [1, 2], 5, None, 0, 64).labels.tolist() == [1, 2, 1, 2, 1]
    assert reflow.Reflow(teacher, {"class_labels": 3}, 2, None, 0, 64).labels.tolist() == [3, 3]


def test_the_time_is_told_before_and_shown_during(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("reflow", tiny(), output=tmp_path / "student", **{**SMALL, "progress": True})
    told = capfd.readouterr().err
    assert re.search(r"reflow: 20 pairs of 8 evaluations, 6 updates; about \d+ s", told)
    assert "20/20" in told
    assert "6/6" in told


# ------------------------------------------------------------------------------------------------- the proof


def fd(pipe: Any, steps: int) -> float:
    return evaluate(pipe, "digits", 2000, inputs=range(10), call={"num_inference_steps": steps}, progress=False)["fid"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_quick_student_of_the_digits_needs_one_step(tmp_path: Path) -> None:
    teacher = load_demo()
    teacher.scheduler = RectifiedFlowScheduler(solver="euler")
    student = run("reflow", teacher, output=tmp_path / "student", samples=2000, steps=400, progress=False)
    one, many, few = fd(teacher, 1), fd(teacher, 16), fd(student, 1)
    assert few <= one / 5
    assert few <= 1.5 * many
    assert many < one / 5  # or the first line would say nothing about the second
    # Each sample follows its own noise: on pairs that were never seen, the loss at s = 1 is far below that of others' noise.
    noise, labels = rng.normal((1, 8, 8), 99, range(200), tag=rng.DATA), torch.arange(200) % 10
    x0 = teacher(labels, latents=noise, num_inference_steps=32, output_type="latent").images
    s = torch.ones(200)

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = student.unet(x, 1000 * s, class_labels=labels).sample
        return output

    others = x0.view(20, 10, 1, 8, 8).roll(1, 0).reshape_as(x0)  # of the same class
    assert reflow.loss(velocity, x0, noise, s) < 0.25 * reflow.loss(velocity, others, noise, s)

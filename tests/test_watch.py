"""Watching a student: exact figures of exact students, the same after a resume, nothing left changed."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowkit import ClassConditionalPipeline, MixtureDenoiser, RectifiedFlowScheduler, load_demo
from flowkit.distill import record, watch
from flowkit.distill.watch import Pairs, Watch
from flowkit.eval import evaluate

from . import tiny

ROOT = Path(__file__).parents[1]
SHAPE = (1, 4, 4)
few = pytest.mark.filterwarnings("ignore:a Frechet distance")


class Straight(ModelMixin, ConfigMixin):
    """The velocity of the straight flow that takes eps to ``scale eps + shift``."""

    @register_to_config
    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.register_to_config(in_channels=SHAPE[0], sample_size=SHAPE[-1], num_class_embeds=4)
        self.line = nn.Parameter(torch.tensor([scale, shift], dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        s, (scale, shift) = t.double() / 1000, self.line
        eps = (x - (1 - s) * shift) / ((1 - s) * scale + s)
        return UNet2DOutput(sample=self.drop(eps - (scale * eps + shift)))


class Doubling(ClassConditionalPipeline):
    """Makes something else of the noise that it is given."""

    def __call__(  # type: ignore[override]
        self,
        class_labels: list[int],
        num_inference_steps: int = 1,
        latents: Tensor | None = None,
        generator: Any = None,
        output_type: str = "pt",
    ) -> Any:
        assert latents is not None
        return super().__call__(
            class_labels, 1.0, num_inference_steps, latents=2 * latents, generator=generator, output_type=output_type
        )


def noise(count: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)


def student(scale: float, shift: float) -> ClassConditionalPipeline:
    return ClassConditionalPipeline(Straight(scale, shift).train(), RectifiedFlowScheduler(solver="euler"))


def pairs(scale: float = 0.5, shift: float = 0.3) -> Pairs:
    x = noise()
    return Pairs(x, scale * x + shift, range(40))


def watched(pipe: Any, folder: Path, steps: int = 1, **options: Any) -> dict[str, float]:
    given = {"inputs": [0, 1, 2], "pairs": pairs(), "pictures": 0, **options}
    return Watch(pipe, folder, steps, **given)(7, pipe.unet)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_exact_straight_student_has_no_error(steps: int, tmp_path: Path) -> None:
    found = watched(student(0.5, 0.3), tmp_path, steps, batch_size=16)
    assert found.keys() == {"mean_drift", "variance_ratio", "rmse", "straightness", "straightness_relative"}
    assert found["mean_drift"] == pytest.approx(0, abs=1e-7)
    assert found["variance_ratio"] == pytest.approx(1, rel=1e-6)
    assert found["rmse"] == pytest.approx(0, abs=1e-7)
    assert found["straightness"] == pytest.approx(0, abs=1e-12)


def test_a_shrunk_and_a_moved_student_show_it_exactly(tmp_path: Path) -> None:
    found = watched(student(0.4, 0.3), tmp_path / "shrunk")
    x = noise()
    assert found["variance_ratio"] == pytest.approx(0.8**2, rel=1e-6)
    assert found["rmse"] == pytest.approx(0.1 * float(x.square().mean().sqrt()), rel=1e-6)
    assert found["straightness"] == pytest.approx(0, abs=1e-12)  # straight still
    found = watched(student(0.5, 0.5), tmp_path / "moved")
    spread = float((0.5 * x).flatten(1).var(0).sum())
    assert found["mean_drift"] == pytest.approx(0.2 * math.sqrt(16 / spread), rel=1e-6)
    assert found["variance_ratio"] == pytest.approx(1, rel=1e-6)
    assert found["rmse"] == pytest.approx(0.2, rel=1e-6)


def gaussian(std: float, start: float, parts: int = 2000) -> float:
    """S of N(0, std^2) from flow time ``start``, for one unit of noise: y moves along g(s) = hypot(std (1 - s), s)."""
    times = [start * (k + 0.5) / parts for k in range(parts)]
    speeds = [(s - std**2 * (1 - s)) / math.hypot(std * (1 - s), s) for s in times]
    whole = math.hypot(std * (1 - start), start) - std
    return sum((whole - start * v) ** 2 for v in speeds) / parts


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    "options",
    [
        {"path": "flow", "prediction_type": "flow_prediction"},
        {"path": "vp", "prediction_type": "epsilon", **SD},
        {"path": "edm", "prediction_type": "edm"},
    ],
)
def test_a_curved_flow_has_its_straightness_on_every_path(options: dict[str, Any], tmp_path: Path) -> None:
    model = MixtureDenoiser.of(torch.zeros(1, *SHAPE), 0.25, labels=torch.tensor([0]), path=options["path"])
    scheduler = RectifiedFlowScheduler(solver="euler", **options)
    pipe, plan = ClassConditionalPipeline(model, scheduler), scheduler.plan(1, None, None, None)
    z, start = noise(), plan.path.at_level(plan.levels[0])
    first = math.hypot(0.25 * (1 - start), start) / plan.path.norm(start) * z
    found = watched(pipe, tmp_path, inputs=[0], pairs=Pairs(first, 0.25 * z, range(40)), nodes=400)
    energy = float(z.square().flatten(1).sum(1).mean())
    assert gaussian(0.25, 1.0) == pytest.approx(0.25 * (2 - math.pi / 2), rel=1e-4)  # the closed form
    # A model of the VP path knows no level below its first.
    assert found["straightness"] == pytest.approx(gaussian(0.25, start) * energy, rel=0.05)


def test_one_step_of_a_curved_flow_loses_the_variance(tmp_path: Path) -> None:
    model = MixtureDenoiser.of(torch.full((1, *SHAPE), 0.3), 0.5, labels=torch.tensor([0]))
    pipe = ClassConditionalPipeline(model, RectifiedFlowScheduler(solver="euler"))
    one, many = (watched(pipe, tmp_path, steps, inputs=[0], nodes=0) for steps in (1, 300))
    assert one["variance_ratio"] == pytest.approx(0, abs=1e-12)  # E[x0 | eps] is the mean
    assert many["variance_ratio"] == pytest.approx(1, rel=0.02)
    assert "straightness" not in one


def test_each_pair_runs_with_the_inputs_of_its_own_sample(tmp_path: Path) -> None:
    labels = torch.arange(3)
    model = MixtureDenoiser.of(labels.double().view(3, 1, 1, 1).expand(3, *SHAPE), 0.0, labels=labels)
    pipe = ClassConditionalPipeline(model, RectifiedFlowScheduler(solver="euler"))
    indices = [7, 5, 3, 4]  # of the inputs 0, 1, 2, 0, ...: labels 1, 2, 0, 1
    ends = torch.tensor([1.0, 2, 0, 1], dtype=torch.float64).view(4, 1, 1, 1).expand(4, *SHAPE)
    right = watched(pipe, tmp_path, pairs=Pairs(noise(4), ends, indices), batch_size=3)
    wrong = watched(pipe, tmp_path, pairs=Pairs(noise(4), ends, range(4)), batch_size=3)
    assert right["rmse"] == pytest.approx(0, abs=1e-12)
    assert wrong["rmse"] > 0.5


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_a_student_that_is_the_teacher_ends_where_the_pairs_do(family: str, tmp_path: Path) -> None:
    small = tiny.PIPELINES[family]
    name, config = small.stock
    teacher = tiny.build(family, getattr(diffusers, name)(**config))
    call = {k: v for k, v in small.call.items() if "prompt" not in k}
    inputs = ["a red cat", "a dog", "a house"]
    taught = record(
        teacher,
        tmp_path / "pairs",
        5,
        3,
        solver="euler",
        keep=["state"],
        at=[0, 3],
        inputs=inputs,
        call=call,
        progress=False,
    )
    states = torch.stack([taught[i]["states"] for i in range(5)], 1)
    scheduler = taught.scheduler()
    scheduler.set_grid(taught.grid)
    pipe = tiny.build(family, scheduler)
    order = [4, 0, 3, 2, 1]
    given = Pairs(states[0, order], states[1, order], order)
    (network,) = tiny.networks(pipe)
    options: dict[str, Any] = {"inputs": inputs, "call": call, "pictures": 0, "nodes": 3, "batch_size": 2}
    found = Watch(pipe, tmp_path / "right", 3, pairs=given, **options)(1, network)
    assert found["rmse"] == pytest.approx(0, abs=2e-4)
    assert found["straightness"] > 1e-3
    cost = (
        found["straightness"] / found["straightness_relative"]
    )  # of the student's own fine paths, which the teacher's resemble
    if family != "sd15":  # where the pairs' noise is in flow coordinates
        assert cost == pytest.approx(float((states[0] - states[1]).square().flatten(1).sum(1).mean()), rel=1e-3)
    other = Watch(pipe, tmp_path / "wrong", 3, pairs=Pairs(given.noise, given.samples, range(5)), **options)(1, network)
    assert other["rmse"] > 5 * found["rmse"]  # the prompts of others


def test_pictures_and_rows_are_the_same_after_a_resume(tmp_path: Path) -> None:
    pipe = load_demo("digits")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = Pairs(x, x.flip(0), range(4))
    first, second = (Watch(pipe, tmp_path / name, 2, inputs=range(10), pairs=given, nodes=4) for name in ("a", "b"))
    first(500, pipe.unet)
    torch.randn(5)  # another place in the stream of random numbers
    found = first(1000, pipe.unet)
    assert second(1000, pipe.unet) == found
    files = [tmp_path / name / "samples-001000.png" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes() == (tmp_path / "a/samples-000500.png").read_bytes()
    assert Image.open(files[0]).size == (498, 98)
    assert [row["step"] for row in watch.rows(tmp_path / "a")] == [500, 1000]
    assert watch.rows(tmp_path / "a")[1] == {"step": 1000, **found}
    # Other weights: the row of a step that is there already is replaced.
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(0.5)
    changed = first(500, pipe.unet)
    assert changed["rmse"] != found["rmse"]
    assert [row["step"] for row in watch.rows(tmp_path / "a")] == [500, 1000]
    assert watch.rows(tmp_path / "a")[0]["rmse"] == changed["rmse"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "samples-000500.png",
        "samples-001000.png",
        "watch.json",
    ]
    assert watch.rows(tmp_path) == []


@few
def test_the_distance_is_that_of_evaluate(tmp_path: Path) -> None:
    pipe = load_demo("digits")
    call = {"num_inference_steps": 2}
    found = Watch(pipe, tmp_path, 2, inputs=range(10), pictures=0, reference="digits", num_images=100, seed=3)(
        1, pipe.unet
    )
    result = evaluate(pipe, "digits", 100, inputs=range(10), call=call, seed=3, progress=False)
    assert found == {"fd": result["fid"], "fd_se": result.se["fid"]}


@few
def test_training_goes_on_as_if_nobody_had_watched(tmp_path: Path) -> None:
    pipe = load_demo("digits")
    unet = pipe.unet.train()
    unet.mid_block.eval()  # a part that is frozen
    modes = {name: module.training for name, module in unet.named_modules()}
    unet(torch.zeros(1, 1, 8, 8), 1.0, class_labels=torch.tensor([0])).sample.sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in unet.parameters()]
    weights = [p.detach().clone() for p in unet.parameters()]
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    looking = Watch(
        pipe, tmp_path, 2, inputs=range(10), pairs=Pairs(x, -x, range(4)), reference="digits", num_images=20, pictures=4
    )
    scheduler, state = pipe.scheduler, torch.get_rng_state()
    looking(1, unet)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == {name: module.training for name, module in unet.named_modules()}
    assert pipe.scheduler is scheduler
    assert all(p.requires_grad for p in unet.parameters())
    for p, gradient, weight in zip(unet.parameters(), gradients, weights, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is None if gradient is None else p.grad is not None and torch.equal(p.grad, gradient)


def test_a_network_in_shards_is_not_shared_out(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pipe = load_demo("digits")
        fully_shard(pipe.unet, mesh=init_device_mesh("cpu", (1,)))
        with pytest.warns(UserWarning, match=r"no Frechet distance is measured of a network in shards \(FSDP\)"):
            found = Watch(pipe, tmp_path, 1, inputs=range(10), pictures=2, reference="digits", num_images=20)(
                1, pipe.unet
            )
        assert found == {}
        assert (tmp_path / "samples-000001.png").is_file()
    finally:
        dist.destroy_process_group()


def test_modes_come_back_after_an_error(tmp_path: Path) -> None:
    pipe = student(math.nan, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        watched(pipe, tmp_path)
    assert pipe.unet.training
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "got steps=0"),
        ({"num_images": 1}, "num_images=1"),
        ({"pairs": Pairs(noise(4), noise(4), range(3))}, "and 3 indices; give at least two pairs"),
        ({"pairs": Pairs(noise(1), noise(1), range(1))}, "at least two pairs"),
        ({"pairs": Pairs(noise(4), torch.ones(4, *SHAPE), range(4))}, "all the same or not finite"),
    ],
)
def test_what_cannot_be_watched_is_refused_at_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Watch(student(0.5, 0.3), tmp_path, **{"steps": 1, **options})


def test_other_pipelines_and_networks_are_refused(tmp_path: Path) -> None:
    pipe = student(0.5, 0.3)
    with pytest.raises(ValueError, match="a Straight, is not the denoiser of the ClassConditionalPipeline"):
        Watch(pipe, tmp_path, 1)(1, Straight(1.0, 0.0))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match=r"FlowMatchEulerDiscreteScheduler; give it RectifiedFlowScheduler.from_config"):
        Watch(pipe, tmp_path, 1)
    labels = tiny.build("dit", RectifiedFlowScheduler())
    with pytest.raises(TypeError, match="DiTPipeline takes no latents"):
        Watch(labels, tmp_path, 1, pairs=pairs())
    with pytest.raises(
        ValueError, match=r"Doubling starts from something else than the pairs' noise \(shape \(40, 1, 4, 4\)"
    ):
        watched(Doubling(pipe.unet, RectifiedFlowScheduler()), tmp_path)


@pytest.mark.parametrize("text", ["{", json.dumps({"rows": []}), "[]"])
def test_a_file_of_something_else_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "watch.json").write_text(text)
    with pytest.raises(ValueError, match=r"watch.json .*delete it"):
        watch.rows(tmp_path)


SHARED = """
import json, sys
from pathlib import Path
import torch
from flowkit import load_demo
from flowkit.distill.watch import Pairs, Watch
pipe = load_demo("digits")
x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
watch = Watch(
    pipe, Path(sys.argv[1]), 2, inputs=range(10), pairs=Pairs(x, -x, range(4)), reference="digits", num_images=100, batch_size=16
)
print(json.dumps(watch(3, pipe.unet)))
"""


@pytest.mark.slow
@few
def test_processes_share_the_work_and_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    env = {**os.environ, **world, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARED, str(tmp_path / "two")]
    started = [
        subprocess.Popen(command, env={**env, "RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE, text=True)
        for r in ("0", "1")
    ]
    printed = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    assert printed[0] == printed[1]
    pipe = load_demo("digits")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = Watch(
        pipe,
        tmp_path / "one",
        2,
        inputs=range(10),
        pairs=Pairs(x, -x, range(4)),
        reference="digits",
        num_images=100,
        batch_size=16,
    )
    assert alone(3, pipe.unet) == pytest.approx(printed[0], rel=1e-5)
    assert [p.name for p in sorted((tmp_path / "two").iterdir())] == ["samples-000003.png", "watch.json"]
    pictures = [(tmp_path / name / "samples-000003.png").read_bytes() for name in ("one", "two")]
    assert pictures[0] == pictures[1]

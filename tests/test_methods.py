"""Losses and grids of the distillation methods, against exact networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowkit import (
    ClassConditionalPipeline,
    MixtureDenoiser,
    RectifiedFlowScheduler,
    paths,
    predictions,
    solvers,
    table,
)
from flowkit.distill import Boss, Chords, OneStep, RectifiedDiffusion, Reflow, Reverse, Trajectories, record
from flowkit.distill.draw import Draw
from flowkit.distill.fine import Runs
from flowkit.distill.onestep import even_grid
from flowkit.distill.pairs import PairLoss, check_metric, line
from flowkit.distill.shortest import shortest_paths
from flowkit.distill.trajectories import recorded_costs
from flowkit.grids import Grid

MEAN, STD = 0.7, 0.25
MODELS = [
    ("flow", "flow_prediction"),
    ("flow", "sample"),
    ("vp", "epsilon"),
    ("vp", "v_prediction"),
    ("cosine", "v_prediction"),
    ("ve", "epsilon"),
    ("edm", "edm"),
]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, wanted: Tensor, close: float = 1e-12) -> bool:
    return float((found - wanted).abs().max()) <= close * max(1.0, float(wanted.abs().max()))


# --------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(("name", "prediction"), MODELS)
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_a_line_holds_data_and_noise(name: str, prediction: str, stop: float) -> None:
    # The algebra of phases: two states of a first-order path give back x_0 and eps, and the step from any point ends right.
    path, x0, eps = paths.named(name), normals(8, 3), normals(8, 3, seed=1)
    start = 80 / 81 if name in ("ve", "edm") else path.start
    s = torch.linspace(stop + 1e-3, start, 8, dtype=torch.float64)

    def state(at: float) -> Tensor:
        return path.alpha(at) * x0 + path.sigma(at) * eps

    at = line(path, prediction, start, (state(start), state(stop)), s, stop)
    for i, value in enumerate(s.tolist()):
        a, b = predictions.pair(prediction, path.alpha(value), path.sigma(value), path.sigma_data)
        assert near(at.x[i], state(value)[i], 1e-11)
        assert near(at.raw[i], a * x0[i] + b * eps[i], 1e-11)
        assert near(at.p[i] * at.x[i] + at.q[i] * at.raw[i], state(stop)[i], 1e-10)
    assert torch.equal(at.x[-1], state(start)[-1])  # to the bit


@pytest.mark.parametrize(("name", "prediction"), MODELS)
def test_the_students_step_ends_where_the_loss_says(name: str, prediction: str) -> None:
    # Whatever the network returns: Euler, DDIM on a diffusion, is the step of first order in every gauge.
    path, x, raw = paths.named(name), normals(4, 3), normals(4, 3, seed=1)
    start = 80 / 81 if name in ("ve", "edm") else path.start
    for high, low in ((start, 0.0), (start, 0.4), (0.6, 0.2), (0.3, 0.0)):
        p, q = (line(path, prediction, high, (x, x), torch.full((4,), high), low).__dict__[k] for k in "pq")
        for gauge in ("eps", "flow"):
            (row,) = table.build(solvers.solver("euler", path, gauge), path, prediction, [high, low])
            assert near(table.step(row, x, raw)[0], p * x + q * raw)


def sampled(path: paths.Path, network: Callable[[Tensor, float], Tensor], steps: int, x: Tensor) -> Tensor:
    history: tuple[Tensor, ...] = ()
    levels = [path.at_level(v) for v in Grid.uniform(steps, path).sigmas]
    for row in table.build(solvers.solver("euler", path), path, "epsilon", levels):
        x, history = table.step(row, x, network(x, row.s), history)
    return x


def test_ddim_is_the_same_with_any_steps_where_the_noise_is_constant() -> None:
    # Gaussian data of deviation 1/2 on the linear schedule; the figures are another program's.
    path, one = paths.vp(paths.betas("linear", 0.0001, 0.02)), torch.ones(1, dtype=torch.float64)

    def matched(x: Tensor, s: float) -> Tensor:
        return x / (0.5 * path.alpha(s) + path.sigma(s))

    ends = torch.cat([sampled(path, matched, k, one) for k in (1, 2, 4, 8, 50, 1000)])
    assert float((ends - ends[0]).abs().max()) < 1e-12
    # The control: pairs at random, whose best prediction changes along the path.
    teacher = MixtureDenoiser.of(torch.zeros(1, 1), 0.5, path="vp", betas=paths.betas("linear", 0.0001, 0.02))
    alone = [float(sampled(path, lambda x, s: teacher.posterior(x, s)[1], k, one[None])) for k in (1, 2, 4, 8, 50)]
    assert alone == sorted(alone)
    assert alone[-1] > 10 * alone[0]
    # The path is a line in x / alpha over sigma / alpha and none in x.
    half = path.at_level(1.0)
    start = 0.5 * path.alpha(path.start) + path.sigma(path.start)
    middle = line(path, "epsilon", path.start, (start * one, 0.5 * one), torch.tensor([half], dtype=torch.float64)).x
    assert near(middle / path.alpha(half), 0.5 + one * 1.0)


# -------------------------------------------------------------------------------------- losses on an exact Gaussian


@dataclass
class Exact:
    """A network that is right on lines whose end is affine in their start, called like `Conditions`."""

    path: paths.Path
    prediction: str
    lines: Sequence[
        tuple[float, float, float, float]
    ]  # flow times (a, b) of each, and (weight, bias) of x_b = weight x_a + bias
    start: float = 1.0
    shape: tuple[int, ...] = (1, 2, 2)
    latent: bool = False

    def __post_init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, network: nn.Module, x: Tensor, s: Tensor, samples: Any) -> Tensor:
        self.calls.append((x, s))
        found = []
        for row, value in zip(x.double(), s.double().tolist(), strict=True):
            high, low, weight, bias = next(
                v for v in self.lines if v[1] <= value <= v[0] and (value > v[1] or not v[1])
            )
            # x is affine in the first state of its line, which is solved for.
            unit, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            at = torch.tensor([value], dtype=torch.float64)
            slope, offset = (
                line(self.path, self.prediction, high, (v, weight * v + bias), at, low) for v in (unit, none)
            )
            first = (row - offset.x) / (slope.x - offset.x)
            found.append(offset.raw + (slope.raw - offset.raw) * first)
        return torch.stack(found)


def gaussian(name: str = "flow", prediction: str | None = None, solver: str = "euler") -> ClassConditionalPipeline:
    mean, label = torch.full((1, 1, 2, 2), MEAN), torch.zeros(1, dtype=torch.int64)
    network = MixtureDenoiser.of(mean, STD, labels=label, path=name, prediction_type=prediction)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} if name == "vp" else {}
    kind = {} if prediction is None else {"prediction_type": prediction}
    pipe = ClassConditionalPipeline(network, RectifiedFlowScheduler(path=name, solver=solver, **betas, **kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recorded(pipe: ClassConditionalPipeline, method: Any, folder: Path, samples: int = 24) -> Trajectories:
    wanted = method.recording(Runs(pipe, method.solver, inputs=[0]), guided=False)
    return record(
        pipe, folder, samples, wanted.grid, solver=method.solver, inputs=[0], keep=wanted.keep, at=wanted.at, progress=False
    )  # fmt: skip


def right(pipe: ClassConditionalPipeline, data: Trajectories, edges: Sequence[int]) -> Exact:
    """The network that is right on what was recorded: of a Gaussian every state is affine in every other."""
    states = data.states(range(len(data)), [data.at.index(i) for i in edges]).flatten(2).double()
    path, lines = pipe.scheduler.path, []
    for i, (one, other) in enumerate(pairwise(edges)):
        x, y = states[:, i].flatten(), states[:, i + 1].flatten()
        fit = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None])
        weight, bias = fit.solution.flatten().tolist()
        assert near(weight * x + bias, y, 1e-10)  # exact: there is nothing else to be learnt
        lines.append((path.at_level(data.grid.sigmas[one]), path.at_level(data.grid.sigmas[other]), weight, bias))
    return Exact(path, pipe.scheduler.prediction, lines, lines[0][0])


METHODS: list[Any] = [
    Reflow(),
    Reflow(times="u-shaped", metric="pseudo-huber", space="x0"),
    OneStep(),
    OneStep(steps=3, metric="l2"),
    Reverse(),
    RectifiedDiffusion(),
    RectifiedDiffusion(phases=3, metric="l2"),
    Boss(steps=3, anchors=12, search=24),
]


def edges_of(method: Any, data: Trajectories) -> list[int]:
    if isinstance(method, Boss):
        return list(method.grid(data).about["indices"])
    return list(data.at)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    ("name", "prediction"), [("flow", "flow_prediction"), ("vp", "epsilon"), ("vp", "v_prediction"), ("edm", None)]
)
def test_the_loss_is_zero_for_the_right_network_and_not_for_shuffled_pairs(
    method: Any, name: str, prediction: str | None, tmp_path: Path
) -> None:
    pipe = gaussian(name, prediction)
    data = recorded(pipe, method, tmp_path)
    predict: Any = right(pipe, data, edges_of(method, data))
    method.check(predict)
    loss, network = method.loss(predict, data, range(len(data))), nn.Linear(1, 1)
    found, s = loss(network, Draw(0, 0, 32))
    assert found.shape == s.shape == (32,)
    scale = 80.0 if name == "edm" else 1.0
    assert float(found.max()) < 1e-7 * scale
    # The control: ends of other samples.
    assert isinstance(loss, PairLoss)
    assert loss.pairs._held is not None
    loss.pairs._held[:, 1:] = loss.pairs._held[:, 1:].roll(1, 0)
    shuffled, s = loss(network, Draw(0, 0, 32))
    if isinstance(method, Reflow | OneStep | Reverse) or name != "edm":
        assert float(shuffled.mean()) > 1e-3


# ---------------------------------------------------------------------------------------------------- flow times and grids


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_a_k_step_student_is_trained_at_its_own_levels(steps: int, name: str, tmp_path: Path) -> None:
    pipe, method = gaussian(name), OneStep(steps=steps)
    data = recorded(pipe, method, tmp_path)
    predict: Any = right(pipe, data, data.at)
    method.loss(predict, data, range(24))(nn.Linear(1, 1), Draw(0, 0, 10 * steps))
    ((x, s),) = predict.calls
    start = pipe.scheduler.path.at_level(data.grid.sigmas[0])
    assert sorted(set(s.tolist())) == pytest.approx([start * i / steps for i in range(1, steps + 1)], rel=1e-6)
    assert torch.bincount((s / start * steps).round().long()).tolist() == [0] + [10] * steps
    noise = data.states(range(24), [0])[:, 0]
    for row in x[s == start]:
        assert any(torch.equal(row, own) for own in noise)  # nothing of the sample leaks into it
    scheduler = method.scheduler(pipe.scheduler, data)
    scheduler.set_timesteps(steps)
    levels = [scheduler.path.at_level(float(v)) for v in scheduler.sigmas]
    assert levels == pytest.approx([start * i / steps for i in range(steps, -1, -1)], rel=1e-5)
    with pytest.raises(ValueError, match=f"the grid has {steps}"):
        scheduler.set_timesteps(steps + 1)


def test_phases_are_sampled_one_a_step(tmp_path: Path) -> None:
    pipe, method = gaussian("vp"), RectifiedDiffusion(phases=4)
    data = recorded(pipe, method, tmp_path)
    assert data.at == [0, 2, 4, 6, 8]
    scheduler = method.scheduler(pipe.scheduler, data)
    assert scheduler.grid is not None
    assert scheduler.grid.sigmas == tuple(data.grid.sigmas[i] for i in data.at)
    assert method.steps == 4
    assert RectifiedDiffusion().steps == 0
    x, last = (v.double() for v in data.states(range(24), [0, -1]).unbind(1))
    predict = right(pipe, data, data.at)
    levels = [scheduler.path.at_level(v) for v in scheduler.grid.sigmas]
    for row in table.build(scheduler.method, scheduler.path, scheduler.prediction, levels):
        raw = predict(nn.Identity(), x, torch.full((24,), row.s, dtype=torch.float64), range(24))
        x, _ = table.step(row, x, raw)
    assert near(x, last, 1e-10)  # the teacher's samples, in 4 steps
    with pytest.raises(
        ValueError, match=r"4 phases need states at 5 even levels, and .* holds those at \[0, 8\] of 8 steps"
    ):
        method.loss(predict, recorded(pipe, OneStep(), tmp_path / "pairs"), range(24))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- BOSS


@pytest.mark.parametrize(("name", "prediction"), [("flow", "flow_prediction"), ("vp", "epsilon")])
def test_boss_learns_the_chords_of_its_grid(name: str, prediction: str, tmp_path: Path) -> None:
    pipe, method = gaussian(name, prediction), Boss(steps=3, anchors=20, search=24)
    data = recorded(pipe, method, tmp_path)
    grid = method.grid(data)
    nodes = list(shortest_paths(recorded_costs(data).mean(), [3])[3])
    assert grid.about["indices"] == nodes
    assert grid.about["cost"] < grid.about["uniform_cost"]
    assert method.scheduler(pipe.scheduler, data).grid == grid
    path, chords = pipe.scheduler.path, Chords(data, grid)
    x, weights = torch.empty(0), []
    for k in range(3):
        items = [chords[3 * i + k] for i in range(24)]
        states = data.states(range(24), nodes[k : k + 2])
        high, low = (path.at_level(data.grid.sigmas[i]) for i in nodes[k : k + 2])
        at = line(
            path, prediction, high, (states[:, 0], states[:, 1]), torch.full((24,), high, dtype=torch.float64), low
        )
        assert torch.equal(at.x, torch.stack([item["x"] for item in items]))
        assert near(at.raw, torch.stack([item["target"] for item in items]), 1e-11)
        # An affine student learns the chords of a Gaussian without error.
        ones = torch.ones(24 * 4, dtype=torch.float64)
        fit = torch.linalg.lstsq(torch.stack([at.x.flatten(), ones], 1), at.raw.flatten()[:, None]).solution.flatten()
        assert near(fit[0] * at.x + fit[1], at.raw, 1e-9)
        weights.append(fit)
    # And then its 3 steps end where the teacher's 20 do.
    levels = [path.at_level(v) for v in grid.sigmas]
    x = data.states(range(24), [0])[:, 0]
    for row, fit in zip(table.build(solvers.solver("euler", path), path, prediction, levels), weights, strict=True):
        x, _ = table.step(row, x, fit[0] * x + fit[1])
    assert near(x, data.states(range(24), [-1])[:, 0], 1e-9)


def test_boss_searches_on_some_trajectories_alone(tmp_path: Path) -> None:
    pipe = gaussian()
    data = recorded(pipe, Boss(anchors=12), tmp_path)
    few, many = Boss(anchors=12, search=5).grid(data), Boss(anchors=12).grid(data)
    assert (few.about["samples"], many.about["samples"]) == (5, 24)
    assert few.about["cost"] != many.about["cost"]
    assert few.about["cost"] == pytest.approx(recorded_costs(data, samples=5).total(few.about["indices"])[0])
    with pytest.raises(ValueError, match="recorded on 12 steps, too few for a grid of 13"):
        Boss(steps=13).grid(data)
    with pytest.raises(ValueError, match="costs need states and outputs at all 9 levels"):
        Boss().grid(recorded(pipe, OneStep(), tmp_path / "pairs"))


# ----------------------------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (OneStep, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        (OneStep, {"steps": 1.5}, "steps must be .* got 1.5"),
        (OneStep, {"metric": "l3"}, "no distance is called 'l3'"),
        (Reverse, {"evaluations": -1}, "evaluations must be .* got -1"),
        (Reverse, {"metric": "lpips"}, "reverse distillation learns noise; use metric='l2'"),
        (Boss, {"steps": 9, "anchors": 8}, "steps=9, anchors=8"),
        (Boss, {"search": 1}, "search=1"),
        (Boss, {"metric": "lpips"}, "BOSS learns velocities"),
        (RectifiedDiffusion, {"phases": 3, "evaluations": 8}, "evaluations=8 cannot be cut into 3 phases"),
        (RectifiedDiffusion, {"phases": 2, "metric": "lpips"}, "those between 2 phases are noisy"),
        (RectifiedDiffusion, {"times": "often"}, "no law of flow times is called 'often'"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_predictions_that_say_nothing_are_refused() -> None:
    blind: Any = SimpleNamespace(path=paths.flow(), prediction="epsilon", start=1.0, shape=(1, 2, 2), latent=False)
    for method in (OneStep(), RectifiedDiffusion(), Boss()):
        with pytest.raises(ValueError, match="does not determine the sample"):
            method.check(blind)
    Reverse().check(blind)  # at the other end epsilon is what is asked for
    with pytest.raises(ValueError, match="predicts the sample says nothing of the noise"):
        Reverse().check(SimpleNamespace(prediction="sample"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "latent"), [((3, 8, 8), True), ((4, 8, 8), False), ((16, 64), False)])
def test_a_perceptual_metric_wants_pixels(shape: tuple[int, ...], latent: bool) -> None:
    with pytest.raises(ValueError, match="lpips compares images, and the teacher's samples are latents"):
        check_metric(SimpleNamespace(shape=shape, latent=latent), "lpips")  # type: ignore[arg-type]
    check_metric(SimpleNamespace(shape=shape, latent=latent), "l2")  # type: ignore[arg-type]
    check_metric(SimpleNamespace(shape=(3, 8, 8), latent=False), "lpips")  # type: ignore[arg-type]


def test_even_levels_begin_where_the_recording_does() -> None:
    path = paths.named("vp")
    first = Grid.uniform(8, path).sigmas[0]
    grid = even_grid(path, first, 3)
    assert grid.sigmas[0] == first
    assert grid.sigmas[-1] == 0
    assert [path.at_level(v) / path.at_level(first) for v in grid.sigmas] == pytest.approx([1, 2 / 3, 1 / 3, 0])

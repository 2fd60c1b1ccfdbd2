from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkit import Grid, MixtureDenoiser, RectifiedFlowScheduler, load_demo, optimize_steps, rng, table, weights
from flowkit.distill.cost_plot import plot_costs
from flowkit.distill.costs import Costs, StepErrors
from flowkit.distill.fine import SEARCH
from flowkit.distill.observe import recording
from flowkit.distill.shortest import nearest_path, shortest_paths, uniform_path
from flowkit.hooks import Trajectory
from flowkit.pipelines.sampling import sample_images
from flowkit.schedulers.plans import Plan

from .tiny_parts import grey

# ------------------------------------------------------------------------------------------------- the shortest path


def best_path(costs: NDArray[np.float64], edges: int) -> tuple[float, int, tuple[int, ...]]:
    """The least (cost, sum of squared lengths, nodes) over all paths, one by one."""
    last = len(costs) - 1
    found = []
    for inner in itertools.combinations(range(1, last), edges - 1):
        path = (0, *inner, last)
        steps = list(itertools.pairwise(path))
        cost = 0.0
        for j, k in reversed(steps):  # in the order of the recursion, so that equal sums are equal bits
            cost = costs[j, k] + cost
        found.append((cost, sum((k - j) ** 2 for j, k in steps), path))
    return min(found)


@pytest.mark.parametrize("nodes", range(7, 12))
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_every_path_is_the_best_of_all(nodes: int, kind: str) -> None:
    draw = np.random.default_rng(nodes)
    for _ in range(100):  # 500 of each kind in all, every K from 1 to 6 and beyond
        costs = draw.random((nodes, nodes)) if kind == "random" else draw.integers(0, 3, (nodes, nodes)).astype(float)
        costs = np.triu(costs, 1)
        paths = shortest_paths(costs, range(1, nodes))
        assert paths == {k: best_path(costs, k)[2] for k in range(1, nodes)}
        assert paths[1] == (0, nodes - 1)
        assert paths[nodes - 1] == tuple(range(nodes))


@pytest.mark.parametrize("nodes", [6, 8])
def test_forbidden_and_forced_nodes(nodes: int) -> None:
    draw = np.random.default_rng(nodes)
    seen = 0
    for _ in range(50):
        costs = np.triu(draw.random((nodes, nodes)), 1)
        forbidden, forced = (draw.permutation(np.arange(1, nodes - 1))[:2].reshape(2, 1)).tolist()
        rest = [i for i in range(nodes) if i not in forbidden]
        for count in range(2, nodes - 1):
            inner = itertools.combinations(rest[1:-1], count - 1)
            allowed = [(0, *path, nodes - 1) for path in inner if set(forced) <= set(path)]
            best = min(allowed, key=lambda path: sum(costs[edge] for edge in itertools.pairwise(path)))
            assert shortest_paths(costs, [count], forbidden=forbidden, forced=forced)[count] == best
            seen += shortest_paths(costs, [count])[count] != best
        for wrong in (1, nodes - 1):
            with pytest.raises(ValueError, match=f"{wrong} steps cannot visit 1 forced anchors and avoid 1 forbidden"):
                shortest_paths(costs, [wrong], forbidden=forbidden, forced=forced)
    assert seen > 50
    for name, value, message in (("forced", [0], "anchor 0"), ("forbidden", [nodes - 1], f"anchor {nodes - 1}")):
        with pytest.raises(ValueError, match=message):
            shortest_paths(costs, [2], **{name: value})
    with pytest.raises(ValueError, match="anchor 2 is forbidden and forced"):
        shortest_paths(costs, [2], forbidden=[2], forced=[2])


def test_the_nearest_anchors_of_another_grid() -> None:
    fine = np.linspace(1, 0, 11).tolist()
    assert nearest_path(fine, [1.0, 0.71, 0.32, 0.0]) == (0, 3, 7, 10)
    assert nearest_path(fine, [0.9, 0.02, 0.01, 0.005]) == (0, 8, 9, 10)  # moved apart, the ends pinned
    assert nearest_path(fine, [1.0, 0.99, 0.98, 0.0]) == (0, 1, 2, 10)
    assert nearest_path(fine, fine) == tuple(range(11))


def test_another_matrix_has_another_path() -> None:
    # The negative control of the test above: it would not see a search that ignores the costs, or reads them transposed.
    draw = np.random.default_rng(0)
    differ = 0
    for _ in range(30):
        costs = np.triu(draw.random((9, 9)), 1)
        path = shortest_paths(costs, [4])[4]
        shuffled = costs.copy()
        above = np.triu_indices(9, 1)
        shuffled[above] = draw.permutation(costs[above])
        differ += (path != shortest_paths(shuffled, [4])[4]) + (path != shortest_paths(costs[::-1, ::-1].T, [4])[4])
        with pytest.raises(AssertionError):
            assert shortest_paths(shuffled, range(1, 9)) == {k: best_path(costs, k)[2] for k in range(1, 9)}
    assert differ > 50


def test_ties_go_to_the_most_even_steps() -> None:
    paths = shortest_paths(np.zeros((101, 101)), range(1, 101))
    for count, path in paths.items():
        lengths = np.diff(path).tolist()
        assert (len(lengths), path[0], path[-1]) == (count, 0, 100)
        assert lengths == sorted(lengths)  # the smaller ones first
        assert lengths[-1] - lengths[0] <= 1
    assert paths[4] == uniform_path(100, 4) == (0, 25, 50, 75, 100)


@pytest.mark.parametrize("steps", [[], [0], [-1], [5], [2.0], [True], ["2"], 2, "2", None])
def test_numbers_of_steps_are_checked(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a list of whole numbers from 1 to 4"):
        shortest_paths(np.zeros((5, 5)), steps)


def test_costs_are_checked() -> None:
    costs = np.zeros((4, 4))
    costs[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        shortest_paths(costs, [2])
    with pytest.raises(ValueError, match="square"):
        shortest_paths(np.zeros((4, 3)), [2])


# ------------------------------------------------------------------------------------------------- the cost matrix


class Run:
    """The fine trajectory of a network from x, the errors of its steps, and costs to be filled."""

    def __init__(self, plan: Plan, trajectory: Trajectory) -> None:
        self.states, self.outputs, self.errors = trajectory.states, trajectory.outputs, StepErrors(plan)
        grid = Grid(tuple(plan.levels), plan.path.name)
        self.costs = Costs(grid, max(2, len(self.states[0])))

    def filled(self) -> Costs:
        self.costs.add(self.errors(self.states, self.outputs))
        return self.costs


def fine_run(network: MixtureDenoiser, x: Tensor, anchors: int) -> Run:
    scheduler = RectifiedFlowScheduler(
        path=network.path.name, prediction_type=network.prediction, trained_betas=network.config.betas, solver="euler"
    )
    scheduler.set_grid(Grid.uniform(anchors, network.path))
    plan = scheduler.plan(anchors, None, None, None)
    run = Trajectory([x])
    for row in plan.rows():
        run.outputs.append(network(run.states[-1], row.time).sample)
        run.states.append(table.step(row, run.states[-1], run.outputs[-1])[0])
    return Run(plan, run)


@functools.cache
def gaussian(std: float, x: tuple[float, ...] = (1.0, 1.0), anchors: int = 100) -> Costs:
    return fine_run(MixtureDenoiser.of(torch.zeros(1, 1), std), torch.tensor(x).double()[:, None], anchors).filled()


# 1-D Gaussian of standard deviation std, 100 anchors, x = 1, computed with another program.
@pytest.mark.parametrize(
    ("std", "count", "path", "cost"),
    [
        (0.5, 2, (0, 68, 100), 3.786e-2),
        (0.5, 4, (0, 43, 66, 83, 100), 5.291e-3),
        (0.5, 6, (0, 31, 51, 65, 77, 88, 100), 1.583e-3),
        (0.1, 2, (0, 90, 100), 1.974e-3),
        (0.1, 4, (0, 74, 88, 95, 100), 3.399e-4),
        (0.1, 6, (0, 62, 80, 88, 93, 97, 100), 1.072e-4),
    ],
)
def test_known_answers_of_a_gaussian(std: float, count: int, path: tuple[int, ...], cost: float) -> None:
    costs = gaussian(std)
    assert shortest_paths(costs.mean(), [count])[count] == path
    assert costs.total(path)[0] == pytest.approx(cost, rel=5e-4)


def test_properties_of_a_gaussians_costs() -> None:
    half = gaussian(0.5)
    mean = half.mean()
    assert half.sums.diagonal(1, 1, 2).max() < 1e-28  # a fine step costs nothing
    assert mean.tril().abs().max() == 0
    assert half.total(range(101))[0] < 1e-28
    assert half.total((0, 100))[0] == pytest.approx(float(mean[0, 100]))
    paths = shortest_paths(mean, range(1, 100))
    totals = [half.total(path)[0] for path in paths.values()]
    assert all(a >= b for a, b in itertools.pairwise(totals))
    draw = np.random.default_rng(0)
    for count in (2, 4, 7):
        inner = [sorted(draw.choice(np.arange(1, 100), count - 1, replace=False).tolist()) for _ in range(50)]
        others = [uniform_path(100, count), *((0, *nodes, 100) for nodes in inner)]
        assert all(half.total(paths[count])[0] <= half.total(other)[0] for other in others)


def test_costs_are_means_over_samples() -> None:
    draw = tuple(torch.randn(7, generator=torch.Generator().manual_seed(0)).tolist())
    one, first = gaussian(0.5, anchors=20).mean(), gaussian(0.5, draw, 20).mean()
    assert torch.allclose(first, gaussian(0.5, draw[::-1], 20).mean(), rtol=1e-12)
    assert torch.allclose(first, gaussian(0.5, draw * 2, 20).mean(), rtol=1e-12)
    assert torch.allclose(first, one * np.square(draw).mean(), rtol=1e-9)


def test_batches_add_up() -> None:
    network = MixtureDenoiser.of(torch.zeros(1, 1), 0.5)
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = fine_run(network, x, 10)
    whole, parts, late = run.filled(), fine_run(network, x, 10).costs, fine_run(network, x, 10).costs
    for part in (slice(0, 5), slice(5, 6), slice(6, 20)):
        errors = run.errors([s[part] for s in run.states], [o[part] for o in run.outputs])
        parts.add(errors)
        late.add(errors, part.start)
    assert torch.equal(parts.sums, late.sums)
    assert torch.allclose(parts.sums, whole.sums, rtol=1e-12)
    assert torch.equal(parts.counts, whole.counts)
    # A Gaussian's cost is c z^2, so its relative error is that of the mean of 20 squares.
    squares = x.square().flatten()
    cost, error = whole.total((0, 4, 10))
    assert error / cost == pytest.approx(float(squares.std() / squares.mean() / 20**0.5))


def test_costs_on_another_path_are_those_of_its_own_steps() -> None:
    # x0 and eps in fixed proportion make a first-order path: DDIM is exact in any number of steps, Euler in x is not.
    class Matched(MixtureDenoiser):
        def posterior(self, x: Tensor, s: float, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
            eps = x.double() / (0.5 * self.path.alpha(s) + self.path.sigma(s))
            return 0.5 * eps, eps

    betas = np.linspace(1e-4, 0.02, 1000).tolist()
    start = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    for network in (
        Matched(shape=[1], path="vp", betas=betas),
        Matched(shape=[1], path="cosine", prediction_type="v_prediction"),
    ):
        run = fine_run(network, start, 40)
        assert run.filled().sums.max() < 1e-25
        middle = (run.states[0] + run.states[40]) / 2
        assert (run.states[20] - middle).abs().max() > 1e-2  # no straight line in x
        options = {"path": network.path.name, "prediction_type": network.prediction}
        curved = fine_run(MixtureDenoiser.of(torch.zeros(1, 1), 0.5, **options), start, 40)
        assert curved.filled().mean()[0, 40] > 1e-2


def test_standard_errors_of_the_matrix_cover_it() -> None:
    # The cost of a Gaussian is c z^2: the mean over many draws lies within the standard errors that few draws give.
    draws = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
    costs, truth = gaussian(0.5, tuple(draws), 10), gaussian(0.5, anchors=10).mean()
    score = ((costs.mean() - truth) / costs.errors())[0, 2:]
    assert score.abs().max() < 3
    assert score.std() < 1e-6  # one number decides all edges
    assert 0.05 < costs.errors()[0, 10] / costs.mean()[0, 10] < 0.2  # sqrt(2 / 200) = .1


def test_resampled_trajectories_tell_how_sure_a_path_is() -> None:
    grid = Grid.uniform(4)
    sure, torn = Costs(grid, 40), Costs(grid, 40)
    errors = torch.ones(40, 5, 5, dtype=torch.float64)
    errors[:, 0, 1] = errors[:, 1, 4] = 0.1
    sure.add(errors)
    errors[0::2, 0, 1], errors[1::2, 0, 2], errors[:, 2, 4] = 0.0, 0.01, 0.1
    errors[1::2, 0, 1] = errors[0::2, 0, 2] = 2.0
    torn.add(errors)
    assert sure.stability({2: (0, 1, 4)}) == {2: (1.0, [1.0, 1.0])}
    path = shortest_paths(torn.mean(), [2])[2]
    share, edges = torn.stability({2: path})[2]
    assert 0.3 < share < 0.8
    assert edges == [share, share]
    assert torn.stability({2: path}) == torn.stability({2: path})


def test_saved_costs_are_searched_again_without_a_run(tmp_path: Path) -> None:
    costs = gaussian(0.5)
    costs.about = {"solver": "euler"}
    costs.save(tmp_path / "costs.safetensors")
    loaded = Costs.load(tmp_path / "costs.safetensors")
    assert torch.equal(loaded.mean(), costs.mean())
    assert (loaded.grid, loaded.about) == (costs.grid, costs.about)
    assert loaded.total((0, 43, 66, 83, 100)) == costs.total((0, 43, 66, 83, 100))
    weights.write(tmp_path / "other.safetensors", {"sums": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no costs of steps"):
        Costs.load(tmp_path / "other.safetensors")


# ------------------------------------------------------------------------------------------------- on pipelines


def ddpm(clip: bool = True) -> diffusers.DDPMPipeline:
    return diffusers.DDPMPipeline(grey(), diffusers.DDPMScheduler(clip_sample=clip))


def last_states(pipe: Any, levels: Sequence[float], count: int, inputs: Any) -> Tensor:
    """Where an Euler run on these levels ends, on the noise of `optimize_steps` with seed 0."""
    scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler, solver="euler")
    scheduler.set_grid(Grid(tuple(levels), scheduler.path.name))
    call = {"num_inference_steps": len(levels) - 1}
    with recording(pipe, scheduler) as take:
        list(sample_images(pipe, count, seed=rng.sample_seed(0, SEARCH), inputs=inputs, call=call))
    return take().states[-1]


@pytest.mark.parametrize("name", ["digits", "ddpm", "ddpm, clipped"])
def test_the_cost_of_one_step_is_its_error(name: str) -> None:
    pipe: Any = load_demo() if name == "digits" else ddpm("clipped" in name)
    inputs = [3, 7, 0] if name == "digits" else None
    before = pipe.scheduler
    how: dict[str, Any] = {"objective": "local", "solver": "euler", "batch_size": 3, "progress": False}
    grids = optimize_steps(pipe, [1, 3, 12], inputs=inputs, anchors=12, samples=5, **how)
    assert pipe.scheduler is before
    assert list(grids) == [1, 3, 12]
    for count, grid in grids.items():
        assert (len(grid), grid.solver, grid.path) == (count, "euler", "flow" if name == "digits" else "vp")
        assert set(grid.sigmas) <= set(grids[12].sigmas)
        assert grid.about["cost"] <= grid.about["uniform_cost"]
        assert grid.about["cost_se"] >= 0
        assert Grid.from_dict(grid.to_dict()) == grid
    fine = last_states(pipe, grids[12].sigmas, 5, inputs)
    missed = (last_states(pipe, grids[1].sigmas, 5, inputs) - fine).flatten(1).square().sum(1)
    about = grids[1].about
    assert about["cost"] == about["uniform_cost"] == pytest.approx(float(missed.mean()), rel=1e-4)
    assert about["cost_se"] == pytest.approx(float(missed.std() / 5**0.5), rel=1e-3)
    assert grids[12].about["cost"] < 1e-6 * about["cost"]


def test_a_search_does_not_see_the_noise_of_an_evaluation() -> None:
    pipe = load_demo()
    seen = []
    scheduler = RectifiedFlowScheduler(solver="euler")
    with recording(pipe, scheduler) as take:
        for seed in (0, rng.sample_seed(0, SEARCH)):
            list(sample_images(pipe, 2, seed=seed, inputs=[1], call={"num_inference_steps": 1}))
            seen.append(take().states[0])
    assert not torch.isclose(seen[0], seen[1]).any()


def test_a_grid_runs_in_the_pipeline_that_it_was_made_for() -> None:
    pipe = ddpm()
    grid = optimize_steps(pipe, [3], objective="local", anchors=6, samples=2, progress=False)[3]
    pipe.scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler.config, solver="euler")
    pipe.scheduler.set_grid(grid)
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3, output_type="np")
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(grid.sigmas)


def test_the_pipelines_scheduler_is_back_after_an_error() -> None:
    pipe = load_demo()
    before, calls = pipe.scheduler, itertools.count()

    def fail(*args: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError("out of memory")

    handle = pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimize_steps(pipe, [2], inputs=[1], anchors=5, samples=2, progress=False)
    handle.remove()
    assert pipe.scheduler is before
    assert next(calls) == 4
    assert pipe(class_labels=[1], num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)


def test_a_sample_that_is_changed_between_steps_is_noticed() -> None:
    def nudge(pipe: Any, step: int, time: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": state["latents"] + 0.01 * (step == 1)}

    call = {"callback_on_step_end": nudge}
    with pytest.raises(ValueError, match="changes the sample after step 2"):
        optimize_steps(load_demo(), [2], inputs=[1], call=call, anchors=5, samples=2, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": [101]}, "from 1 to 100"),
        ({"steps": []}, "steps must be a list"),
        ({"method": "anneal"}, "unknown method 'anneal'; choose bellman, evolve"),
        ({"scales": [2], "skip": 0.1}, "scales, skip cannot be given to the method 'bellman'"),
        ({"objective": "fid"}, "unknown objective 'fid' of bellman; choose final, local"),
        ({"held_out": 1}, "held_out=1"),
        ({"budget": 5}, "budget=5 is enough for 2 runs of 2 steps"),
        ({"solver": "sde-dpm++2m"}, "'sde-dpm\\+\\+2m' draws noise"),
        ({"call": {"eta": 1.0}}, "takes no eta"),
        ({"forbidden": [100]}, "forbidden holds anchor 100"),
        ({"forced": [3, 7]}, "2 steps cannot visit 2 forced anchors"),
        ({"forbidden": [1.5]}, r"forbidden must be a list of anchors, whole numbers, got \[1.5\]"),
        ({"forced": 3}, "forced must be a list of anchors, whole numbers, got 3"),
        ({"anchors": 0}, "anchors=0"),
        ({"samples": 1}, "samples=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"call": {"num_inference_steps": 4}}, "num_inference_steps cannot be in call"),
        ({"call": {"steps": 4}}, "takes no steps"),
        ({"inputs": None}, "pass inputs="),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments: dict[str, Any], message: str) -> None:
    pipe = load_demo()
    pipe.unet = None
    with pytest.raises((ValueError, TypeError), match=message):
        optimize_steps(pipe, **{"steps": [2], "inputs": [1], "progress": False, **arguments})


def test_the_picture_of_a_cost_matrix(tmp_path: Path) -> None:
    costs = gaussian(0.5)
    paths = {f"{k} steps": path for k, path in shortest_paths(costs.mean(), [3, 6]).items()}
    figure = plot_costs(costs, paths, tmp_path / "new" / "costs.png")
    assert (tmp_path / "new" / "costs.png").read_bytes()[:4] == b"\x89PNG"
    axes = figure.axes[0]
    shown = np.ma.getdata(axes.images[0].get_array())
    assert shown[0, 100] == pytest.approx(float(costs.mean()[0, 100]))
    assert np.isnan(shown[np.tril_indices(101)]).all()
    steps = [list(zip(*(v.tolist() for v in line.get_data()), strict=True)) for line in axes.lines[1::2]]
    assert steps == [[(k, j) for j, k in itertools.pairwise(path)] for path in paths.values()]
    with pytest.raises(ValueError, match="x is no path over 101 anchors"):
        plot_costs(costs, {"x": [0, 5, 99]})
    empty = Costs(Grid.uniform(4), 2)
    empty.add(torch.zeros(2, 5, 5, dtype=torch.float64))
    plot_costs(empty, {})

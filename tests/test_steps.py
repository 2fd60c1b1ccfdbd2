"""Steps optimised by the error of the last sample."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flowkit import Grid, RectifiedFlowScheduler, load_demo, optimize_steps, rng, table
from flowkit.distill import bellman
from flowkit.distill.bellman import forecast
from flowkit.distill.costs import Costs
from flowkit.distill.descent import Descent
from flowkit.distill.fine import SEARCH, Fine, Runs, coarse, fine_solution, rmse
from flowkit.distill.shortest import Nodes, nearest_path, shortest_paths, uniform_path
from flowkit.eval.sources import count_rows

from . import mixtures

QUICK: dict[str, Any] = {"inputs": [0], "batch_size": 1000, "progress": False}

# ------------------------------------------------------------------------------------------------- the search itself


def additive(costs: NDArray[np.float64], seen: list[Nodes]) -> Any:
    def error(path: Nodes) -> float:
        seen.append(path)
        return float(sum(costs[edge] for edge in itertools.pairwise(path)))

    return error


def convex_costs(seed: int, anchors: int = 60) -> NDArray[np.float64]:
    """Costs of a step that grow with the square of its length in a warped time: one valley, whose bottom the DP knows."""
    warp = np.concatenate([[0], np.cumsum(np.random.default_rng(seed).random(anchors) + 0.05)])
    return np.asarray(np.square(warp[:, None] - warp))


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_with_additive_costs_descent_ends_near_the_shortest_path(count: int) -> None:
    exact = 0
    for seed in range(20):
        costs, seen = convex_costs(seed), list[Nodes]()
        best = shortest_paths(costs, [count])[count]
        error = additive(costs, seen)
        search = Descent(error, 500)
        found = search.best([uniform_path(60, count)])
        assert len(seen) == len(set(seen)) == len(search.found) <= 500
        assert search.found[found] == min(search.found.values()) <= error(uniform_path(60, count))
        assert error(found) <= 1.005 * error(best)
        exact += found == best
    assert exact >= 15


def test_descent_keeps_to_its_trials_and_to_allowed_nodes() -> None:
    costs, seen = convex_costs(0), list[Nodes]()
    starts = [uniform_path(60, 4), (0, 1, 2, 3, 60), (0, 30, 58, 59, 60)]
    search = Descent(additive(costs, seen), 25)
    best = search.best(starts)
    assert len(seen) == 25
    assert seen[:3] == starts
    assert search.found[best] == min(search.found.values())
    free = Descent(additive(costs, seen), 500).best(starts)
    seen.clear()
    node = free[2]
    Descent(additive(costs, seen), 500, forbidden=[node]).best([(0, 1, 2, 3, 60)])
    assert not any(node in path for path in seen)
    seen.clear()
    Descent(additive(costs, seen), 500, forced=[2]).best([(0, 1, 2, 3, 60)])
    assert all(2 in path for path in seen)
    assert seen[-1] != seen[0]


# ------------------------------------------------------------------------------------------------- errors of real runs


def test_the_fine_solution_of_a_gaussian_is_the_exact_one() -> None:
    pipe = mixtures.gaussian(0.5, "unipc")
    runs = Runs(pipe, inputs=[0])
    seeds = [rng.sample_seed(rng.sample_seed(0, SEARCH), i) for i in range(3, 10)]
    noise = rng.normal((1, 1, 1), seeds, tag=rng.INITIAL, dtype=torch.float64)
    fine = fine_solution(runs, runs.anchors(100), range(3, 10))
    assert torch.allclose(fine.ends, 0.5 * noise, rtol=1e-4)
    # Euler is not that near: the reference is that of the solver itself.
    euler = Runs(pipe, "euler", inputs=[0])
    own = fine_solution(euler, euler.anchors(100), range(3, 10))
    assert 3e-3 < float((own.ends / fine.ends - 1).abs().max()) < 3e-2


@pytest.mark.parametrize("solver", ["euler", "dpm++2m", "unipc", "heun"])
@pytest.mark.parametrize("make", [mixtures.ring, mixtures.planes])
def test_the_error_of_a_grid_is_that_of_the_very_solver(solver: str, make: Any) -> None:
    pipe = make()
    runs = Runs(pipe, solver, inputs=[0], batch_size=3)
    assert runs.solver == solver
    anchors = runs.anchors(12)
    grid, samples = coarse(anchors, (0, 2, 7, 12)), range(4, 9)
    fine = fine_solution(runs, anchors, samples)
    network, scheduler = pipe.unet, runs.scheduler
    seeds = [rng.sample_seed(runs.own_seed, i) for i in samples]
    noise = rng.normal(network.config["shape"], seeds, tag=rng.INITIAL, dtype=torch.float64)
    ends = []
    for levels in (grid, anchors):
        scheduler.set_grid(levels)
        rows = scheduler.plan(len(levels), None, None, None).rows()
        ends.append(table.solve(rows, noise, lambda x, t: network(x, t).sample))
    assert torch.allclose(fine.ends.double(), ends[1], atol=1e-4)
    expected = (ends[0] - ends[1]).flatten(1).square().mean(1)
    errors = runs.errors(grid, fine)
    assert torch.allclose(errors, expected, rtol=2e-3, atol=1e-9)
    assert float(errors.max()) > 1e-4
    assert float(runs.errors(anchors, fine).max()) < 1e-12
    assert pipe.scheduler.grid is None


def test_the_error_and_the_gain_have_the_errors_of_their_samples() -> None:
    errors = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = rmse(errors)
    assert figure.value == pytest.approx(float(errors.mean().sqrt()))
    # d sqrt(m) = dm / (2 sqrt(m))
    assert figure.se == pytest.approx(float(errors.std() / 20 / (2 * errors.mean().sqrt())), rel=0.01)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_best_of_all_paths_is_found(solver: str) -> None:
    grids = optimize_steps(mixtures.ring(solver), [2, 3], anchors=9, samples=50, budget=90, held_out=0, **QUICK)
    runs = Runs(mixtures.ring(solver), inputs=[0])
    anchors = runs.anchors(9)
    fine = fine_solution(runs, anchors, range(50))
    for count, grid in grids.items():
        inner = itertools.combinations(range(1, 9), count - 1)
        errors = {(0, *p, 9): float(runs.errors(coarse(anchors, (0, *p, 9)), fine).mean()) for p in inner}
        best = min(errors, key=lambda p: errors[p])
        assert tuple(grid.about["indices"]) == best
        assert grid.about["search_rmse"] == pytest.approx(errors[best] ** 0.5)
        assert grid.about["uniform_search_rmse"] == pytest.approx(errors[uniform_path(9, count)] ** 0.5)
        assert (grid.solver, grid.about["trials"] <= 90 // count) == (solver, True)
        assert "gain" not in grid.about  # nothing is claimed on the noise that chose the grid


def test_held_out_noise_is_other_noise() -> None:
    pipe, seen = mixtures.ring(), list[tuple[float, ...]]()
    first = pipe.scheduler.path.num_train_timesteps

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if float(args[1]) == first:
            seen.append(tuple(args[0][:, 0, 0, 0].tolist()))

    pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    how = {**QUICK, "batch_size": 40}
    grids = optimize_steps(pipe, [3], anchors=20, samples=30, held_out=40, budget=30, **how)
    search, held_out = set(seen[0]), set(seen[1])
    assert (len(search), len(held_out)) == (30, 40)
    assert not search & held_out
    about = grids[3].about
    assert [set(noise) for noise in seen[2:]] == [search] * about["trials"] + [held_out] * 2
    assert about["held_out"] == 40
    assert about["gain"] == pytest.approx(about["uniform_rmse"] - about["rmse"])
    assert 0 < about["gain_se"] < about["rmse_se"] + about["uniform_rmse_se"]


def test_an_even_grid_gains_nothing_over_itself() -> None:
    # The negative control of every gain: forced to the even path, there is none.
    grids = optimize_steps(mixtures.ring(), [2], anchors=10, samples=10, forced=[5], budget=20, **QUICK)
    about = grids[2].about
    assert about["indices"] == [0, 5, 10]
    assert (about["gain"], about["gain_se"]) == (0.0, 0.0)


@pytest.mark.parametrize(("make", "solver"), [(mixtures.ring, "unipc"), (mixtures.planes, "euler")])
def test_the_found_grid_beats_even_steps_on_held_out_noise(make: Any, solver: str) -> None:
    how = {"samples": 300, "held_out": 2000, "budget": 120, "anchors": 50, **QUICK}
    for grid in optimize_steps(make(solver), [3, 4], **how).values():
        about = grid.about
        assert about["search_rmse"] < about["uniform_search_rmse"]
        assert about["gain"] > 2 * about["gain_se"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [mixtures.ring, mixtures.planes])
def test_final_beats_even_steps_on_exact_mixtures(make: Any) -> None:
    how = {"samples": 2000, "held_out": 4000, "budget": 800, **QUICK}
    gains = {k: g.about for k, g in optimize_steps(make(), range(3, 9), **how).items()}
    assert {k: a["gain"] > 2 * a["gain_se"] for k, a in gains.items()} == dict.fromkeys(range(3, 9), True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "budget", "held_out", "clear"),
    # At 6 steps of shapes so small a search gains too little to be told from nothing.
    [("digits", 400, 2000, [4, 6, 8]), ("shapes", 100, 300, [4, 8])],
)
def test_final_beats_even_steps_on_the_embedded_models(name: str, budget: int, held_out: int, clear: list[int]) -> None:
    pipe = load_demo(name)
    how = {**QUICK, "inputs": range(pipe.num_classes), "solver": "euler", "batch_size": 250}
    found = optimize_steps(pipe, [4, 6, 8], samples=100, held_out=held_out, budget=budget, **how)
    gains = {k: found[k].about for k in clear}
    assert {k: a["gain"] > 2 * a["gain_se"] for k, a in gains.items()} == dict.fromkeys(clear, True)


def test_the_forecast_is_what_a_search_takes_at_most() -> None:
    for solver, fine, coarse_rows in (("euler", 12, 3), ("heun", 23, 5)):
        pipe = mixtures.ring(solver)
        needed = forecast(Runs(pipe, inputs=[0]), [3], 12, 10, 6, 30)
        rows_of_search = 10 * (30 // coarse_rows) * coarse_rows
        assert needed == {"fine run": 10 * fine, "search": rows_of_search, "measurement": 6 * (fine + 2 * coarse_rows)}
        with count_rows(pipe) as rows:
            about = optimize_steps(pipe, [3], anchors=12, samples=10, held_out=6, budget=30, **QUICK)[3].about
            spent = about["trials"] * 10 * coarse_rows
            assert rows() == sum(needed.values()) - rows_of_search + spent
            assert spent <= rows_of_search


def test_guidance_is_part_of_what_is_searched() -> None:
    how: dict[str, Any] = {
        "anchors": 10,
        "samples": 8,
        "held_out": 8,
        "budget": 20,
        "inputs": [3, 7],
        "progress": False,
    }
    plain, guided = (optimize_steps(load_demo(), [2], call={"guidance_scale": w}, **how)[2].about for w in (1.0, 4.0))
    assert guided["call"] == {"guidance_scale": 4.0}
    assert guided["uniform_rmse"] > 1.2 * plain["uniform_rmse"]


def test_karras_spacing_is_one_of_the_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Nodes] = []

    class Seen(Descent):
        def best(self, given: Sequence[Nodes]) -> Nodes:
            starts.extend(given)
            return super().best(given[:1])

    monkeypatch.setattr(bellman, "Descent", Seen)
    optimize_steps(mixtures.ring(), [4], anchors=40, samples=5, held_out=0, **QUICK)
    karras = Grid.karras(4, 0.001, 1.0, path="flow").sigmas
    assert starts[1:] == [(0, 10, 20, 30, 40), nearest_path(Grid.uniform(40).sigmas, karras)]


# ------------------------------------------------------------------------------------------------- folders


class Stop(Exception):
    pass


def stopped_after(pipe: Any, calls: int) -> Any:
    counter = itertools.count()

    def fail(*args: Any) -> None:
        if next(counter) == calls:
            raise Stop

    return pipe.unet.register_forward_pre_hook(fail)


def test_a_search_that_was_stopped_anywhere_ends_the_same(tmp_path: Path) -> None:
    how: dict[str, Any] = {**QUICK, "anchors": 12, "samples": 10, "held_out": 6, "budget": 24, "batch_size": 4}
    whole = optimize_steps(mixtures.ring(), [3, 2], output=tmp_path / "whole", **how)
    assert whole == optimize_steps(mixtures.ring(), [3, 2], **how)
    pipe, draw, stops = mixtures.ring(), np.random.default_rng(0), 0
    while True:
        handle = stopped_after(pipe, int(draw.integers(5, 60)))
        try:
            found = optimize_steps(pipe, [3, 2], output=tmp_path / "stopped", **how)
            break
        except Stop:
            stops += 1
        finally:
            handle.remove()
    assert stops > 3
    assert found == whole
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "stopped").iterdir())
    for name in names:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert Grid.load(tmp_path / "stopped" / "grid-3.json") == whole[3]


def test_another_search_in_the_folder_needs_no_other_fine_run(tmp_path: Path) -> None:
    how: dict[str, Any] = {**QUICK, "anchors": 12, "samples": 10, "output": tmp_path}
    pipe = mixtures.ring()
    local = optimize_steps(pipe, [3], objective="local", **how)[3]
    with count_rows(pipe) as rows:
        again = optimize_steps(pipe, [3, 4], objective="local", **how)
        assert rows() == 0
        final = optimize_steps(pipe, [3], held_out=0, budget=30, **how)[3]
        assert rows() == 10 * 3 * final.about["trials"]
        optimize_steps(pipe, [3], held_out=0, budget=30, **how)
        assert rows() == 10 * 3 * final.about["trials"]
    assert again[3] == local
    costs = Costs.load(tmp_path / "costs.safetensors")
    assert shortest_paths(costs.mean(), [3])[3] == tuple(local.about["indices"])
    with pytest.raises(ValueError, match="holds a search of steps already; pass resume=True"):
        optimize_steps(pipe, [3], resume=False, **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 11}, "samples.count 10, this one has 11"),
        ({"anchors": 10}, "anchors 12, this one has 10"),
        ({"seed": 1}, "samples.seed 0, this one has 1"),
        ({"solver": "unipc"}, "solver 'euler', this one has 'unipc'"),
        ({"call": {"guidance_scale": 1.5}}, "samples.call.guidance_scale None, this one has 1.5"),
        ({"inputs": [1]}, "samples.inputs_sha256"),
    ],
)
def test_a_search_of_other_settings_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    how: dict[str, Any] = {**QUICK, "objective": "local", "anchors": 12, "samples": 10, "output": tmp_path}
    optimize_steps(mixtures.ring(), [3], **how)
    with pytest.raises(ValueError, match=message):
        optimize_steps(mixtures.ring(), [3], **{**how, **change})
    with pytest.raises(ValueError, match="weights_sha256"):
        optimize_steps(mixtures.gaussian(0.3), [3], **how)
    (tmp_path / "steps.json").unlink()
    with pytest.raises(ValueError, match=r"holds no steps.json, so it is no folder of a search of steps"):
        optimize_steps(mixtures.ring(), [3], **how)


# ------------------------------------------------------------------------------------------------- refusals


def test_a_grid_of_another_model_is_refused() -> None:
    runs = Runs(mixtures.ring(), inputs=[0])
    fine = Fine(range(2), torch.zeros(2, 2, 1, 1))
    with pytest.raises(ValueError, match="belongs to the path 'vp', this scheduler walks 'flow'"):
        runs.errors(Grid((3.0, 1.0, 0.0), "vp"), fine)
    with pytest.raises(
        ValueError, match=r"the grid ends at sigma 0.1, the fine solution at 0, so their last samples do not"
    ):
        runs.errors(Grid((1.0, 0.5, 0.1)), fine)
    found = optimize_steps(mixtures.planes(), [2], objective="local", anchors=5, samples=2, **QUICK)[2]
    assert found.about["prediction_type"] == "epsilon"
    scheduler = RectifiedFlowScheduler(path="vp", prediction_type="v_prediction", solver="euler")
    with pytest.raises(
        ValueError, match="optimised for a network that predicts 'epsilon', this one predicts 'v_prediction'"
    ):
        scheduler.set_grid(found)


def test_a_result_that_is_not_finite_is_refused() -> None:
    pipe = mixtures.ring()
    runs = Runs(pipe, inputs=[0])
    fine = Fine(range(2), torch.full((2, 2, 1, 1), math.nan))
    with pytest.raises(ValueError, match="2 of 2 samples end in NaN"):
        runs.errors(Grid.uniform(2), fine)


def test_errors_json_is_what_it_says(tmp_path: Path) -> None:
    grid = optimize_steps(
        mixtures.ring(), [3], anchors=12, samples=10, held_out=0, budget=30, output=tmp_path, **QUICK
    )[3]
    errors = json.loads((tmp_path / bellman.ERRORS).read_text())
    assert len(errors) == grid.about["trials"]
    assert min(errors, key=lambda name: errors[name]) == "-".join(map(str, grid.about["indices"]))

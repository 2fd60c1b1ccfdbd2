"""Evolutionary search: its study without a network, and on pipelines."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from numpy.typing import NDArray

import flowkit
from flowkit import Grid, RectifiedFlowScheduler, load_demo, optimize_steps
from flowkit.distill.additive import likely_path
from flowkit.distill.evolution import Evolution
from flowkit.distill.fine import Runs, coarse, fine_solution, rmse
from flowkit.distill.genome import Genome, Space
from flowkit.distill.shortest import shortest_paths, uniform_path
from flowkit.eval.sources import count_rows
from flowkit.eval.sweep.storage import open_storage, storage_url
from flowkit.hooks import SkippedLayers
from flowkit.hooks.skip import layers

from . import mixtures
from .families import stock_of
from .tiny import PIPELINES, build, run

ROOT = Path(__file__).parent.parent
SPACES = {
    "steps": Space(20, 4),
    "all": Space(12, 3, scales=(1.0, 2.0, 5.0), layers=4, skips=5),
    "forced": Space(12, 4, forbidden=(3, 4, 5), forced=(7,)),
    "one": Space(9, 1),
}


def additive(costs: NDArray[np.float64], seen: list[Genome] | None = None) -> Callable[[Genome], float]:
    def error(genome: Genome) -> float:
        if seen is not None:
            seen.append(genome)
        return float(sum(costs[edge] for edge in itertools.pairwise(genome.nodes)))

    return error


def random_costs(seed: int, anchors: int) -> NDArray[np.float64]:
    return np.triu(np.random.default_rng(1000 + seed).random((anchors + 1, anchors + 1)), 1)


# ------------------------------------------------------------------------------------------------- genomes


@pytest.mark.parametrize("name", SPACES)
def test_genomes_stay_canonical(name: str) -> None:
    space, draw = SPACES[name], np.random.default_rng(0)
    found = [space.random(draw) for _ in range(50)]
    for _ in range(400):
        one, other = (found[i] for i in draw.integers(len(found), size=2))
        child, changed = space.crossed(draw, one, other), space.mutated(draw, one)
        assert set(child.nodes) <= set(one.nodes) | set(other.nodes)
        assert set(child.skipped) <= set(one.skipped) | set(other.skipped)
        assert all(w in pair for w, *pair in zip(child.scales, one.scales, other.scales, strict=True))
        assert sum(a != b for a, b in zip(changed, one, strict=True)) <= 1
        found += [child, changed]
    cells = space.steps * space.layers
    for genome in found:
        assert genome.nodes == tuple(sorted(set(genome.nodes)))
        assert (len(genome.nodes), genome.nodes[0], genome.nodes[-1]) == (space.steps + 1, 0, space.anchors)
        assert set(space.forced) <= set(genome.nodes)
        assert not set(space.forbidden) & set(genome.nodes)
        assert set(genome.scales) <= set(space.scales)
        assert len(genome.scales) == (space.steps if space.scales else 0)
        assert genome.skipped == tuple(sorted(set(genome.skipped)))
        assert len(genome.skipped) == space.skips
        assert all(0 <= cell < cells for cell in genome.skipped)
        assert space.genome(space.parameters(genome)) == genome
    assert len(set(found)) >= min(100, space.size)


def test_the_size_of_a_space_is_its_number_of_genomes() -> None:
    small = Space(5, 2, forbidden=(3,), scales=(1.0, 2.0), layers=2, skips=1)
    draw, found = np.random.default_rng(0), set[Genome]()
    for _ in range(2000):
        found.add(small.random(draw))
    assert len(found) == small.size == 3 * 2**2 * 4
    plain = small.plain((0, 2, 5), 2.0)
    assert plain in found
    assert plain == Genome((0, 2, 5), (2.0, 2.0), (2,))


# ------------------------------------------------------------------------------------------------- the search itself


def test_with_additive_costs_evolution_reaches_the_shortest_path() -> None:
    """Independent random costs, 1771 grids: no valley to walk down, and 20 of 20 within 500."""
    space, needed = Space(24, 4), []
    for seed in range(20):
        costs, seen = random_costs(seed, 24), list[Genome]()
        best = shortest_paths(costs, [4])[4]
        search = Evolution(space, seed)
        for trials in range(50, 501, 50):  # a longer search goes on with a shorter one
            search.run([space.plain(uniform_path(24, 4))], additive(costs, seen), trials)
            assert len(search.found) == len(seen) == len(set(seen)) == trials
            if Genome(best) in seen:
                break
        needed.append(seen.index(Genome(best)))
        assert min(search.found, key=lambda genome: search.found[genome]).nodes == best
    assert space.size == 1771
    assert max(needed) < 500


def test_chance_does_not_reach_it() -> None:
    # The negative control: 500 of 1771 grids at random hold the best one in 28 of 100 searches.
    space, hits = Space(24, 4), 0
    for seed in range(20):
        best, draw, found = shortest_paths(random_costs(seed, 24), [4])[4], np.random.default_rng(seed), set[Genome]()
        while len(found) < 500:
            found.add(space.random(draw))
        hits += Genome(best) in found
    assert hits < 12


def test_a_space_is_evaluated_whole_and_nothing_twice() -> None:
    space, seen = Space(7, 3), list[Genome]()
    search = Evolution(space)
    search.run([space.plain(uniform_path(7, 3))], additive(random_costs(0, 7), seen), 500)
    assert len(seen) == len(set(seen)) == space.size == 15
    assert seen[0].nodes == uniform_path(7, 3)
    best = [min(list(search.found.values())[: i + 1]) for i in range(15)]
    assert best == sorted(best, reverse=True)


def test_scales_and_layers_are_found_too() -> None:
    """A separable error with one optimum in each kind of gene."""
    space = Space(12, 3, scales=(1.0, 2.0, 3.0, 4.0), layers=4, skips=3)
    wanted = Genome((0, 2, 7, 12), (3.0, 1.0, 2.0), (1, 6, 11))

    def error(genome: Genome) -> float:
        far = float(sum(abs(a - b) for a, b in zip(genome.nodes, wanted.nodes, strict=True)))
        far += sum(abs(a - b) for a, b in zip(genome.scales, wanted.scales, strict=True))
        return far + len({*genome.skipped} - {*wanted.skipped})

    search = Evolution(space)
    search.run([space.plain(uniform_path(12, 3), 2.0)], error, 400)
    assert space.size > 700_000
    assert min(search.found, key=lambda genome: search.found[genome]) == wanted


def test_the_fitted_costs_are_those_of_an_additive_error() -> None:
    costs, draw = random_costs(0, 9), np.random.default_rng(0)
    every = [(0, *inner, 9) for inner in itertools.combinations(range(1, 9), 2)]
    some = [every[i] for i in draw.permutation(len(every))[:24]]
    error = additive(costs)
    best = min(every, key=lambda path: error(Genome(path)))
    assert likely_path(every, [error(Genome(path)) for path in every]) == best == shortest_paths(costs, [3])[3]
    drawn = {likely_path(some, [error(Genome(path)) for path in some], draw) for _ in range(50)}
    assert len(drawn) > 1
    assert all(7 not in likely_path(some, [1.0] * 24, draw, forbidden=[7]) for _ in range(20))
    assert all(5 in likely_path(some, [1.0] * 24, draw, forced=[5]) for _ in range(20))


def test_the_same_seed_gives_the_same_search() -> None:
    space, error = SPACES["all"], additive(random_costs(0, 12))
    runs = []
    for seed in (0, 0, 1):
        search = Evolution(space, seed)
        search.run([space.plain(uniform_path(12, 3), 2.0)], error, 40)
        runs.append(list(search.found))
    assert runs[0] == runs[1] != runs[2]


# ------------------------------------------------------------------------------------------------- studies


WORKER = """
import itertools, sys, time
import numpy as np
from flowkit.distill.evolution import Evolution
from flowkit.distill.genome import Space
from flowkit.eval.sweep.storage import open_storage
costs = np.triu(np.random.default_rng(1000).random((17, 17)), 1)
space = Space(16, 4)
def error(genome):
    print(*genome.nodes, flush=True)
    time.sleep(float(sys.argv[3]))
    return float(sum(costs[edge] for edge in itertools.pairwise(genome.nodes)))
Evolution(space, 0, open_storage(sys.argv[1], 30)).run([space.plain((0, 4, 8, 12, 16))], error, int(sys.argv[2]))
"""


def worker(url: str, trials: int, pause: float = 0.0) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", WORKER, url, str(trials), str(pause)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ})


@pytest.mark.parametrize("kills", [(13,), pytest.param((3, 9, 6), marks=pytest.mark.slow)])
def test_a_search_that_was_killed_ends_the_same(tmp_path: Path, kills: tuple[int, ...]) -> None:
    url, costs, space = storage_url(None, tmp_path), random_costs(0, 16), Space(16, 4)
    for after in kills:  # three in the first generation, or later
        dying = worker(url, 18, pause=0.01)
        assert dying.stdout is not None
        for _ in range(after):
            dying.stdout.readline()
        dying.send_signal(signal.SIGKILL)
        dying.wait()
    stopped, whole = Evolution(space, 0, open_storage(url, 30)), Evolution(space, 0)
    for search in (stopped, whole):
        search.run([space.plain(uniform_path(16, 4))], additive(costs), 18)
    assert stopped.found == whole.found
    assert stopped.once("a", lambda: [1.0]) == stopped.once("a", lambda: [2.0]) == [1.0]


@pytest.mark.slow
def test_workers_share_a_search(server: str | None, tmp_path: Path) -> None:
    url = storage_url(server, tmp_path)
    workers = [worker(url, 40, pause=0.05) for _ in range(2)]
    done = [one.communicate(timeout=300)[0].splitlines() for one in workers]
    assert [one.returncode for one in workers] == [0, 0]
    assert min(map(len, done)) > 5
    assert max(Counter(itertools.chain(*done)).values()) == 1
    assert len(Evolution(Space(16, 4), 0, open_storage(url, 30)).found) == 40


def test_a_study_of_another_search_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    Evolution(Space(9, 3), 0, storage, "one", {"objective": "final", "samples": 10})
    Evolution(Space(9, 3), 0, storage, "one", {"objective": "final", "samples": 10})
    with pytest.raises(ValueError, match="study 'one' is of another search: samples was 10, now it is 12"):
        Evolution(Space(9, 3), 0, storage, "one", {"objective": "final", "samples": 12})


# ------------------------------------------------------------------------------------------------- on pipelines

QUICK: dict[str, Any] = {"method": "evolve", "inputs": [0], "batch_size": 1000, "progress": False}


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_best_is_no_worse_than_the_grids_it_began_with_on_fresh_noise(solver: str) -> None:
    pipe = mixtures.ring(solver)
    grid = optimize_steps(pipe, [3], anchors=20, samples=60, budget=240, held_out=300, **QUICK)[3]
    about = grid.about
    first, seeds = about["ranking"][0], about["seeds"]
    assert (list(seeds), first["indices"]) == (["uniform", "karras", "bellman"], about["indices"])
    ranked = {tuple(entry["indices"]): entry["rmse"] for entry in about["ranking"]}
    assert all(first["rmse"] <= ranked[tuple(seed["indices"])] for seed in seeds.values())
    assert list(ranked.values()) == sorted(ranked.values())
    assert about["trials"] == 240 // (3 if solver == "euler" else 5)
    assert all(seed["gain"] > -2 * seed["gain_se"] for seed in seeds.values())
    assert seeds["uniform"]["gain"] > 2 * seeds["uniform"]["gain_se"]
    # The figures are those of samples 60 to 119, and 120 to 419.
    runs = Runs(pipe, inputs=[0], batch_size=1000)
    anchors = runs.anchors(20)
    fresh, held_out = (fine_solution(runs, anchors, samples) for samples in (range(60, 120), range(120, 420)))
    assert rmse(runs.errors(grid, fresh)).value == pytest.approx(first["rmse"])
    assert rmse(runs.errors(grid, held_out)).value == pytest.approx(about["rmse"])
    uniform = rmse(runs.errors(coarse(anchors, uniform_path(20, 3)), held_out))
    assert uniform.value - about["rmse"] == pytest.approx(seeds["uniform"]["gain"])
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_scale_of_its_own_for_each_step(solver: str) -> None:
    pipe = load_demo()
    how: dict[str, Any] = {**QUICK, "inputs": [3, 7], "call": {"guidance_scale": 3.0}, "solver": solver}
    found = optimize_steps(pipe, [2], scales=[1, 2, 4], anchors=6, samples=8, budget=90, held_out=8, **how)[2]
    rows = 2 if solver == "euler" else 3  # the last step of Heun takes one evaluation
    assert len(found.about["scales"]) == rows
    assert set(found.about["scales"]) <= {1.0, 2.0, 3.0, 4.0}
    assert found.about["seeds"]["uniform"]["scales"] == [3.0] * rows
    assert len({tuple(entry["scales"]) for entry in found.about["ranking"]}) > 1
    # What a user attaches gives the samples that were measured.
    runs = Runs(pipe, solver, inputs=[3, 7], call={"guidance_scale": 3.0}, batch_size=1000)
    fine = fine_solution(runs, runs.anchors(6), range(16, 24))
    again = Grid.from_dict(json.loads(json.dumps(found.to_dict())))
    with flowkit.attach(pipe, *flowkit.distill.parts(again)):
        assert rmse(runs.errors(again, fine)).value == pytest.approx(found.about["rmse"])
    if set(found.about["scales"]) != {3.0}:
        assert rmse(runs.errors(again, fine)).value != pytest.approx(found.about["rmse"], rel=1e-3)
    with (
        pytest.raises(ValueError, match=f"for runs of {rows} evaluations"),
        flowkit.attach(pipe, *flowkit.distill.parts(again)),
    ):
        pipe(class_labels=[1], guidance_scale=3.0, num_inference_steps=5)


def test_by_frechet_distance_in_any_extractor() -> None:
    how: dict[str, Any] = {**QUICK, "inputs": range(10), "objective": "fid", "anchors": 10, "samples": 40, "budget": 10}
    pipe = load_demo()
    grid = optimize_steps(pipe, [2], reference="digits", **how)[2]
    assert grid.about["extractor"]["name"] == "classifier"
    assert grid.about["ranking"][0]["fid"] <= min(entry["fid"] for entry in grid.about["ranking"])
    less = how | {"samples": 20, "budget": 6, "held_out": 0}
    other = optimize_steps(pipe, [2], reference="digits", extractor="pixels", **less)[2]
    assert other.about["extractor"]["name"] == "pixels"
    assert "fid_se" not in other.about
    # The figure is that of `evaluate` on the images of the pipeline with the grid.
    scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler)
    scheduler.set_grid(grid)
    pipe.scheduler = scheduler
    seed = flowkit.rng.sample_seed(0, 2**63 + 4)
    with pytest.warns(UserWarning, match="biased upwards"):
        result = flowkit.eval.evaluate(pipe, "digits", 40, inputs=range(10), seed=seed, batch_size=1000, progress=False,
                                       call={"num_inference_steps": 2})  # fmt: skip
    assert result["fid"] == pytest.approx(grid.about["fid"])


def test_a_search_goes_on_in_its_folder(tmp_path: Path) -> None:
    how: dict[str, Any] = {**QUICK, "anchors": 12, "samples": 10, "held_out": 6}
    whole = optimize_steps(mixtures.ring(), [3], budget=36, output=tmp_path / "search", **how)
    assert whole == optimize_steps(mixtures.ring(), [3], budget=36, **how)
    with count_rows(pipe := mixtures.ring()) as rows:
        assert whole == optimize_steps(pipe, [3], budget=36, output=tmp_path / "search", **how)
        assert rows() == 6 * 3 * len(
            {tuple(seed["indices"]) for seed in (whole[3].about, *whole[3].about["seeds"].values())}
        )
    assert Grid.load(tmp_path / "search" / "grid-3.json") == whole[3]
    longer = optimize_steps(mixtures.ring(), [3], budget=45, output=tmp_path / "search", **how)[3]
    assert longer == optimize_steps(mixtures.ring(), [3], budget=45, **how)[3]
    assert (whole[3].about["trials"], longer.about["trials"]) == (12, 15)
    with pytest.raises(ValueError, match=r"study 'search-3' is of another search: forbidden"):
        optimize_steps(mixtures.ring(), [3], budget=90, output=tmp_path / "search", forbidden=[4], **how)
    with pytest.raises(ValueError, match="holds a search of steps already; pass resume=True"):
        optimize_steps(mixtures.ring(), [3], budget=90, output=tmp_path / "search", resume=False, **how)
    with pytest.raises(ValueError, match=r"samples\.seed 0, this one has 1"):
        optimize_steps(mixtures.ring(), [3], budget=90, output=tmp_path / "search", seed=1, **how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": [101]}, "from 1 to 100"),
        ({"steps": [0]}, "from 1 to 100"),
        ({"objective": "local"}, "unknown objective 'local' of evolve; choose final, fid"),
        ({"budget": 5}, "budget=5 is enough for 2 runs of 2 steps, and the search begins with 3 grids"),
        ({"objective": "fid"}, "got None; pass reference="),
        ({"objective": "fid", "reference": "digits", "extractor": "vgg"}, "vgg"),
        ({"objective": "fid", "reference": "nowhere"}, "no reference 'nowhere'"),
        ({"reference": "digits"}, "objective 'final' takes no reference"),
        ({"scales": [2, 4]}, "without guidance, its guidance_scale is 1.0; pass call=dict"),
        ({"scales": [2, float("nan")], "call": {"guidance_scale": 2.0}}, "must not be NaN"),
        ({"scales": [2], "inputs": [{"class_labels": 1, "guidance_scale": 2.0}]}, "is an input of each sample"),
        ({"skip": 1.0}, "skip=1.0 must be a share"),
        ({"skip": 0.1}, "UNet2DModel has no stack of residual transformer blocks"),
        ({"samples": 1}, "samples=1"),
        ({"solver": "sde-dpm++2m"}, "draws noise"),
        ({"storage": "nonsense"}, "storage is no URL"),
        ({"storage": "postgresql://someone:secret@127.0.0.1:1/none"}, r"someone:\*\*\*.* cannot be used"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    pipe = load_demo()
    pipe.unet.forward = None
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        optimize_steps(pipe, **{"steps": [2], "inputs": [1], "method": "evolve", "progress": False, **arguments})


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("flowkit.distill.evolve", "flowkit.distill.evolution", "flowkit.distill.genome")
    for name in [name for name in sys.modules if name in ours or name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'needs optuna: pip install "flowkit-diffusion\[sweep\]"'):
        optimize_steps(load_demo(), [2], inputs=[1], method="evolve")


# ------------------------------------------------------------------------------------------------- skipped layers


@pytest.mark.parametrize("family", ["dit", "pixart-alpha", "sd3", "flux", "wan"])
def test_a_layer_that_is_left_out_is_as_if_it_were_not_there(family: str) -> None:
    pipe = build(family, stock_of(family))
    (stack, *_) = [
        s for s in pipe.transformer.children() if isinstance(s, torch.nn.ModuleList) and s[0] in layers(pipe)
    ]
    last, before = len(stack) - 1, run(pipe)
    with flowkit.attach(pipe, SkippedLayers([[], [], [], []])):
        assert torch.equal(run(pipe), before)
    with flowkit.attach(pipe, SkippedLayers([[last]] * 4)):
        skipped = run(pipe)
        assert torch.equal(run(pipe), skipped)
    with flowkit.attach(pipe, SkippedLayers([[], [last], [], []])):
        once = run(pipe)
    assert not torch.equal(once, before)
    assert not torch.equal(once, skipped)
    assert torch.equal(run(pipe), before)
    layer = stack.pop(last)
    try:
        assert torch.equal(run(pipe), skipped)
    finally:
        stack.append(layer)  # pipelines share their networks


def test_what_is_skipped_at_each_step_is_searched() -> None:
    pipe = build("pixart-alpha", stock_of("pixart-alpha"))
    depth = len(layers(pipe))
    how: dict[str, Any] = {"anchors": 6, "samples": 3, "batch_size": 3, "progress": False, "method": "evolve"}
    given = {**PIPELINES["pixart-alpha"].call, "guidance_scale": 1.0}
    inputs = {name: value[0] for name, value in given.items() if isinstance(value, torch.Tensor)}
    call = {name: value for name, value in given.items() if name not in inputs}
    how |= {"inputs": inputs, "call": call}
    found = optimize_steps(pipe, [3], skip=1 / 3, budget=30, **how)[3]
    assert sum(map(len, found.about["skipped"])) == round(depth)
    assert len({str(entry["skipped"]) for entry in found.about["ranking"]}) > 1
    runs = Runs(pipe, inputs=inputs, call=call, batch_size=3)
    fine = fine_solution(runs, runs.anchors(6), range(6, 9))
    with flowkit.attach(pipe, *flowkit.distill.parts(found)):
        assert rmse(runs.errors(found, fine)).value == pytest.approx(found.about["rmse"])
    assert rmse(runs.errors(found, fine)).value < found.about["rmse"]  # all layers are nearer
    with pytest.raises(ValueError, match=f"skip=0.01 of 3 times {depth} layers is less than one; give at least"):
        optimize_steps(pipe, [3], skip=0.01, **how)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "there are no evaluations"),
        ([[-1]], "whole numbers from 0, got -1"),
        ([[0.5]], "whole numbers from 0, got 0.5"),
        ([[9], []], "layer 9 is to be left out, and PixArtAlphaPipeline has"),
        ([[0], []], "in runs of 2 evaluations, this one has 4"),
    ],
)
def test_layers_that_are_not_there_are_refused(table: Any, message: str) -> None:
    pipe = build("pixart-alpha", stock_of("pixart-alpha"))
    before = run(pipe)
    with pytest.raises((ValueError, TypeError), match=message), flowkit.attach(pipe, SkippedLayers(table)):
        run(pipe)
    assert torch.equal(run(pipe), before)

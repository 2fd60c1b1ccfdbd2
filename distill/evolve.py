"""Evolutionary search of how to sample in K steps (AutoDiffusion; Li et al. 2023, arXiv 2309.10438).

Time steps, a guidance scale for each step and the layers that each step leaves out are varied together
(`flowkit.distill.genome`), by NSGA-II of Optuna with operators of our own (`flowkit.distill.evolution`). What is made smaller is

    "final"     the error of the last sample to the fine solution, which has the pipeline's own scale and all layers;
    "fid"       the Frechet distance of images to a reference, in any extractor (`flowkit.eval.evaluate`).

Every candidate of a search sees the same noise. The best of many looks better than it is on the noise that chose it, so the best
are ranked again on fresh noise, the grids that the search began with among them, and what is gained is measured on held-out noise
that neither has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flowkit.distill.attached import parts
from flowkit.distill.bellman import COSTS, SEARCH, settings, starts
from flowkit.distill.costs import Costs
from flowkit.distill.evolution import Evolution
from flowkit.distill.fine import Runs, coarse
from flowkit.distill.genome import Genome, Space
from flowkit.distill.objectives import Distance, Frechet
from flowkit.distill.shortest import check_nodes, check_steps, shortest_paths, uniform_path
from flowkit.eval import runs as folders
from flowkit.eval.intervals import Figure, paired
from flowkit.eval.provenance import describe
from flowkit.eval.references import Extractor, Reference
from flowkit.eval.sweep.storage import open_storage, reachable, storage_url
from flowkit.grids import Grid
from flowkit.guidance.checks import finite
from flowkit.hooks import layout
from flowkit.hooks.skip import layers
from flowkit.pipelines.sampling import Inputs, as_inputs, parameters
from flowkit.progress import bar

OBJECTIVES = {"final": "rmse", "fid": "fid"}  # and the names of their figures
RANKED = 10  # of the best that are measured on fresh noise
_SEEDS = 3  # uniform, Karras, Bellman
_HEARTBEAT = 30  # seconds between signs of life of a worker


@dataclass(frozen=True)
class Task:
    """The search of one number of steps.

    Attributes:
        space: what is searched.
        trials: number of genomes that may be evaluated.
        steps: of each network evaluation, the step that it belongs to.
        scale: the pipeline's own; None where scales are not searched.
    """

    space: Space
    trials: int
    steps: tuple[int, ...]
    scale: float | None

    def about(self, genome: Genome) -> dict[str, Any]:
        """Returns a genome in values of JSON: anchors, and for each evaluation scale and skipped layers."""
        found: dict[str, Any] = {"indices": list(genome.nodes)}
        if genome.scales:
            found["scales"] = [genome.scales[step] for step in self.steps]
        if genome.skipped:
            rows: list[list[int]] = [[] for _ in range(self.space.steps)]
            for cell in genome.skipped:
                rows[cell // self.space.layers].append(cell % self.space.layers)
            found["skipped"] = [rows[step] for step in self.steps]
        return found


def evolve(
    pipe: Any,  # noqa: ANN401
    steps: Iterable[int],
    *,
    objective: str,
    reference: Reference,
    extractor: Extractor | None,
    scales: Iterable[float],
    skip: float,
    storage: str | None,
    inputs: Inputs,
    call: Mapping[str, Any] | None,
    solver: str | None,
    anchors: int,
    samples: int,
    held_out: int | None,
    budget: int,
    forbidden: Iterable[int],
    forced: Iterable[int],
    seed: int,
    batch_size: int,
    output: Path | None,
    resume: bool,
    progress: bool,
) -> dict[int, Grid]:
    """Runs ``flowkit.optimize_steps(method="evolve")``, which says what the arguments are."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r} of evolve; choose {', '.join(OBJECTIVES)}")
    held_out = samples if held_out is None else held_out
    if anchors < 1 or samples < 2 or held_out < 0 or held_out == 1:
        raise ValueError(f"got anchors={anchors}, samples={samples}, held_out={held_out}; at least 1, 2 and 2 are needed (or "
                         "held_out=0)")  # fmt: skip
    if objective != "fid" and (reference is not None or extractor is not None):
        raise ValueError(
            f"objective {objective!r} takes no reference and no extractor; leave them out, or pass objective='fid'"
        )
    wanted = check_steps(steps, anchors)
    without, through = check_nodes(wanted, anchors, forbidden, forced)
    runs = Runs(pipe, solver, inputs=inputs, call=call, seed=seed, batch_size=batch_size)
    runs.check_deterministic()
    grid = runs.anchors(anchors)
    scale, choices = _scales(runs, scales)
    depth = _layers(pipe, skip)
    measure = (
        Frechet(runs, reference, extractor, samples, held_out)
        if objective == "fid"
        else Distance(runs, grid, samples, held_out)
    )
    tasks = {}
    for k in wanted:
        space = Space(anchors, k, tuple(without), tuple(through), choices, depth, round(skip * k * depth))
        tasks[k] = _task(runs, grid, space, scale, skip, budget)
    shared = {"method": "evolve", "objective": objective, "prediction_type": runs.prediction, "anchors": anchors}
    shared |= {"samples": samples, "seed": seed, "call": describe(runs.call), **measure.describe()}
    described = settings(runs, anchors, samples)
    if output is not None:
        folders.open_run(output, described, resume, SEARCH)
    url = storage_url(storage, output or Path()) if storage or output else None
    with reachable(url) if url else nullcontext(), bar(progress) as display:
        database = open_storage(url, _HEARTBEAT) if url else None
        if progress:
            _announce(tasks, anchors, runs.evaluations(grid), samples, held_out, objective, display)
        fine = _portable(described)
        costs = Costs(grid, measure.trajectories, shared)
        searches = {}
        for k, task in tasks.items():  # a study of another search is refused before anything runs
            name = f"{output.name if output else 'steps'}-{k}"
            own = {"steps": k, "measure": {"objective": objective, **measure.describe()}, "fine": fine, "forbidden": without,
                   "forced": through, "scales": choices, "skips": task.space.skips}  # fmt: skip
            searches[k] = Evolution(task.space, seed, database, name, own)
        measure.prepare("search", output, display, costs)
        if output is not None:
            costs.save(output / COSTS)
        bellman = shortest_paths(costs.mean(), wanted, forbidden=without, forced=through)
        grids = {}
        for k, task in tasks.items():
            others = starts(grid, runs.scheduler.path, k, without, through)
            seeds = {name: task.space.plain(nodes, scale) for name, nodes in {**others, "bellman": bellman[k]}.items()}
            found = _search(runs, grid, task, searches[k], seeds, measure, output, display)
            grids[k] = replace(found, about={**shared, "budget": budget, **found.about})
            if output is not None:
                grids[k].save(output / f"grid-{k}.json")
    return grids


def _search(
    runs: Runs,
    anchors: Grid,
    task: Task,
    search: Evolution,
    seeds: Mapping[str, Genome],
    measure: Distance | Frechet,
    folder: Path | None,
    display: Progress,
) -> Grid:
    """Evolves the genomes of one number of steps, ranks the best on fresh noise, and measures the first on held-out noise."""
    steps, key = task.space.steps, measure.key

    def made(genome: Genome) -> Grid:
        about = {**task.about(genome), "network": type(layout.networks(runs.pipe)[0]).__name__}
        return replace(coarse(anchors, genome.nodes), about=about)

    def figure(genome: Genome, noise: str) -> Figure:
        grid = made(genome)
        return measure.measure(grid, parts(grid), noise)

    shown = display.add_task(f"trials of {steps} steps", total=task.trials)
    search.run(
        list(seeds.values()),
        lambda genome: figure(genome, "search").value,
        task.trials,
        lambda done: display.update(shown, completed=done),
    )
    found = search.found
    best = sorted(found, key=lambda genome: (found[genome], genome))[:RANKED]
    measure.prepare("ranking", folder, display)
    ranking: list[tuple[float, float, Genome]] = []
    for genome in display.track(
        list(dict.fromkeys((*best, *seeds.values()))), description=f"fresh noise, {steps} steps"
    ):
        value, se = search.once(f"ranking {genome!r}", lambda g=genome: _numbers(figure(g, "ranking")))  # type: ignore[misc]
        ranking.append((value, se, genome))
    ranking.sort()
    winner = ranking[0][2]
    grid = made(winner)
    about: dict[str, Any] = {
        **grid.about,
        "trials": len(found),
        f"search_{key}": found[winner],
        "ranking": [{**task.about(genome), key: value, "se": se} for value, se, genome in ranking],
        "seeds": {name: task.about(genome) for name, genome in seeds.items()},
    }
    if measure.held_out:
        measure.prepare("held-out", folder, display)
        everything = dict.fromkeys((winner, *seeds.values()))
        held_out = {
            genome: figure(genome, "held-out")
            for genome in display.track(list(everything), description=f"held-out noise, {steps} steps")
        }
        own = held_out[winner]
        about |= {"held_out": measure.held_out, key: own.value, f"{key}_se": own.se}
        for name, genome in seeds.items():
            gain = paired(held_out[genome], own)
            theirs = {key: held_out[genome].value, "se": held_out[genome].se, "gain": gain.value, "gain_se": gain.se}
            about["seeds"][name] |= theirs
    return replace(grid, about=about)


def _numbers(figure: Figure) -> list[float]:
    return [figure.value, figure.se]


def _scales(runs: Runs, scales: Iterable[float]) -> tuple[float | None, tuple[float, ...]]:
    """The pipeline's own guidance scale, and those to choose from, it among them; None and nothing where none are searched."""
    choices = {finite("a guidance scale", w, "give numbers such as scales=[1, 2, 5]") for w in scales}
    if not choices:
        return None, ()
    known, given = parameters(runs.pipe), as_inputs(runs.pipe, runs.inputs)(0)
    name = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    if name not in known or name in given:
        reason = "is an input of each sample" if name in given else f"is no argument of {type(runs.pipe).__name__}"
        raise ValueError(f"scales={sorted(choices)} cannot be searched, since {name} {reason}; leave scales out")
    own = runs.call.get(name, known[name].default)
    if not isinstance(own, (int, float)) or not 1 < own < math.inf:
        raise ValueError(f"scales={sorted(choices)} cannot be searched in a pipeline without guidance, its {name} is {own!r}; pass "
                         f"call=dict({name}=...) above 1, the scale to imitate")  # fmt: skip
    return float(own), tuple(sorted(choices | {float(own)}))


def _layers(pipe: Any, skip: float) -> int:  # noqa: ANN401
    """Number of layers that can be skipped; 0 where none shall be."""
    if not 0 <= skip < 1:
        raise ValueError(f"skip={skip} must be a share of a run's layers, from 0 to below 1; 0.1 is the paper's")
    return len(layers(pipe)) if skip else 0


def _task(runs: Runs, anchors: Grid, space: Space, scale: float | None, skip: float, budget: int) -> Task:
    """Checks and counts what one number of steps needs."""
    runs.scheduler.set_grid(coarse(anchors, uniform_path(space.anchors, space.steps)))
    rows = runs.scheduler.plan(space.steps, None, None, None).rows()
    if skip and not space.skips:
        raise ValueError(f"skip={skip} of {space.steps} times {space.layers} layers is less than one; give at least "
                         f"{1 / (space.steps * space.layers):.3g}")  # fmt: skip
    if (trials := budget // len(rows)) < _SEEDS:
        raise ValueError(f"budget={budget} is enough for {trials} runs of {space.steps} steps, and the search begins with {_SEEDS} "
                         "grids; give it some 100 times the steps")  # fmt: skip
    return Task(space, min(trials, space.size), tuple(row.step for row in rows), scale)


def _portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a fine run without what differs between the machines that share a study."""
    pipeline = settings["samples"]["pipeline"]
    device = {"device": pipeline["device"].partition(":")[0]}
    return {**settings, "samples": {**settings["samples"], "pipeline": {**pipeline, **device, "source": None}}}


def _announce(
    tasks: Mapping[int, Task], anchors: int, fine: int, samples: int, held_out: int, objective: str, display: Progress
) -> None:
    """Says how many network evaluations the search takes."""
    trajectories = 2 * samples + held_out if objective == "final" else min(samples, Frechet.TRAJECTORIES)
    needed = {
        "fine run": trajectories * fine,
        "search": samples * sum(task.trials * len(task.steps) for task in tasks.values()),
        "ranking": samples * (RANKED + _SEEDS) * sum(len(task.steps) for task in tasks.values()),
        "measurement": held_out * (1 + _SEEDS) * sum(len(task.steps) for task in tasks.values()),
    }
    counts = ", ".join(f"{name} {count:,}" for name, count in needed.items() if count)
    display.console.print(f"network evaluations at most, guidance not counted: {counts}", highlight=False)

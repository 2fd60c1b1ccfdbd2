"""Step optimisation over the anchors of fine trajectories (BOSS; Nguyen et al. 2024, arXiv 2312.16414), by two objectives.

"local" is the paper's: the grid of K steps with the least summed cost, each step's own error (`flowkit.distill.costs`), is a
shortest path over the anchors (`flowkit.distill.shortest`). It says nothing of how errors spread, so it can lose to even steps.

"final" is the mean squared error of the solver that will run, multistep and all, to the fine solution: coordinate descent over
the anchors (`flowkit.distill.descent`), begun from the local path, from even steps and from Karras spacing, every grid on the same
noise. Every trial is a real run of the pipeline.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from rich.progress import Progress

from flowkit.distill.costs import Costs
from flowkit.distill.descent import Descent
from flowkit.distill.fine import Fine, Runs, coarse, fine_solution, rmse
from flowkit.distill.shortest import Nodes, check_nodes, check_steps, nearest_path, shortest_paths, uniform_path
from flowkit.eval import runs as folders
from flowkit.eval.intervals import paired
from flowkit.eval.provenance import describe
from flowkit.eval.references import Extractor, Reference
from flowkit.eval.sources import PipelineSource
from flowkit.grids import Grid, named
from flowkit.paths import Path
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar

METHODS, OBJECTIVES = ("bellman", "evolve"), ("final", "local")
_STARTS = 3  # local, uniform, Karras
COSTS, ERRORS = "costs.safetensors", "errors.json"
SEARCH = folders.Kind(
    "a search of steps",
    "steps.json",
    "flowkit.steps/1",
    re.compile(r"\.(steps|costs|errors|fine-\d+-\d+|grid-\d+)\.(json|safetensors)\.\w+"),
)


def optimize_steps(
    pipe: Any,  # noqa: ANN401
    steps: Iterable[int],
    *,
    method: str = "bellman",
    objective: str = "final",
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    solver: str | None = None,
    anchors: int = 100,
    samples: int = 100,
    held_out: int | None = None,
    budget: int = 500,
    forbidden: Iterable[int] = (),
    forced: Iterable[int] = (),
    seed: int = 0,
    batch_size: int = 64,
    reference: Reference = None,
    extractor: Extractor | None = None,
    scales: Iterable[float] = (),
    skip: float = 0.0,
    storage: str | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> dict[int, Grid]:
    """Finds the best levels for a few steps of a pipeline, without training.

    The pipeline runs on fine steps (even in model time; Karras spacing on VE and EDM), guidance and all, with a scheduler of ours
    in place of its own; where its samples end is the fine solution. The noise is not that of `flowkit.eval.evaluate` under the same
    seed.

    Args:
        pipe: any diffusers pipeline, on any path; it is left as it was.
        steps: numbers of steps K wanted, each from 1 to ``anchors``; all come from one fine run.
        method: "bellman"; or "evolve", an evolutionary search (AutoDiffusion; Li et al. 2023, arXiv 2309.10438) by Optuna, see
            `flowkit.distill.evolve`, which needs the extra "sweep".
        objective: "final", the error of the last sample to the fine solution. Of "bellman" also "local", the paper's summed squared
            error of each step by itself, without further runs; for solvers that look back or call the network within a step, it
            takes each step for one of first order (see `flowkit.distill.costs.StepErrors`). Of "evolve" also "fid", the Frechet
            distance of images to ``reference``.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all samples, such as ``dict(guidance_scale=5.0)``.
        solver: what will run on the grid, a deterministic one of `flowkit.solvers.SOLVERS`. None means that of the pipeline's
            scheduler if it is ours, and Euler if not.
        anchors: fine steps A, among whose A + 1 levels a grid chooses.
        samples: number of trajectories, >= 2: the search noise. Of "fid" the number of images of each trial; figures of few images
            are biased upwards, so only equal numbers compare.
        held_out: number of further samples, none of the search's, on which the error and what is gained over even steps are
            measured; 0 for none. None means as many as ``samples``, and none for "local".
        budget: network evaluations of each sample that "final" and "fid" may spend on each number of steps, guidance not counted;
            a layer that is skipped counts as run.
        forbidden: inner anchors that no grid may visit.
        forced: inner anchors that every grid must visit.
        seed: of the noise.
        batch_size: samples at a time; memory holds ``2 A + 1`` states of each.
        reference: of "fid", one, as for `flowkit.eval.evaluate`: "digits" or "shapes", statistics, images.
        extractor: of "fid", likewise; None means the reference's own.
        scales: guidance scales that "evolve" chooses from at each step, beside the pipeline's own, which must be above 1; none:
            that scale at all steps. A scale of 1 costs no unconditional evaluation.
        skip: share of a run's layers that "evolve" leaves out, in [0, 1), others at each step, chosen to harm least. Only networks
            that are stacks of residual transformer blocks have such layers; 0 runs all. More is cheaper, never better.
        storage: of "evolve": URL of a database that several workers share, such as "postgresql://user@host/database", each called
            with the same arguments and, where there is one, the same name of ``output``. None means SQLite in ``output``.
        output: folder of the search: the fine run in blocks, the cost matrix, every measured error and the grids. A search that was
            killed goes on there and ends the same; another number of steps, objective or budget needs no other fine run. None keeps
            nothing.
        resume: go on with the search in ``output``; False refuses a folder that holds one.
        progress: show bars with the time left.

    Returns:
        K -> grid, made for the solver. ``about`` holds the summed cost and that of the uniform grid, whose anchors are evenly
        spaced, each with its standard error; how often resampled trajectories choose the same local path; for "final" the error on
        the search noise beside that of the uniform grid, which is not smaller; on held-out noise the root mean squared error per
        element, and the gain over the uniform grid with its paired standard error; and the settings.

        Of "evolve" it holds instead the best genomes with their figures on fresh noise, "ranking", each with its standard error,
        the returned one first; the grids that the search began with, "seeds" (uniform, Karras, Bellman), none of which ranks
        before it, with what is gained over each on held-out noise and the paired standard error; and where they were searched the
        guidance scale and the skipped layers of each network evaluation, which `flowkit.distill.parts` turns into what to attach::

            pipe.scheduler.set_grid(grid)
            with flowkit.attach(pipe, *flowkit.distill.parts(grid)): ...

    Raises:
        ImportError: for "evolve" without its extra.
        OSError: for a folder that cannot be written, or a database that cannot be reached.
        TypeError: for arguments that the pipeline does not take.
        ValueError: for a bad number, an unknown method or objective, a solver that draws noise, a scheduler that has no path of
            ours, a pipeline that does not simply take ``anchors`` steps, layers that cannot be skipped, scales without guidance, or
            a folder or study with a search of other settings.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    if method == "evolve":
        return _evolve(
            pipe, steps, objective=objective, reference=reference, extractor=extractor, scales=scales, skip=skip,
            storage=storage, inputs=inputs, call=call, solver=solver, anchors=anchors, samples=samples, held_out=held_out,
            budget=budget, forbidden=forbidden, forced=forced, seed=seed, batch_size=batch_size,
            output=None if output is None else FilePath(output), resume=resume, progress=progress,
        )  # fmt: skip
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r} of {method}; choose {', '.join(OBJECTIVES)}")
    if given := [name for name, value in (("reference", reference), ("extractor", extractor), ("scales", tuple(scales)),
                                          ("skip", skip), ("storage", storage)) if value]:  # fmt: skip
        raise ValueError(
            f"{', '.join(given)} cannot be given to the method {method!r}; leave it out, or pass method='evolve'"
        )
    held_out = (samples if objective == "final" else 0) if held_out is None else held_out
    if anchors < 1 or samples < 2 or held_out < 0 or held_out == 1:
        raise ValueError(f"got anchors={anchors}, samples={samples}, held_out={held_out}; at least 1, 2 and 2 are needed (or "
                         "held_out=0), 100 of each is usual")  # fmt: skip
    wanted = check_steps(steps, anchors)
    without, through = check_nodes(wanted, anchors, forbidden, forced)
    runs = Runs(pipe, solver, inputs=inputs, call=call, seed=seed, batch_size=batch_size)
    runs.check_deterministic()
    anchor_grid = runs.anchors(anchors)
    budget = budget if objective == "final" else 0
    trials = {k: budget // runs.evaluations(coarse(anchor_grid, uniform_path(anchors, k))) for k in wanted}
    if objective == "final" and (short := [k for k in wanted if trials[k] < _STARTS]):
        raise ValueError(f"budget={budget} is enough for {trials[short[0]]} runs of {short[0]} steps, and the search begins with "
                         f"{_STARTS}; give it some 100 times the steps")  # fmt: skip
    folder = None if output is None else FilePath(output)
    if folder is not None:
        folders.open_run(folder, settings(runs, anchors, samples), resume, SEARCH)
    shared = {"method": method, "objective": objective, "prediction_type": runs.prediction, "anchors": anchors}
    shared |= {"samples": samples, "seed": seed, "call": describe(runs.call)}
    with bar(progress) as display:
        if progress:
            needed = forecast(runs, wanted, anchors, samples, held_out, budget)
            parts = ", ".join(f"{name} {count:,}" for name, count in needed.items() if count)
            display.console.print(f"network evaluations, guidance not counted: {parts}", highlight=False)
        costs = Costs(anchor_grid, samples, {**shared, "objective": "local"})
        fine = fine_solution(runs, anchor_grid, range(samples), folder, display, costs)
        if folder is not None:
            costs.save(folder / COSTS)
        if held_out:
            others = fine_solution(runs, anchor_grid, range(samples, samples + held_out), folder, display)
        local = shortest_paths(costs.mean(), wanted, forbidden=without, forced=through)
        stability = costs.stability(local, seed=seed, forbidden=without, forced=through)
        grids = {}
        for k, path in local.items():
            uniform, about = uniform_path(anchors, k), dict(shared)
            about |= {"local_indices": list(path), "path_stability": stability[k][0], "edge_stability": stability[k][1]}
            if objective == "final":
                path, found = _final(runs, anchor_grid, fine, path, trials[k], without, through, folder, display)
                about |= {"budget": budget, "trials": len(found), "search_rmse": found[path] ** 0.5}
                if uniform in found:
                    about["uniform_search_rmse"] = found[uniform] ** 0.5
            about["indices"] = list(path)
            about["cost"], about["cost_se"] = costs.total(path)
            about["uniform_cost"], about["uniform_cost_se"] = costs.total(uniform)
            if held_out:
                pair = coarse(anchor_grid, path), coarse(anchor_grid, uniform)
                about |= _measured(runs, *pair, others, display)
            grids[k] = replace(coarse(anchor_grid, path), about=about)
            if folder is not None:
                grids[k].save(folder / f"grid-{k}.json")
    return grids


def _evolve(*args: Any, **kwargs: Any) -> dict[int, Grid]:  # noqa: ANN401
    """`flowkit.distill.evolve.evolve`, whose extra may not be installed."""
    try:
        from flowkit.distill.evolve import evolve
    except ImportError as error:
        raise ImportError(
            f'an evolutionary search needs {error.name}: pip install "flowkit-diffusion[sweep]"'
        ) from error
    return evolve(*args, **kwargs)


def forecast(
    runs: Runs, steps: Iterable[int], anchors: int, samples: int, held_out: int, budget: int
) -> dict[str, int]:
    """Returns how many network evaluations a search takes, guidance not counted.

    Args:
        runs: of the pipeline.
        steps: numbers of steps, as are the others those of `optimize_steps`.
        anchors: fine steps.
        samples: trajectories.
        held_out: further samples.
        budget: of "final" for each sample and number of steps; 0 for "local".

    Returns:
        Those of the "fine run", of the "search" at most, and of the "measurement" on held-out noise.
    """
    grid = runs.anchors(anchors)
    fine = runs.evaluations(grid)
    coarse_runs = [runs.evaluations(coarse(grid, uniform_path(anchors, k))) for k in steps]
    return {
        "fine run": samples * fine,
        "search": sum(samples * (budget // k) * k for k in coarse_runs),
        "measurement": held_out * (fine + 2 * sum(coarse_runs)),
    }


def _final(
    runs: Runs,
    anchors: Grid,
    fine: Fine,
    local: Nodes,
    trials: int,
    without: Sequence[int],
    through: Sequence[int],
    folder: FilePath | None,
    display: Progress,
) -> tuple[Nodes, dict[Nodes, float]]:
    """The path of the least error to the fine solution, and the error of every one that was measured."""
    count = len(local) - 1
    task = display.add_task(f"trials of {count} steps", total=trials)
    file = None if folder is None else folder / ERRORS
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}

    def error(found: Nodes) -> float:
        name = "-".join(map(str, found))
        if name not in known:
            known[name] = float(runs.errors(coarse(anchors, found), fine).mean())
            if file:
                folders.write_json(file, known)
        display.advance(task)
        return known[name]

    others = starts(anchors, runs.scheduler.path, count, without, through).values()
    search = Descent(error, trials, without, through)
    best = search.best([local, *others])
    display.update(task, total=len(search.found))
    return best, search.found


def starts(anchors: Grid, path: Path, steps: int, without: Iterable[int], through: Iterable[int]) -> dict[str, Nodes]:
    """Returns the paths nearest to the "uniform" and the "karras" grid, those that forbidden and forced anchors leave.

    Args:
        anchors: the fine grid.
        path: of the pipeline.
        steps: number of them, K.
        without: forbidden anchors.
        through: forced anchors.
    """
    karras = [path.at_level(v) for v in named("karras", steps, path).sigmas]
    found = {
        "uniform": uniform_path(len(anchors), steps),
        "karras": nearest_path([path.at_level(v) for v in anchors.sigmas], karras),
    }
    return {name: nodes for name, nodes in found.items() if {*through} <= {*nodes} and not {*without} & {*nodes}}


def _measured(runs: Runs, grid: Grid, uniform: Grid, fine: Fine, display: Progress) -> dict[str, Any]:
    """Errors on held-out noise, and what is gained over the uniform grid on it."""
    total = len(fine.samples) * (runs.evaluations(grid) + runs.evaluations(uniform))
    task = display.add_task(f"held-out noise, {len(grid)} steps", total=total)
    own, even = (rmse(runs.errors(g, fine, lambda rows: display.advance(task, rows))) for g in (grid, uniform))
    gain = paired(even, own)
    return {
        "held_out": len(fine.samples),
        "rmse": own.value,
        "rmse_se": own.se,
        "uniform_rmse": even.value,
        "uniform_rmse_se": even.se,
        "gain": gain.value,
        "gain_se": gain.se,
    }


def settings(runs: Runs, anchors: int, samples: int) -> dict[str, Any]:
    """What the fine run depends on."""
    source = PipelineSource(runs.pipe, samples, runs.seed, runs.inputs, runs.call, runs.batch_size).describe()
    del source["pipeline"]["scheduler"]
    config = {k: v for k, v in describe(dict(runs.scheduler.config)).items() if k != "grid" and not k.startswith("_")}
    return {"samples": source, "solver": runs.solver, "scheduler": config, "anchors": anchors}

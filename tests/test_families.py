"""Our scheduler in the pipelines of diffusers: every family with every solver, and the table of it in docs/families.md."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit import Grid, RectifiedFlowScheduler, solvers
from flowkit.paths import Path as ModelPath
from flowkit.solvers import SOLVERS

from . import families
from .families import LATE, PER_TOKEN, UNSCALED, WORKING, built, listened, solvers_of, steps_of, stock_of
from .swaps import difference, stock, watched
from .tiny import PIPELINES, build, networks, run
from .tiny_parts import DDIM, DPM, EULER, FLOW, HEUN, MATCH, MATCH_HEUN, SD, UNIPC, V

# What Stable Diffusion says when it rewrites a configuration, and numpy of the stock classes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

Params = list[Any]
_AT_ONCE = 2  # solvers of each family in the short run, others in the next, so that all of them appear


def _cells() -> Params:
    """Every family with every solver that is right there; what the short run leaves out is marked slow."""
    names, cells = list(SOLVERS), []
    for i, family in enumerate(WORKING):
        now = {names[(_AT_ONCE * i + k) % len(names)] for k in range(_AT_ONCE)}
        for solver in solvers_of(family):
            marks = () if solver in now or family in PER_TOKEN else pytest.mark.slow
            cells.append(pytest.param(family, solver, marks=marks))
    return cells


@functools.cache
def _result(family: str, solver: str) -> tuple[Tensor, int, int, ModelPath]:
    """Images; network calls made and wanted; path."""
    pipe = built(family, solver)
    known, steps = PIPELINES[family], steps_of(family)
    with watched(pipe) as outputs:
        images = run(pipe, steps)
    scheduler = pipe.scheduler
    first = round(steps * (1 - known.strength)) * scheduler.order
    return images, len(outputs), known.calls * (len(scheduler.timesteps) - first), scheduler.path


@pytest.mark.parametrize(("family", "solver"), _cells())
def test_solver_in_family(family: str, solver: str) -> None:
    images, calls, wanted, path = _result(family, solver)
    assert images.isfinite().all()
    assert calls == wanted
    change = difference(images, _result(family, "euler")[0])
    assert change < 1e-5 if _method(solver, path) == _method("euler", path) else change > 1e-4


def _method(name: str, path: ModelPath) -> solvers.Solver:
    """What a solver is but for its name; without noise and with one prediction held, every gauge says the same."""
    method = replace(solvers.solver(name, path), name="", remark="", accuracy=0)
    return replace(method, gauge=None, tau="u") if method.first_order and not method.noise else method


def test_the_short_run_meets_every_solver() -> None:
    met = {cell.values[1] for cell in _cells() if not cell.marks}
    assert met == set(SOLVERS)


# Stock results.

_TRAILING = {**SD, **V, "timestep_spacing": "trailing"}
_CLASSES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vp": [
        (DDIM, {**_TRAILING, "clip_sample": False}),
        *((name, _TRAILING) for name in (EULER, HEUN, DPM, UNIPC)),
    ],
    "flow": [*((name, {"shift": 3.0}) for name in (MATCH, MATCH_HEUN)), *((name, FLOW) for name in (DPM, UNIPC))],
    "edm": [(f"EDM{name}Scheduler", {"sigma_data": 1.0, **V}) for name in ("Euler", "DPMSolverMultistep")],
}
_WRONG = {
    *((family, name) for family in UNSCALED for name in (EULER, HEUN)),  # whose noise or input gets the wrong scale
    *(("kandinsky5", name) for name in (MATCH_HEUN, UNIPC)),  # whose samples are overwritten: see below
    *((family, name) for family in PER_TOKEN for name in (MATCH_HEUN, DPM, UNIPC)),  # whose solver has no such step
    *(("cogview4", name) for name in (MATCH_HEUN, DPM, UNIPC)),  # which take one list, not two
}


def _imitable(family: str) -> list[tuple[str, dict[str, Any]]]:
    """Stock schedulers that walk a family's path, its own first where its solver is in flowkit."""
    name, config = PIPELINES[family].stock
    path = RectifiedFlowScheduler.from_config(stock_of(family), solver="euler").path.name
    kept = {k: "fixed_small" for k in config if k == "variance_type"}  # by which some pipelines know what to pass on
    found = [(other, {**kept, **values}) for other, values in _CLASSES[path] if (family, other) not in _WRONG]
    try:
        RectifiedFlowScheduler.from_config(stock_of(family))
    except ValueError:
        return found
    return [(name, dict(config)), *found]


def _imitations() -> Params:
    """Families with stock schedulers: the first in the short run."""
    return [
        pytest.param(family, *case, id=f"{family}-{case[0]}-{i}", marks=pytest.mark.slow if i else ())
        for family in WORKING
        for i, case in enumerate(_imitable(family))
    ]


@pytest.mark.parametrize(("family", "name", "config"), _imitations())
def test_stock_configuration_gives_the_stock_images(family: str, name: str, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name).from_config(config)
    ours = run(build(family, RectifiedFlowScheduler.from_config(scheduler)), steps_of(family))
    try:
        theirs = run(build(family, scheduler), steps_of(family))
    except (TypeError, ValueError, AttributeError, AssertionError):
        # The pipeline cannot drive the stock class: no list of sigmas, no mu, no scale_noise.
        assert name != PIPELINES[family].stock[0]
        assert ours.isfinite().all()
        return
    assert difference(ours, theirs) < 1e-5


# Image to image.


@pytest.mark.parametrize("family", [name for name in WORKING if PIPELINES[name].strength < 1])
def test_strength_begins_in_the_middle(family: str) -> None:
    pipe = built(family, "dpm++2m")
    counts = []
    for strength in (0.25, 0.5):
        with watched(pipe) as outputs:
            run(pipe, 8, strength=strength)
        counts.append(len(outputs))
        assert pipe.scheduler.begin_index in (None, 8 - 8 * strength)
        assert pipe.scheduler.step_index == 8
    calls = PIPELINES[family].calls
    assert counts == [2 * calls, 4 * calls]


@pytest.mark.parametrize("family", LATE)
@pytest.mark.parametrize(("strength", "executed"), [(0.5, 1), (0.75, 9), (1.0, 15)])
def test_two_calls_a_step_begin_too_late_where_calls_are_taken_for_steps(
    family: str, strength: float, executed: int
) -> None:
    """Half of 8 steps are 7 calls, for which a strength of 3/4 does better than 1/2; stock Heun is refused there."""
    pipe = built(family, "heun")
    with watched(pipe) as outputs:
        run(pipe, 8, strength=strength)
    assert len(outputs) == PIPELINES[family].calls * executed


# Grids.

# Classes that take a list of any grid on a path.
_LISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "vp": (DPM, {**SD, **V}),
    "flow": (MATCH, {}),
    "edm": ("EDMEulerScheduler", {"sigma_data": 1.0, **V}),
}
# No scheduler of diffusers can be put on a grid through these pipelines.
_NOWHERE = {family for family in WORKING if not families.takes(family)}


def _grid(scheduler: Any, steps: int) -> Grid:
    """An uneven grid on the path of a stock scheduler, with whole model times where it wants them."""
    path = RectifiedFlowScheduler.from_config(scheduler, solver="euler").path
    shares = [round((1 - i / steps) ** 1.5, 3) for i in range(steps)]
    if path.name == "vp":
        times = tuple(float(round(950 * share)) for share in shares)
        return Grid((*(path.level(path.at_time(t)) for t in times), 0.0), "vp", timesteps=times)
    if path.name == "edm":
        return Grid((*(60 * share for share in shares), 0.0), "edm")
    grid, terminal = Grid((*shares, 0.0)), scheduler.config.get("shift_terminal")
    return grid.stretched(terminal) if terminal else grid


def _exported(family: str) -> tuple[Any, Grid, dict[str, Any]]:
    """A stock scheduler, the family's own if that can be, a grid, and the arguments that put the one on the other."""
    name, config = _LISTED[built(family, "euler").scheduler.path.name]
    for scheduler in (stock_of(family), stock(name, **config)):
        grid = _grid(scheduler, steps_of(family))
        try:
            lists = grid.for_stock(scheduler, mu=listened(family).mu)
        except ValueError:
            continue
        if set(lists) <= set(families.takes(family)):
            if family == "cogview4":  # which otherwise hands its own model times to the network
                lists["timesteps"] = [round(1000 * level) for level in grid.sigmas[:-1]]
            return scheduler, grid, lists
    # Pipelines that take times alone: without a shift these are levels.
    times = [1000 * level for level in grid.sigmas[:-1]]
    return scheduler, grid, {"timesteps": times} if families.takes(family) == ["timesteps"] else {}


@pytest.mark.parametrize("family", WORKING)
def test_a_grid_file_gives_the_same_images_in_ours_and_in_stock(family: str, tmp_path: Path) -> None:
    scheduler, grid, lists = _exported(family)
    grid.save(tmp_path / "grid.json")
    pipe, steps = build(family, RectifiedFlowScheduler.from_config(scheduler)), steps_of(family)
    without = run(pipe, steps)
    pipe.scheduler.set_grid(Grid.load(tmp_path / "grid.json"))
    ours = run(pipe, steps)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(grid.sigmas, abs=1e-6)
    assert difference(ours, without) > 1e-3
    assert (not lists) == (family in _NOWHERE)
    if lists:
        assert difference(ours, run(build(family, scheduler), steps, **lists)) < 1e-5


@pytest.mark.parametrize("family", families.DEAF)
def test_pipelines_that_have_an_argument_for_timesteps_and_fail_with_it(family: str) -> None:
    name, config = _LISTED[built(family, "euler").scheduler.path.name]
    for scheduler in (stock(name, **config), RectifiedFlowScheduler.from_config(stock(name, **config))):
        with pytest.raises(
            (ValueError, IndexError), match=r"Only one of|out of bounds|all 4 steps are done|not one of"
        ):
            run(build(family, scheduler), 4, timesteps=[950, 700, 500, 300, 100])


# Noise.


@pytest.mark.parametrize("family", [name for name in WORKING if name not in PER_TOKEN])
def test_noise_comes_from_the_generator_where_the_pipeline_passes_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = all(listened(family).generators)
    monkeypatch.setattr(families.Listening, "noise_share", 1.0)
    pipe = build(family, families.Listening.from_config(stock_of(family), solver="euler"))
    images = []
    for seed in (1, 2) if passed else (1, 2, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            images.append(run(pipe, steps_of(family)))
    assert difference(images[0], _result(family, "euler")[0]) > 1e-3
    assert torch.equal(images[-1], images[0])
    assert torch.equal(images[1], images[0]) == passed


# Quirks that the table notes.


@pytest.mark.parametrize("name", [MATCH_HEUN, UNIPC])
def test_kandinsky5_overwrites_what_stock_classes_keep(name: str) -> None:
    config = dict(_CLASSES["flow"])[name]
    pipe = build("kandinsky5", stock(name, **config))
    theirs = run(pipe)
    step = pipe.scheduler.step

    def on_copies(output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        return step(output, timestep, sample.clone(), **kwargs)

    pipe.scheduler.step = on_copies
    right = run(pipe)
    pipe = build("kandinsky5", RectifiedFlowScheduler.from_config(stock(name, **config)))
    assert difference(run(pipe), right) < 1e-5
    assert difference(theirs, right) > 1e-3


def test_ltx2_drives_the_sound_with_a_copy() -> None:
    pipe = built("ltx2", "unipc")
    result = pipe(**PIPELINES["ltx2"].call, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    alone = built("ltx2", "unipc")
    again = alone(**PIPELINES["ltx2"].call, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert result.audio.isfinite().all()
    assert torch.equal(result.audio, again.audio)
    assert pipe.scheduler.step_index == 4


def test_wan_changes_networks_at_its_boundary() -> None:
    pipe = built("wan2.2", "unipc")
    counts = {}
    for network in networks(pipe):
        handle = network.register_forward_hook(lambda net, *_: counts.update({net: counts.get(net, 0) + 1}))
        run(pipe)
        handle.remove()
    above = int((pipe.scheduler.timesteps >= 0.7 * 1000).sum())
    assert 0 < above < 4
    assert list(counts.values()) == [2 * above, 2 * (4 - above)]


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in solvers_of("ltx-condition")])
def test_per_token_times_are_refused_with_other_solvers(solver: str) -> None:
    with pytest.raises(
        ValueError, match="per_token_timesteps need a first-order solver without noise on the flow path"
    ):
        run(built("ltx-condition", solver))


# The documentation.

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def _documented(name: str, text: str, write: bool) -> str:
    """What is between the markers of a name in the page; the text, once it is written there if wanted."""
    page = PAGE.read_text(encoding="utf-8")
    head, begin, rest = page.partition(f"<!-- {name} -->\n")
    found, end, tail = rest.partition(f"\n<!-- end of {name} -->\n")
    assert begin
    assert end
    if write:
        PAGE.write_text("".join((head, begin, text, end, tail)), encoding="utf-8")
        return text
    return found


def _same_diffusers() -> None:
    version = ".".join(diffusers.__version__.split(".")[:2])
    if f"diffusers {version}" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip(f"docs/families.md is about another diffusers than {version}; write it anew with --write-docs")


def test_the_table_in_the_docs_is_true(pytestconfig: pytest.Config) -> None:
    _same_diffusers()
    write = pytestconfig.getoption("--write-docs")
    for name, text in (("families", families.table()), ("refusals", families.refusals())):
        assert _documented(name, text, write) == text


@pytest.mark.slow
def test_the_list_of_untested_pipelines_in_the_docs_is_true(pytestconfig: pytest.Config) -> None:
    _same_diffusers()
    text = families.untested()
    assert _documented("untested", text, pytestconfig.getoption("--write-docs")) == text

"""Our scheduler in diffusers' pipelines: stock results from stock configurations, and what the stock classes cannot do."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Generator, Tensor

import flowkit
from flowkit import Grid, RectifiedFlowScheduler
from flowkit.schedulers.stock_classes import CLASSES, REFUSED

from .stock64 import stock64
from .swaps import difference, stock, swapped, watched
from .tiny import FAMILIES, build, run
from .tiny_parts import DDIM, DPM, EULER, FLOW, HEUN, MATCH, MATCH_HEUN, SD, UNIPC, V

# What Stable Diffusion says when it rewrites a configuration, and numpy of the stock classes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

Config = dict[str, Any]
Case = tuple[str, str, Config]  # family, stock class, configuration

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
X0 = {"prediction_type": "sample"}  # what the tiny networks say of x0 stays in range, so that few pixels are clamped
MULTISTEP = (DPM, UNIPC)
SD_CLASSES = (DDIM, EULER, HEUN, *MULTISTEP)
# Whose solver is no table of ours, or not with the default configuration.
OTHERS = {
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "FlowMatchLCMScheduler",
}
OTHERS |= {
    "HeliosScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
}
SPACINGS = ("linspace", "leading", "trailing")
SOLVERS = ("euler", "heun", "dpm++2m", "unipc")

PARITY: list[Case] = [
    *(("sd15", name, {**SD, "timestep_spacing": s}) for name in SD_CLASSES for s in SPACINGS),
    *(("sd15", name, {**SD, "use_karras_sigmas": True}) for name in SD_CLASSES[1:]),
    *(("sd15", name, {**SD, **V}) for name in SD_CLASSES),
    ("sd15", DDIM, {**SD, "set_alpha_to_one": False}),
    ("sd15", DDIM, {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("sd15", EULER, {**SD, "use_exponential_sigmas": True}),
    ("sd15", EULER, {**SD, "final_sigmas_type": "sigma_min"}),
    ("sd15", DPM, {**SD, "solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    ("sd15", UNIPC, {**SD, "solver_type": "bh1", "final_sigmas_type": "sigma_min", "disable_corrector": [0]}),
    *(("sd15-img2img", name, {**SD, **V}) for name in SD_CLASSES),
    (
        "sd15",
        "PNDMScheduler",
        {**SD, "skip_prk_steps": True, "set_alpha_to_one": False},
    ),  # as Stable Diffusion 1.5 comes
    *(("sd15", f"{k}DiscreteScheduler", SD) for k in ("EulerAncestral", "LMS", "KDPM2", "KDPM2Ancestral")),
    ("sd15", "DDPMScheduler", {**SD, **V, "clip_sample": False, "timestep_spacing": "trailing"}),
    ("sd15", "DPMSolverSinglestepScheduler", {**BETAS, **V, "solver_order": 3}),
    ("sd15", "DEISMultistepScheduler", {**SD, **V}),
    ("sd15", DPM, {**SD, **V, "algorithm_type": "sde-dpmsolver++"}),
    *(("sd15", name, {**SD, **V, "solver_order": 3}) for name in MULTISTEP),
    *(("sd15-img2img", f"{k}DiscreteScheduler", {**SD, **V}) for k in ("EulerAncestral", "KDPM2")),
    ("ddpm", "DDPMScheduler", {**X0, "variance_type": "fixed_large"}),
    ("ddpm", DDIM, {**X0, "clip_sample": True}),
    ("ddpm", DPM, V),
    ("sd3", "DPMSolverSinglestepScheduler", FLOW),
    ("ddpm", MATCH, {"shift": 3.0}),
    ("dit", DDIM, {**V, "clip_sample": False}),
    *(("dit", name, {}) for name in MULTISTEP),
    *(("sd3", name, {"shift": k}) for name in (MATCH, MATCH_HEUN) for k in (1.0, 3.0)),
    ("sd3", MATCH, {"use_karras_sigmas": True}),
    ("sd3", MATCH, {"use_dynamic_shifting": True}),
    *(("sd3", name, FLOW) for name in MULTISTEP),
    ("sd3-img2img", MATCH, {"shift": 3.0}),
    *(("flux", MATCH, {"use_dynamic_shifting": True, "time_shift_type": k}) for k in ("exponential", "linear")),
    ("flux", MATCH, {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
    ("flux-img2img", MATCH, {"use_dynamic_shifting": True}),
]
MORE: list[Case] = [
    *(("sd15", name, {**SD, **X0}) for name in SD_CLASSES),
    # Not in float32: there rounding makes the multistep classes take 998 for the time of the first call, which is 999.
    *(("sd15", name, {**SD, f"use_{k}_sigmas": True}) for name in SD_CLASSES[1:] for k in ("exponential", "beta")),
    *(("sd15", name, {**SD, "thresholding": True}) for name in (DDIM, *MULTISTEP)),
    *(("sd15", name, {**SD, **V, "timestep_spacing": "leading"}) for name in SD_CLASSES),
    ("sd15", DPM, {**SD, "use_lu_lambdas": True}),
    *(("sd15", name, {**SD, "solver_order": 1}) for name in MULTISTEP),
    ("sd15", EULER, {**SD, **V, "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 70.0}),
    ("sd15", EULER, {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("sd15", EULER, {**SD, "interpolation_type": "log_linear"}),
    ("sd15", "EDMEulerScheduler", {}),
    ("sd15", "EDMDPMSolverMultistepScheduler", {}),
    *(("sd15-img2img", name, {**SD, "timestep_spacing": s}) for name in SD_CLASSES for s in SPACINGS),
    ("sd3", "DEISMultistepScheduler", FLOW),
    ("ddpm", DDIM, {**X0, "timestep_spacing": "trailing"}),
    ("ddpm", DPM, {**V, "use_karras_sigmas": True}),
    *(("sd3", MATCH, {f"use_{k}_sigmas": True, "shift": 3.0}) for k in ("karras", "exponential")),
    *(("sd3", name, {**FLOW, "use_dynamic_shifting": True}) for name in MULTISTEP),
    *(("flux", name, {**FLOW, "use_dynamic_shifting": True}) for name in MULTISTEP),
    ("flux", UNIPC, FLOW),
    ("flux", MATCH, {"shift": 3.0}),
]  # fmt: skip


def named(case: Case) -> str:
    family, name, config = case
    return "-".join([family, name.removesuffix("Scheduler"), *(f"{k}={v}" for k, v in config.items() if k not in SD)])


# Stock results.


@pytest.mark.parametrize("case", PARITY, ids=named)
def test_stock_configuration_gives_the_stock_images(case: Case) -> None:
    family, name, config = case
    pipe = build(family, stock(name, **config))
    theirs = run(pipe)
    assert difference(run(swapped(pipe)), theirs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", PARITY + MORE, ids=named)
def test_stock_configuration_gives_the_stock_images_to_the_last_digits(case: Case) -> None:
    family, name, config = case
    pipe = build(family, stock64(name)(**config), torch.float64)
    for steps in (3, 7):
        theirs = run(pipe, steps)
        ours = build(family, pipe.scheduler, torch.float64)
        assert difference(run(swapped(ours), steps), theirs) < 1e-9


@pytest.mark.parametrize(
    ("case", "knobs"),
    [
        (("sd15", DPM, SD), {"solver_type": "heun"}),
        (("sd15", EULER, SD), {"timestep_spacing": "trailing"}),
        (("sd15", UNIPC, SD), {"disable_corrector": [0, 1, 2]}),
        (("sd3", MATCH, {}), {"shift": 1.2}),
        (("ddpm", DDIM, V), {"prediction_type": "epsilon"}),
    ],
    ids=lambda value: named(value) if isinstance(value, tuple) else next(iter(value)),
)
def test_another_configuration_gives_other_images(case: Case, knobs: Config) -> None:
    family, name, config = case
    pipe = build(family, stock(name, **config))
    theirs = run(pipe)
    assert difference(run(swapped(pipe, **knobs)), theirs) > 1e-3


@pytest.mark.parametrize("name", SD_CLASSES)
def test_the_scheduler_its_configuration_and_its_file_say_the_same(name: str, tmp_path: Path) -> None:
    scheduler = stock(name, **SD, **V)
    scheduler.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert "_class_name" not in stock(name, **SD, **V).config  # what `from_config` then goes by are the keys
    ours = [RectifiedFlowScheduler.from_config(c) for c in (scheduler, stock(name, **SD, **V).config, file)]
    plain = [{k: v for k, v in o.config.items() if not k.startswith("_")} for o in ours]
    assert plain[0]["stock"] == name
    assert plain[1] == plain[0] == plain[2]


@pytest.mark.parametrize("name", SD_CLASSES)
def test_the_last_class_counts_when_a_configuration_has_been_through_several(name: str, tmp_path: Path) -> None:
    # Through a file, so that every key is explicit from here on, as in a checkpoint.
    diffusers.PNDMScheduler(**SD, **V).save_pretrained(tmp_path)
    pipe = build("sd15", diffusers.PNDMScheduler.from_pretrained(tmp_path))
    for through in (UNIPC, DDIM, name):
        pipe.scheduler = getattr(diffusers, through).from_config(pipe.scheduler.config)
    theirs = run(pipe, 3)
    assert difference(run(swapped(pipe), 3), theirs) < 1e-5


# Solvers.


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_stock_class_runs_or_asks_for_a_solver(name: str) -> None:
    config = {"_class_name": name, **({"stages": 1} if name == "HeliosScheduler" else {})}
    knobs = {}
    if name in OTHERS:
        with pytest.raises(ValueError, match=f"{name}.*pass solver= one of .*heun"):
            RectifiedFlowScheduler.from_config(config)
        knobs = {"solver": "dpm++2m"}
    pipe = build("sd15", RectifiedFlowScheduler.from_config(config, **knobs))
    assert run(pipe, 3).isfinite().all()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_no_solver_makes_a_refused_class_run(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be imitated"):
        RectifiedFlowScheduler.from_config({"_class_name": name}, solver="euler")


@pytest.mark.parametrize(
    ("case", "solver", "expected"),
    [
        (("sd15", EULER, {**SD, **V}), "heun", (HEUN, {})),
        (("sd15", EULER, {**SD, "use_karras_sigmas": True}), "heun", (HEUN, {})),
        (("sd15", HEUN, SD), "euler", (EULER, {})),
        (("sd15", UNIPC, {**SD, **V}), "dpm++2m", (DPM, {})),
        (("sd15", DPM, {**SD, **V}), "unipc", (UNIPC, {})),
        (("sd15", DPM, SD), "euler", (DPM, {"solver_order": 1})),
        (("sd15", "PNDMScheduler", {**SD, "skip_prk_steps": True}), "euler", (DDIM, {"set_alpha_to_one": False})),
        (("sd15", "EulerAncestralDiscreteScheduler", {**SD, **V}), "heun", (HEUN, {})),
        (("ddpm", "DDPMScheduler", {**X0, "clip_sample": False}), "euler", (DDIM, {})),
        (("ddpm", UNIPC, V), "dpm++2m", (DPM, {})),
        (("dit", UNIPC, {}), "dpm++2m", (DPM, {})),
        (("sd3", MATCH, {"shift": 3.0}), "heun", (MATCH_HEUN, {})),
        (("sd3", MATCH_HEUN, {"shift": 3.0}), "euler", (MATCH, {})),
        (("sd3", UNIPC, FLOW), "euler", (UNIPC, {"solver_order": 1, "disable_corrector": list(range(9))})),
    ],
    ids=lambda value: named(value) if isinstance(value, tuple) and len(value) == 3 else None,
)
def test_solver_on_the_grid_of_another_class(case: Case, solver: str, expected: tuple[str, Config]) -> None:
    family, name, config = case
    theirs = run(
        build(family, getattr(diffusers, expected[0]).from_config(stock(name, **config).config, **expected[1]))
    )
    assert difference(run(swapped(build(family, stock(name, **config)), solver=solver)), theirs) < 1e-5


@pytest.mark.parametrize("name", [EULER, HEUN, UNIPC])
def test_ddpm_with_classes_that_its_pipeline_cannot_call(name: str) -> None:
    """It scales no noise and no input, as Euler and Heun want, and gives `step` a generator, which Heun and UniPC refuse."""
    pipe = build("ddpm", stock(name, **V, timestep_spacing="leading"))
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 8, 8, generator=Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert difference(run(swapped(pipe)), (x / 2 + 0.5).clamp(0, 1)) < 1e-5


def test_dit_with_euler_which_its_pipeline_gives_unscaled_noise() -> None:
    pipe = build("dit", stock(DDIM, **V, clip_sample=False, timestep_spacing="trailing"))
    theirs = run(pipe)
    pipe.scheduler = stock(EULER, **V, timestep_spacing="trailing")
    assert difference(run(swapped(pipe)), theirs) < 1e-5


def test_flux_with_classes_that_take_no_sigmas_or_no_mu() -> None:
    heun = run(swapped(build("flux", stock(MATCH, shift=3.0)), solver="heun"))
    assert difference(run(swapped(build("flux", stock(MATCH_HEUN, shift=3.0)))), heun) < 1e-5
    pipe = swapped(build("flux", stock(DPM, **FLOW)))
    assert run(pipe).isfinite().all()
    static = stock(DPM, **FLOW)
    static.set_timesteps(4)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(static.sigmas.tolist())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_fresh_scheduler_ends_at_zero_without_a_wasted_call(family: str) -> None:
    pipe = build(family, RectifiedFlowScheduler())
    fresh = run(pipe)
    assert pipe.scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    pipe = swapped(build(family, NATIVE[family]()), solver="unipc")
    assert difference(run(pipe), fresh) > 1e-3
    pipe.scheduler.set_grid(Grid.uniform(4))
    assert difference(run(pipe), fresh) < 1e-5


NATIVE: dict[str, Callable[[], Any]] = {
    "ddpm": lambda: stock(DDIM, **V, clip_sample=False),
    "dit": lambda: stock(DDIM, **V, clip_sample=False, timestep_spacing="trailing"),
    "sd15": lambda: stock(EULER, **SD, **V),
    "sd15-img2img": lambda: stock(EULER, **SD, **V),
    "sd3": lambda: stock(MATCH, shift=3.0),
    "flux": lambda: stock(MATCH, use_dynamic_shifting=True),
}


@pytest.mark.parametrize("family", NATIVE)
def test_every_solver_in_every_family(family: str) -> None:
    results = {}
    for solver in SOLVERS:
        pipe = swapped(build(family, NATIVE[family]()), solver=solver)
        with watched(pipe) as outputs:
            results[solver] = run(pipe, 8 if family == "sd15-img2img" else 4)
        calls = 7 if solver == "heun" else 4
        assert len(outputs) == calls * (2 if family == "flux" else 1)  # Flux guides in two calls
        assert results[solver].isfinite().all()
    for one, other in itertools.combinations(results.values(), 2):
        assert difference(one, other) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_solvers_converge_to_one_result(family: str) -> None:
    pipe = build(family, NATIVE[family]())
    scheduler = pipe.scheduler

    def result(solver: str, steps: int) -> Tensor:
        pipe.scheduler = RectifiedFlowScheduler.from_config(scheduler.config, solver=solver, grid="uniform")
        return run(pipe, steps)

    truth = result("heun", 100)
    coarse = difference(result("euler", 4), truth)
    for solver in SOLVERS:
        assert difference(result(solver, 25), truth) < (0.4 if solver == "euler" else 0.25) * coarse


# Grids.


@pytest.mark.parametrize("family", ["sd3", "flux", "flux-img2img"])
def test_set_grid_wins_over_the_sigmas_of_a_pipeline(family: str) -> None:
    levels = [1.0, 0.8, 0.6, 0.25]
    pipe = build(family, stock(MATCH))
    theirs = run(pipe, 4, sigmas=levels)
    swapped(pipe).scheduler.set_grid(Grid((*levels, 0.0)))
    seen: list[float] = []

    def look(_pipe: Any, _step: int, t: Tensor, _values: Any) -> dict[str, Tensor]:
        seen.append(float(t))
        return {}

    assert difference(run(pipe, 4, callback_on_step_end=look), theirs) < 1e-5
    assert seen == pytest.approx([1000 * s for s in (levels[2:] if "img2img" in family else levels)])
    with pytest.raises(
        ValueError, match=r"^5 steps asked for, but the grid has 4; pass num_inference_steps=4, or clear"
    ):
        run(pipe, 5)
    pipe.scheduler.set_grid(None)
    assert difference(run(pipe, 4), theirs) > 1e-3
    assert difference(run(pipe, 5), run(build(family, stock(MATCH)), 5)) < 1e-5


def test_set_grid_on_vp_with_every_solver() -> None:
    pipe = build("sd15", stock(EULER, **SD, **V, use_karras_sigmas=True))
    pipe.scheduler.set_timesteps(4)
    grid = Grid(tuple(pipe.scheduler.sigmas.tolist()), "vp", timesteps=tuple(pipe.scheduler.timesteps.tolist()))
    for name, solver in ((EULER, "euler"), (HEUN, "heun")):
        theirs = run(build("sd15", getattr(diffusers, name).from_config(pipe.scheduler.config)))
        other = swapped(build("sd15", stock(EULER, **SD, **V)), solver=solver)
        other.scheduler.set_grid(grid)
        assert difference(run(other), theirs) < 1e-5


@pytest.mark.parametrize("solver", ["heun", "dpm++2m"])
def test_explicit_lists_of_a_pipeline(solver: str) -> None:
    pipe = build("sd15", stock(EULER, **SD, **V))
    pipe.scheduler.set_timesteps(4)
    sigmas, timesteps = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist()
    swapped(pipe, solver=solver)
    wanted = run(pipe)
    for lists in ({"sigmas": sigmas}, {"timesteps": timesteps}):
        assert difference(run(pipe, None, **lists), wanted) < 1e-4  # stock reads times from float32 levels


# Image to image, and the edits that Stable Diffusion makes in configurations.


def test_strength_begins_in_the_middle() -> None:
    pipe = swapped(build("sd15-img2img", stock(DPM, **SD, **V)))
    assert difference(run(pipe, 8, strength=0.25), run(pipe, 8, strength=0.5)) > 1e-3
    assert pipe.scheduler.begin_index == 4
    assert pipe.scheduler.step_index == 8
    with watched(pipe) as outputs:
        run(pipe, 8, strength=0.25)
    assert len(outputs) == 2


@pytest.mark.parametrize("family", ["sd15", "sd15-img2img"])
def test_rewritten_configuration_counts(family: str) -> None:
    old = {**SD, **V, "steps_offset": 0, "clip_sample": True, "timestep_spacing": "leading"}
    theirs = run(build(family, stock(DDIM, **old)))
    pipe = build(family, RectifiedFlowScheduler.from_config(stock(DDIM, **old)))
    assert (pipe.scheduler.config.steps_offset, pipe.scheduler.config.clip_sample) == (1, False)
    assert difference(run(pipe), theirs) < 1e-5
    pipe.scheduler = RectifiedFlowScheduler.from_config(stock(DDIM, **old))  # too late for the pipeline to rewrite
    assert difference(run(pipe), theirs) > 1e-3


# State.


def test_forks_run_side_by_side() -> None:
    first = swapped(build("sd15", stock(UNIPC, **SD, **V)))
    run(first, 2)
    pipes = [first, build("sd15", first.scheduler.fork())]
    settings: list[Config] = [{"steps": 5, "seed": 1}, {"steps": 5, "seed": 2, "prompt": "a blue bird"}]
    alone = [run(pipe, **setting) for pipe, setting in zip(pipes, settings, strict=True)]
    assert difference(*alone) > 1e-3
    together: list[Tensor | None] = [None, None]
    meeting = threading.Barrier(2, timeout=60)

    def meet(_pipe: Any, _step: int, _t: Any, _values: Any) -> dict[str, Tensor]:
        meeting.wait()  # so that the steps of the two do alternate
        return {}

    def work(i: int) -> None:
        together[i] = run(pipes[i], **settings[i], callback_on_step_end=meet)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, got in zip(alone, together, strict=True):
        assert got is not None
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["eta", "begin"])
def test_fork_of_a_scheduler_in_use_starts_afresh(mode: str) -> None:
    scheduler = RectifiedFlowScheduler.from_config(stock(DDIM, **SD) if mode == "eta" else stock(DPM, **SD))
    scheduler.set_timesteps(5)
    fresh = scheduler.fork()
    x = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(0))
    first = 2 if mode == "begin" else 0
    scheduler.set_begin_index(first)
    for t in scheduler.timesteps[first : first + 2]:
        scheduler.step(x.sin(), t, x, eta=float(mode == "eta"), generator=Generator().manual_seed(0))
    results = []
    for fork in (fresh, scheduler.fork()):
        y = x
        for t in fork.timesteps:
            y = fork.step(y.sin(), t, y, generator=Generator().manual_seed(0)).prev_sample
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("config", [{}, {"thresholding": True}], ids=["plain", "thresholding"])
def test_copies_in_mid_run_go_on(copied: Callable[[Any], Any], config: Config) -> None:
    pipe = swapped(build("sd15", stock(UNIPC, **SD, **V, **config)))
    wanted = run(pipe, 5)

    def exchange(pipe: Any, step: int, _t: Any, _values: Any) -> dict[str, Tensor]:
        if step == 2:
            original = pipe.scheduler
            pipe.scheduler = copied(original)
            original.set_timesteps(2)
        return {}

    assert torch.equal(run(pipe, 5, callback_on_step_end=exchange), wanted)


# Folders.


def _saved(family: str, knobs: Config, grid: Grid | None = None) -> Any:
    pipe = swapped(build(family, NATIVE[family]()), **knobs)
    if grid:
        pipe.scheduler.set_grid(grid)
    return pipe


SAVED: dict[str, Callable[[], Any]] = {
    "ddpm": lambda: _saved("ddpm", {"solver": "dpm++2m"}, Grid((40.0, 3.0, 0.4, 0.1, 0.0), "vp", "dpm++2m", about={"gain": 2})),
    "sd15": lambda: _saved("sd15", {"solver": "unipc", "timestep_spacing": "trailing"}),
    "sd3": lambda: _saved("sd3", {"solver": "heun"}, Grid((1.0, 0.9, 0.5, 0.2, 0.0))),
    "flux": lambda: _saved("flux", {"grid": "uniform", "noise": "keyed"}),
}  # fmt: skip


@pytest.mark.parametrize("family", SAVED)
def test_saved_with_our_scheduler_inside(family: str, tmp_path: Path) -> None:
    pipe = SAVED[family]()
    wanted = run(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["flowkit", "RectifiedFlowScheduler"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is RectifiedFlowScheduler
    assert (loaded.scheduler.method, loaded.scheduler.grid) == (pipe.scheduler.method, pipe.scheduler.grid)
    assert difference(run(loaded), wanted) < 1e-5


@pytest.mark.parametrize("family", SAVED)
def test_saved_for_everyone(family: str, tmp_path: Path) -> None:
    pipe = SAVED[family]()
    ours = pipe.scheduler
    wanted = run(pipe)
    flowkit.save_pretrained(pipe, tmp_path)
    assert pipe.scheduler is ours
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is type(NATIVE[family]())
    assert run(loaded).isfinite().all()
    back = swapped(loaded).scheduler
    assert (back.method, back.grid) == (ours.method, ours.grid)
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == {
        k: v for k, v in ours.config.items() if not k.startswith("_")
    }
    assert difference(run(loaded), wanted) < 1e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        RectifiedFlowScheduler(shift=2.0),
        RectifiedFlowScheduler(solver="heun", grid=Grid((1.0, 0.3, 0.0)), noise="keyed"),
        RectifiedFlowScheduler(grid="karras", sigma_min=0.01, sigma_max=0.9),
        RectifiedFlowScheduler(path="vp", prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
        RectifiedFlowScheduler(path="vp", grid="karras", sigma_min=0.05, sigma_max=30.0),
        RectifiedFlowScheduler(path="edm", prediction_type="v_prediction", sigma_data=1.0, sigma_max=70.0),
    ],
    ids=["flow", "flow-grid", "flow-karras", "vp", "vp-karras", "edm"],
)
def test_schedulers_of_our_own_are_saved_for_everyone(scheduler: RectifiedFlowScheduler, tmp_path: Path) -> None:
    flowkit.save_pretrained(build("ddpm", scheduler), tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler).__module__.startswith("diffusers.")
    back = swapped(loaded).scheduler
    for s in (scheduler, back):
        s.set_timesteps(None if s.grid else 4)
    assert (back.method, back.grid, back.path) == (scheduler.method, scheduler.grid, scheduler.path)
    assert back.sigmas.tolist() == scheduler.sigmas.tolist()
    assert back.timesteps.tolist() == scheduler.timesteps.tolist()
    keys = ("noise", "prediction_type")
    assert [back.config[k] for k in keys] == [scheduler.config[k] for k in keys]


def test_paths_without_a_stock_class_are_not_saved_for_everyone(tmp_path: Path) -> None:
    pipe = build("ddpm", RectifiedFlowScheduler(path="cosine"))
    with pytest.raises(ValueError, match=r"no diffusers scheduler walks the path 'cosine' .* pipe\.save_pretrained"):
        flowkit.save_pretrained(pipe, tmp_path)
    assert not list(tmp_path.iterdir())


_ELSEWHERE = """
import sys
import diffusers, torch
from safetensors.torch import save_file

def run(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images

folder = sys.argv[1]
pipe = diffusers.DiffusionPipeline.from_pretrained(folder + "/everyone")
results = {"stock": run(pipe)}
assert type(pipe.scheduler).__name__ == "DDIMScheduler"
assert not [name for name in sys.modules if name.partition(".")[0] == "flowkit"]

import flowkit
inside = diffusers.DiffusionPipeline.from_pretrained(folder + "/inside")
assert type(inside.scheduler) is flowkit.RectifiedFlowScheduler
results["inside"] = run(inside)
pipe.scheduler = flowkit.RectifiedFlowScheduler.from_config(pipe.scheduler.config)
results["back"] = run(pipe)
save_file(results, folder + "/results.safetensors")
"""


def test_folders_load_in_another_process_with_and_without_flowkit(tmp_path: Path) -> None:
    pipe = SAVED["ddpm"]()
    flowkit.save_pretrained(pipe, tmp_path / "everyone")
    pipe.save_pretrained(tmp_path / "inside")
    root = str(Path(flowkit.__file__).parents[1])
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = safetensors.torch.load_file(tmp_path / "results.safetensors")
    wanted = run(pipe)
    assert difference(results["inside"], wanted) < 1e-5
    assert difference(results["back"], wanted) < 1e-5
    assert difference(results["stock"], wanted) > 1e-3


# Precision, noise and what else a call can bring.


@pytest.mark.parametrize(("family", "solver"), [("sd15", "unipc"), ("sd15", "heun"), ("sd3", "dpm++2m")])
def test_bfloat16_stays_bfloat16(family: str, solver: str) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(0)).bfloat16()
    exact = run(swapped(build(family, NATIVE[family]()), solver=solver), latents=latents.float())
    pipe = swapped(build(family, NATIVE[family](), torch.bfloat16), solver=solver)
    samples: list[Tensor] = []

    def look(_pipe: Any, _step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        samples.append(values["latents"])
        return {}

    with watched(pipe) as outputs:
        run(pipe, latents=latents, callback_on_step_end=look)
    assert {x.dtype for x in (*outputs, *samples)} == {torch.bfloat16}
    assert difference(samples[-1].float(), exact) < 0.05


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_debug_names_the_step_of_the_first_nan(solver: str) -> None:
    pipe = swapped(build("sd15", NATIVE["sd15"]()), solver=solver, debug=True)
    total = 7 if solver == "heun" else 4

    def broken(call: int, output: Tensor) -> Tensor:
        return output * (float("nan") if call == 2 else 1.0)

    with watched(pipe, broken), pytest.raises(ValueError, match=rf"^step 2 of {total}, sigma .* gave NaN or inf"):
        run(pipe)
    pipe.scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler.config, debug=False)
    with watched(pipe, broken):
        assert run(pipe).isnan().all()


@pytest.mark.parametrize(("eta", "spacing"), [(0.5, "trailing"), (1.0, "leading")])
def test_eta_is_that_of_ddim(eta: float, spacing: str) -> None:
    pipe = build("sd15", stock(DDIM, **SD, **V, timestep_spacing=spacing))
    theirs, without = run(pipe, eta=eta), run(pipe)
    assert difference(theirs, without) > 1e-3
    assert difference(run(swapped(pipe), eta=eta), theirs) < 1e-5
    assert difference(run(pipe), without) < 1e-5
    swapped(pipe, solver="dpm++2m")
    with pytest.raises(
        ValueError, match=rf"^eta = {eta:g} needs a one-step solver, but this is 'dpm\+\+2m'; use solver='euler'"
    ):
        run(pipe, eta=eta)


def test_a_list_of_generators_makes_a_batch_of_single_images() -> None:
    pipe = build("sd15", stock(DDIM, **SD, **V))

    def images(*seeds: int) -> Tensor:
        generators = [Generator().manual_seed(s) for s in seeds]
        return run(pipe, generator=generators, num_images_per_prompt=len(seeds), eta=1.0)

    theirs = images(1, 2, 3)
    swapped(pipe)
    assert difference(images(1, 2, 3), theirs) < 1e-5
    assert difference(torch.cat([images(1), images(2, 3)]), theirs) < 1e-5


@pytest.mark.parametrize("noise", ["keyed", "diffusers"])
def test_only_keyed_noise_does_not_depend_on_the_batch(noise: str) -> None:
    pipe = swapped(build("sd15", stock(DDIM, **SD, **V)), noise=noise)
    latents = torch.randn(3, 4, 8, 8, generator=Generator().manual_seed(7))

    def images(count: int, seed: int = 5) -> Tensor:
        return run(pipe, seed=seed, latents=latents[:count], num_images_per_prompt=count, eta=1.0)

    change = difference(images(3)[:1], images(1))
    assert change < 1e-5 if noise == "keyed" else change > 1e-3
    assert difference(images(3, seed=6), images(3)) > 1e-3


# Bad input.


@pytest.mark.parametrize("family", ["ddpm", "dit", "sd15", "sd15-img2img", "sd3"])
@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(family: str, steps: int) -> None:
    pipe = swapped(build(family, NATIVE[family]()))
    with pytest.raises(ValueError, match=rf"number of steps|num_inference_steps.*got {steps}; "):
        run(pipe, steps)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("sd15", {"sigmas": [1.0, 5.0, 0.0]}, "sigmas must be finite and fall strictly"),
        ("sd15", {"timesteps": [10, 500]}, "timesteps must be finite and fall strictly"),
        ("sd15", {"timesteps": [1500, 500]}, r"timesteps must lie in \[0, 999\], got \[1500"),
        ("sd3", {"sigmas": [0.5, 0.5]}, "sigmas must be finite and fall strictly"),
        ("sd3", {"sigmas": [2.0, 0.5]}, r"sigmas must lie in \[0, 1\], got \[2"),
        ("flux", {"sigmas": [0.2, 0.9]}, "sigmas must be finite and fall strictly"),
    ],
)
def test_lists_that_make_no_grid_are_refused(family: str, arguments: Config, message: str) -> None:
    pipe = swapped(build(family, NATIVE[family]()))
    with pytest.raises(ValueError, match=message):
        run(pipe, None, **arguments)


def test_lists_in_conflict_are_refused() -> None:
    pipe = flowkit.load_demo("digits")  # the other pipelines pass one list at most
    with pytest.raises(ValueError, match=r"^sigmas \[1\.0, 0\.5\] and timesteps \[1000.0, 400.0\] disagree"):
        pipe(class_labels=[3], sigmas=[1.0, 0.5], timesteps=[1000, 400])


def test_a_dynamic_shift_without_its_amount_is_refused() -> None:
    pipe = swapped(build("ddpm", stock(MATCH, use_dynamic_shifting=True)))
    with pytest.raises(ValueError, match="needs a number mu, got None; pass mu="):
        run(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_names_are_refused_before_a_run(family: str) -> None:
    pipe = build(family, NATIVE[family]())
    for knobs, message in (
        ({"solver": "huen"}, "^unknown solver 'huen'; choose one of .*heun"),
        ({"prediction_type": "noise"}, "'noise'"),
        ({"solvers": "heun"}, "^unknown knob 'solvers' = 'heun'; choose from .*solver"),
    ):
        with pytest.raises(ValueError, match=message):
            swapped(pipe, **knobs)

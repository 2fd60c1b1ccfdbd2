"""What every scheduler of diffusers promises, on ours: each solver, path and prediction works or is refused by name."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from flowkit import Grid, MixtureDenoiser, RectifiedFlowScheduler, paths, solvers
from flowkit.grids import GRIDS, named
from flowkit.predictions import pair
from flowkit.schedulers.saving import stock_config

SOLVERS = tuple(solvers.SOLVERS)
NOISY = tuple(name for name, method in solvers.SOLVERS.items() if method.noise)
PATHS = ("flow", "vp", "cosine", "ve", "edm")
PREDICTIONS = ("flow_prediction", "epsilon", "sample", "v_prediction")


def one_step(scheduler: RectifiedFlowScheduler, seed: int = 0, **options: Any) -> Tensor:
    """The first step of a run of 10, from fixed tensors."""
    scheduler.set_timesteps(10)
    x = torch.rand(4, 3, 8, 8, generator=Generator().manual_seed(1))
    t = scheduler.timesteps[0]
    output = scheduler.step(0.1 * x, t, x, generator=Generator().manual_seed(seed), **options)
    result: Tensor = output[0] if isinstance(output, tuple) else output.prev_sample
    return result


def run(scheduler: RectifiedFlowScheduler, model: MixtureDenoiser, count: int = 64) -> Tensor:
    """A whole run of a scheduler with timesteps, under an exact network."""
    noise, path = Generator().manual_seed(0), scheduler.path
    x = torch.randn(count, 2, generator=noise, dtype=torch.float64) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        row = scheduler._rows[i]
        x0, eps = model.posterior(x * path.norm(row.s), row.s)
        plan = scheduler._plan
        assert plan is not None
        a, b = pair(plan.prediction, path.alpha(row.s), path.sigma(row.s), path.sigma_data)
        x = scheduler.step(a * x0 + b * eps, t, x, generator=noise, return_dict=False)[0]
    return x


# ---------------------------------------------------------------------------------------- what diffusers' own tests ask for


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_saved_scheduler_is_the_same_one(solver: str, path: str, tmp_path: Path) -> None:
    scheduler = RectifiedFlowScheduler(path=path, solver=solver)
    scheduler.save_pretrained(tmp_path)
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    plain = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    assert plain == dict(loaded.config)
    first = one_step(scheduler)
    assert first.shape == (4, 3, 8, 8)
    assert torch.equal(one_step(loaded), first)
    assert torch.equal(one_step(loaded, return_dict=False), first)
    assert torch.equal(one_step(loaded, seed=1), first) == (solver not in NOISY)


@pytest.mark.parametrize(
    "options", [{}, {"path": "vp", "solver": "unipc"}, {"path": "edm", "solver": "edm", "s_churn": 4.0}]
)
def test_every_compatible_class_gives_ours_back(options: dict[str, Any]) -> None:
    scheduler = RectifiedFlowScheduler(**options)
    assert len(scheduler.compatibles) > 10
    for other in scheduler.compatibles:
        back = RectifiedFlowScheduler.from_config(other.from_config(scheduler.config).config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(scheduler.config)


def test_training_scripts_find_times_and_levels_before_any_run(tmp_path: Path) -> None:
    for stock in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        diffusers.DDIMScheduler(),
        diffusers.EulerDiscreteScheduler(),
    ):
        ours = RectifiedFlowScheduler.from_config(stock)
        assert torch.allclose(ours.timesteps, stock.timesteps.float(), rtol=1e-6)
        if hasattr(stock, "alphas_cumprod"):
            assert torch.allclose(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4)
            assert torch.allclose(ours.betas, stock.betas, rtol=1e-2, atol=1e-6)
    flow = RectifiedFlowScheduler()
    assert not hasattr(flow, "betas")
    assert (len(flow.timesteps), flow.sigmas[[0, -1]].tolist()) == (1000, [1.0, 0.0])
    for options in ({}, {"num_train_timesteps": 2}):  # diffusers' own tests leave it at 1000
        given = RectifiedFlowScheduler(path="vp", trained_betas=np.array([0.1, 0.3]), **options)
        assert given.betas.tolist() == pytest.approx([0.1, 0.3])
        given.save_pretrained(tmp_path)
        assert torch.equal(RectifiedFlowScheduler.from_pretrained(tmp_path).betas, given.betas)


def test_whole_timesteps_and_any_model_time_are_taken() -> None:
    scheduler = RectifiedFlowScheduler.from_config(diffusers.DDIMScheduler())
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(*(scheduler.fork().step(x, t, x).prev_sample for t in (900, torch.tensor(900))))
    edm = RectifiedFlowScheduler(path="edm")
    assert torch.equal(edm.scale_model_input(x, 0.0), x)  # nothing to scale before a run
    edm.set_timesteps(10)
    assert torch.allclose(edm.scale_model_input(x, 0.0), x / math.hypot(1.0, 0.5))  # sigma 1, beside the grid


# ------------------------------------------------------------------------------------------------- every combination


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_on_every_path_with_every_prediction(solver: str) -> None:
    """Works, to the data's own mean and spread, or is refused by name before a step."""
    means = torch.tensor([[1.0, -0.5], [-0.6, 0.8]], dtype=torch.float64)
    model = MixtureDenoiser.of(means, 0.3)
    for path, prediction in itertools.product(PATHS, PREDICTIONS):
        options = {"path": path, "solver": solver, "prediction_type": prediction}
        scheduler = RectifiedFlowScheduler(**options)
        # The cosine path starts at pure noise, which is all that epsilon says there; sigma max on the flow path too.
        blind = prediction == "epsilon" and path in ("flow", "cosine")
        if blind:
            with pytest.raises(ValueError, match="'epsilon' does not determine the sample at alpha = 0"):
                scheduler.set_timesteps(40)
            continue
        scheduler.set_timesteps(40)
        x = run(scheduler, model)
        nearest = (x[:, None] - means).norm(dim=-1).amin(1)
        assert nearest.mean() < 0.75, options  # 0.38 for exact samples of two dimensions with std 0.3
        assert 0.4 < x.std() < 1.1, options


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_and_two_steps_and_a_repeated_run(solver: str, path: str) -> None:
    scheduler = RectifiedFlowScheduler(path=path, solver=solver)
    for steps in (1, 2):
        scheduler.set_timesteps(steps)
        assert scheduler.num_inference_steps == steps
        model = MixtureDenoiser.of(torch.zeros(1, 2, dtype=torch.float64), 0.5)
        first = run(scheduler, model)
        assert torch.isfinite(first).all()
        scheduler.set_timesteps(steps)
        assert torch.equal(run(scheduler, model), first)


# ---------------------------------------------------------------------------------------------------------------- noise


def test_churn_raises_the_levels_of_the_calls() -> None:
    scheduler = RectifiedFlowScheduler(path="edm", solver="edm", s_churn=10.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
    plain = RectifiedFlowScheduler(path="edm", solver="edm")
    scheduler.set_timesteps(18)
    plain.set_timesteps(18)
    gamma = min(10 / 18, math.sqrt(2) - 1)
    levels, firsts = plain.sigmas[:-1][::2].tolist(), scheduler.sigmas[:-1][::2].tolist()
    for level, raised in zip(levels, firsts, strict=True):
        wanted = level * (1 + gamma) if 0.05 <= level <= 50 else level
        assert raised == pytest.approx(wanted, rel=1e-5)
    seconds = scheduler.sigmas[1:-1][::2].tolist()  # at the level where the step ends, before it is raised
    assert seconds == pytest.approx(plain.sigmas[1:-1][::2].tolist(), rel=1e-5)
    assert scheduler.timesteps.tolist() == pytest.approx(
        [0.25 * math.log(v) for v in scheduler.sigmas[:-1].tolist()], abs=1e-5
    )
    assert scheduler.init_noise_sigma == pytest.approx(80.0)  # beyond s_tmax


def test_the_first_noise_of_churn_has_the_factor_too() -> None:
    scheduler = RectifiedFlowScheduler(path="edm", solver="edm", s_churn=4.0, s_noise=1.1)
    scheduler.set_timesteps(10)
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(80**2 + 1.1**2 * ((80 * 1.4) ** 2 - 80**2)))
    x0, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert scheduler.add_noise(x0, noise, scheduler.timesteps[:1]).max() == pytest.approx(
        80 * 1.4
    )  # the level of the call


def test_churn_stays_within_what_a_discrete_model_knows() -> None:
    scheduler = RectifiedFlowScheduler(path="vp", solver="edm", grid="karras", s_churn=20.0)
    scheduler.set_timesteps(8)
    top = scheduler.path.rhos[-1]
    assert scheduler.sigmas.max() == pytest.approx(top, rel=1e-6)
    assert scheduler.timesteps.max() == 999
    assert scheduler.sigmas[2] > scheduler.sigmas[1]  # the call after a step is at a raised level


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
@pytest.mark.parametrize(
    "options",
    [{"solver": "edm", "s_churn": 8.0}, {"solver": "dpm++2s", "eta": 1.0}, *({"solver": name} for name in NOISY)],
    ids=lambda options: options["solver"],
)
def test_noise_keeps_the_distribution(options: dict[str, Any], path: str) -> None:
    """The variance of Gaussian data after a fine run, which a factor on the noise spoils."""
    model, std = MixtureDenoiser.of(torch.zeros(1, 2, dtype=torch.float64), 0.5), 0.5

    def variance(**more: Any) -> float:
        scheduler = RectifiedFlowScheduler(path=path, **options, **more)
        scheduler.set_timesteps(150)
        return run(scheduler, model, 5_000).square().mean().item()

    # 10,000 values have a relative standard error of 1.4 %, and the first-order solvers a bias of up to a tenth.
    plain = variance()
    assert plain == pytest.approx(std**2, rel=0.12)
    assert variance(s_noise=1.25) > 1.15 * plain


def test_eta_of_a_step_wins_over_that_of_the_scheduler() -> None:
    results = [
        one_step(RectifiedFlowScheduler(solver="euler", eta=own), eta=asked)
        for own, asked in ((None, 0.0), (0.7, 0.0), (None, 0.7), (0.2, 0.7))
    ]
    assert torch.equal(results[1], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    own = RectifiedFlowScheduler(solver="ancestral")
    assert torch.equal(one_step(own), one_step(RectifiedFlowScheduler(solver="euler", eta=1.0)))
    assert not torch.equal(one_step(own), one_step(RectifiedFlowScheduler(solver="ancestral", eta=0.5)))


def test_noise_belongs_to_the_solver_that_it_was_given_for() -> None:
    churned = RectifiedFlowScheduler(path="edm", solver="edm", s_churn=10.0, s_noise=1.01)
    other = RectifiedFlowScheduler.from_config(churned, solver="unipc")
    assert (other.config["s_churn"], other.config["s_noise"]) == (0.0, 1.0)
    same = RectifiedFlowScheduler.from_config(churned, solver="edm", s_tmax=50.0)
    assert (same.config["s_churn"], same.config["s_noise"], same.config["s_tmax"]) == (10.0, 1.01, 50.0)
    ltx = diffusers.LTXEulerAncestralRFScheduler(eta=0.7, s_noise=0.9)
    assert RectifiedFlowScheduler.from_config(ltx).config["eta"] == 0.7
    assert RectifiedFlowScheduler.from_config(ltx, solver="unipc").config["eta"] is None


def test_the_factor_on_the_noise_counts_with_every_variance() -> None:
    x = torch.randn(2, 3, 4, 4, generator=Generator().manual_seed(0))
    wide = torch.cat([x, torch.full_like(x, 0.3)], 1)
    for kind in ("fixed_small", "fixed_large", "learned", "learned_range"):
        results = []
        for factor in (1.0, 2.0, 3.0):
            scheduler = RectifiedFlowScheduler.from_config(
                diffusers.DDPMScheduler(variance_type=kind, clip_sample=False), s_noise=factor
            )
            scheduler.set_timesteps(10)
            generator = Generator().manual_seed(3)
            results.append(scheduler.step(wide, scheduler.timesteps[0], x, generator=generator).prev_sample)
        assert torch.allclose(results[2] - results[1], results[1] - results[0], atol=1e-5), kind
        assert not torch.allclose(results[1], results[0], atol=1e-2), kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "unipc", "eta": 1.0}, "eta = 1 would put noise into the corrector of 'unipc'; use solver='sde-dpm"),
        ({"solver": "dpm++3m", "eta": 1.0}, "eta = 1 needs a one-step solver, but this is 'dpm"),
        ({"solver": "ancestral", "eta": 2.0}, r"eta = 2 asks for more noise than there is; choose a value in \[0, 1\]"),
        ({"solver": "ancestral", "eta": -1.0}, "eta must be a number >= 0, got -1"),
        ({"solver": "ab2", "s_churn": 3.0}, "s_churn needs a one-step solver, but this is 'ab2'"),
        ({"solver": "sde-dpm++2m", "s_churn": 3.0}, "'sde-dpm.*' draws noise of its own"),
        ({"solver": "edm", "s_churn": -1.0}, "got s_churn=-1"),
        ({"solver": "edm", "s_churn": 1.0, "s_tmin": 3.0, "s_tmax": 2.0}, "s_tmin=3.0, s_tmax=2.0"),
        ({"solver": "heun", "s_noise": 1.01}, "s_noise=1.01 has no effect on 'heun', which adds no noise"),
        ({"solver": "ancestral", "variance_type": "learned"}, "variance_type='learned' on the path 'flow' is none"),
        ({"path": "vp", "solver": "ancestral", "variance_type": "huge"}, "variance_type='huge'"),
    ],
)
def test_noise_that_a_solver_cannot_take_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**options)


def test_churn_in_step_and_noise_per_token_are_refused() -> None:
    scheduler = RectifiedFlowScheduler(solver="edm")
    with pytest.raises(ValueError, match=r"step\(s_churn=4\) comes too late.*set it at construction"):
        one_step(scheduler, s_churn=4.0)
    with pytest.raises(ValueError, match="per_token_timesteps need a first-order solver without noise"):
        one_step(RectifiedFlowScheduler(solver="ancestral"), per_token_timesteps=torch.full((4, 8), 1000.0))


def test_learned_variance_is_a_choice() -> None:
    """Dropped by every solver, but taken by ancestral steps that ask for it."""
    config = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    x = torch.randn(2, 3, 4, 4, generator=Generator().manual_seed(0))
    wide = torch.cat([x, torch.full_like(x, 1.0)], 1)

    def step(output: Tensor, **knobs: Any) -> Tensor:
        scheduler = RectifiedFlowScheduler.from_config(config, **knobs)
        scheduler.set_timesteps(10)
        result: Tensor = scheduler.step(
            output, scheduler.timesteps[0], x, generator=Generator().manual_seed(3)
        ).prev_sample
        return result

    taken, dropped = step(wide), step(wide, variance_type="fixed_small")
    assert not torch.equal(taken, dropped)
    assert torch.equal(dropped, step(x, variance_type="fixed_small"))
    # v = 1 says the larger variance, that of the forward step.
    assert torch.allclose(taken, step(wide, variance_type="fixed_large"), atol=1e-5)
    assert torch.equal(step(wide, solver="heun"), step(x, solver="heun"))
    with pytest.raises(ValueError, match="needs a model output with twice the channels"):
        step(x)


# ------------------------------------------------------------------------------------- faults of the stock classes, not ours


def test_unipc_bh1_is_finite_at_sigma_0() -> None:
    stock = diffusers.UniPCMultistepScheduler(solver_type="bh1")
    ours = RectifiedFlowScheduler.from_config(stock)
    results = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(6)
        x = torch.randn(1, 3, 4, 4, generator=Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x, return_dict=False)[0]
        results.append(x)
    assert results[0].isnan().all()
    assert results[1].isfinite().all()


def test_a_grid_with_a_level_there_twice_ends_finite() -> None:
    """A thousand linspace steps round to one time that is there twice, where stock UniPC of order 3 meets a singular matrix."""
    stock = diffusers.UniPCMultistepScheduler(solver_order=3)
    stock.set_timesteps(1000)
    assert len(set(stock.timesteps.tolist())) < 1000
    ours = RectifiedFlowScheduler.from_config(stock)
    ours.set_timesteps(1000)
    assert all(math.isfinite(b) for row in ours._rows for b in (row.a, *row.b))
    assert any(row.s == row.t for row in ours._rows)


def test_no_step_of_ours_is_wasted_where_stock_ddim_wastes_one() -> None:
    stock = diffusers.DDIMScheduler(set_alpha_to_one=False, clip_sample=False)
    x = torch.randn(1, 3, 4, 4, generator=Generator().manual_seed(0))
    stock.set_timesteps(10)
    assert torch.allclose(stock.step(x.cos(), stock.timesteps[-1], x).prev_sample, x, atol=1e-6)
    ours = RectifiedFlowScheduler.from_config(stock, grid="uniform")
    ours.set_timesteps(10)
    ours.set_begin_index(9)
    assert not torch.allclose(ours.step(x.cos(), ours.timesteps[-1], x).prev_sample, x, atol=1e-2)


def test_model_times_of_a_flow_are_not_cut_to_whole_ones() -> None:
    stock = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    stock.set_timesteps(7)
    cut = stock.timesteps.float() - 1000 * stock.sigmas[:-1]
    assert cut.min() < -0.3  # up to a thousandth of the path
    ours = RectifiedFlowScheduler.from_config(stock, grid=Grid((*(float(v) for v in stock.sigmas[:-1]), 0.0)))
    ours.set_timesteps(7)
    assert torch.allclose(ours.timesteps, 1000 * ours.sigmas[:-1], rtol=1e-6)


def test_a_path_says_where_it_starts() -> None:
    with pytest.raises(ValueError, match="cannot start at infinite sigma"):
        RectifiedFlowScheduler(path="edm", grid=Grid((math.inf, 1.0, 0.0), "edm")).set_timesteps()
    assert paths.named("edm").level(1.0) == math.inf


@pytest.mark.parametrize("solver", ["heun", "midpoint", "ab3", "unipc", "edm"])
def test_a_vp_model_on_straightened_coordinates(solver: str) -> None:
    """In the gauge of the flow and on its levels, a model of Stable Diffusion's path is sampled as the flow's would be."""
    model = MixtureDenoiser.of(torch.tensor([[1.0, -0.5], [-0.6, 0.8]]), 0.3)
    vp = RectifiedFlowScheduler(path="vp", solver=solver, gauge="flow", grid="straight")
    vp.set_timesteps(9)
    first = vp.path.start
    levels = [first * (1 - i / 9) for i in range(10)]
    flow = RectifiedFlowScheduler(solver=solver, gauge="flow", grid=Grid(tuple(levels)))
    flow.set_timesteps()
    results = []
    for scheduler in (vp, flow):
        path, x = scheduler.path, torch.randn(8, 2, generator=Generator().manual_seed(0), dtype=torch.float64)
        x = x / path.norm(first)
        for i, t in enumerate(scheduler.timesteps):
            row = scheduler._rows[i]
            x0, eps = model.posterior(x * path.norm(row.s), row.s)
            output = eps if path.name == "vp" else eps - x0
            x = scheduler.step(output, t, x, return_dict=False)[0]
        results.append(x)
    assert (results[0] - results[1]).abs().max() < 1e-10
    plain = RectifiedFlowScheduler(path="vp", solver=solver, grid="straight")
    plain.set_timesteps(9)
    assert plain.method.gauge != "flow"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "dpm++2m", "gauge": "flow"}, "always holds x0, got gauge='flow'"),
        ({"solver": "heun", "gauge": "x0"}, "'heun' takes eps, flow, got gauge='x0'"),
        ({"solver": "heun", "gauge": "straight"}, "gauge='straight'"),
        ({"stock": "DDIMScheduler", "path": "vp", "gauge": "flow"}, "gauge='flow' needs a solver"),
    ],
)
def test_gauges_that_a_solver_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**options)


# --------------------------------------------------------------------------------------------------------------- grids by name


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_by_name_wins_over_what_a_pipeline_passes(name: str) -> None:
    default = [1.0, 0.75, 0.5, 0.25]  # as most pipelines of flow models pass it
    fresh = RectifiedFlowScheduler(grid=name, shift=2.0)
    fresh.set_timesteps(sigmas=default)
    wanted = named(name, 4, paths.flow(), shift=2.0)
    assert fresh.sigmas.tolist() == pytest.approx(wanted.sigmas, rel=1e-6)
    assert fresh.timesteps.tolist() == pytest.approx([1000 * s for s in wanted.sigmas[:-1]], rel=1e-6)
    for stock in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, use_karras_sigmas=True),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0),
    ):
        ours = RectifiedFlowScheduler.from_config(stock, grid=name)
        ours.set_timesteps(sigmas=default)
        assert ours.sigmas.tolist() == pytest.approx(fresh.sigmas.tolist(), abs=2e-6)  # UniPC stays off 1 by 1e-6
        assert ours.timesteps.tolist() == pytest.approx(fresh.timesteps.tolist(), abs=2e-3)
    ltx = RectifiedFlowScheduler.from_config(diffusers.LTXEulerAncestralRFScheduler(), grid=name)
    ltx.set_timesteps(4)
    assert len(ltx.timesteps) == 4


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_and_stretch_of_our_own_are_those_of_flow_match(kind: str) -> None:
    knobs = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.1}
    ours, stock = RectifiedFlowScheduler(**knobs), diffusers.FlowMatchEulerDiscreteScheduler(**knobs)
    sigmas = [1.0, 0.8, 0.5, 0.3]
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=sigmas, mu=0.9)
    assert torch.allclose(ours.sigmas, stock.sigmas, atol=1e-6)
    with pytest.raises(ValueError, match=r"use_dynamic_shifting=True needs a number mu, got None; pass mu="):
        ours.set_timesteps(4)
    static = RectifiedFlowScheduler(shift=3.0)
    static.set_timesteps(4, mu=0.9)  # as some pipelines pass it to every scheduler
    assert static.sigmas[1] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "vp", "shift": 3.0}, "shift=3.0, .* move flow levels, but the path is 'vp'; leave them out"),
        ({"path": "edm", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"path": "edm", "grid": "uniform"}, "has no trailing grid, its noise is unbounded"),
        ({"path": "vp", "sigma_min": 0.1}, "the grid 'uniform' has no sigma_min and sigma_max, got 0.1"),
        ({"use_dynamic_shifting": True, "time_shift_type": "square"}, "unknown time_shift_type 'square'"),
    ],
)
def test_grids_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**options).set_timesteps(4, mu=0.5)


# ------------------------------------------------------------------------------------------------------ what pipelines bring


def test_both_lists_are_taken_where_they_agree() -> None:
    """As CogView4 passes them, times whole."""
    sigmas, timesteps = [1.0, 0.7503, 0.5, 0.2497], [1000, 750, 500, 250]
    for stock in (
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ):
        both, one = RectifiedFlowScheduler.from_config(stock), RectifiedFlowScheduler.from_config(stock)
        both.set_timesteps(sigmas=sigmas, timesteps=timesteps)
        one.set_timesteps(sigmas=sigmas)
        assert torch.equal(both.sigmas, one.sigmas)
        with pytest.raises(ValueError, match=r"timesteps \[1000. .* and sigmas \[1. .* disagree; leave one"):
            both.set_timesteps(sigmas=sigmas, timesteps=[1000, 700, 500, 250])


def test_a_seed_of_its_own_where_a_pipeline_hands_on_no_generator() -> None:
    def noise(generator: Generator | None = None, **options: Any) -> Tensor:
        scheduler = RectifiedFlowScheduler(solver="ancestral", noise="keyed", **options)
        scheduler.set_timesteps(4)
        x = torch.zeros(3, 2, 4, 4)
        result: Tensor = scheduler.step(x, scheduler.timesteps[0], x, generator=generator).prev_sample
        return result

    assert torch.equal(noise(seed=5), noise(seed=5))
    assert not torch.equal(noise(seed=5), noise(seed=6))
    assert not torch.equal(noise(), noise())
    assert torch.equal(noise(Generator().manual_seed(5)), noise(seed=5))
    assert torch.equal(noise(Generator().manual_seed(5), seed=6), noise(seed=5))
    with pytest.raises(ValueError, match="seed=3 is that of keyed noise; set noise='keyed', or"):
        RectifiedFlowScheduler(solver="ancestral", seed=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "DDIMScheduler", "num_train_timesteps": "many"},
            "num_train_timesteps='many': not a whole number from 1",
        ),
        (
            {"_class_name": "DDIMScheduler", "num_train_timesteps": 10**9},
            "num_train_timesteps=1000000000: not a whole number",
        ),
        ({"_class_name": "DDIMScheduler", "steps_offset": 0.5}, "steps_offset=0.5: not a whole number"),
        ({"_class_name": "DDIMScheduler", "beta_end": math.nan}, "beta_end=nan: not a number from 0 to 1"),
        ({"_class_name": "DDIMScheduler", "trained_betas": 0.5}, "trained_betas=0.5: not a list of numbers"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": ["linear"]}, "beta_schedule=.'linear'.: not a name"),
        ({"_class_name": "DDIMScheduler", "flowkit": [1]}, r"the hidden key 'flowkit' holds \[1\], not our settings"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": None},
            "algorithm_type=None: unknown; choose",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": True}, "shift=True: not a number"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": "x"}, "shift_terminal='x': not a number"),
        (
            {"_class_name": "UniPCMultistepScheduler", "disable_corrector": "all"},
            "disable_corrector='all': not a list of steps",
        ),
    ],
)
def test_values_of_a_wrong_kind_in_a_file_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RectifiedFlowScheduler.from_config(config)
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- what contradicts itself


def test_a_grid_of_another_path_is_refused_for_an_imitated_class_too() -> None:
    stock = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="the grid belongs to the path 'flow', this scheduler walks 'vp'"):
        RectifiedFlowScheduler.from_config(stock, grid=Grid.uniform(4))
    hidden = {"_class_name": "DDIMScheduler", "flowkit": {"grid": Grid.uniform(2).to_dict(), "solver": "euler"}}
    with pytest.raises(ValueError, match="the grid belongs to the path 'flow'"):
        RectifiedFlowScheduler.from_config(hidden)
    with pytest.warns(UserWarning, match="made for solver 'unipc'"):
        RectifiedFlowScheduler.from_config(
            diffusers.FlowMatchEulerDiscreteScheduler(), solver="heun", grid=Grid((1.0, 0.5, 0.0), solver="unipc")
        )


@pytest.mark.parametrize(
    ("config", "knobs", "message"),
    [
        (
            "DDIMScheduler",
            {"path": "flow", "solver": "euler"},
            "is of DDIMScheduler on the path 'vp', got .*leave out path",
        ),
        ("DDIMScheduler", {"stock": "FlowMatchEulerDiscreteScheduler"}, "is of DDIMScheduler on the path 'vp'"),
        ("DDIMScheduler", {"shift": 3.0}, "DDIMScheduler does not read shift=3.0; leave it out"),
        ("DDIMScheduler", {"sigma_max": 3.0}, "DDIMScheduler does not read sigma_max=3.0"),
        ("DDIMScheduler", {"use_dynamic_shifting": True}, "DDIMScheduler does not read use_dynamic_shifting=True"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"sigma_min": 0.1},
            "FlowMatchEulerDiscreteScheduler does not read sigma_min=0.1",
        ),
    ],
)
def test_knobs_without_effect_are_refused(config: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler.from_config({"_class_name": config}, **knobs)


def test_hidden_settings_of_another_path_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the hidden key 'flowkit' says path='flow', the class DDIMScheduler is one of 'vp'"
    ):
        RectifiedFlowScheduler.from_config(
            {"_class_name": "DDIMScheduler", "flowkit": {"path": "flow", "solver": "euler", "stock": "DDIMScheduler"}}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "edm", "s_tmin": 1.0}, "s_tmin=1.0 and s_tmax=None bound churn, but s_churn is 0"),
        ({"solver": "edm", "s_churn": math.inf}, "s_churn=inf: not a number"),
        ({"shift_terminal": 1.0}, r"terminal must lie in \(0, 1\), got 1"),
        ({"sigma_min": 0.1}, "the grid 'uniform' has no sigma_min and sigma_max"),
        ({"path": "edm", "sigma_min": 5.0, "sigma_max": 1.0}, "need 0 < sigma_min < sigma_max, got 5.0 and 1.0"),
        ({"grid": "karras", "sigma_max": 80.0}, r"levels of a flow grid must lie in \[0, 1\]"),
        (
            {"path": "vp", "grid": "karras", "sigma_max": 800.0},
            "karras starts at 800, the model knows 157.4; lower",
        ),
        ({"path": "ve", "grid": "leading"}, "has no leading grid, its noise is unbounded"),
        ({"path": "vp", "beta_schedule": "even"}, "unknown beta_schedule 'even'"),
        ({"path": "vp", "trained_betas": [None, 0.1]}, "trained_betas=.None, 0.1.: not a list of numbers"),
        ({"path": "vp", "trained_betas": ["x"]}, "trained_betas=.'x'.: not a list of numbers"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**options)


def test_the_cosine_path_runs_with_its_defaults() -> None:
    scheduler = RectifiedFlowScheduler(path="cosine")
    scheduler.set_timesteps(20)
    assert run(scheduler, MixtureDenoiser.of(torch.zeros(1, 2, dtype=torch.float64), 0.5)).std() == pytest.approx(
        0.5, rel=0.2
    )


def test_noise_for_the_step_that_a_run_begins_with() -> None:
    """Whole model times of a shifted flow are there several times, each with its level."""
    stock = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=17.0)
    ours = RectifiedFlowScheduler.from_config(stock)
    x0, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(100)
    assert len(set(stock.timesteps.tolist())) < 100
    for begin in range(0, 100, 3):
        for scheduler in (stock, ours):
            scheduler.set_begin_index(begin)
        t = stock.timesteps[begin : begin + 1]
        assert torch.allclose(ours.add_noise(x0, noise, t), stock.add_noise(x0, noise, t), atol=1e-6)


def test_numbers_and_lists_of_numpy_and_torch_are_taken() -> None:
    scheduler = RectifiedFlowScheduler(shift=np.float32(3))
    for steps in (np.int64(4), torch.tensor(4)):
        scheduler.set_timesteps(steps)
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    for sigmas in (np.array([1.0, 0.75, 0.5, 0.25]), torch.tensor([1.0, 0.75, 0.5, 0.25])):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    for betas in (np.linspace(1e-4, 0.02, 1000), torch.linspace(1e-4, 0.02, 1000)):
        given, by_schedule = RectifiedFlowScheduler(path="vp", trained_betas=betas), RectifiedFlowScheduler(path="vp")
        for vp in (given, by_schedule):
            vp.set_timesteps(4)
        assert torch.allclose(given.sigmas, by_schedule.sigmas, rtol=1e-4)


def test_an_exact_grid_counts_the_steps_of_a_list_with_its_terminal_too() -> None:
    scheduler = RectifiedFlowScheduler(grid=Grid((1.0, 0.6, 0.0)))
    for sigmas in ([1.0, 0.5], [1.0, 0.5, 0.0]):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.0])
    with pytest.raises(ValueError, match="3 steps asked for, but the grid has 2"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25, 0.0])


def test_a_refused_call_leaves_the_run_before_it() -> None:
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(4)
    for arguments in ({"num_inference_steps": 0}, {"num_inference_steps": 6, "device": "nosuch"}):
        with pytest.raises((ValueError, RuntimeError)):
            scheduler.set_timesteps(**arguments)
        assert len(scheduler.timesteps) == len(scheduler._rows) == scheduler.num_inference_steps == 4
    with pytest.raises(ValueError, match="model time 500 lies outside the path 'edm'"):
        RectifiedFlowScheduler(path="edm").add_noise(torch.zeros(1), torch.zeros(1), torch.tensor([500]))


def test_a_stand_in_for_everyone_takes_the_output_for_what_it_is() -> None:
    name, config = stock_config(RectifiedFlowScheduler(path="vp"))
    assert (name, config["clip_sample"], config["timestep_spacing"]) == ("DDIMScheduler", False, "trailing")
    for options in (
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"path": "edm", "prediction_type": "sample"},
        {"path": "vp", "prediction_type": "flow_prediction"},
        {"path": "ve"},
    ):
        with pytest.raises(
            ValueError, match=r"no diffusers scheduler walks the path .*save with pipe\.save_pretrained"
        ):
            stock_config(RectifiedFlowScheduler(**options))

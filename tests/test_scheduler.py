"""Our scheduler against diffusers' own classes, over whole trajectories, and its contract."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowkit import Grid, MixtureDenoiser, RectifiedFlowScheduler, predictions

from .stock64 import stock64

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
VE_SAMPLES = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
DPM, UNIPC, SINGLE = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"
V = {"prediction_type": "v_prediction"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("DDIMScheduler", {"timestep_spacing": s, "clip_sample": False} | SD) for s in ("leading", "linspace", "trailing")),
    *(("DDIMScheduler", {"prediction_type": p} | SD) for p in ("epsilon", "sample", "v_prediction")),
    ("DDIMScheduler", {"thresholding": True, "clip_sample": False, "sample_max_value": 2.0} | SD),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"} | SD),
    ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}),
    *(("EulerDiscreteScheduler", {"timestep_spacing": s} | SD) for s in ("leading", "linspace", "trailing")),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"} | SD),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"} | SD),
    ("HeunDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", {"clip_sample": True, "use_karras_sigmas": True} | SD),
    ("DPMSolverMultistepScheduler", SD),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"} | SD),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "solver_order": 1} | SD),
    ("DPMSolverMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", SD),
    ("UniPCMultistepScheduler", {"solver_order": 1, "use_karras_sigmas": True} | SD),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "disable_corrector": [0, 2]} | SD),
    ("UniPCMultistepScheduler", FLOW),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", {}),
    *((name, c | SD) for name in VE_SAMPLES[3:] for c in ({}, {"use_karras_sigmas": True} | V)),
    *(("EulerAncestralDiscreteScheduler", {"timestep_spacing": s} | SD) for s in ("leading", "linspace", "trailing")),
    *(("DDPMScheduler", {"variance_type": v} | SD) for v in (
        "fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")),
    ("DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample": False} | V),
    ("DDPMScheduler", {"steps_offset": 1, "variance_type": "fixed_large", "thresholding": True, "clip_sample": False} | SD),
    ("DDPMParallelScheduler", SD),
    *(("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": one, "steps_offset": 1} | SD) for one in (False, True)),
    *((DPM, {"solver_order": 3, "solver_type": t} | SD) for t in ("midpoint", "heun")),
    *((DPM, {"algorithm_type": a, "final_sigmas_type": "sigma_min", "solver_type": t} | SD)
      for a in ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++") for t in ("midpoint", "heun")),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1} | SD),
    (DPM, {"algorithm_type": "sde-dpmsolver++"} | FLOW),
    (DPM, {"solver_order": 3} | FLOW),
    *((SINGLE, {"solver_order": o, "solver_type": t} | SD) for o in (1, 2, 3) for t in ("midpoint", "heun")),
    (SINGLE, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3} | SD),
    (SINGLE, FLOW),
    *((UNIPC, {"solver_order": o, "predict_x0": x, "solver_type": t, "final_sigmas_type": "sigma_min"} | SD)
      for o, x, t in ((3, True, "bh1"), (3, True, "bh2"), (3, False, "bh2"), (2, False, "bh1"), (1, False, "bh2"))),
    (UNIPC, {"solver_order": 3} | FLOW),
    *(("DEISMultistepScheduler", {"solver_order": o} | SD) for o in (1, 2, 3)),
    ("DEISMultistepScheduler", FLOW),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}),
]  # fmt: skip


def named(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def trajectories(stock: Any, steps: int, dtype: torch.dtype) -> float:
    """Largest difference between stock and ours over a run on an exact mixture, in the path's own coordinates."""
    ours = RectifiedFlowScheduler.from_config(named(stock))  # before the singlestep class edits its configuration
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    # A time between the model's own is read from its level, which is float32 in the classes themselves.
    assert torch.allclose(
        ours.timesteps, stock.timesteps.float(), rtol=1e-5, atol=1e-4 if dtype == torch.float64 else 2e-3
    )
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 4, 2, 2, generator=generator, dtype=torch.float64)
    model, path, plan = MixtureDenoiser.of(means, 0.5), ours.path, ours._plan
    assert plan is not None
    noise = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64).to(dtype)
    x_stock, x_ours = noise * getattr(stock, "init_noise_sigma", 1.0), noise * ours.init_noise_sigma
    ve, learned = type(stock).__name__ in VE_SAMPLES, (stock.config.get("variance_type") or "").startswith("learned")
    seeded = "generator" in inspect.signature(stock.step).parameters
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    worst = 0.0
    for i, row in enumerate(ours._rows):
        alpha, sigma = path.alpha(row.s), path.sigma(row.s)
        a, b = predictions.pair(plan.prediction, alpha, sigma, path.sigma_data)

        def network(x: Tensor, row: Any = row, a: float = a, b: float = b) -> Tensor:
            x0, eps = model.posterior(x.double() * path.norm(row.s), row.s)
            raw: Tensor = (a * x0 + b * eps).to(x.dtype)
            return torch.cat([raw, raw.tanh().square()], 1) if learned else raw

        t = stock.timesteps[i]
        if hasattr(stock, "scale_model_input"):
            stock.scale_model_input(x_stock, t)
        before, after = (alpha, path.alpha(row.t)) if ve and i + 1 < len(ours._rows) else (alpha if ve else 1.0, 1.0)
        theirs = {"generator": generators[0]} if seeded else {}
        x_stock = stock.step(network(x_stock * before), t, x_stock, return_dict=False, **theirs)[0]
        t = ours.timesteps[i]
        x_ours = ours.step(network(x_ours), t, x_ours, generator=generators[1], return_dict=False)[0]
        scale = max(1.0, x_ours.abs().max().item())
        worst = max(worst, (x_stock * after - x_ours).abs().max().item() / scale)
    return worst


@pytest.mark.parametrize("steps", [3, 10, 20])
@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{n[:-9]}-{i}" for i, (n, _) in enumerate(CASES)])
def test_parity_in_float64(name: str, config: dict[str, Any], steps: int) -> None:
    assert trajectories(stock64(name)(**config), steps, torch.float64) < 1e-12


@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{n[:-9]}-{i}" for i, (n, _) in enumerate(CASES)])
def test_parity_in_float32(name: str, config: dict[str, Any]) -> None:
    # A quantile passes on the rounding of one element to all; DEIS takes differences of antiderivatives in float32.
    loose = config.get("thresholding") or name == "DEISMultistepScheduler"
    assert trajectories(getattr(diffusers, name)(**config), 10, torch.float32) < (5e-5 if loose else 1e-5)


def test_parity_is_lost_with_another_solver() -> None:
    stock = stock64("DPMSolverMultistepScheduler")(**SD)
    config = named(stock) | {"solver_type": "heun"}
    ours, true = RectifiedFlowScheduler.from_config(config), RectifiedFlowScheduler.from_config(named(stock))
    for scheduler in (ours, true):
        scheduler.set_timesteps(10)
    assert (
        max(abs(a - b) for r, s in zip(ours._rows, true._rows, strict=True) for a, b in zip(r.b, s.b, strict=True))
        > 1e-3
    )


def test_ddim_eta_draws_the_same_noise_as_stock() -> None:
    stock = stock64("DDIMScheduler")(**SD)
    ours = RectifiedFlowScheduler.from_config(named(stock))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(6)
    x_stock = x_ours = x
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for i, t in enumerate(stock.timesteps):
        x_stock = stock.step(torch.sin(x_stock), t, x_stock, eta=0.7, generator=generators[0]).prev_sample
        x_ours = ours.step(torch.sin(x_ours), ours.timesteps[i], x_ours, eta=0.7, generator=generators[1]).prev_sample
    assert (x_stock - x_ours).abs().max() < 1e-12


def test_fresh_defaults() -> None:
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert scheduler.sigmas.device.type == "cpu"
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert (scheduler.method.name, scheduler.method.gauge) == ("unipc", "flow")
    heun = RectifiedFlowScheduler(solver="heun")
    heun.set_timesteps(3)
    assert heun.order == 2
    assert heun.timesteps.tolist() == pytest.approx([1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3])
    many = RectifiedFlowScheduler()
    many.set_timesteps(3000)  # a continuous clock has no limit
    assert len(many.timesteps) == 3000


def test_signatures_that_pipelines_inspect() -> None:
    names = list(inspect.signature(RectifiedFlowScheduler.set_timesteps).parameters)
    assert names == ["self", "num_inference_steps", "device", "timesteps", "sigmas", "mu"]
    step = inspect.signature(RectifiedFlowScheduler.step).parameters
    assert list(step)[:4] == ["self", "model_output", "timestep", "sample"]
    assert {"eta", "generator", "per_token_timesteps", "return_dict"} <= set(step)
    assert RectifiedFlowScheduler.__module__ == "flowkit"


def run(scheduler: Any, x: Tensor, first: int = 0) -> Tensor:
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(torch.sin(3 * x), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++2m", "unipc"])
def test_beginning_in_the_middle_bootstraps_anew(solver: str) -> None:
    whole, part = (RectifiedFlowScheduler(solver=solver) for _ in range(2))
    whole.set_timesteps(8)
    first = 3 * whole.order
    x = torch.randn(2, 3, dtype=torch.float64)
    part.set_grid(Grid(tuple(1 - i / 8 for i in range(3, 9))))
    part.set_timesteps()
    expected = run(part, x)
    whole.set_begin_index(first)
    assert (run(whole, x, first) - expected).abs().max() < 1e-6  # levels went through float32
    whole.set_timesteps(8)  # without begin index the timestep tells
    assert (run(whole, x, first) - expected).abs().max() < 1e-6
    whole.set_timesteps(8)
    assert torch.equal(run(whole, x), run(whole.fork(), x))


def test_begin_index_inside_a_step_is_refused() -> None:
    scheduler = RectifiedFlowScheduler(solver="heun")
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="begin at a multiple of 2"):
        run(scheduler, torch.zeros(1, 1), 3)
    scheduler.set_begin_index(9)
    with pytest.raises(ValueError, match="9 lies outside the 7 timesteps"):
        run(scheduler, torch.zeros(1, 1))


def test_set_grid_wins_over_what_pipelines_pass() -> None:
    scheduler = RectifiedFlowScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    grid = Grid((1.0, 0.8, 0.3, 0.0))
    scheduler.set_grid(grid)
    for arguments in ({"num_inference_steps": 3}, {}, {"sigmas": [1.0, 0.5, 0.1]}, {"timesteps": [900, 500, 20]}):
        scheduler.set_timesteps(**arguments)
        assert scheduler.sigmas.tolist() == pytest.approx(grid.sigmas)
        assert scheduler.timesteps.tolist() == pytest.approx([1000, 800, 300])
    with pytest.raises(ValueError, match="4 steps asked for, but the grid has 3"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="2 steps asked for"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
    scheduler.set_grid(None)
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == 4
    with pytest.raises(ValueError, match="belongs to the path 'vp'"):
        scheduler.set_grid(Grid((1.0, 0.0), "vp"))
    with pytest.warns(UserWarning, match="made for solver 'heun'"):
        scheduler.set_grid(Grid((1.0, 0.0), solver="heun"))


def test_configurations_go_round() -> None:
    stock = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    ours = RectifiedFlowScheduler.from_config(named(stock), solver="heun", noise="keyed")
    ours.set_grid(Grid((5.0, 1.0, 0.0), "vp"))
    for other in (
        RectifiedFlowScheduler.from_config(ours.config),
        RectifiedFlowScheduler.from_config(ours),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
    ):
        assert (other.method.name, other.config["noise"], other.grid) == ("heun", "keyed", ours.grid)
        assert other.config["use_karras_sigmas"] is True
        other.set_timesteps()
        assert other.sigmas.tolist() == [5, 1, 1, 0]
    back = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    assert (back.config.beta_start, back.config.use_karras_sigmas) == (0.00085, True)
    again = RectifiedFlowScheduler.from_config(named(back))
    assert again.method.name == "heun"


def test_configuration_in_memory_names_its_class_by_its_keys() -> None:
    for stock in (
        diffusers.DDIMScheduler(**SD),
        diffusers.EulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.EDMEulerScheduler(),
    ):
        assert "_class_name" not in stock.config
        ours = RectifiedFlowScheduler.from_config(stock.config)
        assert ours.config["stock"] == type(stock).__name__
    lms = diffusers.LMSDiscreteScheduler()
    with pytest.raises(
        ValueError, match=r"LMSDiscreteScheduler or KDPM2Discrete.*; pass the scheduler itself, or solver="
    ):
        RectifiedFlowScheduler.from_config(lms.config)
    assert RectifiedFlowScheduler.from_config(lms).method.name == "lms"
    assert RectifiedFlowScheduler.from_config(lms.config, solver="heun").config["path"] == "vp"
    for stock in (diffusers.TCDScheduler(), diffusers.LCMScheduler(), diffusers.CogVideoXDPMScheduler()):
        with pytest.raises(ValueError, match="pass solver="):
            RectifiedFlowScheduler.from_config(stock.config)
        assert RectifiedFlowScheduler.from_config(stock.config, solver="euler").config["path"] == "vp"


def test_edits_of_the_configuration_after_construction_count() -> None:
    ours = RectifiedFlowScheduler.from_config(diffusers.DDIMScheduler(**SD))
    ours._internal_dict = diffusers.configuration_utils.FrozenDict(
        {**ours.config, "steps_offset": 1, "clip_sample": False}
    )
    ours.set_timesteps(10)
    stock = diffusers.DDIMScheduler(**SD, steps_offset=1, clip_sample=False)
    stock.set_timesteps(10)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert ours._plan is not None
    assert ours._plan.limit is None


def test_only_keys_that_the_class_reads_limit_x0() -> None:
    for name, options, limited in (
        ("DDIMScheduler", {}, True),
        ("DDIMScheduler", {"clip_sample": False}, False),
        ("CogVideoXDDIMScheduler", {"clip_sample": True}, False),
        ("TCDScheduler", {"clip_sample": True, "thresholding": True}, False),
        ("EulerDiscreteScheduler", {"clip_sample": True}, False),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, True),
    ):
        ours = RectifiedFlowScheduler.from_config({"_class_name": name, **options}, solver="euler")
        ours.set_timesteps(3)
        assert ours._plan is not None
        assert bool(ours._plan.limit) is limited, name


def test_noising_is_the_path() -> None:
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    stock = diffusers.DDIMScheduler(**SD)
    ours = RectifiedFlowScheduler.from_config(named(stock))
    times = torch.tensor([17, 803])
    assert torch.allclose(ours.add_noise(x0, noise, times), stock.add_noise(x0, noise, times), atol=1e-6)
    flow, stock_flow = RectifiedFlowScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(5)
    stock_flow.set_timesteps(5, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    t = stock_flow.timesteps[2:3]
    assert torch.allclose(flow.scale_noise(x0, t, noise), stock_flow.scale_noise(x0, t, noise), atol=1e-6)


def test_per_token_times_move_each_token_to_its_own_next_level() -> None:
    ours, stock = RectifiedFlowScheduler(solver="euler"), diffusers.FlowMatchEulerDiscreteScheduler()
    ours.set_timesteps(4)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x, raw = torch.randn(2, 2, 3, 5)
    times = torch.tensor([[1000.0, 750.0, 250.0], [600.0, 500.0, 0.0]])
    results = [s.step(raw, s.timesteps[0], x, per_token_timesteps=times, return_dict=False)[0] for s in (ours, stock)]
    assert torch.allclose(results[0], results[1], atol=1e-6)
    fresh = RectifiedFlowScheduler()
    fresh.set_timesteps(4)
    with pytest.raises(ValueError, match="per_token_timesteps need a first-order solver"):
        fresh.step(raw, fresh.timesteps[0], x, per_token_timesteps=times)


def test_learned_variance_is_dropped_and_other_shapes_refused() -> None:
    ours = RectifiedFlowScheduler()
    ours.set_timesteps(2)
    x, raw = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    wide = ours.fork().step(raw, ours.timesteps[0], x).prev_sample
    assert torch.equal(wide, ours.fork().step(raw[:, :3], ours.timesteps[0], x).prev_sample)
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\) does not fit a sample of shape \(2, 3, 4, 4\)"):
        ours.step(raw[:, :5], ours.timesteps[0], x)


def test_keyed_noise_of_a_step_does_not_depend_on_the_batch() -> None:
    ours = RectifiedFlowScheduler.from_config(named(diffusers.DDIMScheduler(**SD)), noise="keyed")
    ours.set_timesteps(5)
    x = torch.randn(4, 3, 2, 2)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    whole, halves = ours.fork(), [ours.fork(), ours.fork()]
    t = ours.timesteps[0]
    together = whole.step(x, t, x, eta=1.0, generator=generators).prev_sample
    parts = [
        h.step(p, t, p, eta=1.0, generator=g).prev_sample
        for h, p, g in zip(halves, x.split(2), (generators[:2], generators[2:]), strict=True)
    ]
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_models_dtype(dtype: torch.dtype) -> None:
    ours = RectifiedFlowScheduler()
    ours.set_timesteps(3)
    x = torch.randn(2, 3, dtype=dtype)
    assert run(ours, x).dtype == dtype


def test_debug_names_the_step() -> None:
    ours = RectifiedFlowScheduler(debug=True)
    ours.set_timesteps(4)
    x = torch.randn(2, 3)
    x = ours.step(x, ours.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match=r"step 1 of 4, sigma 0.75 to 0.5, gave NaN or inf \(the model output"):
        ours.step(x * torch.nan, ours.timesteps[1], x)
    silent = RectifiedFlowScheduler()
    silent.set_timesteps(4)
    assert silent.step(x * torch.nan, silent.timesteps[0], x).prev_sample.isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": -3}, "at least 1, got -3"),
        ({}, "how many steps"),
        ({"sigmas": [0.5, 0.8]}, "strictly fall"),
        ({"sigmas": [0.5, 0.5]}, "strictly fall"),
        ({"sigmas": [1.2, 0.5]}, r"lie in \[0, 1\]"),
        ({"sigmas": []}, "at least a start"),
        ({"timesteps": [100, 500]}, "strictly fall"),
        ({"timesteps": [2000, 500]}, "2000 lies outside"),
        ({"sigmas": [1.0, 0.5], "timesteps": [1000, 400]}, "disagree"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "3 steps asked for, but 2"),
    ],
)
def test_bad_grids_are_refused(arguments: dict[str, Any], message: str) -> None:
    scheduler = RectifiedFlowScheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)


def test_explicit_lists_on_a_fresh_scheduler() -> None:
    scheduler = RectifiedFlowScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])  # before the shift
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0])
    scheduler.set_timesteps(timesteps=[1000, 400])  # as they are
    assert scheduler.timesteps.tolist() == [1000, 400]
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])  # the terminal is not added twice
    assert len(scheduler.timesteps) == 2
    scheduler.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000, 750])
    assert scheduler.timesteps.tolist() == [1000, 750]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "eular"}, "unknown solver 'eular'"),
        ({"prediction_type": "noise"}, "unknown prediction type 'noise'"),
        ({"path": "straight"}, "unknown path 'straight'"),
        ({"noise": "random"}, "unknown noise 'random'"),
        ({"grid": "cubic"}, "unknown grid 'cubic'"),
        ({"grid": {"sigmas": [1, 0]}}, "not a flowkit grid"),
        ({"grid": Grid((1.0, 0.0), "vp")}, "belongs to the path 'vp'"),
        ({"shift": 0.0}, "shift must be a positive number, got 0"),
    ],
)
def test_bad_constructions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "_class_name"),
        ({"_class_name": "NoSuchScheduler"}, "unknown scheduler class 'NoSuchScheduler'"),
        ({"_class_name": "UNet2DModel"}, "is not a scheduler"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "noise"}, "'noise'"),
        ({"_class_name": "SASolverScheduler"}, "the solver of SASolverScheduler .* pass solver="),
        ({"beta_start": 0.1, "beta_end": 0.2}, "_class_name"),
    ],
)
def test_bad_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler.from_config(config)


def test_unknown_knobs_are_refused_and_stock_ones_taken() -> None:
    stock = diffusers.EulerDiscreteScheduler(**SD)
    with pytest.raises(ValueError, match="unknown knob 'use_karas_sigmas' = True"):
        RectifiedFlowScheduler.from_config(named(stock), use_karas_sigmas=True)
    ours = RectifiedFlowScheduler.from_config(named(stock), use_karras_sigmas=True, timestep_spacing="trailing")
    other = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True, timestep_spacing="trailing")
    ours.set_timesteps(7)
    other.set_timesteps(7)
    assert torch.allclose(ours.sigmas, other.sigmas, rtol=1e-5)


def test_steps_before_and_after_the_run_are_refused() -> None:
    ours = RectifiedFlowScheduler()
    x = torch.randn(1, 2)
    with pytest.raises(ValueError, match="before set_timesteps"):
        ours.step(x, 1000.0, x)
    ours.set_timesteps(2)
    run(ours, x)
    with pytest.raises(ValueError, match="all 2 steps are done"):
        ours.step(x, ours.timesteps[0], x)
    ours.set_timesteps(2)
    with pytest.raises(ValueError, match="333 is not one of"):
        ours.step(x, 333.0, x)

"""Stock schedulers put on exact grids: the lists land there, and what cannot be put there says why."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest

from flowkit import paths
from flowkit.grids import Grid, named
from flowkit.schedulers import RectifiedFlowScheduler

from .tiny import build, run

VP = paths.vp(paths.betas())
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True}
SVD = {**SD, "timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}


def _flow(rng: np.random.Generator) -> Grid:
    return Grid((*np.sort(rng.uniform(0.002, 1, rng.integers(1, 12)))[::-1].tolist(), 0.0))


def _full(rng: np.random.Generator) -> Grid:
    return Grid((1.0, *_flow(rng).sigmas))


def _terminal(rng: np.random.Generator) -> Grid:
    return _full(rng).stretched(0.1)


def _vp(rng: np.random.Generator) -> Grid:
    return Grid(
        (*np.exp(np.sort(rng.uniform(np.log(0.03), np.log(14.6), rng.integers(1, 12))))[::-1].tolist(), 0.0), "vp"
    )


def _times(rng: np.random.Generator) -> Grid:
    times = np.sort(rng.choice(1000, rng.integers(1, 12), replace=False))[::-1]
    return Grid((*(VP.rhos[t] for t in times), 0.0), "vp")


def _edm(rng: np.random.Generator) -> Grid:
    return Grid((*np.sort(np.exp(rng.uniform(-5, 4, rng.integers(1, 12))))[::-1].tolist(), 0.0), "edm")


CASES: list[tuple[str, dict[str, Any], float | None, Callable[[np.random.Generator], Grid]]] = [
    ("FlowMatchEulerDiscreteScheduler", {}, None, _full),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None, _full),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 0.3}, None, _flow),
    ("FlowMatchEulerDiscreteScheduler", DYNAMIC, 1.15, _full),
    ("FlowMatchEulerDiscreteScheduler", DYNAMIC, -0.5, _flow),
    ("FlowMatchEulerDiscreteScheduler", {**DYNAMIC, "time_shift_type": "linear"}, 1.7, _flow),
    ("FlowMatchEulerDiscreteScheduler", {**DYNAMIC, "shift_terminal": 0.1}, 2.05, _terminal),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0, "shift_terminal": 0.1}, None, _terminal),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, None, _full),
    ("FlowMapEulerDiscreteScheduler", {"shift": 5.0}, None, _full),
    ("LTXEulerAncestralRFScheduler", {}, None, _full),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}, None, _full),
    ("UniPCMultistepScheduler", {**FLOW, **DYNAMIC}, 0.9, _flow),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0, "shift_terminal": 0.1}, None, _terminal),
    ("EulerDiscreteScheduler", SD, None, _vp),
    ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}, None, _vp),
    ("EulerDiscreteScheduler", SVD, None, _edm),
    ("HeunDiscreteScheduler", SD, None, _vp),
    ("DPMSolverMultistepScheduler", SD, None, _times),
    ("DPMSolverSinglestepScheduler", {**SD, "lower_order_final": True}, None, _times),
    ("DDPMScheduler", SD, None, _times),
    ("DDPMParallelScheduler", SD, None, _times),
    ("LCMScheduler", SD, None, _times),
    ("TCDScheduler", SD, None, _times),
    ("EDMEulerScheduler", {}, None, _edm),
]


def _taken(scheduler: Any) -> list[float]:
    """The levels that the scheduler's steps run between, read independently of what is tested."""
    if not hasattr(scheduler, "sigmas"):
        bar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
        return [*((1 - bar) / bar).sqrt().tolist(), 0.0]
    levels = scheduler.sigmas.tolist()
    return sorted(set(levels), reverse=True) if scheduler.order == 2 else levels


@pytest.mark.parametrize(("name", "config", "mu", "draw"), CASES)
def test_the_list_lands_on_the_grid(
    name: str, config: dict[str, Any], mu: float | None, draw: Callable[[np.random.Generator], Grid]
) -> None:
    stock = getattr(diffusers, name)(**config)
    extra = {} if mu is None else {"mu": mu}
    for seed in range(8):
        grid = draw(np.random.default_rng(seed))
        before = copy.deepcopy(vars(stock))
        given = grid.for_stock(stock, mu)
        assert str(vars(stock)) == str(before)  # only a copy was tried
        stock.set_timesteps(**given, **extra)
        # float32 keeps alpha^2 of the first betas, and so sigma/alpha, to four digits
        assert _taken(stock) == pytest.approx(grid.sigmas, rel=2e-4 if draw is _times else 5e-6)


@pytest.mark.parametrize(("name", "config", "mu", "draw"), [c for c in CASES if "shift" in str(c[1])])
def test_without_the_inversion_it_does_not(
    name: str, config: dict[str, Any], mu: float | None, draw: Callable[[np.random.Generator], Grid]
) -> None:
    stock, grid = getattr(diffusers, name)(**config), draw(np.random.default_rng(1))
    sigmas = np.array(grid.sigmas[:-1])
    stock.set_timesteps(sigmas=sigmas, **({} if mu is None else {"mu": mu}))
    assert np.abs(stock.sigmas.numpy() - grid.sigmas).max() > 0.01


def test_the_shift_is_the_instances_own() -> None:
    stock, grid = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), Grid.uniform(4)
    stock.set_shift(6.0)
    stock.set_timesteps(**grid.for_stock(stock))
    assert stock.sigmas.tolist() == pytest.approx(grid.sigmas)


def test_keys_of_another_class_mean_nothing() -> None:
    match = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    multi = diffusers.UniPCMultistepScheduler.from_config(match.config, use_karras_sigmas=False, **FLOW)
    assert multi.config["shift"] == 3.0  # which it does not read
    euler = diffusers.EulerDiscreteScheduler(**SD, timestep_type="continuous", prediction_type="v_prediction")
    other = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        diffusers.UniPCMultistepScheduler(**SD, use_flow_sigmas=False).config
    )
    assert other.config["use_flow_sigmas"] is False
    for stock in (multi, other):
        stock.set_timesteps(**Grid.uniform(4).for_stock(stock))
        assert stock.sigmas.tolist() == pytest.approx(Grid.uniform(4).sigmas, rel=5e-6)
    heun = diffusers.HeunDiscreteScheduler.from_config(euler.config)
    assert "timesteps" in Grid.ays("sd15").for_stock(heun)


def test_whole_flow_times_survive_the_truncation_of_unipc() -> None:
    stock = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    for seed in range(20):
        grid = _flow(np.random.default_rng(seed)).at_whole_times(paths.flow())
        stock.set_timesteps(**grid.for_stock(stock))
        assert stock.timesteps.tolist() == list(grid.timesteps or ())


def test_zero_terminal_snr_starts_at_the_noisiest_time() -> None:
    stock = diffusers.DPMSolverMultistepScheduler(**SD, rescale_betas_zero_snr=True)
    rhos = ((1 - stock.alphas_cumprod.double()) / stock.alphas_cumprod.double()).sqrt().tolist()
    grid = Grid((float("inf"), rhos[499], 0.0), "vp")
    assert grid.for_stock(stock) == {"timesteps": [999, 499]}


@pytest.mark.parametrize(
    ("name", "config", "mu", "grid", "message"),
    [
        *(
            (n, {}, None, named("karras", 4, VP), f"{n}.* takes neither sigmas nor timesteps .*; use EulerDiscreteScheduler, or")
            for n in ("DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "DEISMultistepScheduler",
                      "SASolverScheduler", "KDPM2DiscreteScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler")
        ),
        *(
            (n, FLOW, None, Grid.uniform(4), f"{n} with use_flow_sigmas=True takes neither .*; use FlowMatchEuler")
            for n in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler")
        ),
        ("FlowMatchHeunDiscreteScheduler", {}, None, Grid.uniform(4), "takes neither .*; use FlowMatchEulerDiscreteScheduler, or"),
        ("EDMDPMSolverMultistepScheduler", {}, None, Grid.karras(4), "takes neither .*; use EDMEulerScheduler, or"),
        ("IPNDMScheduler", {}, None, Grid.uniform(4), "takes neither .*; use flowkit.RectifiedFlowScheduler.from_config"),
        ("SCMScheduler", {}, None, Grid.uniform(4), "takes neither"),
        ("HeliosScheduler", {}, None, Grid.uniform(4), r"refuses the list of this grid \(.*num_inference_steps.*; use FlowMatch"),
        ("MiniMaxH3Scheduler", {}, None, Grid.uniform(4), "refuses the list"),
        ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}, None, Grid.uniform(4),
         "with use_beta_sigmas=True respaces whatever list it is given; set it to False"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, None, Grid.uniform(4), "runs from 0 to 1.*; set it to False"),
        ("FlowMatchEulerDiscreteScheduler", DYNAMIC, None, Grid.uniform(4), "needs a number mu, got None; pass"),
        ("FlowMatchEulerDiscreteScheduler", {**DYNAMIC, "time_shift_type": "linear"}, -1.0, Grid.uniform(4), "by -1; give a pos"),
        ("FlowMatchEulerDiscreteScheduler", DYNAMIC, -25.0, Grid.uniform(4), "takes level .* for 0.75 of step 1, whatever"),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, None, Grid.uniform(4),
         r"makes that its last level before the end, the grid has 0.25; use grid.stretched\(0.1\), or"),
        ("FlowMatchEulerDiscreteScheduler", {}, None, Grid((1.0, 0.5)), "ends its runs at level 0, the grid at 0.5; end the grid"),
        ("FlowMatchEulerDiscreteScheduler", {}, None, named("karras", 4, VP),
         r"belongs to the path 'vp', .*; use grid.on\('flow'\)"),
        ("FlowMatchEulerDiscreteScheduler", {}, None, Grid((1.0, 0.5, 0.0), timesteps=(999.0, 499.0)),
         r"calls the model at times \[1000.0, 500.0\], the grid at \[999.0, 499.0\]; drop them with dataclasses.replace"),
        ("UniPCMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}, None, Grid.uniform(4),
         "ends its runs at level 0.25, the grid at 0; set final_sigmas_type to 'zero'"),
        ("EulerDiscreteScheduler", SD, None, Grid((float("inf"), 1.0, 0.0), "vp"), "cannot start at an infinite level; start"),
        ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}, None, named("leading", 4, VP), "use_karras_sigmas=True"),
        *(
            (n, SD, None, Grid((VP.rhos[999], VP.rhos[550] * 1.002, 0.0), "vp"),
             r"takes whole model times only, level 1.92\d+ of step 1 lies at 550.\d\d; use grid.at_whole_times")
            for n in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DDPMScheduler", "LCMScheduler",
                      "TCDScheduler")
        ),
        ("DDPMScheduler", SD, None, Grid((2000.0, VP.rhos[9], 0.0), "vp"), "takes level 14.6146 for 2000 of step 0, whatever"),
        ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, None, Grid.karras(4), "reads no list; set it to 'karras'"),
        ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, None, Grid.karras(4), "set final_sigmas_type to 'zero'"),
    ],
)  # fmt: skip
def test_refusals_name_the_class_and_the_cure(
    name: str, config: dict[str, Any], mu: float | None, grid: Grid, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        grid.for_stock(getattr(diffusers, name)(**config), mu)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ours_takes_the_grid_itself() -> None:
    with pytest.raises(ValueError, match=r"takes the grid itself; call scheduler.set_grid\(grid\)"):
        Grid.uniform(4).for_stock(RectifiedFlowScheduler())
    with pytest.raises(TypeError, match="expected a scheduler of diffusers, got 3"):
        Grid.uniform(4).for_stock(3)


@pytest.mark.parametrize(
    ("family", "name", "config", "grid"),
    [
        ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, Grid((1.0, 0.93, 0.6, 0.2, 0.0))),
        (
            "sd3",
            "FlowMatchEulerDiscreteScheduler",
            {"shift_terminal": 0.1, "shift": 3.0},
            Grid.uniform(5).stretched(0.1),
        ),
        ("flux", "FlowMatchEulerDiscreteScheduler", DYNAMIC, Grid((1.0, 0.93, 0.6, 0.2, 0.0))),
        ("sd3", "UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}, Grid((0.95, 0.6, 0.25, 0.0))),
        ("sd15", "EulerDiscreteScheduler", SD, Grid.ays("sd15", 5)),
        ("sd15", "HeunDiscreteScheduler", SD, Grid.ays("sd15", 3)),
        ("sd15", "DPMSolverMultistepScheduler", SD, Grid.ays("sd15", 6).at_whole_times(VP)),
    ],
)
def test_a_grid_gives_the_same_images_in_stock_and_in_ours(
    family: str, name: str, config: dict[str, Any], grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = getattr(diffusers, name)(**config)
    pipe = build(family, stock)
    default = run(pipe, len(grid))
    mu = None
    if stock.config.get("use_dynamic_shifting"):  # the pipeline's own, for its image size
        with monkeypatch.context() as patch:
            seen = Mock(wraps=stock.set_timesteps)
            patch.setattr(stock, "set_timesteps", functools.wraps(stock.set_timesteps)(lambda **given: seen(**given)))
            run(pipe, len(grid))
        mu = seen.call_args.kwargs["mu"]
    theirs = run(pipe, len(grid), **grid.for_stock(stock, mu))
    pipe.scheduler = RectifiedFlowScheduler.from_config(stock)
    if name == "UniPCMultistepScheduler":  # it truncates the times that it hands to the model
        grid = replace(grid, timesteps=tuple(float(int(1000 * v)) for v in grid.sigmas[:-1]))
    pipe.scheduler.set_grid(grid)
    ours = run(pipe, len(grid))
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 2e-4 * scale
    assert (default - theirs).abs().max() > 1e-3 * scale

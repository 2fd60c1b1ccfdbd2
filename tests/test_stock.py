"""What diffusers' configurations mean: every class decided, every grid, start and order list equal to the stock class's."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flowkit import paths
from flowkit.schedulers import stock
from flowkit.schedulers.stock_classes import _STAND_INS, defaults

from .stock64 import source, stock64

Array = NDArray[np.float64]
Options = dict[str, Any]
diffusers.logging.set_verbosity_error()

# What we say to the default configuration of every scheduler class: path and prediction type, or a word of the refusal.
DECISIONS: dict[str, tuple[str, str] | str] = {
    "AmusedScheduler": "tokens",
    "BlockRefinementScheduler": "tokens",
    "CMStochasticIterativeScheduler": "consistency",
    "CogVideoXDDIMScheduler": ("vp", "epsilon"),
    "CogVideoXDPMScheduler": ("vp", "epsilon"),
    "ConsistencyDecoderScheduler": "decoder",
    "CosineDPMSolverMultistepScheduler": ("cosine", "v_prediction"),
    "DDIMInverseScheduler": "data to noise",
    "DDIMParallelScheduler": ("vp", "epsilon"),
    "DDIMScheduler": ("vp", "epsilon"),
    "DDPMParallelScheduler": ("vp", "epsilon"),
    "DDPMScheduler": ("vp", "epsilon"),
    "DDPMWuerstchenScheduler": "clock",
    "DEISMultistepScheduler": ("vp", "epsilon"),
    "DPMSolverMultistepInverseScheduler": "data to noise",
    "DPMSolverMultistepScheduler": ("vp", "epsilon"),
    "DPMSolverSDEScheduler": ("vp", "epsilon"),
    "DPMSolverSinglestepScheduler": ("vp", "epsilon"),
    "DiscreteDDIMScheduler": "tokens",
    "EDMDPMSolverMultistepScheduler": ("edm", "epsilon"),
    "EDMEulerScheduler": ("edm", "epsilon"),
    "EntropyBoundScheduler": "tokens",
    "EulerAncestralDiscreteScheduler": ("vp", "epsilon"),
    "EulerDiscreteScheduler": ("vp", "epsilon"),
    "FlowMapEulerDiscreteScheduler": "mean velocities",
    "FlowMatchEulerDiscreteScheduler": ("flow", "flow_prediction"),
    "FlowMatchHeunDiscreteScheduler": ("flow", "flow_prediction"),
    "FlowMatchLCMScheduler": ("flow", "flow_prediction"),
    "HeliosDMDScheduler": "pipeline",
    "HeliosScheduler": "stages=3",
    "HeunDiscreteScheduler": ("vp", "epsilon"),
    "IPNDMScheduler": ("cosine", "v_prediction"),
    "KDPM2AncestralDiscreteScheduler": ("vp", "epsilon"),
    "KDPM2DiscreteScheduler": ("vp", "epsilon"),
    "KarrasVeScheduler": "other methods",
    "LCMScheduler": ("vp", "epsilon"),
    "LMSDiscreteScheduler": ("vp", "epsilon"),
    "LTXEulerAncestralRFScheduler": ("flow", "flow_prediction"),
    "MiniMaxH3Scheduler": "velocity",
    "PNDMScheduler": ("vp", "epsilon"),
    "PiflowScheduler": "policy",
    "RFD4ProteinaScheduler": "score",
    "RePaintScheduler": "mask",
    "SASolverScheduler": ("vp", "epsilon"),
    "SCMScheduler": "sigma_data",
    "ScoreSdeVeScheduler": "other methods",
    "ScoreSdeVpScheduler": "other methods",
    "TCDScheduler": ("vp", "epsilon"),
    "UnCLIPScheduler": ("vp", "epsilon"),
    "UniPCMultistepScheduler": ("vp", "epsilon"),
    "VQDiffusionScheduler": "tokens",
}

# A scheduler_config.json as it is found, keys of other classes included: path, prediction type and where they come from.
# fmt: off
FILES: dict[str, tuple[Options, tuple[str, str]]] = {
    "stable diffusion 1.5": (
        {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
         "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
        ("vp", "epsilon"),
    ),
    "stable diffusion xl": (
        {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
         "clip_sample": False, "sample_max_value": 1.0, "steps_offset": 1, "timestep_spacing": "leading"},
        ("vp", "epsilon"),
    ),
    "stable video diffusion": (
        {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
         "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002, "steps_offset": 1,
         "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True},
        ("edm", "v_prediction"),
    ),
    "stable diffusion 3": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, ("flow", "flow_prediction")),
    "flux": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
         "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True},
        ("flow", "flow_prediction"),
    ),
    "wan": (
        {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "prediction_type": "flow_prediction",
         "use_flow_sigmas": True},
        ("flow", "flow_prediction"),
    ),
    "sana": (
        {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0, "prediction_type": "flow_prediction",
         "use_flow_sigmas": True},
        ("flow", "flow_prediction"),
    ),
    "cogvideox": (
        {"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "snr_shift_scale": 1.0, "timestep_spacing": "trailing"},
        ("vp", "v_prediction"),
    ),
    "ddpm on cifar-10": ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, ("vp", "epsilon")),
    "edm": ({"_class_name": "EDMEulerScheduler"}, ("edm", "epsilon")),
}
# fmt: on


def translated(name: str, **options: Any) -> dict[str, Any]:
    return stock.translate({"_class_name": name, **options})


def product(**choices: Iterable[Any]) -> Iterator[Options]:
    """Every combination; a value that is itself a dict stands for several keys."""
    for values in itertools.product(*choices.values()):
        options: Options = {}
        for key, value in zip(choices, values, strict=True):
            options |= value if isinstance(value, dict) else {key: value}
        yield options


# ------------------------------------------------------------------------------------------------------------ decisions


def test_every_scheduler_of_diffusers_is_decided() -> None:
    exported = {n for n in dir(diffusers.schedulers) if n.endswith("Scheduler")}
    assert exported == set(DECISIONS)
    assert set(stock.CLASSES) | set(stock.REFUSED) == exported
    assert not set(stock.CLASSES) & set(stock.REFUSED)


@pytest.mark.parametrize("name", DECISIONS)
def test_decision(name: str) -> None:
    decision = DECISIONS[name]
    if isinstance(decision, str):
        with pytest.raises(ValueError, match=f"^{name} .*cannot be imitated: .*; ") as caught:
            translated(name)
        assert decision in str(caught.value)
    else:
        values = translated(name)
        assert (values["path"], values["prediction_type"]) == decision
        assert values["stock"] == name
        assert stock.make_path(values).name == decision[0]


@pytest.mark.parametrize("name", FILES)
def test_files_that_omit_keys(name: str) -> None:
    config, decision = FILES[name]
    values = stock.translate({**config, "_use_default_values": ["shift"]})
    assert (values["path"], values["prediction_type"]) == decision
    assert {k: values[k] for k in config} == config
    assert "_use_default_values" not in values
    json.dumps(values)


def test_configurations_in_memory_have_no_name() -> None:
    """What is read without a name is what is read with it, or refused; two classes of two keys cannot be told apart."""
    told = 0
    for name, decision in DECISIONS.items():
        cls = getattr(diffusers.schedulers, name)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if name == "FlowMapEulerDiscreteScheduler" or any(
            p.default is p.empty and p.name != "kwargs" for p in parameters
        ):
            continue
        config = dict(cls().config)
        assert "_class_name" not in config
        try:
            values = stock.translate(config)
        except ValueError:
            assert isinstance(decision, str) or name in ("LTXEulerAncestralRFScheduler", "IPNDMScheduler")
        else:
            assert (values["path"], values["prediction_type"]) == decision
            told += 1
    assert told > 20


def test_omitted_keys_are_the_defaults_of_their_own_class() -> None:
    assert translated("DDIMScheduler")["timestep_spacing"] == "leading"
    assert translated("UniPCMultistepScheduler")["timestep_spacing"] == "linspace"
    assert translated("HeunDiscreteScheduler")["beta_start"] == 0.00085
    assert translated("EulerDiscreteScheduler")["beta_start"] == 0.0001


@pytest.mark.parametrize("name", _STAND_INS)
def test_stand_ins_have_the_defaults_of_the_source(name: str) -> None:
    """They stand in where torchsde or SciPy is missing."""
    module = ast.parse(source(name)[1])
    cls = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
    init = next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    wanted = dict(zip((a.arg for a in init.args.args[1:]), map(ast.literal_eval, init.args.defaults), strict=True))
    twin, others = _STAND_INS[name]
    standing = {**defaults(twin), **others}
    assert {k: standing[k] for k in wanted} == wanted


def test_cosine_classes_are_vp_with_the_angle_as_time() -> None:
    """At sigma_data 1, c_in x and the v-prediction of the EDM form are those of the cosine path, at the time atan(sigma) 2/pi."""
    config = translated("CosineDPMSolverMultistepScheduler")
    path, stock_class = stock.make_path(config), stock64("CosineDPMSolverMultistepScheduler")()
    for sigma in (0.3, 2.0, 500.0):
        s = paths.from_rho(sigma)
        assert stock_class.precondition_noise(sigma).item() == pytest.approx(path.time(s), rel=1e-6)
        assert stock_class.precondition_inputs(torch.tensor(1.0), sigma).item() == pytest.approx(
            path.alpha(s), rel=1e-6
        )
        denoised = stock_class.precondition_outputs(
            1.0, 1.0, sigma
        )  # of x = 1 before scaling and a network that says 1
        assert denoised == pytest.approx(path.alpha(s) * path.alpha(s) - path.sigma(s), rel=1e-9)


def test_continuous_euler_is_edm_with_unit_data() -> None:
    config = stock.translate(FILES["stable video diffusion"][0])
    path = stock.make_path(config)
    assert (path.name, path.sigma_data) == ("edm", 1.0)
    levels, times = stock.levels(config, 4)
    assert times == pytest.approx([path.time(paths.from_rho(v)) for v in levels[:-1]])


# --------------------------------------------------------------------------------------------------------------- grids

STEPS = (3, 10, 15, 20, 50)
SCHEDULES: tuple[Options, ...] = (
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 + 2e-5 * i for i in range(1000)]},
)
SPACINGS: tuple[Options, ...] = tuple(
    {"timestep_spacing": kind, "steps_offset": offset}
    for kind in ("linspace", "leading", "trailing")
    for offset in (0, 1)
)
CONVERSIONS: tuple[Options, ...] = ({}, *({f"use_{k}_sigmas": True} for k in ("karras", "exponential", "beta")))
FINALS: tuple[Options, ...] = ({"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"})
ZERO_SNR: Options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
DISCRETE = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler")  # fmt: skip
FLOWS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler")
DDIMS = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
IS_FLOW: Options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def stock_grid(scheduler: Any, steps: int) -> tuple[Array, Array]:
    """Levels and times of a stock scheduler, one of each a step."""
    times, sigmas = (v.double().numpy() for v in (scheduler.timesteps, scheduler.sigmas))
    if scheduler.order == 2:
        times, sigmas = times[::2], np.r_[sigmas[0], sigmas[1 : 2 * steps - 2 : 2], sigmas[-1]]
    return sigmas[: steps + 1], times


def built(cls: Any, options: Options) -> Any:
    """A stock scheduler, without the 1000 steps that some classes lay when they are built, which takes a second."""
    laying = cls.set_timesteps
    cls.set_timesteps = lambda self, *_: setattr(self, "sigmas", torch.zeros(1))
    try:
        return cls(**options)
    finally:
        cls.set_timesteps = laying


def compare(
    name: str, options: Options, steps: Iterable[int | None] = STEPS, *, single: bool = True, **call: Any
) -> None:
    """Our grid and start against the stock class in float64 and, unless told not to, as it is."""
    config = translated(name, **options)
    classes = [stock64(name)]
    if single and not hasattr(getattr(diffusers, name), "_backends"):  # a stand-in where torchsde is missing
        classes.append(getattr(diffusers, name))
    for cls in classes:
        scheduler, double = built(cls, options), cls is classes[0]
        for n in steps:
            scheduler.set_timesteps(n, **call)
            levels, times = map(np.asarray, stock.levels(config, n, **call))
            wanted, wanted_times = stock_grid(scheduler, len(times))
            where = f"{cls.__module__} {options} {n} {call}"
            if double:
                np.testing.assert_allclose(levels, wanted, rtol=1e-12, atol=1e-15, err_msg=where)
                np.testing.assert_allclose(times, wanted_times, rtol=1e-12, atol=1e-12, err_msg=where)
            else:
                agree32(config, levels, times, wanted, wanted_times, where)
            start = float(getattr(scheduler, "init_noise_sigma", 1.0))
            if config["path"] in ("vp", "cosine") and start > 1:
                start /= math.hypot(wanted[0], 1)
            ours = stock.start_scale(config, levels.tolist())
            assert ours == pytest.approx(start, rel=1e-12 if double else 1e-5), where


def agree32(config: Options, levels: Array, times: Array, wanted: Array, wanted_times: Array, where: str) -> None:
    """Relative 1e-5, and equal times where they are whole.

    Of VP levels the signal variance is compared, as 1 - alpha^2 cancels in the float32 of the stock class: its level of time 0 is
    off by 3e-4. Grids that are respaced from there carry that error, and may round a time to the other side of a whole number.
    """
    respaced = any(config.get(f"use_{k}") for k in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"))
    shaken = (respaced and "beta_schedule" in config) or config.get("interpolation_type") == "log_linear"
    if config["path"] == "vp":
        levels, wanted = 1 / (1 + levels**2), 1 / (1 + wanted**2)
    np.testing.assert_allclose(levels, wanted, rtol=5e-4 if shaken else 1e-5, atol=1e-6, err_msg=where)
    if shaken:
        np.testing.assert_allclose(times, wanted_times, atol=1.001, err_msg=where)
    elif config["path"] == "vp" and (wanted_times == np.trunc(wanted_times)).all():
        np.testing.assert_array_equal(times, wanted_times, err_msg=where)
    else:
        np.testing.assert_allclose(times, wanted_times, rtol=1e-5, atol=1e-5, err_msg=where)


# Every value, and most pairs of them.
QUICK = [{**SCHEDULES[i % 4], **SPACINGS[(i + i // 6) % 6], **CONVERSIONS[(i + i // 4) % 4]} for i in range(12)]


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_grids(name: str) -> None:
    for options in QUICK[:: 3 if name.startswith("KDPM2") else 1]:  # these two take long
        compare(name, options, (3, 15, 20))


@pytest.mark.slow
@pytest.mark.parametrize("name", DISCRETE)
def test_all_discrete_grids(name: str) -> None:
    for options in product(betas=SCHEDULES, spacing=SPACINGS, conversion=CONVERSIONS):
        compare(name, options)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_ends_and_zero_terminal_snr(name: str) -> None:
    for options in product(final=FINALS, snr=({}, ZERO_SNR), conversion=CONVERSIONS[:3]):
        compare(name, {**SCHEDULES[1], **options}, (10,))
        # With these betas the last level, kept finite, lies below its neighbours: in float32 its time is found elsewhere.
        compare(name, options, (10,), single=False)


def test_other_options_of_discrete_grids() -> None:
    for spacing in SPACINGS[::2]:
        compare("EulerAncestralDiscreteScheduler", {**SCHEDULES[1], **spacing, **ZERO_SNR}, (10, 20))
        for clipped in (-5.1, -3.0):
            for name in ("DPMSolverMultistepScheduler", "SASolverScheduler"):
                compare(name, {**spacing, **SCHEDULES[2], "lambda_min_clipped": clipped}, (10, 20))
    for options in product(betas=SCHEDULES[:3], conversion=CONVERSIONS, final=FINALS):
        compare("DPMSolverSinglestepScheduler", options, (10, 15))
    for betas in SCHEDULES[1:3]:
        compare("DPMSolverMultistepScheduler", {**betas, "use_lu_lambdas": True}, (10, 15))
    for conversion in CONVERSIONS:
        compare("EulerDiscreteScheduler", {**conversion, "sigma_min": 0.1, "sigma_max": 12.0}, (10,))
        compare("EulerDiscreteScheduler", {**conversion, "interpolation_type": "log_linear"}, (3, 10))
    compare("HeunDiscreteScheduler", {"beta_schedule": "exp"}, (10,))


def test_continuous_euler_grids() -> None:
    config = FILES["stable video diffusion"][0]
    options = {k: v for k, v in config.items() if k in defaults("EulerDiscreteScheduler")}
    for n in (5, 25):
        compare("EulerDiscreteScheduler", options, (n,))
        compare("EulerDiscreteScheduler", {**options, "timestep_spacing": "linspace", "use_karras_sigmas": False}, (n,))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_match_grids(name: str) -> None:
    for options in product(shift=(1.0, 3.0, 0.5), shift_terminal=(None, 0.1), conversion=CONVERSIONS):
        compare(name, options, (3, 10, 50))
    for kind, mu, terminal in itertools.product(("exponential", "linear"), (0.5, 1.15), (None, 0.02)):
        options = {"use_dynamic_shifting": True, "shift": 3.0, "time_shift_type": kind, "shift_terminal": terminal}
        compare(name, options, (3, 10, 50), mu=mu)
    for options in ({"shift": 3.0}, {"use_dynamic_shifting": True}):
        compare(name, options, (8,), mu=0.8, sigmas=np.linspace(1, 1 / 8, 8).tolist())
        compare(name, options, (4,), mu=0.8, timesteps=[900.0, 700.0, 400.5, 100.0])
        compare(name, options, (2,), mu=0.8, timesteps=[900.0, 100.0], sigmas=[0.8, 0.2])


def test_other_flow_grids() -> None:
    for shift in (1.0, 3.0):
        compare("FlowMatchHeunDiscreteScheduler", {"shift": shift})
        compare("HeliosScheduler", {"stages": 1, "shift": shift, "time_shift_type": "linear"}, (3, 20))
        compare("HeliosScheduler", {"stages": 1, "shift": shift}, (3, 20))
    given = np.linspace(0.999, 0, 6)[:-1]
    compare("HeliosScheduler", {"stages": 1, "use_dynamic_shifting": True}, (5,), mu=0.9, sigmas=given)
    compare("HeliosScheduler", {"stages": 1, "shift": 3.0}, (5,), sigmas=given)


def test_ltx_lays_the_grid_of_flow_match_euler_or_exactly_what_is_given() -> None:
    for options in ({}, {"shift": 3.0}, {"use_dynamic_shifting": True}):
        config = translated("LTXEulerAncestralRFScheduler", **options)
        reference = diffusers.LTXEulerAncestralRFScheduler.from_config(options)
        reference.set_timesteps(10, mu=0.9)
        levels, times = stock.levels(config, 10, mu=0.9)
        np.testing.assert_allclose(levels, reference.sigmas, rtol=1e-5)
        np.testing.assert_allclose(times, reference.timesteps, rtol=1e-5)
    values = [1.0, 0.99, 0.9, 0.4, 0.0]
    assert stock.levels(translated("LTXEulerAncestralRFScheduler"), sigmas=values) == (
        values,
        [1000.0, 990.0, 900.0, 400.0],
    )


@pytest.mark.parametrize("name", FLOWS)
def test_flow_grids_of_vp_classes(name: str) -> None:
    for shift, final in itertools.product((1.0, 3.0, 7.0), FINALS if name.startswith("DPM") else ({},)):
        compare(name, {**IS_FLOW, "flow_shift": shift, **final}, (3, 10, 15, 20, 50))
    if name != "SASolverScheduler":
        options = {**IS_FLOW, "use_dynamic_shifting": True}
        config, reference = translated(name, **options), stock64(name)(**options)
        reference.set_timesteps(20, mu=1.15)
        levels, times = stock.levels(config, 20, mu=1.15)
        np.testing.assert_allclose(levels, reference.sigmas, rtol=1e-12)
        np.testing.assert_array_equal(times, reference.timesteps)


def test_flow_grids_of_unipc() -> None:
    for options in product(flow_shift=(1.0, 3.0), final=FINALS, shift_terminal=(None, 0.1)):
        compare("UniPCMultistepScheduler", {**IS_FLOW, **options})
    for kind, mu in itertools.product(("exponential", "linear"), (0.5, 1.15)):
        options = {**IS_FLOW, "use_dynamic_shifting": True, "time_shift_type": kind}
        compare("UniPCMultistepScheduler", options, (10, 20), mu=mu)
    for limits in ({}, {"sigma_min": 0.02, "sigma_max": 200.0}):
        compare("UniPCMultistepScheduler", {**IS_FLOW, "use_karras_sigmas": True, **limits}, (10, 20))
    compare("UniPCMultistepScheduler", {**IS_FLOW, "flow_shift": 3.0}, (8,), sigmas=np.linspace(1, 1 / 8, 8))


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"]
)
def test_edm_grids(name: str) -> None:
    for options in product(
        sigma_schedule=("karras", "exponential"), final=FINALS, sigma_max=(80.0, 500.0), rho=(7.0, 3.0)
    ):
        compare(name, options)


def test_angles_of_ipndm() -> None:
    config, reference = translated("IPNDMScheduler"), stock64("IPNDMScheduler")()
    for n in STEPS:
        reference.set_timesteps(n)
        levels, times = stock.levels(config, n)
        angles = np.arctan2(reference.betas.numpy(), reference.alphas.numpy())
        np.testing.assert_allclose(np.arctan(levels), angles, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(times, reference.timesteps, rtol=1e-12)


def table(scheduler: Any) -> Array:
    """sigma/alpha of a stock scheduler at its discrete times."""
    bar = scheduler.alphas_cumprod.double().numpy()
    with np.errstate(divide="ignore"):
        return np.asarray(np.sqrt((1 - bar) / bar))


def landed(scheduler: Any) -> Array:
    """Where the steps of a stock DDIM end: what it makes of x0 = 1 without noise, and of noise 1 without x0."""
    found = []
    for t in scheduler.timesteps:
        bar = scheduler.alphas_cumprod[t]
        signal = scheduler.step(torch.zeros(1, dtype=bar.dtype), t, bar.sqrt()[None]).prev_sample
        noise = scheduler.step(torch.ones(1, dtype=bar.dtype), t, (1 - bar).sqrt()[None]).prev_sample
        found.append((noise / signal).item())
    return np.asarray(found)


@pytest.mark.parametrize("name", DDIMS)
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_grids(name: str, to_one: bool) -> None:
    for i, spacing in enumerate(SPACINGS):
        options = {**SCHEDULES[i % 3], **spacing, "set_alpha_to_one": to_one}
        config = translated(name, **options)
        reference, plain = stock64(name)(**options), getattr(diffusers, name)(**options)
        for n in (3, 7, 10, 15, 50):
            reference.set_timesteps(n)
            plain.set_timesteps(n)
            levels, times, ends = stock.grid(config, n)
            assert times == plain.timesteps.tolist()
            np.testing.assert_allclose(levels[:-1], table(reference)[reference.timesteps], rtol=1e-12)
            assert (ends or levels)[-1] == levels[-1]
            assert ends is None or spacing["timestep_spacing"] != "leading"
            if n < 15:
                np.testing.assert_allclose(ends or levels[1:], landed(reference), rtol=1e-9, atol=1e-12)
            assert stock.start_scale(config, levels) == plain.init_noise_sigma


@pytest.mark.parametrize("name", ["DDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDPMScheduler"])
def test_zero_terminal_snr_is_infinite_where_stock_has_it(name: str) -> None:
    for scale in (1.0, 3.0) if name.startswith("Cog") else (None,):
        options: Options = {**ZERO_SNR, **SCHEDULES[1], "timestep_spacing": "trailing"}
        options |= {} if scale is None else {"snr_shift_scale": scale}
        path, reference = stock.make_path(translated(name, **options)), stock64(name)(**options)
        assert path.rhos[-1] == math.inf
        assert path.num_train_timesteps == 1000
        np.testing.assert_allclose(path.rhos[:-1], table(reference)[:-1], rtol=1e-11)
        assert stock.levels(translated(name, **options), 10)[0][0] == math.inf


def test_cogvideox_shifts_the_snr() -> None:
    for scale in (1.0, 3.0):
        path = stock.make_path(translated("CogVideoXDDIMScheduler", snr_shift_scale=scale))
        np.testing.assert_allclose(
            path.rhos, table(stock64("CogVideoXDDIMScheduler")(snr_shift_scale=scale)), rtol=1e-12
        )


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler", "TCDScheduler", "UnCLIPScheduler"]
)
def test_grids_of_stochastic_classes(name: str) -> None:
    choices = SPACINGS if name.startswith("DDPM") else ({},)
    for options in choices:
        config, reference, plain = (
            translated(name, **options),
            stock64(name)(**options),
            getattr(diffusers, name)(**options),
        )
        for n in STEPS:
            reference.set_timesteps(n)
            plain.set_timesteps(n)
            levels, times, ends = stock.grid(config, n)
            assert times == plain.timesteps.tolist()
            np.testing.assert_allclose(levels[:-1], table(reference)[reference.timesteps], rtol=1e-12)
            assert levels[-1] == pytest.approx(table(reference)[0] if name == "TCDScheduler" else 0.0, rel=1e-12)
            assert ends is None


def test_grids_of_pndm_have_one_entry_a_step() -> None:
    for options in product(spacing=SPACINGS, set_alpha_to_one=(True, False)):
        config, reference = (
            translated("PNDMScheduler", **options),
            stock64("PNDMScheduler")(**options, skip_prk_steps=True),
        )
        for n in (4, 10, 50):
            reference.set_timesteps(n)
            levels, times = stock.levels(config, n)
            assert times == [times[0], *reference.timesteps.tolist()[2:]] == reference._timesteps[::-1].tolist()
            np.testing.assert_allclose(levels[:-1], table(reference)[np.asarray(times, dtype=int)], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_schedules_of_ddpm(schedule: str) -> None:
    path = stock.make_path(translated("DDPMScheduler", beta_schedule=schedule))
    np.testing.assert_allclose(path.rhos, table(stock64("DDPMScheduler")(beta_schedule=schedule)), rtol=1e-12)


def test_trailing_spacing_takes_as_many_steps_as_asked() -> None:
    """Rounding gives stock DDIM a 62nd call, at time -1, for 61 steps."""
    config = translated("DDIMScheduler", timestep_spacing="trailing")
    reference = diffusers.DDIMScheduler(timestep_spacing="trailing")
    reference.set_timesteps(61)
    assert reference.timesteps.tolist() == [*stock.levels(config, 61)[1], -1]


# ------------------------------------------------------------------------------------------- explicit lists and begin


def test_explicit_lists_of_euler() -> None:
    for options in ({}, SCHEDULES[1]):
        compare("EulerDiscreteScheduler", options, (None,), timesteps=[999, 850, 736, 645, 24])
        compare("EulerDiscreteScheduler", options, (None,), sigmas=[14.615, 6.475, 0.963, 0.0])
        compare("EulerDiscreteScheduler", options, (None,), sigmas=[14.615, 6.475, 0.963])
    svd = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    compare("EulerDiscreteScheduler", svd, (None,), sigmas=[700.0, 54.5, 0.034, 0.0])


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"]
)
def test_explicit_timesteps(name: str) -> None:
    compare(name, SCHEDULES[1], (None,), timesteps=[999, 850, 736, 645, 24])


def test_explicit_lists_where_the_class_takes_none() -> None:
    path = paths.vp(paths.betas("linear", 0.0001, 0.02))
    for name in (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "LMSDiscreteScheduler",
    ):
        levels, times = stock.levels(translated(name), timesteps=[900, 500, 100])
        assert times == [900.0, 500.0, 100.0]
        assert levels[:-1] == [path.rhos[t] for t in (900, 500, 100)]
        levels, times = stock.levels(translated(name), sigmas=[10.0, 2.0, 0.5, 0.0])
        assert levels == [10.0, 2.0, 0.5, 0.0]
        assert times == pytest.approx([path.time(paths.from_rho(v)) for v in levels[:-1]])
    for name in FLOWS:
        config = translated(name, **IS_FLOW, flow_shift=3.0)
        assert stock.levels(config, timesteps=[900, 100]) == (
            [0.9, 0.1, stock.levels(config, 5)[0][-1] * 0],
            [900.0, 100.0],
        )
        assert stock.levels(config, sigmas=[0.9, 0.5])[0][:2] == pytest.approx([2.7 / 2.8, 0.75])
    levels, times = stock.levels(translated("EDMEulerScheduler"), sigmas=[80.0, 1.0])
    assert (levels, times) == ([80.0, 1.0, 0.0], [0.25 * math.log(80), 0.0])
    assert stock.levels(translated("EDMEulerScheduler"), timesteps=times)[0] == pytest.approx(levels)
    assert stock.levels(translated("IPNDMScheduler"), timesteps=[1.0, 0.5])[0] == pytest.approx([math.inf, 1.0, 0.0])


def test_a_given_terminal_is_not_added_twice() -> None:
    config = translated("FlowMatchEulerDiscreteScheduler", shift=3.0)
    assert stock.levels(config, sigmas=[1.0, 0.5, 0.0]) == stock.levels(config, sigmas=[1.0, 0.5])
    assert stock.levels(config, 2, sigmas=[1.0, 0.5, 0.0]) == stock.levels(config, 2, sigmas=[1.0, 0.5])


def test_lists_may_be_arrays_and_tensors() -> None:
    config = translated("FlowMatchEulerDiscreteScheduler")
    plain = stock.levels(config, sigmas=[0.75, 0.5])
    assert (
        plain
        == stock.levels(config, sigmas=np.array([0.75, 0.5]))
        == stock.levels(config, sigmas=torch.tensor([0.75, 0.5]))
    )


def test_mu_is_ignored_without_dynamic_shifting() -> None:
    for name, options in (
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("DPMSolverMultistepScheduler", IS_FLOW),
    ):
        config = translated(name, **options)
        assert stock.levels(config, 5, mu=1.15) == stock.levels(config, 5)


def test_the_configuration_is_read_when_called() -> None:
    config = translated("DDIMScheduler")
    before = stock.levels(config, 10)[1]
    config["steps_offset"] = 1
    assert stock.levels(config, 10)[1] == [t + 1 for t in before]


def test_keys_of_other_classes_are_carried_but_not_read() -> None:
    """As diffusers does, sigma_min and sigma_max apart, which every karras grid reads."""
    hidden = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "final_sigmas_type": "sigma_min"}
    plain, carrying = translated("DPMSolverSinglestepScheduler"), translated("DPMSolverSinglestepScheduler", **hidden)
    assert carrying["timestep_spacing"] == "trailing"
    assert stock.levels(carrying | {"final_sigmas_type": "zero"}, 10) == stock.levels(plain, 10)
    karras = {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}
    reference = stock64("DPMSolverMultistepScheduler").from_config(karras)  # hidden keys need from_config
    reference.set_timesteps(10)
    levels = stock.levels(translated("DPMSolverMultistepScheduler", **karras), 10)[0]
    np.testing.assert_allclose(levels, reference.sigmas, rtol=1e-12)


# -------------------------------------------------------------------------------------------------- plain configurations


def test_plain_configurations_make_paths() -> None:
    assert stock.make_path({"path": "flow"}) == paths.flow()
    assert stock.make_path({"path": "cosine", "num_train_timesteps": 500}) == paths.cosine(500)
    assert stock.make_path({"path": "ve"}) == paths.ve()
    assert stock.make_path({"path": "edm", "sigma_data": 1.0}) == paths.edm(sigma_data=1.0)
    assert stock.make_path({"path": "vp"}) == paths.vp(paths.betas())
    keys = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 100}
    assert stock.make_path({"path": "vp", **keys}) == paths.vp(paths.betas("linear", 1e-4, 0.02, 100))
    zero = stock.make_path({"path": "vp", "rescale_betas_zero_snr": True})
    assert zero.rhos[0] == pytest.approx(paths.vp(paths.betas()).rhos[0])
    assert zero.rhos[-1] == math.inf
    assert stock.make_path({"path": "vp", "trained_betas": [0.1, 0.2], "num_train_timesteps": 2}) == paths.vp(
        [0.1, 0.2]
    )
    assert stock.start_scale({"path": "edm"}, [80.0, 0.0]) == 80.0
    assert stock.start_scale({"path": "vp"}, [14.6, 0.0]) == 1.0


# ------------------------------------------------------------------------------------------------------------- solvers


def run_orders(scheduler: Any, n: int) -> list[int]:
    """Orders that a stock multistep class runs, seen from outside; its arithmetic is left out."""
    seen: list[int] = []
    for name in ("multistep_uni_p_bh_update", "multistep_uni_c_bh_update"):
        setattr(scheduler, name, lambda sample=None, this_sample=None, **_: this_sample if sample is None else sample)
    for order, part in ((1, "first_order"), (2, "second_order"), (3, "third_order")):
        for name in dir(scheduler):
            if name.endswith(f"{part}_update"):

                def counted(*args: Any, _order: int = order, sample: Any, **kwargs: Any) -> Any:
                    seen.append(_order)
                    return sample

                setattr(scheduler, name, counted)
    scheduler.set_timesteps(n)
    sample = torch.ones(1, 1, 1, 1)
    for t in scheduler.timesteps:
        scheduler.step(sample, t, sample)
        if not hasattr(scheduler, "lower_order_nums") or "UniPC" in type(scheduler).__name__:
            seen.append(scheduler.this_order)
    return seen


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_orders(name: str) -> None:
    choices: dict[str, Iterable[Any]] = {"solver_order": (1, 2, 3), "lower_order_final": (True, False)}
    if name != "DEISMultistepScheduler":
        choices["final"] = FINALS
    if "DPM" in name:
        choices["euler_at_final"] = (True, False)
    for options in product(**choices):
        if name.startswith("UniPC") and not options["lower_order_final"] and options["final_sigmas_type"] == "zero":
            continue  # the class divides by zero
        for n in (1, 2, 3, 14, 15):
            scheduler = getattr(diffusers, name)(**options)
            assert stock.orders(translated(name, **options), n) == run_orders(scheduler, n), (options, n)


def test_unipc_ends_at_zero_with_order_one() -> None:
    config = translated("UniPCMultistepScheduler", lower_order_final=False)
    assert stock.orders(config, 4) == [1, 2, 2, 1]


def test_orders_of_singlestep_classes() -> None:
    for options in product(solver_order=(1, 2, 3), lower_order_final=(True, False), final=FINALS):
        for n in (6, 7, 8, 9):
            scheduler = diffusers.DPMSolverSinglestepScheduler(**options)
            scheduler.set_timesteps(n)
            assert stock.orders(translated("DPMSolverSinglestepScheduler", **options), n) == scheduler.order_list


def test_orders_of_one_step_classes() -> None:
    assert stock.orders(translated("HeunDiscreteScheduler"), 3) == [2, 2, 1]
    assert stock.orders(translated("FlowMatchHeunDiscreteScheduler"), 1) == [1]
    assert stock.orders(translated("DDIMScheduler"), 2) == [1, 1]
    assert stock.orders(translated("LMSDiscreteScheduler"), 6) == [1, 2, 3, 4, 4, 4]
    with pytest.raises(ValueError, match=r"LCMScheduler .*choose a solver"):
        stock.orders(translated("LCMScheduler"), 3)


# Name, gauge and order of the solver of a configuration, or None where it is not a table of ours.
SDE = {"algorithm_type": "sde-dpmsolver++"}
SOLVERS: list[tuple[str, Options, tuple[str, str, int] | None]] = [
    ("DDIMScheduler", {}, ("euler", "eps", 1)),
    ("CogVideoXDDIMScheduler", {}, ("euler", "eps", 1)),
    ("EulerDiscreteScheduler", {}, ("euler", "eps", 1)),
    ("EulerAncestralDiscreteScheduler", {}, ("ancestral", "x0", 1)),
    ("DDPMScheduler", {}, ("ancestral", "x0", 1)),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, None),
    ("HeunDiscreteScheduler", {}, ("heun", "eps", 1)),
    ("LMSDiscreteScheduler", {}, ("lms", "eps", 4)),
    ("KDPM2DiscreteScheduler", {}, ("dpm2", "eps", 2)),
    ("KDPM2AncestralDiscreteScheduler", {}, ("dpm2", "eps", 2)),
    ("PNDMScheduler", {"skip_prk_steps": True}, ("plms", "eps", 4)),
    ("PNDMScheduler", {}, None),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}, None),
    ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing"}, None),
    ("FlowMatchEulerDiscreteScheduler", {}, ("euler", "flow", 1)),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, ("ancestral", "x0", 1)),
    ("FlowMatchHeunDiscreteScheduler", {}, ("heun", "flow", 1)),
    ("EDMEulerScheduler", {}, ("euler", "eps", 1)),
    ("EDMDPMSolverMultistepScheduler", {"solver_type": "heun"}, ("dpm++2m", "x0", 2)),
    ("DPMSolverMultistepScheduler", {}, ("dpm++2m", "x0", 2)),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "deis"}, ("dpm++2m", "x0", 2)),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, ("dpm++3m", "x0", 3)),
    ("DPMSolverMultistepScheduler", SDE, ("sde-dpm++2m", "x0", 2)),
    ("DPMSolverMultistepScheduler", SDE | {"solver_order": 3}, None),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, ("dpm2m", "eps", 2)),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, ("dpm++3s", "x0", 3)),
    ("DPMSolverSinglestepScheduler", SDE, None),
    ("UniPCMultistepScheduler", {}, ("unipc", "x0", 2)),
    ("UniPCMultistepScheduler", {"predict_x0": False, "solver_order": 3}, ("unipc", "eps", 3)),
    ("UniPCMultistepScheduler", {"solver_order": 4}, None),
    ("DEISMultistepScheduler", {"solver_order": 3}, ("deis", "eps", 3)),
    ("LTXEulerAncestralRFScheduler", {}, ("ancestral", "x0", 1)),
    ("LTXEulerAncestralRFScheduler", {"eta": 0.0}, ("euler", "flow", 1)),
    ("HeliosScheduler", {"stages": 1}, None),
    ("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}, ("euler", "flow", 1)),
    *((name, {}, None) for name in (
        "LCMScheduler", "TCDScheduler", "SASolverScheduler", "IPNDMScheduler", "FlowMatchLCMScheduler", "CogVideoXDPMScheduler",
        "UnCLIPScheduler", "DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "wanted"), SOLVERS)
def test_own_solver(name: str, options: Options, wanted: tuple[str, str, int] | None) -> None:
    found = stock.own_solver(translated(name, **options))
    assert (found and (found.name, found.gauge, found.order)) == wanted


def test_solver_types_are_rules() -> None:
    """Of two predictions and of three, as the classes' own update functions weight them."""
    for name, options, rules in (
        ("DPMSolverMultistepScheduler", {}, ("mid", "half")),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, ("exact", "half")),
        ("DPMSolverMultistepScheduler", {"solver_type": "bh2"}, ("mid", "half")),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, ("mid", "outer")),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}, ("exact", "exact")),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, ("bh1", "exact")),
        ("UniPCMultistepScheduler", {"solver_type": "midpoint"}, ("mid", "exact")),
        ("DEISMultistepScheduler", {}, ("exact",)),
    ):
        found = stock.own_solver(translated(name, **options))
        assert found is not None
        assert found.rules == rules, name


# ----------------------------------------------------------------------------------------------------------- bad input

NOT_CONFIGURATIONS: list[tuple[Any, str]] = [
    ({}, "names its class in '_class_name', got None"),
    ({"_class_name": None}, "got None"),
    ({"_class_name": ["diffusers", "DDIMScheduler"]}, r"got \['diffusers'"),
    (None, "got None"),
    ({"_class_name": "NoSuchScheduler"}, "unknown scheduler class 'NoSuchScheduler'"),
    ({"_class_name": "UNet2DModel"}, "UNet2DModel of diffusers is not a scheduler"),
    ({"_class_name": "SchedulerMixin"}, "SchedulerMixin of diffusers is not a scheduler"),
]


@pytest.mark.parametrize(("config", "message"), NOT_CONFIGURATIONS)
def test_what_is_no_scheduler_configuration_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*; ") as caught:
        stock.translate(config)
    assert "\n" not in str(caught.value)


def test_a_scheduler_of_a_later_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class NewScheduler:
        pass

    monkeypatch.setattr(diffusers, "NewScheduler", NewScheduler, raising=False)
    monkeypatch.setattr(diffusers.schedulers, "NewScheduler", NewScheduler, raising=False)
    with pytest.raises(ValueError, match=r"NewScheduler came to diffusers after .*; keep"):
        stock.translate({"_class_name": "NewScheduler"})


CONTRADICTIONS: list[tuple[str, Options, str]] = [
    ("DDIMScheduler", {"prediction_type": "noise"}, "'noise'; set prediction_type='epsilon'"),
    ("DDIMScheduler", {"prediction_type": None}, "got None"),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "got 'flow_prediction'; set prediction_type='epsilon'"),
    (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction"},
        "got 'flow_prediction'; set use_flow_sigmas=True",
    ),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "got 'epsilon'; set prediction_type='flow_prediction'"),
    ("DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "got 'v_prediction'"),
    ("FlowMatchEulerDiscreteScheduler", {"prediction_type": "epsilon"}, "got 'epsilon'"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True cannot be imitated: .*Mochi"),
    ("FlowMatchLCMScheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
    ("FlowMatchLCMScheduler", {"scale_factors": [2.0]}, "scale_factors="),
    ("LTXEulerAncestralRFScheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
    ("HeliosScheduler", {"stages": 1, "scheduler_type": "dmd"}, "scheduler_type='dmd'"),
    ("CosineDPMSolverMultistepScheduler", {"sigma_data": 0.5}, "sigma_data=0.5"),
    ("CosineDPMSolverMultistepScheduler", {"prediction_type": "epsilon"}, "got 'epsilon'"),
    ("EDMDPMSolverMultistepScheduler", {"prediction_type": "sample"}, "got 'sample'"),
    ("IPNDMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas="),
    ("EulerDiscreteScheduler", {"timestep_spacing": "even"}, "timestep_spacing='even'"),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "both use_karras_sigmas=True and"),
    ("DPMSolverMultistepScheduler", {**IS_FLOW, "use_karras_sigmas": True}, "use_karras_sigmas=True"),
    ("UniPCMultistepScheduler", {**IS_FLOW, "use_beta_sigmas": True}, "use_beta_sigmas=True"),
    ("UniPCMultistepScheduler", {"shift_terminal": 0.1}, "shift_terminal=0.1 needs use_flow_sigmas=True"),
    ("UniPCMultistepScheduler", {"solver_type": "bh3"}, "solver_type='bh3'"),
    ("DPMSolverMultistepScheduler", {"time_shift_type": "linear"}, "time_shift_type='linear'"),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "2 trained_betas for num_train_timesteps=1000"),
]


@pytest.mark.parametrize(("name", "options", "message"), CONTRADICTIONS)
def test_configurations_that_cannot_be_are_refused(name: str, options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} .*{message}") as caught:
        translated(name, **options)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


FLOW_MATCH, DYNAMIC = "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}
BAD_CALLS: list[tuple[str, Options, Options, str]] = [
    ("DDIMScheduler", {}, {}, "nothing says how many steps"),
    *(("DDIMScheduler", {}, {"num_inference_steps": n}, "num_inference_steps must be a whole number, 1 or more, got ")
      for n in (0, -1, 2.5, True, "10")),
    ("DDIMScheduler", {}, {"num_inference_steps": 1001}, "num_inference_steps=1001 exceeds the 1000 times"),
    ("EulerDiscreteScheduler", {}, {"num_inference_steps": 1001}, "num_inference_steps=1001 exceeds"),
    ("UnCLIPScheduler", {}, {"num_inference_steps": 1}, "2 or more, got 1"),
    ("LCMScheduler", {}, {"num_inference_steps": 51}, "num_inference_steps=51 must not exceed original_inference_steps=50"),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}, {"num_inference_steps": 1000}, "no room for 1000 steps"),
    ("DDIMScheduler", {"steps_offset": 1}, {"num_inference_steps": 1000}, "steps_offset=1 puts the first of 1000 steps at"),
    ("DDPMScheduler", {}, {"timesteps": [100, 500]}, r"timesteps must be finite and fall .*got \[100. 500.\]; sort"),
    ("DDPMScheduler", {}, {"timesteps": [500, 500]}, "timesteps must be finite and fall"),
    ("DDPMScheduler", {}, {"timesteps": []}, "timesteps must be finite and fall"),
    ("DDPMScheduler", {}, {"timesteps": [math.nan]}, "timesteps must be finite and fall"),
    ("DDPMScheduler", {}, {"timesteps": [1000, 500]}, r"timesteps must lie in \[0, 999\], got"),
    ("DDPMScheduler", {}, {"timesteps": [500, -1]}, "timesteps must lie in"),
    ("DDPMScheduler", {}, {"timesteps": [500, 100], "num_inference_steps": 3}, "num_inference_steps=3 contradicts the 2"),
    ("EulerDiscreteScheduler", {}, {"timesteps": [500], "sigmas": [10.0, 0.0]}, "takes timesteps or sigmas, not both"),
    ("EulerDiscreteScheduler", {}, {"sigmas": [0.0]}, "sigmas must be positive"),
    ("EulerDiscreteScheduler", {}, {"sigmas": [1.0, -1.0]}, "sigmas must be positive"),
    ("EulerDiscreteScheduler", {}, {"sigmas": [10.0, 0.0], "num_inference_steps": 2}, "num_inference_steps=2 contradicts"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"timesteps": [500]}, "cannot be combined with use_karras_sigmas"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 0.001}, {"num_inference_steps": 3}, "levels must fall"),
    ("DPMSolverMultistepScheduler", {**IS_FLOW, **FINALS[1]}, {"num_inference_steps": 500}, "levels must fall"),
    (FLOW_MATCH, {}, {"sigmas": [1.5, 0.5]}, r"sigmas must lie in \[0, 1\]"),
    (FLOW_MATCH, {}, {"timesteps": [1500.0, 500.0]}, r"timesteps must lie in \[0, 1000\]"),
    (FLOW_MATCH, {}, {"sigmas": [0.0]}, r"sigmas=\[0\] leaves nothing to do"),
    (FLOW_MATCH, {}, {"sigmas": [0.9, 0.5], "timesteps": [900.0]}, "1 timesteps contradict 2 sigmas"),
    (FLOW_MATCH, {}, {"sigmas": [0.9, 0.5], "num_inference_steps": 3}, "num_inference_steps=3 contradicts"),
    (FLOW_MATCH, DYNAMIC, {"num_inference_steps": 3}, "needs a number mu, got None; pass mu"),
    (FLOW_MATCH, DYNAMIC, {"num_inference_steps": 3, "mu": math.nan}, "needs a number mu, got nan"),
    (FLOW_MATCH, {**DYNAMIC, "time_shift_type": "linear"}, {"num_inference_steps": 3, "mu": -1.0}, "cannot be shifted by -1"),
    (FLOW_MATCH, {"shift": 0.0}, {"num_inference_steps": 3}, "cannot be shifted by 0"),
    (FLOW_MATCH, {"shift_terminal": 0.1}, {"num_inference_steps": 1}, "shift_terminal=0.1 needs at least two steps"),
    ("DPMSolverMultistepScheduler", {**IS_FLOW, **DYNAMIC}, {"num_inference_steps": 3}, "needs a number mu"),
    ("UniPCMultistepScheduler", {**IS_FLOW, "use_karras_sigmas": True}, {"sigmas": [0.9, 0.5]}, "cannot be combined with"),
    ("LTXEulerAncestralRFScheduler", {}, {"timesteps": [1000.0, 500.0, 0.0]}, r"sigmas must lie in \[0, 1\]"),
    ("EDMEulerScheduler", {}, {"num_inference_steps": 0}, "1 or more, got 0"),
    ("IPNDMScheduler", {}, {"timesteps": [1000.0, 500.0]}, r"timesteps must lie in \[0, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "call", "message"), BAD_CALLS)
def test_calls_that_cannot_be_are_refused(name: str, options: Options, call: Options, message: str) -> None:
    config = translated(name, **options)
    with pytest.raises(ValueError, match=message) as caught:
        stock.levels(config, **call)
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beta_grids_name_scipy_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"a beta grid needs SciPy; .*pip install scipy"):
        stock.levels(translated("EulerDiscreteScheduler", use_beta_sigmas=True), 5)


def test_what_does_not_come_from_translate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stock=None\); get it from translate"):
        stock.levels({"path": "vp"}, 5)
    with pytest.raises(ValueError, match="unknown path None; choose"):
        stock.make_path({})
    with pytest.raises(ValueError, match="unknown beta_schedule 'even'"):
        stock.make_path({"path": "vp", "beta_schedule": "even"})

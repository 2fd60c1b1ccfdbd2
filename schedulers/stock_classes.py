"""The scheduler classes of diffusers (0.42): where the model behind each configuration lives, or why we cannot say.

A configuration and the defaults in the signature of the class that it names say everything; no stock class is instantiated.
Every class is on one of two lists: `CLASSES`, those whose model is a denoiser on one of our paths, and `REFUSED`. Files omit
keys, and what they omit is the default of their own class; silence never means flow.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import diffusers

from flowkit.schedulers.stock_spacing import CONVERSIONS, Config


def _all(names: str, value: Any) -> dict[str, Any]:  # noqa: ANN401
    return dict.fromkeys(names.split(), value)


# The path of the model. "vp" turns into "flow" by use_flow_sigmas=True and, for Euler with continuous time and v-prediction
# (Stable Video Diffusion), into "edm" with sigma_data 1, which that is. The "cosine" classes have alpha = cos(pi t / 2) and
# sigma = sin(pi t / 2) at a model time t in [0, 1].
CLASSES: Final[dict[str, str]] = {
    **_all("DDPMScheduler DDPMParallelScheduler UnCLIPScheduler PNDMScheduler LCMScheduler TCDScheduler", "vp"),
    **_all("DDIMScheduler DDIMParallelScheduler CogVideoXDDIMScheduler CogVideoXDPMScheduler", "vp"),
    **_all("EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler", "vp"),
    **_all("KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverSDEScheduler", "vp"),
    **_all("DPMSolverMultistepScheduler DPMSolverSinglestepScheduler UniPCMultistepScheduler", "vp"),
    **_all("DEISMultistepScheduler SASolverScheduler", "vp"),
    **_all("FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler", "flow"),
    **_all("LTXEulerAncestralRFScheduler HeliosScheduler", "flow"),
    **_all("EDMEulerScheduler EDMDPMSolverMultistepScheduler", "edm"),
    **_all("IPNDMScheduler CosineDPMSolverMultistepScheduler", "cosine"),
}

_KEEP = "keep the stock class"
_OWN_LOOP = ("its pipeline drives it by other methods than step", _KEEP)
REFUSED: Final[dict[str, tuple[str, str]]] = {
    **_all("AmusedScheduler VQDiffusionScheduler", ("it denoises discrete tokens", _KEEP)),
    **_all(
        "BlockRefinementScheduler DiscreteDDIMScheduler EntropyBoundScheduler", ("it denoises discrete tokens", _KEEP)
    ),
    **_all(
        "DDIMInverseScheduler DPMSolverMultistepInverseScheduler",
        ("it runs from data to noise", "name the forward class in the configuration, the model is the same"),
    ),
    **_all("KarrasVeScheduler ScoreSdeVeScheduler ScoreSdeVpScheduler", _OWN_LOOP),
    "CMStochasticIterativeScheduler": ("its consistency model has boundary terms and a clock of its own", _KEEP),
    "ConsistencyDecoderScheduler": ("it is a decoder of two fixed steps", _KEEP),
    "DDPMWuerstchenScheduler": ("its cosine clock is offset, warped and clamped", _KEEP),
    "FlowMapEulerDiscreteScheduler": ("its model predicts mean velocities over whole steps", _KEEP),
    "HeliosDMDScheduler": ("its step takes tensors from its pipeline to add noise", _KEEP),
    "MiniMaxH3Scheduler": ("its velocity points to the data and its time rises from 0 to 1", _KEEP),
    "PiflowScheduler": ("its model predicts a policy for a whole step, not one velocity", _KEEP),
    "RFD4ProteinaScheduler": ("its time rises, and its step rescales the score and masks the sample", _KEEP),
    "RePaintScheduler": (
        "it jumps back in time and takes a mask",
        "name DDPMScheduler in the configuration, the model is the same",
    ),
    "SCMScheduler": ("its noise has the scale sigma_data and its times come from its pipeline", _KEEP),
}

# class -> key -> (the values that can be imitated, why others cannot)
_ONLY: Final[dict[str, dict[str, tuple[tuple[Any, ...], str]]]] = {
    **_all(
        "FlowMatchEulerDiscreteScheduler LTXEulerAncestralRFScheduler",
        {"invert_sigmas": ((False, None), "the flow runs from 0 to 1, as in Mochi")},
    ),
    "FlowMatchLCMScheduler": {
        "invert_sigmas": ((False, None), "the flow runs from 0 to 1"),
        "scale_factors": ((None, []), "the sample changes its size between steps"),
    },
    "HeliosScheduler": {
        "stages": ((1,), "a pyramid of stages has no single path"),
        "scheduler_type": (("euler", "unipc"), "the step takes tensors from the pipeline to add noise"),
        "use_flow_sigmas": ((True,), "the levels are those of a flow"),
    },
    "CosineDPMSolverMultistepScheduler": {"sigma_data": ((1,), "the clock is that of the cosine path for 1 only")},
    "IPNDMScheduler": {"trained_betas": ((None,), "the class takes them for its grid")},
}
_ONLY["DPMSolverMultistepScheduler"] = _ONLY["DPMSolverSinglestepScheduler"] = _ONLY["DEISMultistepScheduler"] = {
    "time_shift_type": (("exponential",), "the class knows no other shift")
}

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "sigma_schedule": ("karras", "exponential"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
}

# What a model on the path may predict; first what it does predict if its class has no prediction_type.
_PREDICTIONS: Final[dict[str, tuple[str, ...]]] = {
    "vp": ("epsilon", "sample", "v_prediction"),
    "flow": ("flow_prediction", "sample"),
    "edm": ("epsilon", "v_prediction"),
    "cosine": ("v_prediction",),
}

# Where torchsde or SciPy is missing, diffusers puts stand-ins without a signature: (a class with the same defaults, but for).
_STAND_INS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "DPMSolverSDEScheduler": ("KDPM2DiscreteScheduler", {"noise_sampler_seed": None}),
    "LMSDiscreteScheduler": ("KDPM2DiscreteScheduler", {"beta_start": 0.0001, "beta_end": 0.02}),
    "CosineDPMSolverMultistepScheduler": (
        "EDMDPMSolverMultistepScheduler",
        {
            "sigma_min": 0.3,
            "sigma_max": 500,
            "sigma_data": 1.0,
            "sigma_schedule": "exponential",
            "prediction_type": "v_prediction",
        },
    ),
}


# Each has the parameters of another class, by which a nameless configuration is read.
_KDPM2 = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
_TWINS: Final = (
    *_KDPM2,
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "TCDScheduler",
    "CogVideoXDDIMScheduler",
    "FlowMapEulerDiscreteScheduler",
)


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a stock configuration.

    Args:
        config: a scheduler configuration of diffusers. With its ``_class_name`` keys left out are the defaults of that class;
            without, as of a scheduler built in memory, all parameters of the class must be there, and tell it (`infer`).

    Returns:
        Every parameter of the class with its value, every other key as it came (but ``_use_default_values``), and

        - ``stock``: the class's name;
        - ``path``: "vp", "flow", "edm" or "cosine";
        - ``prediction_type``: as diffusers spells it, "epsilon", "sample", "v_prediction" or "flow_prediction";
        - ``sigma_data``: on the "edm" path.

    Raises:
        ValueError: for a configuration without a scheduler's name, of a class or with a value that cannot be imitated, or whose
            keys contradict each other.
    """
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if name is None and isinstance(config, Mapping):
        name = infer(config)
    if not isinstance(name, str):
        raise ValueError(
            f"a scheduler configuration names its class in '_class_name', got {name!r}; "
            "pass the scheduler itself, or the contents of a scheduler_config.json"
        )
    if name not in CLASSES:
        raise ValueError(_refusal(name))
    values = dict(defaults(name)) | {k: v for k, v in config.items() if k != "_use_default_values"}
    known = {k: values[k] for k in defaults(name)}
    for key, (allowed, reason) in _ONLY.get(name, {}).items():
        if not any(known[key] is v or known[key] == v for v in allowed):
            raise ValueError(f"{name} with {key}={known[key]!r} cannot be imitated: {reason}; {_KEEP}")
    path = "flow" if CLASSES[name] == "vp" and known.get("use_flow_sigmas") else CLASSES[name]
    values["prediction_type"] = prediction = _prediction(name, path, values)
    if known.get("timestep_type") == "continuous" and prediction == "v_prediction":
        path, values["sigma_data"] = "edm", 1.0
    values.update(path=path, stock=name)
    check(values)
    return values


def infer(config: Mapping[str, Any]) -> str | None:
    """Returns the class all of whose parameters a configuration holds, the one with most of them, or None.

    diffusers writes the name of the class on saving only. Of classes with the same parameters (`_TWINS`) the usual one is taken,
    or the one that makes the caller name a solver; only flow-match Heun is told by as few as two keys.
    """
    there = (n for n in (*CLASSES, *REFUSED) if n not in _TWINS and hasattr(diffusers, n))
    full = [n for n in there if set(defaults(n)) <= set(config)]
    best = max(full, key=lambda n: len(defaults(n)), default=None)
    small = best is not None and len(defaults(best)) < 6
    return None if small and best != "FlowMatchHeunDiscreteScheduler" else best


def check_told(config: Mapping[str, Any]) -> None:
    """Refuses a nameless configuration that several classes with solvers of their own have.

    Raises:
        ValueError: with the names of the classes.
    """
    if "_class_name" not in config and infer(config) == "LMSDiscreteScheduler":
        names = " or ".join(("LMSDiscreteScheduler", *_KDPM2))
        raise ValueError(
            f"this configuration may be that of {names}, which run different solvers; pass the scheduler itself, or solver="
        )


def own(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the imitated class itself reads of a translated configuration, checked.

    A configuration that came from another class carries keys that the class in hand ignores. Only sigma_min and sigma_max are
    read by every class that has karras grids, whether it declares them or not.

    Raises:
        ValueError: for a configuration that does not come from `translate`, or contradicts itself.
    """
    name = config.get("stock")
    if name not in CLASSES:
        raise ValueError(f"configuration without a stock class (stock={name!r}); get it from translate(config)")
    check(config)
    known = defaults(name)
    keys = ("sigma_min", "sigma_max", "sigma_data", "stock", "path", "prediction_type")
    return {**known, **{k: config[k] for k in (*known, *keys) if k in config}}


@cache
def defaults(name: str) -> Mapping[str, Any]:
    """Returns the parameters of a class with their defaults; LTX's include those of the flow class that lays its grid."""
    values = _signature(name)
    if values is None:
        twin, others = _STAND_INS[name]
        values = {**defaults(twin), **others}
    if name == "LTXEulerAncestralRFScheduler":
        values = {**defaults("FlowMatchEulerDiscreteScheduler"), **values}
    return MappingProxyType(values)


def check(values: Config) -> None:
    """Raises ValueError where parameters of a translated configuration contradict each other."""
    name = values["stock"]
    known = {k: values[k] for k in defaults(name) if k in values}
    for key, allowed in _CHOICES.items():
        if key in known and known[key] not in allowed:
            raise ValueError(f"{name} with {key}={known[key]!r}: unknown; choose one of {', '.join(allowed)}")
    flags = [k for k in CONVERSIONS if known.get(k)]
    if len(flags) > 1:
        raise ValueError(f"{name} with both {flags[0]}=True and {flags[1]}=True; set one of them to False")
    flow = bool(known.get("use_flow_sigmas")) and CLASSES[name] == "vp"
    if flow and flags and (name, flags[0]) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
        raise ValueError(
            f"{name} takes VP levels for flow levels with {flags[0]}=True; set it to False, or name a grid"
        )
    if known.get("shift_terminal") and "use_flow_sigmas" in known and not flow:
        raise ValueError(f"{name} with shift_terminal={known['shift_terminal']!r} needs use_flow_sigmas=True; set it")
    betas, total = known.get("trained_betas"), known.get("num_train_timesteps")
    if betas is not None and len(betas) != total:
        raise ValueError(f"{name} has {len(betas)} trained_betas for num_train_timesteps={total}; make them agree")


def _prediction(name: str, path: str, values: Config) -> str:
    """The prediction type, as diffusers spells it."""
    allowed = _PREDICTIONS[path]
    if "prediction_type" not in defaults(name):
        allowed = allowed[:1]
    wanted = values.get("prediction_type", allowed[0])
    if name == "EulerDiscreteScheduler" and wanted == "original_sample":
        wanted = "sample"
    if wanted not in allowed:
        flagged = "use_flow_sigmas" in defaults(name)
        have = f"{name} with use_flow_sigmas={values['use_flow_sigmas']}" if flagged else name
        cure = "use_flow_sigmas=True" if flagged and wanted == "flow_prediction" else f"prediction_type={allowed[0]!r}"
        raise ValueError(f"{have} expects a model that predicts {' or '.join(allowed)}, got {wanted!r}; set {cure}")
    return str(wanted)


def _signature(name: str) -> dict[str, Any] | None:
    """Parameters and defaults of a stock class, None for a stand-in."""
    parameters = list(inspect.signature(getattr(diffusers, name).__init__).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def _refusal(name: str) -> str:
    if name in REFUSED:
        reason, cure = REFUSED[name]
        return f"{name} cannot be imitated: {reason}; {cure}"
    if name not in dir(diffusers):
        return f"unknown scheduler class {name!r}; name one of diffusers {diffusers.__version__}, such as DDIMScheduler"
    if name not in dir(diffusers.schedulers) or not name.endswith("Scheduler"):
        return f"{name} of diffusers is not a scheduler; pass the configuration of a scheduler"
    return f"{name} came to diffusers after this version of flowkit and is not known; {_KEEP}, or update flowkit"

"""The solver that a scheduler class of diffusers (0.42) runs: which one, and in which order at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from flowkit.schedulers.stock_classes import own
from flowkit.solvers import Gauge, Rule, Solver, find

_EULER: Final = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "EulerDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
)
_HEUN: Final = ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_MULTISTEP: Final = ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler")
# Rows of two predictions, by solver_type; other values mean the class's own.
_RULES: Final[dict[str, Rule]] = {"midpoint": "mid", "heun": "exact", "bh1": "bh1", "bh2": "mid"}


def own_solver(config: Mapping[str, Any]) -> Solver | None:
    """Returns the solver of the imitated class, or None where it is not a table of ours.

    Args:
        config: a configuration from `translate`.
    """
    c = own(config)
    stock, order = c["stock"], c.get("solver_order", 1)
    natural: Gauge = "flow" if c["path"] == "flow" else "eps"
    if stock in _EULER:
        if c.get("stochastic_sampling"):
            return replace(find("ancestral"), noise="full")
        return replace(find("ancestral"), noise="rf") if c.get("eta") else replace(find("euler"), gauge=natural)
    if stock in _HEUN:
        return replace(find("heun"), gauge=natural)
    match stock:
        case "HeliosScheduler" if c["scheduler_type"] == "euler":
            return replace(find("euler"), gauge=natural)
        case "EulerAncestralDiscreteScheduler":
            return find("ancestral")
        case "DDPMScheduler" | "DDPMParallelScheduler":
            return None if c["variance_type"] == "fixed_large_log" else find("ancestral")
        case "LMSDiscreteScheduler":
            return replace(find("lms"), gauge="eps")
        case "KDPM2DiscreteScheduler":
            return replace(find("dpm++2s"), name="dpm2", gauge="eps")
        case "KDPM2AncestralDiscreteScheduler":
            return replace(find("dpm++2s"), name="dpm2", gauge="eps", noise="ancestral")
        case "PNDMScheduler" if c["skip_prk_steps"] and c["timestep_spacing"] == "leading" and _predicts_eps(c):
            # Liu et al. 2022, equation 12, whose first step is made twice.
            return Solver("plms", 2, "eps", "index", order=4, corrector=True)
        case "DEISMultistepScheduler":
            return replace(find("deis"), order=order)
        case "UniPCMultistepScheduler" if c["solver_p"] is None and order <= 3:
            rule = _RULES[c["solver_type"] if c["solver_type"] in ("bh1", "bh2") else "bh2"]
            gauge: Gauge = "x0" if c["predict_x0"] else "eps"
            return replace(find("unipc"), gauge=gauge, rules=(rule, "exact"), order=order)
        case _ if stock in _MULTISTEP or stock == "DPMSolverSinglestepScheduler":
            return _dpm(c, singlestep=stock not in _MULTISTEP)
    return None


def _dpm(c: Mapping[str, Any], singlestep: bool) -> Solver | None:
    """DPM-Solver and DPM-Solver++, as an ODE or an SDE."""
    algorithm, order = c["algorithm_type"], c["solver_order"]
    stochastic = algorithm.startswith("sde-")
    if order > 3 or (stochastic and (singlestep or order > 2)):
        return None  # fresh noise in every row would have to be taken out again; order 3 is none for an SDE
    gauge: Gauge = "eps" if algorithm.endswith("dpmsolver") else "x0"
    rule = _RULES[c["solver_type"] if c["solver_type"] in ("midpoint", "heun") else "midpoint"]
    third: Rule = "half"
    if singlestep:
        third = "exact" if rule == "exact" else "outer"
    family = "dpm" if gauge == "eps" else "dpm++"
    name = f"{'sde-' if stochastic else ''}{family}{order}{'s' if singlestep else 'm'}"
    noise = {"noise": "exact"} if stochastic else {}
    return Solver(name, order, gauge, "lambda", (rule, third), order, singlestep=singlestep, **noise)  # type: ignore[arg-type]


def _predicts_eps(c: Mapping[str, Any]) -> bool:
    return bool(c["prediction_type"] == "epsilon")


def orders(config: Mapping[str, Any], n: int) -> list[int]:
    """Returns the order that the imitated class runs in each of n steps.

    The multistep classes begin with order 1 and lower it at the end: DPM-Solver++ to 1 in the last step if the grid ends at zero
    or n < 15, and to 2 in the last but one if n < 15; DEIS for n < 15 only; UniPC and the predictor of SA-Solver to the steps
    left. Heun's last step, which ends at zero, is Euler's. Singlestep solvers repeat 1, ..., order.

    Args:
        config: a configuration from `translate`.
        n: number of steps, >= 1.

    Raises:
        ValueError: for a class whose solver is none of these.
    """
    c = own(config)
    stock, zero = c["stock"], c.get("final_sigmas_type", "zero") == "zero"
    order = c.get("solver_order", c.get("predictor_order", 1))
    lower, few = c.get("lower_order_final", False), n < 15
    grown = [min(order, i + 1) for i in range(n)]
    match stock:
        case "HeliosScheduler" if c["scheduler_type"] == "euler":
            grown = [1] * n
        case "UniPCMultistepScheduler" | "SASolverScheduler" | "HeliosScheduler":
            if lower:
                grown = [min(k, n - i) for i, k in enumerate(grown)]
            elif zero and stock != "SASolverScheduler":
                grown[-1] = 1  # the class divides by zero here
        case "DPMSolverMultistepScheduler" | "EDMDPMSolverMultistepScheduler" | "CosineDPMSolverMultistepScheduler":
            _lower(grown, lower and few, zero or c["euler_at_final"])
        case "DEISMultistepScheduler":
            _lower(grown, lower and few, False)
        case "DPMSolverSinglestepScheduler":
            grown = [i % order + 1 for i in range(n)]
            if zero or (lower and n % order == 0):
                grown[-1] = 1
        case _ if stock in _HEUN:
            grown = [2] * (n - 1) + [1]
        case _ if (found := own_solver(c)) is None:
            raise ValueError(f"{stock} has no list of orders; choose a solver")
        case _:
            grown = [min(found.order, i + 1) for i in range(n)]
    return grown


def _lower(orders: list[int], few: bool, last: bool) -> None:
    if few and len(orders) > 1:
        orders[-2] = min(orders[-2], 2)
    if few or last:
        orders[-1] = 1

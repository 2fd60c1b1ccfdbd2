"""The solver that a scheduler class of diffusers (0.42) runs: which one, and in which order at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flowkit.schedulers.stock_classes import own

_SOLVERS: Final[dict[str, str]] = {
    "DDIMScheduler": "euler",
    "DDIMParallelScheduler": "euler",
    "CogVideoXDDIMScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "EDMEulerScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "LTXEulerAncestralRFScheduler": "euler",
    "HeliosScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "EDMDPMSolverMultistepScheduler": "dpm++2m",
    "UniPCMultistepScheduler": "unipc",
}
# What else the configuration must say for the solver to be that one.
_PROVIDED: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "DPMSolverMultistepScheduler": {"algorithm_type": ("dpmsolver++", "deis"), "solver_order": (1, 2)},
    "EDMDPMSolverMultistepScheduler": {"algorithm_type": ("dpmsolver++", "deis"), "solver_order": (1, 2)},
    "UniPCMultistepScheduler": {"predict_x0": (True,), "solver_order": (1, 2), "solver_p": (None,)},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": (False, None)},
    "LTXEulerAncestralRFScheduler": {"eta": (0,)},
    "HeliosScheduler": {"scheduler_type": ("euler",)},
}


def solver_spec(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describes the solver of the imitated class, for Euler (DDIM is Euler), Heun, DPM-Solver++(2M) and UniPC up to order 2.

    Args:
        config: a configuration from `translate`.

    Returns:
        None where the class runs another solver (order 3, SDE, ancestral, LMS, PNDM, LCM, ...), otherwise

        - ``name``: "euler", "heun", "dpm++2m" or "unipc";
        - ``order``: 1 or 2; `orders` has it step by step;
        - ``solver_type``: "midpoint" or "heun" of dpm++2m, "bh1" or "bh2" of unipc, otherwise None;
        - ``disable_corrector``: steps whose result UniPC does not correct.
    """
    c = own(config)
    stock = c["stock"]
    if stock not in _SOLVERS or any(c[k] not in allowed for k, allowed in _PROVIDED.get(stock, {}).items()):
        return None
    name, solver_type = _SOLVERS[stock], None
    if name in ("dpm++2m", "unipc"):
        own_types = ("midpoint", "heun") if name == "dpm++2m" else ("bh2", "bh1")
        solver_type = c["solver_type"] if c["solver_type"] in own_types else own_types[0]
    return {
        "name": name,
        "order": c["solver_order"] if solver_type else 2 if name == "heun" else 1,
        "solver_type": solver_type,
        "disable_corrector": list(c.get("disable_corrector", ())),
    }


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
        case _ if _SOLVERS.get(stock) == "heun":
            grown = [2] * (n - 1) + [1]
        case _ if stock not in _SOLVERS:
            raise ValueError(f"{stock} has no list of orders; choose a solver")
    return grown


def _lower(orders: list[int], few: bool, last: bool) -> None:
    if few and len(orders) > 1:
        orders[-2] = min(orders[-2], 2)
    if few or last:
        orders[-1] = 1

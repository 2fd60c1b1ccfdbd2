"""The solvers, as data: a new one is a new entry here, not a new class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from flowkit.paths import Path

Gauge = Literal["eps", "x0", "flow"]
Rule = Literal["exact", "mid", "bh1"]


@dataclass(frozen=True)
class Solver:
    """One method, as data.

    Attributes:
        name: what users call it.
        facts: order, evaluations a step, deterministic or not, what it converges to, storage.
        gauge: what is held or interpolated; None means flow velocity on the flow path and eps elsewhere.
        tau: variable of the interpolation, the gauge's clock "u" or the log-SNR "lambda".
        rule: "exact" integrates the interpolant (32-point Gauss-Legendre); "mid" takes its value at the middle in log-SNR
            (the "simplified" second-order formulas); "bh1" is "mid" with the slope times ``h / (1 - exp(-h))`` (Zhao et al.
            2023, B1).
        order: number of predictions that a multistep row interpolates.
        corrector: fuse a corrector through the new prediction into the next row (Zhao et al. 2023).
        tableau: row j holds the weights of the predictions so far in the start of stage j + 1; None for multistep methods.
    """

    name: str
    facts: str
    gauge: Gauge | None = None
    tau: Literal["u", "lambda"] = "u"
    rule: Rule = "exact"
    order: int = 1
    corrector: bool = False
    tableau: tuple[tuple[float, ...], ...] | None = None

    @property
    def stages(self) -> int:
        """Network evaluations of one full step."""
        return len(self.tableau) if self.tableau else 1

    @property
    def first_order(self) -> bool:
        """Whether a step holds one prediction: DDIM, and Euler in every gauge."""
        return self.order == 1 and not self.tableau and not self.corrector


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(
            "euler",
            "order 1; 1 evaluation a step; deterministic (a row per eta > 0 is stochastic); to the ODE; stores 0",
        ),
        Solver("ddim", "order 1; 1 evaluation a step; another name of euler, eps gauge", gauge="eps"),
        Solver(
            "heun",
            "order 2; 2 evaluations a step, 1 where it ends at sigma 0; deterministic; to the ODE; stores 1",
            tableau=((1.0,), (0.5, 0.5)),
        ),
        Solver(
            "dpm++2m",
            "order 2; 1 evaluation a step; deterministic; to the ODE; stores 1",
            gauge="x0",
            tau="lambda",
            rule="mid",
            order=2,
        ),
        Solver(
            "unipc",
            "order 2, 3 with its corrector; 1 evaluation a step; deterministic; to the ODE; stores 2",
            gauge="x0",
            tau="lambda",
            rule="mid",
            order=2,
            corrector=True,
        ),
    )
}


def find(name: str) -> Solver:
    """Returns a solver by name, as published.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


def solver(name: str, path: Path) -> Solver:
    """Returns a solver by name, in the form that suits the path.

    UniPC interpolates flow velocity in flow time on the flow path: no end rules and clean orders; elsewhere it is the published
    x0 form in log-SNR.

    Raises:
        ValueError: for an unknown name.
    """
    found = find(name)
    if name == "unipc" and path.name == "flow":
        found = replace(found, gauge="flow", tau="u", rule="exact")
    return replace(found, gauge=found.gauge or ("flow" if path.name == "flow" else "eps"))

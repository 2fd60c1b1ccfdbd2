"""The solvers, as data: a new one is a new entry here, not a new class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from flowkit.paths import Path

Gauge = Literal["eps", "x0", "flow"]
Rule = Literal["exact", "mid", "bh1", "half", "outer"]
Noise = Literal["ancestral", "rf", "full", "exact", "euler"]
Tableau = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Solver:
    """One method, as data.

    Attributes:
        name: what users call it.
        accuracy: order of convergence; of a stochastic method the weak one.
        gauge: what is held or interpolated; None means flow velocity on the flow path and eps elsewhere.
        tau: variable of the interpolation: the gauge's clock "u", the log-SNR "lambda", or the "index" of the step, as if steps
            were equal.
        rules: how a row weights 2, 3, ... predictions, the last for more: "exact" integrates the interpolant (32-point
            Gauss-Legendre); "mid" takes its value at the middle in log-SNR (the "simplified" second-order formulas); "bh1" is
            "mid" with the slope times ``h / (1 - exp(-h))`` (Zhao et al. 2023, B1); "half" is "exact" with half the quadratic
            term (DPM-Solver++(3M) as published in diffusers); "outer" is "exact" through the newest and the oldest alone.
        order: number of predictions that a row interpolates.
        corrector: fuse a corrector through the new prediction into the next row (Zhao et al. 2023).
        tableau: row j holds the weights of the predictions so far in the start of stage j + 1; None for multistep methods.
        singlestep: a row of order k starts where the last row of order 1 did, k - 1 rows ago (Lu et al. 2022, DPM-Solver).
        inner: extra calls inside a step of a singlestep method, as fractions of the step in log-SNR.
        reach: longest step, in log-SNR and in units of the one before, that a row extrapolates over; over one r times as long it
            takes 1 / r^2 of the extrapolation.
        noise: where noise comes from: None, a deterministic method; "ancestral" puts it in place of part of eps (Song et al.
            2021, equation 16), "rf" of another part (that of LTXEulerAncestralRFScheduler), "full" of all of it; "exact"
            integrates the reverse SDE of the gauge, "euler" takes its noise level at the start (Euler-Maruyama).
        remark: what else a user should know.
    """

    name: str
    accuracy: int
    gauge: Gauge | None = None
    tau: Literal["u", "lambda", "index"] = "u"
    rules: tuple[Rule, ...] = ("exact",)
    order: int = 1
    corrector: bool = False
    tableau: Tableau | None = None
    singlestep: bool = False
    inner: tuple[float, ...] = ()
    reach: float = math.inf
    noise: Noise | None = None
    remark: str = ""

    @property
    def stages(self) -> int:
        """Network evaluations of one full step."""
        return len(self.tableau) if self.tableau else 1 + len(self.inner)

    @property
    def first_order(self) -> bool:
        """Whether a step holds one prediction: DDIM, and Euler in every gauge."""
        return self.order == 1 and not self.tableau and not self.corrector

    @property
    def one_step(self) -> bool:
        """Whether a step uses nothing of the steps before it."""
        return self.first_order or bool(self.tableau or self.inner)

    @property
    def stored(self) -> int:
        """Predictions kept besides the current one."""
        return len(self.tableau) - 1 if self.tableau else self.order - 1 + self.corrector

    @property
    def facts(self) -> str:
        """One line: order, evaluations a step, deterministic or not, what it converges to, storage."""
        calls = "1 evaluation a step" if self.stages == 1 else f"{self.stages} evaluations a step"
        kind = ("stochastic", "SDE of the same marginals") if self.noise else ("deterministic", "probability-flow ODE")
        weak = "weak order" if self.noise else "order"
        line = f"{weak} {self.accuracy}; {calls}; {kind[0]}; converges to the {kind[1]}; stores {self.stored}"
        return f"{line}; {self.remark}" if self.remark else line


_HEUN: Tableau = ((1.0,), (0.5, 0.5))
_LAST = "1 evaluation, Euler, where it ends at sigma 0"
_START = "its first steps have lower order, which a uniform flow grid shows and a Karras grid hides"

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("euler", 1, remark="eta > 0 makes it ancestral"),
        Solver("ddim", 1, gauge="eps", remark="another name of euler (Song et al. 2021, equation 12)"),
        Solver("heun", 2, tableau=_HEUN, remark=_LAST),
        Solver("midpoint", 2, tableau=((0.5,), (0.0, 1.0))),
        Solver("ralston", 2, tableau=((2 / 3,), (0.25, 0.75))),
        Solver("rk4", 4, tableau=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)), remark=_LAST),
        Solver("ab2", 2, order=2),
        Solver("ab3", 3, order=3, remark=_START),
        Solver("ab4", 4, order=4, remark=_START),
        Solver("lms", 4, order=4, remark=f"another name of ab4 (Katherine Crowson's k-diffusion); {_START}"),
        Solver("dpm++1s", 1, gauge="x0", remark="ddim that stores x0"),
        Solver("dpm++2s", 2, "x0", "lambda", ("mid",), 2, singlestep=True, inner=(0.5,), remark=_LAST),
        Solver("dpm++2m", 2, "x0", "lambda", ("mid",), 2),
        Solver(
            "dpm++3m", 2, "x0", "lambda", ("mid", "half"), 3,
            remark="as published, with half the quadratic term; with all of it the order would be 3",
        ),
        Solver("sde-dpm++2m", 2, "x0", "lambda", ("mid",), 2, noise="exact"),
        Solver(
            "unipc", 3, "x0", "lambda", ("mid", "exact"), 2, corrector=True,
            remark="2 without its corrector; in flow time on the flow path, in log-SNR as published elsewhere",
        ),
        Solver("deis", 2, "eps", "lambda", order=2),
        Solver("euler-maruyama", 1, noise="euler"),
        Solver("ancestral", 1, gauge="x0", noise="ancestral", remark="euler with eta = 1: DDPM, Euler a"),
        Solver("edm", 2, gauge="eps", tableau=_HEUN, remark=f"{_LAST}; s_churn > 0 adds noise, to the SDE"),
    )
}  # fmt: skip


def find(name: str) -> Solver:
    """Returns a solver by name, as published.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


def solver(name: str, path: Path, gauge: str | None = None) -> Solver:
    """Returns a solver by name, in the form that suits the path.

    Multistep methods that extrapolate x0 in log-SNR reach twice the step before on the flow path, whose grids often end in a leap
    (flow-match Euler's from sigma .1 to .001, say); on the paths that they were published for they are as published.

    Args:
        name: one of `SOLVERS`.
        path: the path of the sample.
        gauge: what is held or interpolated, for solvers that leave it open: "eps" or "flow", for "unipc" also "x0". None means
            the path's own, flow velocity on the flow path and eps elsewhere; UniPC then interpolates flow velocity in flow time
            on the flow path (no end rules and clean orders), and x0 in log-SNR, as published, elsewhere. "flow" on another path
            straightens it: the solver sees ``(1 - s) x0 + s eps``.

    Raises:
        ValueError: for an unknown name, or a gauge that the solver does not have.
    """
    found = find(name)
    open_to: tuple[Gauge, ...] = ("eps", "flow", "x0") if name == "unipc" else ("eps", "flow")
    if path.name == "flow" and found.gauge == "x0" and found.tau == "lambda" and not found.singlestep:
        found = replace(found, reach=2.0)
    if gauge is None and (found.gauge is None or name == "unipc"):
        gauge = "flow" if path.name == "flow" else found.gauge or "eps"
    if gauge is None:
        return found
    fixed = found.gauge and name not in ("unipc", "edm")
    if fixed or gauge not in open_to:
        choice = f"always holds {found.gauge}" if fixed else f"takes {', '.join(open_to)}"
        raise ValueError(f"solver {name!r} {choice}, got gauge={gauge!r}; choose another solver or leave the gauge out")
    chosen = next(g for g in open_to if g == gauge)
    if name == "unipc" and chosen == "flow":
        return replace(found, gauge=chosen, tau="u", rules=("exact",))
    return replace(found, gauge=chosen)

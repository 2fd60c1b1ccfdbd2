"""Paths between data and noise, ``x_t = alpha_t x0 + sigma_t eps``, as rows of one table.

Every path is the straight path in other units. With ``s = sigma / (alpha + sigma)`` in [0, 1] (flow time) and
``y = (1 - s) x0 + s eps``, any path is ``x = y / n(s)`` for one positive function n:

    flow            n = 1               alpha + sigma = 1
    vp, cosine      n = hypot(1-s, s)   alpha^2 + sigma^2 = 1
    ve, edm         n = 1 - s           alpha = 1

so solvers are written once, for y. What else tells checkpoints apart is the clock: the model's own time ``t(s)``. All numbers
are Python floats (float64); s is finite at both ends, the log-SNR ``log((1-s)/s)`` is not.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

PathName = Literal["flow", "vp", "cosine", "ve", "edm"]


@dataclass(frozen=True)
class Path:
    """One path and its clock; build it with `flow`, `vp`, `cosine`, `ve` or `edm`.

    Attributes:
        name: "flow", "vp", "cosine", "ve" or "edm".
        num_train_timesteps: the model time of pure noise on the continuous clocks, and the number of discrete times of "vp".
        rhos: for "vp", sigma/alpha at the model times 0, 1, ...; increasing, the last may be inf.
        sigma_data: for "edm", standard deviation of the data (Karras et al. 2022, table 1).
    """

    name: PathName
    num_train_timesteps: int = 1000
    rhos: tuple[float, ...] = ()
    sigma_data: float = 0.5

    def norm(self, s: float) -> float:
        """Returns n(s): the path's coordinates are ``x = y / n(s)``."""
        match self.name:
            case "flow":
                return 1.0
            case "ve" | "edm":
                return 1.0 - s
            case _:
                return math.hypot(1.0 - s, s)

    def alpha(self, s: float) -> float:
        """Returns the signal level at flow time s."""
        return 1.0 if self.name in ("ve", "edm") else (1.0 - s) / self.norm(s)

    def sigma(self, s: float) -> float:
        """Returns the noise level at flow time s; inf for VE and EDM at s = 1."""
        return rho(s) if self.name in ("ve", "edm") else s / self.norm(s)

    def level(self, s: float) -> float:
        """Returns what diffusers exports as ``sigmas``: s itself on the flow path, sigma/alpha on every other."""
        return s if self.name == "flow" else rho(s)

    def at_level(self, level: float) -> float:
        """Returns the flow time of an exported level; the inverse of `level`."""
        return level if self.name == "flow" else from_rho(level)

    def time(self, s: float) -> float:
        """Returns the model's own time at flow time s.

        flow ``T s``; vp the index of the training betas, interpolated in log(sigma/alpha); cosine ``T (2/pi) atan(sigma/alpha)``;
        ve sigma; edm ``ln(sigma) / 4`` (Karras et al. 2022, table 1).
        """
        match self.name:
            case "flow":
                return self.num_train_timesteps * s
            case "cosine":
                return self.num_train_timesteps * math.atan2(s, 1.0 - s) * 2 / math.pi
            case "ve":
                return rho(s)
            case "edm":
                return 0.25 * math.log(rho(s)) if s > 0 else -math.inf
        level = rho(s)
        if level <= self.rhos[0]:
            return 0.0
        if level >= self.rhos[-1]:
            return float(len(self.rhos) - 1)
        low = bisect.bisect_right(self.rhos, level) - 1
        below, above = self.rhos[low], self.rhos[low + 1]
        if math.isinf(above):
            return low + (s - from_rho(below)) / (1.0 - from_rho(below))
        return low + math.log(level / below) / math.log(above / below)

    def at_time(self, time: float) -> float:
        """Returns the flow time at a model time; the inverse of `time`.

        Raises:
            ValueError: for a time outside the model's range.
        """
        match self.name:
            case "flow":
                s = time / self.num_train_timesteps
            case "cosine":
                angle = time / self.num_train_timesteps * math.pi / 2
                s = math.sin(angle) / (math.sin(angle) + math.cos(angle))
            case "ve":
                s = from_rho(time)
            case "edm":
                s = from_rho(math.exp(4 * time)) if time < 170 else math.inf
            case _:
                s = self._at_index(time)
        if not 0 <= s <= 1:
            raise ValueError(f"model time {time:g} lies outside the path {self.name!r} (s = {s:g}); times run from 0 up to "
                             f"{self.num_train_timesteps}")  # fmt: skip
        return s

    def _at_index(self, time: float) -> float:
        last = len(self.rhos) - 1
        if not 0 <= time <= last:
            raise ValueError(f"model time {time:g} lies outside the trained times 0 ... {last}")
        low = min(int(time), last - 1)
        below, above, w = self.rhos[low], self.rhos[low + 1], time - low
        if math.isinf(above):
            return (1 - w) * from_rho(below) + w
        if w in (0.0, 1.0):
            return from_rho(above if w else below)
        return from_rho(below ** (1 - w) * above**w)

    @property
    def start(self) -> float:
        """The flow time of the noisiest level that the model knows."""
        return from_rho(self.rhos[-1]) if self.name == "vp" else 1.0

    def input_scale(self, s: float) -> float:
        """Returns what the sample is multiplied with before the network: c_in of Karras et al. 2022 for "edm", otherwise 1."""
        return 1.0 / math.hypot(rho(s), self.sigma_data) if self.name == "edm" else 1.0


def rho(s: float) -> float:
    """Returns ``sigma / alpha = s / (1 - s)``; inf at s = 1."""
    return s / (1.0 - s) if s < 1.0 else math.inf


def from_rho(level: float) -> float:
    """Returns ``s = rho / (1 + rho)``; 1 at rho = inf."""
    return level / (1.0 + level) if math.isfinite(level) else 1.0


def log_snr(s: float) -> float:
    """Returns ``lambda = log(alpha / sigma) = log((1 - s) / s)``; inf at s = 0, -inf at s = 1."""
    if s <= 0.0:
        return math.inf
    return math.log((1.0 - s) / s) if s < 1.0 else -math.inf


def flow(num_train_timesteps: int = 1000) -> Path:
    """The rectified-flow path ``x = (1 - s) x0 + s eps`` (Liu et al. 2022), model time ``T s``."""
    return Path("flow", num_train_timesteps)


def cosine(num_train_timesteps: int = 1000) -> Path:
    """The continuous cosine path ``alpha = cos(pi u / 2), sigma = sin(pi u / 2)`` (Nichol & Dhariwal 2021), model time ``T u``."""
    return Path("cosine", num_train_timesteps)


def ve(num_train_timesteps: int = 1000) -> Path:
    """The variance-exploding path ``x = x0 + sigma eps``; the model's time is sigma."""
    return Path("ve", num_train_timesteps)


def edm(num_train_timesteps: int = 1000, sigma_data: float = 0.5) -> Path:
    """The VE path with the preconditioning of Karras et al. 2022, table 1: c_in outside the network, time ``ln(sigma) / 4``."""
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}; EDM checkpoints use 0.5")
    return Path("edm", num_train_timesteps, sigma_data=sigma_data)


def vp(betas: Sequence[float]) -> Path:
    """The variance-preserving path of a discrete diffusion, ``alpha^2 = prod (1 - beta)`` (Ho et al. 2020, equation 4).

    Args:
        betas: the training betas, at least two, each in (0, 1]; a last beta of 1 is zero terminal SNR.

    Raises:
        ValueError: for betas outside (0, 1].
    """
    values = np.asarray(betas, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(
            f"betas must be a list of at least two numbers in (0, 1], got {np.array2string(values, threshold=6)}; correct "
            "beta_start, beta_end or trained_betas"
        )
    alphas_cumprod = np.cumprod(1.0 - values)
    with np.errstate(divide="ignore"):
        rhos = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
    return Path("vp", len(values), tuple(float(r) for r in rhos))


def betas(
    schedule: str = "scaled_linear",
    start: float = 0.00085,
    end: float = 0.012,
    count: int = 1000,
) -> list[float]:
    """Returns the betas of diffusers' named schedules, in float64.

    Args:
        schedule: "linear", "scaled_linear" (linear in sqrt(beta); Rombach et al. 2022), "squaredcos_cap_v2" (Nichol & Dhariwal
            2021, equation 17) or "sigmoid".
        start: first beta; not read by "squaredcos_cap_v2".
        end: last beta; not read by "squaredcos_cap_v2".
        count: number of training times.

    Returns:
        ``count`` betas.

    Raises:
        ValueError: for an unknown schedule.
    """
    match schedule:
        case "linear":
            values = np.linspace(start, end, count)
        case "scaled_linear":
            values = np.linspace(start**0.5, end**0.5, count) ** 2
        case "squaredcos_cap_v2":
            bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            values = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        case "sigmoid":
            values = (end - start) / (1 + np.exp(-np.linspace(-6, 6, count))) + start
        case _:
            raise ValueError(f"unknown beta_schedule {schedule!r}; choose linear, scaled_linear, squaredcos_cap_v2 or sigmoid, "
                             "or pass trained_betas")  # fmt: skip
    return [float(v) for v in values]


def named(name: str, trained: Sequence[float] | None = None, sigma_data: float = 0.5) -> Path:
    """Returns a path by name.

    Args:
        name: "flow", "vp", "cosine", "ve" or "edm".
        trained: training betas of "vp"; None means Stable Diffusion's.
        sigma_data: standard deviation of the data on "edm".

    Raises:
        ValueError: for an unknown name.
    """
    match name:
        case "flow":
            return flow()
        case "vp":
            return vp(betas() if trained is None else trained)
        case "cosine":
            return cosine()
        case "ve":
            return ve()
        case "edm":
            return edm(sigma_data=sigma_data)
    raise ValueError(f"unknown path {name!r}; choose flow, vp, cosine, ve or edm")

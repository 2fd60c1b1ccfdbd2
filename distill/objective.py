"""What a student learns from: at which flow times, and how a difference is measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Generator, Tensor

from flowkit.distill.lpips import LPIPS

Times = Callable[[int, Generator], Tensor]  # (batch, generator) -> flow times (batch,) in [0, 1], float32; 1 is noise
_SHARE = 0.75
_HUBER = 0.00054  # Song & Dhariwal's constant, of both scales below
_LEAST = 1e-6  # LPIPS falls as s^2, so that divided by s it is 0 at 0
METRICS = ("l2", "pseudo-huber", "lpips")
BLENDS = ("lpips-huber", "lpips-huber-1/t")


class Metric(Protocol):
    """A distance of samples: (found (B, ...), wanted (B, ...)) -> (B,)."""

    def __call__(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Returns the distance of each pair."""


def times(given: str | Sequence[float]) -> Times:
    """Returns a law of flow times.

    Args:
        given: "uniform"; "logit-normal" (Esser et al. 2024, arXiv 2403.03206, section 3.1: ``s = sigmoid(m + d z)``), with
            "logit-normal:m,d" for others than 0,1; "u-shaped" (Lee et al. 2024, arXiv 2405.20320: density ``~ e^{as} +
            e^{a(1-s)}``), with "u-shaped:a" for others than 4; "mode" (Esser et al., equation 20), with "mode:scale" for others
            than 1.29; "noise": three quarters of each batch at exactly 1, the rest uniform; or levels in [0, 1], also as text
            ("0.25,0.5,1.0"): drawn evenly, each as often as the batch divides by their number.

    Raises:
        ValueError: for an unknown name, or numbers out of range.
    """
    if not isinstance(given, str):
        return _levels(given)
    name, _, numbers = given.partition(":")
    if name not in _LAWS:
        levels = _numbers(given)
        if levels is None:
            raise ValueError(f"no law of flow times is called {given!r}; there are {', '.join(_LAWS)}, and levels such as "
                             "0.25,0.5,1.0")  # fmt: skip
        return _levels(levels)
    make, most = _LAWS[name]
    values = _numbers(numbers) if numbers else []
    if values is None or len(values) > most:
        raise ValueError(
            f"flow times {given!r}: {name} takes at most {most} numbers after a colon; write {name} alone for the usual"
        )
    return make(*values)


def metric(name: str, *, c: float | None = None, weights: str | os.PathLike[str] | None = None) -> Metric:
    """Returns a distance of samples.

    Args:
        name: "l2", the mean of ``(found - wanted)^2`` over the elements; "pseudo-huber", ``sqrt(|found - wanted|^2 + c^2) - c``
            over the whole sample (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3); "lpips", see `flowkit.distill.lpips.LPIPS`.
        c: of "pseudo-huber" alone, > 0. None means ``0.00054 sqrt(d)`` for d elements.
        weights: of "lpips" alone: the folder of its two files. None searches this machine.

    Raises:
        FileNotFoundError: where the weights of "lpips" are not on this machine.
        ValueError: for an unknown name, or an argument that the distance does not have.
    """
    if name not in METRICS:
        raise ValueError(f"no distance is called {name!r}; there are {', '.join(METRICS)}")
    if c is not None and (name != "pseudo-huber" or not c > 0):
        raise ValueError(f"distance {name!r} with c={c!r}: c belongs to pseudo-huber and is above 0; leave it out")
    if weights is not None and name != "lpips":
        raise ValueError(f"distance {name!r} has no weights, got {os.fspath(weights)!r}; leave them out")
    if name == "lpips":
        return LPIPS(weights)
    return _l2 if name == "l2" else _PseudoHuber(c)


class Comparison:
    """How far a network's output is from the one wanted.

    "lpips-huber" is that of Lee, Lin & Fanti 2024 (arXiv 2405.20320, section 4), on the flow path with t the flow time s:

        (1 - t) (sqrt(|v - v*|^2 + c^2) - c) / d  +  LPIPS(x0_hat, x_0),       c = 0.00054 d for d elements,

    and "lpips-huber-1/t" divides its second term by t.

    Args:
        name: one of `METRICS`, see `metric`, or of `BLENDS`.
        space: "model" compares outputs, "x0" the states to which they lead; "lpips" always compares the latter, blends both.

    Raises:
        FileNotFoundError: where the weights of LPIPS are needed and not on this machine.
        ValueError: for an unknown name or space, and for a blend in the space "x0".
    """

    def __init__(self, name: str, space: str = "model") -> None:
        if space not in ("model", "x0"):
            raise ValueError(f"unknown space {space!r}; choose model or x0")
        if name in BLENDS and space == "x0":
            raise ValueError(f"{name} compares outputs and samples, which reflow alone has in its space 'model'; here use lpips or "
                             "pseudo-huber")  # fmt: skip
        if name not in (*METRICS, *BLENDS):
            raise ValueError(f"no distance is called {name!r}; there are {', '.join((*METRICS, *BLENDS))}")
        self._space = "x0" if name == "lpips" else space
        self._metric = _huber_of_elements if name in BLENDS else metric(name)
        self._seen = metric("lpips") if name in BLENDS else None
        self._divided = name == "lpips-huber-1/t"

    def __call__(self, output: tuple[Tensor, Tensor], state: tuple[Tensor, Tensor], s: Tensor) -> Tensor:
        """Returns the distance of each row, (B,).

        Args:
            output: of the network, and the one wanted, (B, ...) each.
            state: to which the output leads, and the one wanted, (B, ...) each.
            s: where each row lies on its line, 1 at the start and 0 at the end, (B,); from pure noise to data that is flow time.
        """
        found = self._metric(*(output if self._space == "model" else state))
        if self._seen is None:
            return found
        s = s.to(found)
        return (1 - s) * found + self._seen(*state) / (s.clamp_min(_LEAST) if self._divided else 1)


def _l2(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().flatten(1).mean(1)


class _PseudoHuber:
    def __init__(self, c: float | None) -> None:
        self._c = c

    def __call__(self, found: Tensor, wanted: Tensor) -> Tensor:
        square = (found - wanted).square().flatten(1)
        c = _HUBER * math.sqrt(square.shape[1]) if self._c is None else self._c
        total = square.sum(1)
        return total / ((total + c * c).sqrt() + c)  # sqrt(total + c^2) - c, without its cancellation


def _huber_of_elements(found: Tensor, wanted: Tensor) -> Tensor:
    count = found[0].numel()
    return _PseudoHuber(_HUBER * count)(found, wanted) / count


def _uniform() -> Times:
    return lambda count, generator: torch.rand(count, generator=generator)


def _noise() -> Times:
    def draw(count: int, generator: Generator) -> Tensor:
        s = torch.rand(count, generator=generator)
        s[: round(_SHARE * count)] = 1.0
        return s

    return draw


def _logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    if not std > 0 or not math.isfinite(mean + std):
        raise ValueError(f"logit-normal flow times need a finite mean and a deviation above 0, got {mean:g},{std:g}")
    return _sd3("logit_normal", logit_mean=mean, logit_std=std)


def _mode(scale: float = 1.29) -> Times:
    most = 2 / (math.pi - 2)
    if not -1 <= scale <= most:
        raise ValueError(
            f"mode flow times need a scale from -1 to {most:.4f}, where the law is monotone, got {scale:g}"
        )
    return _sd3("mode", mode_scale=scale)


def _sd3(scheme: str, **numbers: float) -> Times:
    def draw(count: int, generator: Generator) -> Tensor:
        s: Tensor = compute_density_for_timestep_sampling(scheme, count, **numbers, generator=generator)
        return s.clamp(0, 1)  # of rounding

    return draw


def _u_shaped(a: float = 4.0) -> Times:
    if not 0 < a <= 50:
        raise ValueError(f"u-shaped flow times need a number above 0 and at most 50, got {a:g}; usual is 4")

    def draw(count: int, generator: Generator) -> Tensor:
        # With r = s - 1/2 the density is ~ cosh(a r): the inverse of F = (1 + sinh(a r) / sinh(a / 2)) / 2.
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        return (0.5 + ((2 * u - 1) * math.sinh(a / 2)).asinh() / a).clamp(0, 1).float()

    return draw


def _levels(given: Sequence[float]) -> Times:
    levels = torch.tensor([float(level) for level in given])
    if not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"levels of flow time lie between 0 (data) and 1 (noise), got {[*given]}")

    def draw(count: int, generator: Generator) -> Tensor:
        whole, rest = divmod(count, len(levels))
        s = torch.cat([levels.repeat(whole), levels[torch.randperm(len(levels), generator=generator)[:rest]]])
        return s[torch.randperm(count, generator=generator)]

    return draw


def _numbers(text: str) -> list[float] | None:
    """The numbers of a list with commas; None where there is anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None


# Name -> its maker, and how many numbers that takes.
_LAWS: dict[str, tuple[Callable[..., Times], int]] = {
    "uniform": (_uniform, 0),
    "logit-normal": (_logit_normal, 2),
    "u-shaped": (_u_shaped, 1),
    "mode": (_mode, 1),
    "noise": (_noise, 0),
}

"""Averages of weights in training: the classic exponential one, and power-function profiles whose length is chosen afterwards.

A power-function average after t updates weighs the weights of update i by the share of ``(tau / t)^gamma`` that lies in
``(i - 1, i]`` (Karras et al. 2024, arXiv 2312.02696, section 3.1). Its length is ``sigma_rel``, the standard deviation of that
profile over t. Snapshots of two such averages give any other, long after the training: the profile that is wanted is the
combination of stored profiles that is nearest to it (section 3.2).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from flowkit import weights

LONGEST = 1 / math.sqrt(12)  # sigma_rel of gamma = 0, the plain mean of all updates
# Of the profile's norm: a synthesized profile further away than this is refused.
_FAR = 0.05
_SUFFIX = ".safetensors"


def to_sigma_rel(gamma: float) -> float:
    """Returns the relative length ``sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))`` of a power-function profile.

    Args:
        gamma: the exponent, > 0.

    Raises:
        ValueError: for an exponent out of range.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"the exponent of a power-function average must be above 0, got {gamma!r}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def to_gamma(sigma_rel: float) -> float:
    """Returns the exponent of a power-function profile, the largest root of a cubic; the inverse of `to_sigma_rel`.

    Args:
        sigma_rel: relative length, in (0, 1 / sqrt(12)).

    Raises:
        ValueError: for a length out of range.
    """
    if not 0 < sigma_rel < LONGEST:
        raise ValueError(f"sigma_rel of a power-function average lies between 0 and 1/sqrt(12) = {LONGEST:.4f}, "
                         f"got {sigma_rel!r}; usual are 0.05 to 0.10")  # fmt: skip
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Averages:
    """Follows the trainable parameters of a network; the averages are float32, or wider where the parameters are.

    Args:
        parameters: (name, parameter), as ``network.named_parameters()`` gives them; those that need no gradient are left out.
            They may be shards (DTensor). They stay on their device from here on.
        decay: of the classic average, the highest: after n updates it is ``min(decay, (1 + n) / (10 + n))``, and 0 at the first.
        profiles: sigma_rel of each power-function average.

    Attributes:
        step: number of updates so far.
        tensors: the classic average, in the order of the parameters.

    Raises:
        ValueError: for parameters of which none is trained, or a decay or a length out of range.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float, profiles: Sequence[float] = ()) -> None:
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self._parameters:
            raise ValueError("none of the parameters needs a gradient; make the trained ones require one first")
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the averaged weights must be at least 0 and below 1, got {decay!r}")
        self._decay, self._gammas = decay, {float(sigma_rel): to_gamma(sigma_rel) for sigma_rel in profiles}
        self.step = 0
        self.tensors = self._copies()
        self._profiles = {sigma_rel: self._copies() for sigma_rel in self._gammas}

    def _copies(self) -> list[Tensor]:
        return [p.detach().to(_wide(p), copy=True) for p in self._parameters.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters of an update into every average.

        Args:
            step: the number of the update, from 1, each in turn: the profiles depend on it.

        Raises:
            ValueError: for a number out of turn.
        """
        if step != self.step + 1:
            raise ValueError(
                f"update {step} cannot follow update {self.step}; restore the averages of the update before it"
            )
        self.step = step
        now = [_local(p).to(_wide(p)) for p in self._parameters.values()]
        _pull(self.tensors, now, 1 - (0.0 if step == 1 else min(self._decay, step / (9 + step))))
        for sigma_rel, average in self._profiles.items():
            _pull(average, now, 1 - (1 - 1 / step) ** (self._gammas[sigma_rel] + 1))

    def profile(self, sigma_rel: float) -> list[Tensor]:
        """Returns the power-function average of this length, in the order of the parameters.

        Raises:
            ValueError: where it is not followed.
        """
        if sigma_rel not in self._profiles:
            raise ValueError(f"sigma_rel {sigma_rel!r} is not followed, only {[*self._profiles]}; add it to profiles")
        return self._profiles[sigma_rel]

    @contextmanager
    def applied(self, sigma_rel: float | None = None) -> Iterator[None]:
        """Puts an average into the parameters, and afterwards the parameters back, bit for bit.

        Args:
            sigma_rel: of a followed power-function average. None means the classic one.
        """
        average = self.tensors if sigma_rel is None else self.profile(sigma_rel)
        parameters = [_local(p) for p in self._parameters.values()]
        before = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, [_local(t) for t in average])
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, before)

    def state(self) -> dict[str, Tensor]:
        """Returns every average, not copied: "ema.NAME" and "power_SIGMA.NAME" for each parameter's name."""
        return {
            f"{key}.{name}": t
            for key, own in self._all().items()
            for name, t in zip(self._parameters, own, strict=True)
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Takes what `state` returned, after that number of updates, and goes on from there.

        Args:
            tensors: by the names of `state`, whole or shards, on any device; others are ignored.
            step: number of updates so far.

        Raises:
            ValueError: where one is missing or of another shape.
        """
        for key, average in self.state().items():
            if key not in tensors or tensors[key].shape != average.shape:
                found = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is missing"
                raise ValueError(f"the average {key!r} of shape {tuple(average.shape)} {found}; it is of another network or other "
                                 "profiles: start in a new folder")  # fmt: skip
            average.copy_(spread(tensors[key], average))
        self.step = step

    def snapshot(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the power-function averages into a file of their own, for `synthesize`.

        Every process of a distributed training must call it; the first writes.

        Args:
            folder: of the snapshots of one training.
            dtype: of what is stored. The synthesis adds with weights of both signs, so that half precision costs more of the
                result's accuracy than its own rounding.

        Raises:
            ValueError: where no power-function average is followed.
        """
        if not self._profiles:
            raise ValueError(
                "a snapshot holds power-function averages, and none is followed; pass profiles, such as 0.05, 0.10"
            )
        full = {key: whole(t).to("cpu", dtype) for key, t in self.state().items() if not key.startswith("ema.")}
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            profiles = " ".join(map(str, self._profiles))
            weights.write(folder / f"{self.step:09}{_SUFFIX}", full, {"step": str(self.step), "profiles": profiles})

    def _all(self) -> dict[str, list[Tensor]]:
        return {"ema": self.tensors, **{_key(sigma_rel): average for sigma_rel, average in self._profiles.items()}}


def synthesize(folder: str | os.PathLike[str], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """Returns the power-function average of any length, from the snapshots of a training (post-hoc EMA).

    The weights x of the stored averages make ``|p - sum_i x_i p_i|`` least over their profiles p_i, up to the step; they are
    scaled to the sum 1 (Karras et al. 2024, arXiv 2312.02696, section 3.2).

    Args:
        folder: where `Averages.snapshot` wrote.
        sigma_rel: relative length, in (0, 1 / sqrt(12)).
        step: of a snapshot, the update that the average ends at. None means the last.

    Returns:
        The average of each parameter by name, float32, on the CPU.

    Raises:
        FileNotFoundError: for a folder without snapshots.
        ValueError: for a length out of range or further from those stored than the snapshots allow, or a step without snapshot.
    """
    to_gamma(sigma_rel)
    files = {
        int(file.stem): weights.check(file) for file in sorted(Path(folder).glob(f"*{_SUFFIX}")) if file.stem.isdigit()
    }
    if not files:
        raise FileNotFoundError(
            f"no snapshots of averaged weights in {folder}; train with profiles, such as 0.05 and 0.10"
        )
    end = max(files) if step is None else step
    if end not in files:
        raise ValueError(f"no snapshot at step {step} in {folder}; there are {[*files]}")
    stored = {at: _profiles(file) for at, file in files.items() if at <= end}
    terms = [(float(profile), at) for at, profiles in stored.items() for profile in profiles]
    x, error = coefficients(terms, (sigma_rel, end))
    if error > _FAR:
        raise ValueError(f"{len(stored)} snapshots of sigma_rel {', '.join(stored[end])} give a profile of sigma_rel {sigma_rel} "
                         f"at step {end} that is {error:.0%} off; choose a length between theirs, or take snapshots more "
                         "often")  # fmt: skip
    total: dict[str, Tensor] = {}
    factors = dict(zip(terms, x, strict=True))
    for at, profiles in stored.items():
        tensors = weights.read(files[at])[0]
        for prefix, factor in ((_key(p) + ".", factors[float(p), at]) for p in profiles):
            for name, tensor in ((k.removeprefix(prefix), t) for k, t in tensors.items() if k.startswith(prefix)):
                total[name] = total.get(name, 0) + factor * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def coefficients(
    terms: Sequence[tuple[float, float]], wanted: tuple[float, float]
) -> tuple[NDArray[np.float64], float]:
    """Returns the weights, of sum 1, of the power-function profiles that together come nearest to another.

    Args:
        terms: (sigma_rel, step) of each profile that there is.
        wanted: the same of the profile to make.

    Returns:
        The weights, (n,), and how far the combination is from the wanted profile, as a share of its norm.
    """
    every = [*terms, wanted]
    gamma, at = np.array([to_gamma(sigma_rel) for sigma_rel, _ in every]), np.array([float(t) for _, t in every])
    products = _products(gamma, at)
    matrix, right, norm = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    found = np.linalg.lstsq(matrix, right)[0]
    x = np.asarray(found / found.sum(), np.float64)
    return x, math.sqrt(max(norm - 2 * x @ right + x @ matrix @ x, 0) / norm)


def _products(gamma: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products of all pairs of profiles ``(gamma + 1) tau^gamma / t^(gamma + 1)`` on ``0 < tau <= t``."""
    a, b, at_a, at_b = gamma[:, None], gamma, at[:, None], at
    exponent = np.where(at_a < at_b, b, -a)
    return (a + 1) * (b + 1) * (at_a / at_b) ** exponent / ((a + b + 1) * np.maximum(at_a, at_b))


def _profiles(file: Path) -> list[str]:
    """sigma_rel of each average in a snapshot, from its header alone."""
    with safe_open(file, framework="pt") as opened:
        return str(opened.metadata()["profiles"]).split()


def _pull(average: list[Tensor], now: list[Tensor], share: float) -> None:
    """Moves an average by a share of the way to the present, in the operations of diffusers' EMAModel."""
    local = [_local(t) for t in average]
    torch._foreach_sub_(local, torch._foreach_sub(local, now), alpha=share)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _key(sigma_rel: float | str) -> str:
    return f"power_{sigma_rel}"


def _local(tensor: Tensor) -> Tensor:
    """The data of a tensor, or of this process's shard of it: torch's operations on lists know no shards."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor put together from its shards, in all processes; itself where it has none."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor where another one lies, in its shards where that has some; what is in shards already as it is."""
    if isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)

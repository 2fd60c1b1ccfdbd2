"""Running a network again as a pipeline called it, at any sample and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.hooks import layout
from flowkit.hooks.arguments import Arguments
from flowkit.hooks.levels import TIME_MAPS
from flowkit.hooks.parts import Level
from flowkit.hooks.selftest import aligned
from flowkit.hooks.standins import untouched


def aligned_to(x: Tensor, like: Tensor) -> Tensor:
    """Returns a prediction in the arrangement of another; itself where there is none."""
    found = aligned(x, like)
    return x if found is None else found


class DenoiserCall:
    """A network with the arguments of a recorded call, as a function of sample and time.

    Attributes:
        network: the module.
        roles: which rows it can be called for: "cond" and, of a guided pipeline, "uncond".
        form: how the network is told the time, one of `TIME_MAPS`.
        sign: -1 where the pipeline negates the network's output, otherwise 1.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        calls: dict[str, Arguments],
        shape: Sequence[int],
        form: str,
        total: int,
        sign: int,
        level: Level | None,
    ) -> None:
        self.network, self.form, self.sign = network, form, sign
        self._calls, self._shape, self._total = calls, tuple(shape), total
        self._path = None if level is None else level.path

    @property
    def roles(self) -> tuple[str, ...]:
        """Rows that it can be called for."""
        return tuple(self._calls)

    def fits(self, timestep: float) -> bool:
        """Whether the recorded call, at this time of the scheduler, told the network the time in this form."""
        told = self._calls["cond"].time
        want = float(TIME_MAPS[self.form](torch.tensor(timestep), self._total))
        return abs(float(torch.as_tensor(told).double().abs().max()) - abs(want)) <= 4e-3 * max(abs(want), 1e-3)

    def __call__(
        self,
        x: Tensor,
        timestep: float | Tensor,
        rows: str = "cond",
        *,
        given: Arguments | None = None,
        network: torch.nn.Module | None = None,
    ) -> Tensor:
        """Returns the network's prediction, as ``scheduler.step`` expects it.

        Args:
            x: noisy samples in the path's coordinates, (B, ...); gradients go through.
            timestep: of the scheduler: a number, or one for each sample, (B,).
            rows: "cond" or "uncond".
            given: the network's arguments for the B samples, latents and time as they were then; None means those that were
                recorded for ``rows``, for as many samples.
            network: what is run in the place of the recorded network: a student, or a copy that is wrapped for training in several
                processes. None means that itself, without what is attached to it.

        Returns:
            The prediction, shape of ``x``, without the channels of a learned variance.

        Raises:
            ValueError: for rows that were not recorded, samples of another shape, or as many times as there are not samples.
        """
        if rows not in self._calls:
            raise ValueError(f"no {rows!r} rows were recorded, only {', '.join(self._calls)}; record a guided call")
        call, shape = self._calls[rows], self._shape
        if given is not None:
            call, shape = given, (len(given.latents), *self._shape[1:])
        if tuple(x.shape) != shape:
            raise ValueError(f"got samples of shape {tuple(x.shape)}, recorded were {shape}")
        times = torch.as_tensor(timestep, dtype=torch.float64)
        if times.ndim and times.shape != (len(x),):
            raise ValueError(f"got times of shape {tuple(times.shape)} for {len(x)} samples; pass one, or one a sample")
        call = call.replaced(self._input(x, call.latents, times), self._told(times, call.time))
        run = untouched(self.network if network is None else network)
        value = layout.split(layout.read(run(*call.args, **call.kwargs)), x)[0]
        return self.sign * aligned_to(value, x)

    def _input(self, x: Tensor, old: Any, times: Tensor) -> Any:  # noqa: ANN401
        if self._path is not None and self._path.name == "edm":
            scales = [self._path.input_scale(self._path.at_time(t)) for t in times.flatten().tolist()]
            x = x * _beside(torch.tensor(scales, dtype=x.dtype, device=x.device), x)
        if not isinstance(old, Tensor):
            return type(old)(row.to(was.dtype).reshape(was.shape) for row, was in zip(x, old, strict=True))
        if x.numel() == old.numel():
            return x.to(old.dtype).reshape(old.shape)
        # Images beside the sample, along the channels or tokens, stay.
        for axis, own in enumerate(x.shape):
            if own < old.shape[axis]:
                return torch.cat([x.to(old.dtype), old.narrow(axis, own, old.shape[axis] - own)], axis)
        raise ValueError(f"the network's input has shape {tuple(old.shape)}, the sample {tuple(x.shape)}")

    def _told(self, times: Tensor, old: Any) -> Any:  # noqa: ANN401
        told = TIME_MAPS[self.form](times, self._total)
        if not isinstance(old, Tensor):
            return told.float() if told.ndim else type(old)(told.item())
        kind = old.dtype
        if told.ndim and not kind.is_floating_point and not torch.equal(told, told.round()):
            kind = torch.float32  # whole numbers of the scheduler's grid; between them there are none
        told = told.to(old.device, kind)
        if not old.ndim:
            return told
        if told.ndim:  # some networks want one a frame
            told = _beside(told.repeat_interleave(max(1, len(old) // len(told))), old)
        # Frames or tokens that are given have time 0, and keep it.
        size = old.abs()
        largest = size.amax(tuple(range(1, old.ndim)), keepdim=True) if old.ndim > 1 else size.max()
        return torch.where(size == largest, told, old.to(kind))


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """One value for each sample, to be broadcast over its elements."""
    return values.view(-1, *[1] * (like.ndim - 1))

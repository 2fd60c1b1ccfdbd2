"""The course of a training: loss over all and per band of noise, gradient norm and rate, some hundred rows of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Bands of flow time: ten even ones over [0, 1), and pure noise, the one time that a one-step sampler asks for.
BANDS = (*((k / 10, (k + 1) / 10) for k in range(10)), (1.0, 1.0))
_ROWS = 200


class History:
    """Sums since the last row, and the rows.

    Args:
        steps: of the training.

    Attributes:
        every: updates of a row.
        rows: dicts of "step" (updates done), "loss" (mean since the row before), "gradient_norm" (mean, before it is clipped),
            "rate" (of the latest update) and "bands", a list of [low, high, mean loss of the rows with low <= s < high, or None].
        totals: sums by name: what a checkpoint keeps.
    """

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // _ROWS)
        self.rows: list[dict[str, Any]] = []
        self.totals: dict[str, Tensor] = {}
        self._reset()

    def _reset(self) -> None:
        bands = {name: torch.zeros(len(BANDS), dtype=torch.float64) for name in ("sums", "counts")}
        loose = {name: torch.zeros((), dtype=torch.float64) for name in ("loss", "losses", "norm", "norms")}
        self.totals = {**bands, **loose}

    def add(self, losses: Tensor, s: Tensor | None) -> None:
        """Adds the losses of rows, (b,), and their flow times, (b,); None where they have none."""
        own = losses.detach().to("cpu", torch.float64)
        self.totals["loss"] += own.sum()
        self.totals["losses"] += len(own)
        if s is not None:
            band = (s.detach().cpu().double() * 10).floor().clamp(0, len(BANDS) - 1).long()
            self.totals["sums"].index_add_(0, band, own)
            self.totals["counts"].index_add_(0, band, torch.ones_like(own))

    def gradient(self, norm: float) -> None:
        """Adds the gradient norm of an update that was made, the same in all processes."""
        self.totals["norm"] += norm
        self.totals["norms"] += 1

    def close(self, step: int, rate: float, accelerator: Any) -> dict[str, Any] | None:  # noqa: ANN401
        """Closes a row where it is time and an update was made, over all processes, and returns it."""
        if step % self.every or not self.totals["norms"]:
            return None
        found = self.state(accelerator)
        means = (found["sums"] / found["counts"]).tolist()
        seen = found["counts"].tolist()
        row = {
            "step": step,
            "loss": float(found["loss"] / found["losses"]),
            "gradient_norm": float(found["norm"] / found["norms"]),
            "rate": rate,
            "bands": [[*band, mean if n else None] for band, mean, n in zip(BANDS, means, seen, strict=True)],
        }
        self.rows.append(row)
        self._reset()
        return row

    def state(self, accelerator: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Returns the sums over all processes."""
        if accelerator.num_processes == 1:
            return dict(self.totals)
        device = accelerator.device
        own = {k: v for k, v in self.totals.items() if k not in ("norm", "norms")}
        kind = torch.float32 if device.type == "mps" else torch.float64
        shared = {k: accelerator.reduce(v.to(device, kind), "sum").cpu().double() for k, v in own.items()}
        return {**self.totals, **shared}

    def restore(self, totals: Mapping[str, Tensor], rows: list[dict[str, Any]], main: bool = True) -> None:
        """Takes over what a checkpoint holds; the sums belong to the main process alone."""
        self.rows = rows
        if main:
            self.totals = dict(totals)
        else:
            self.totals |= {k: totals[k] for k in ("norm", "norms")}

"""The objective on pairs of noise and sample: a line between them, on any path, for any prediction.

A sampler starts at a state x_1, of flow time s_1, and its sample is x_0. With ``eps = (x_1 - alpha_1 x_0) / sigma_1`` the curve

    x_s = alpha_s x_0 + sigma_s eps,        0 <= s <= s_1,

passes through both, and on it the network is right where its output says that x_0 and eps, at every s: ``A x_0 + B eps`` with the
(A, B) of `flowkit.predictions.pair`. On the flow path that is ``eps - x_0`` on a line, equation 1 of Liu, Gong & Liu 2022 (arXiv
2209.03003); on the others it is the first-order path of Wang et al. 2024 (arXiv 2410.07303, section 3), which is a line in
``x / alpha`` over ``sigma / alpha``. Where s_1 is pure noise, eps is the noise that the sampler drew; elsewhere (Stable Diffusion
begins at sigma/alpha = 14.6) it differs by what the noise lacks, so that one step from x_1 still ends at x_0 exactly.

Likewise between any two states of a trajectory, of flow times a > b: in flow coordinates ``y = n(s) x``, see `flowkit.paths`, the
curve is the line through both, ``dy/ds = eps - x_0``, and a step of first order from any of its points ends at x_b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkit import predictions
from flowkit.distill import lpips
from flowkit.distill.conditions import Conditions
from flowkit.distill.draw import Draw, Times
from flowkit.distill.objective import Comparison
from flowkit.distill.shards import Trajectories
from flowkit.paths import Path

# Pairs up to this size are held in memory, others read from their shards as they are drawn.
_HELD = 2**30


def check_start(predict: Conditions) -> None:
    """Refuses a model whose output does not tell the sample where the sampler starts.

    Raises:
        ValueError: for it, such as epsilon at pure noise.
    """
    path = predict.path
    alpha, sigma = path.alpha(predict.start), path.sigma(predict.start)
    predictions.row(predict.prediction, (1.0, 0.0), alpha, sigma, path.sigma_data)


def check_metric(predict: Conditions, metric: str) -> None:
    """Refuses a perceptual metric for what are no images.

    Raises:
        ValueError: for latents.
    """
    if metric.startswith("lpips") and (predict.latent or not lpips.fits(predict.shape)):
        raise ValueError(f"{metric} compares images, and the teacher's samples are latents of shape {predict.shape}; use "
                         "metric='pseudo-huber'")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Points on the lines between two states of trajectories.

    Attributes:
        x: the points, (b, ...), in the path's coordinates.
        raw: what the network shall return there, of its prediction type.
        p: of ``x_b_hat = p x + q raw``, the state where a step to the end of the line leads, (b, 1, ...); at flow time 0 x0_hat.
        q: likewise.
    """

    x: Tensor
    raw: Tensor
    p: Tensor
    q: Tensor


def line(
    path: Path,
    prediction: str,
    start: float | Tensor,
    ends: tuple[Tensor, Tensor],
    s: Tensor,
    stop: float | Tensor = 0.0,
) -> Line:
    """Returns points on the lines between two states; at the start the first one, to the bit.

    Args:
        path: of the model.
        prediction: type of the network's output.
        start: flow time a of the first states, or of each, (b,).
        ends: first states and last, (b, ...) each: x_1 and x_0 of pairs.
        s: flow time of each point, between those of its two states, (b,).
        stop: flow time b < a of the last states, or of each, (b,).

    Raises:
        ValueError: where the network's output does not determine x_b at a point: epsilon at pure noise.
    """
    dtype = torch.promote_types(ends[0].dtype, torch.float32)
    first, last = (x.to(dtype) for x in ends)
    highs, lows = (torch.as_tensor(v, dtype=torch.float64).expand(len(s)) for v in (start, stop))
    exact = torch.where(s.cpu() == highs.to(s.dtype), highs, s.cpu().double())  # the start, whatever s is rounded to
    rows = []
    for high, low, value in zip(highs.tolist(), lows.tolist(), exact.tolist(), strict=True):
        here = path.alpha(value), path.sigma(value)
        n_high, n_low, n = path.norm(high), path.norm(low), path.norm(value)
        share, speed = (value - low) / (high - low), 1 / (high - low)
        big_a, big_b = predictions.pair(prediction, *here, path.sigma_data)
        turn = speed * (big_b * (1 - low) - big_a * low)
        wanted = path.alpha(low), path.sigma(low)
        rows.append(
            (
                share * n_high / n,
                (1 - share) * n_low / n,
                turn * n_high,
                (big_a + big_b - turn) * n_low,
                *predictions.row(prediction, wanted, *here, path.sigma_data),
            )
        )
    table = torch.tensor(rows, dtype=dtype, device=first.device)
    x_first, x_last, raw_first, raw_last, p, q = (c.view(-1, *[1] * (first.ndim - 1)) for c in table.T)
    return Line(x_first * first + x_last * last, raw_first * first + raw_last * last, p, q)


class PairLoss:
    """The loss of a network on lines between states of recorded trajectories: pairs of noise and sample, or parts of the way.

    Args:
        predict: the network with the conditioning of each sample.
        pairs: recorded.
        samples: those that are trained on.
        times: distribution of the flow times, over [0, 1] of a line: 1 is its start, 0 its end.
        compare: the network's output with the one wanted, or the state where its step leads with the end of the line: of pairs,
            the predicted sample with the sample.
        edges: numbers of the recorded levels whose states bound the lines, one after the other, rising; None means the first
            and the last: pairs.
    """

    def __init__(
        self,
        predict: Conditions,
        pairs: Trajectories,
        samples: Sequence[int],
        times: Times,
        compare: Comparison,
        edges: Sequence[int] | None = None,
    ) -> None:
        self.predict, self.times, self.compare = predict, times, compare
        numbers = [pairs.at[0], pairs.at[-1]] if edges is None else list(edges)
        self.pairs = Held(pairs, samples, [pairs.at.index(number) for number in numbers])
        self.levels = torch.tensor([predict.path.at_level(pairs.grid.sigmas[i]) for i in numbers], dtype=torch.float64)

    def __call__(self, network: nn.Module, draw: Draw) -> tuple[Tensor, Tensor]:
        """Returns the loss of each row of a draw, and its flow time."""
        predict = self.predict
        picked = draw.indices(len(self.pairs))
        parts = len(self.levels) - 1
        part = draw.indices(parts) if parts > 1 else torch.zeros_like(picked)
        start, stop = self.levels[part], self.levels[part + 1]
        share = draw.times(self.times)
        s = torch.where(share == 1, start, stop + share.double() * (start - stop))
        device = next(network.parameters()).device
        rows, states = torch.arange(len(picked)), self.pairs(picked)
        first, last = (states[rows, i].to(device) for i in (part, part + 1))
        at = line(predict.path, predict.prediction, start, (first, last), s, stop)
        found = predict(network, at.x, s.to(device), self.pairs.numbers(picked)).float()
        return self.compare((found, at.raw), (at.p * at.x + at.q * found, last.float()), share), s


class Held:
    """Some states of recorded samples, in memory where they fit.

    Args:
        pairs: the recording.
        samples: numbers of the samples.
        at: positions among the recorded states of those that are wanted.
    """

    def __init__(self, pairs: Trajectories, samples: Sequence[int], at: Sequence[int] = (0, -1)) -> None:
        self._pairs, self._samples, self._at = pairs, samples, at
        size = len(samples) * len(at) * torch.Size(pairs.shape).numel() * pairs.dtype.itemsize
        self._held: Tensor | None = self._read(samples) if size <= _HELD else None

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._samples)

    def __call__(self, picked: Tensor) -> Tensor:
        """Returns the states of some of the samples, (b, len(at), ...), on the CPU."""
        return self._held[picked] if self._held is not None else self._read(self.numbers(picked))

    def numbers(self, picked: Tensor) -> list[int]:
        """Returns the numbers of some of the samples in the recording."""
        return [self._samples[i] for i in picked.tolist()]

    def _read(self, numbers: Sequence[int]) -> Tensor:
        return self._pairs.states(numbers, self._at)

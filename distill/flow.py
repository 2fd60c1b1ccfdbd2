"""Training a flow from data: rectified flow (Liu, Gong & Liu 2022, arXiv 2209.03003), and likewise any other path.

    min_v  E || v(x_s, s, c) - (eps - x_0) ||^2,      x_s = (1 - s) x_0 + s eps,      s ~ p(s)

with images x_0, their conditions c, and noise eps, independent or coupled within each batch (see `flowkit.distill.couplings`). On
another path, or for a network that predicts something else, x_s and what the network shall return are those of the path: x_0 is a
sample, and the state that a sampler begins with is ``alpha x_0 + sigma eps`` at the noisiest level (see `flowkit.distill.pairs`).

A condition is dropped with a probability: the network then sees none, so that it can be guided (Ho & Salimans 2022, arXiv
2207.12598). The coupling sees what the network sees: rows without a condition exchange noise among themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flowkit import rng
from flowkit.distill import couplings
from flowkit.distill.conditions import Conditions
from flowkit.distill.draw import Draw, Times
from flowkit.distill.encode import Encoder
from flowkit.distill.feed import Feed
from flowkit.distill.pairs import line

_COUPLING = 2**61  # numbers the seeds of couplings, apart from those of updates


@dataclass(frozen=True)
class Batch:
    """Rows of an update.

    Attributes:
        x0: samples, (b, ...).
        noise: paired with them, same shape.
        conditions: number of each row's condition, dropped ones replaced, (b,).
        s: flow times, (b,).
    """

    x0: Tensor
    noise: Tensor
    conditions: Tensor
    s: Tensor

    def rows(self, wanted: range) -> Batch:
        """Returns some of the rows."""
        cut = slice(wanted.start, wanted.stop)
        return Batch(self.x0[cut], self.noise[cut], self.conditions[cut], self.s[cut])


class FlowLoss:
    """The loss of a network on images and noise.

    Args:
        predict: the network with each condition, by number.
        feed: the images of each update; of all its rows where noise is coupled.
        encode: from images to samples.
        numbers: number of each image's condition, int64 (N,).
        null: number of the condition that stands for none.
        dropout: how often a condition is dropped, in [0, 1].
        times: distribution of the flow times, over [0, 1]; the path's own start is its 1.
        coupling: one of `flowkit.distill.couplings.COUPLINGS`.
        seed: of couplings that are drawn.
    """

    def __init__(
        self,
        predict: Conditions,
        feed: Feed,
        encode: Encoder,
        numbers: Tensor,
        null: int,
        dropout: float,
        times: Times,
        coupling: str = "independent",
        seed: int = 0,
    ) -> None:
        self.predict, self.feed, self.encode, self.numbers, self.null = predict, feed, encode, numbers, null
        self.dropout, self.times, self.coupling, self.seed = dropout, times, coupling, seed
        self._whole: tuple[int, Batch] | None = None

    def __call__(self, network: nn.Module, draw: Draw) -> tuple[Tensor, Tensor]:
        """Returns the loss of each row of a draw, a mean over its elements, and its flow time."""
        batch = self._drawn(draw) if self.coupling == "independent" else self._coupled(draw).rows(draw.rows)
        path, start = self.predict.path, self.predict.start
        first = path.alpha(start) * batch.x0 + path.sigma(start) * batch.noise
        at = line(path, self.predict.prediction, start, (first, batch.x0), batch.s)
        found = self.predict(network, at.x, batch.s.to(at.x.device), batch.conditions).float()
        return (found - at.raw).square().flatten(1).mean(1), batch.s

    def _drawn(self, draw: Draw) -> Batch:
        """Images and independent noise."""
        images, picked = self.feed(draw.step, draw.rows)
        s = draw.times(self.times) * self.predict.start
        conditions = self.numbers[picked].masked_fill(draw.uniform() < self.dropout, self.null)
        x0 = self.encode(images, draw.normal)
        return Batch(x0, draw.normal(*x0.shape[1:]).to(x0.device), conditions, s)

    def _coupled(self, draw: Draw) -> Batch:
        """All rows of the update, for the noise of one may go to any other: the same in every process and part."""
        if self._whole is None or self._whole[0] != draw.step:
            batch = self._drawn(draw.whole())
            seed = rng.sample_seed(rng.sample_seed(self.seed, _COUPLING), draw.step)
            order = couplings.couple(self.coupling, batch.noise, batch.x0, batch.conditions, seed=seed)
            noise = batch.noise[order.to(batch.noise.device)]
            self._whole = draw.step, Batch(batch.x0, noise, batch.conditions, batch.s)
        return self._whole[1]

"""The loss of training from data: the closed form of a Gaussian, couplings that straighten, conditions that are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowkit import paths, predictions
from flowkit.distill import objective
from flowkit.distill.data import tensors
from flowkit.distill.draw import Draw
from flowkit.distill.encode import Encoder
from flowkit.distill.feed import Feed
from flowkit.distill.flow import FlowLoss

MEAN, STD = 0.7, 0.5


class Predict:
    """The network as `flowkit.distill.Conditions` calls it, without a pipeline."""

    def __init__(self, path: paths.Path, prediction: str, shape: tuple[int, ...], start: float = 1.0) -> None:
        self.path, self.prediction, self.shape, self.start = path, prediction, shape, start
        self.conditions: list[list[int]] = []

    def __call__(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor, samples: Tensor) -> Tensor:
        self.conditions.append(samples.tolist())
        return network(x, s)


def gaussian_loss(
    batch: int = 256,
    coupling: str = "independent",
    times: str | Sequence[float] = "uniform",
    prediction: str = "flow_prediction",
    path: paths.Path | None = None,
    start: float = 1.0,
    data: Tensor | None = None,
    labels: Sequence[int] | None = None,
    dropout: float = 0.0,
    parts: Sequence[range] | None = None,
) -> FlowLoss:
    """The loss on quantiles of a Gaussian, so that the data have its moments."""
    if data is None:
        normal = torch.distributions.Normal(MEAN, STD)
        data = normal.icdf((torch.arange(4096) + 0.5) / 4096).float()
    data = data.reshape(-1, 1, 1, 1)
    predict: Any = Predict(path or paths.flow(), prediction, (1, 1, 1), start)
    pipe: Any = SimpleNamespace(device="cpu")
    numbers = torch.tensor(labels) if labels is not None else torch.zeros(len(data), dtype=torch.int64)
    feed = Feed(tensors(data), batch, 0, parts or [range(batch)])
    encode = Encoder(pipe, (1, 1, 1))
    return FlowLoss(predict, feed, encode, numbers, 9, dropout, objective.times(times), coupling)


def velocity(x: Tensor, s: Tensor) -> Tensor:
    """The best velocity of independent noise, E[eps - x0 | x_s], of Gaussian data."""
    s = s.view(-1, 1, 1, 1)
    spread = (1 - s).square() * STD**2 + s.square()
    return -MEAN + (s - (1 - s) * STD**2) / spread * (x - (1 - s) * MEAN)


def mean_loss(loss: FlowLoss, network: Any, batch: int, steps: int) -> tuple[float, Tensor, Tensor]:
    """Mean over updates, and all losses and times."""
    found = [loss(network, Draw(0, step, batch)) for step in range(steps)]
    losses, s = (torch.cat(values) for values in zip(*found, strict=True))
    return float(losses.mean()), losses, s


def test_the_best_velocity_has_the_loss_that_cannot_be_removed() -> None:
    # V = std pi / 2 (Liu et al. 2022, section 3), std^2 / a(s) at each time.
    value, losses, s = mean_loss(gaussian_loss(), velocity, 256, 40)
    assert value == pytest.approx(STD * math.pi / 2, rel=0.05)
    spread = (1 - s).square() * STD**2 + s.square()
    assert float((losses * spread / STD**2).mean()) == pytest.approx(1, abs=0.05)
    # The controls: no other velocity does as well, nor the right one with time the other way.
    for wrong in (lambda x, s: velocity(x, s) + 0.3, lambda x, s: velocity(x, 1 - s), lambda x, s: -velocity(x, s)):
        assert mean_loss(gaussian_loss(), wrong, 256, 10)[0] > value + 0.05


@pytest.mark.parametrize(("coupling", "updates", "close"), [("independent", 60, 0.1), ("ot", 12, 0.06)])
def test_an_affine_model_of_a_gaussian_finds_the_closed_form(coupling: str, updates: int, close: float) -> None:
    levels, batch = torch.tensor([0.1, 0.4, 0.7, 1.0]), 256
    loss = gaussian_loss(batch, coupling, levels.tolist())

    def mean(table: Tensor) -> Tensor:
        """The loss of v = a_k x + b_k at level k."""

        def network(x: Tensor, s: Tensor) -> Tensor:
            at = table[(s[:, None] - levels).abs().argmin(1)]
            return at[:, 0].view(-1, 1, 1, 1) * x + at[:, 1].view(-1, 1, 1, 1)

        return torch.stack([loss(network, Draw(0, step, batch))[0].mean() for step in range(updates)]).mean()  # type: ignore[arg-type]

    # It is quadratic in (a, b), so that one step of Newton's method ends at its minimum.
    zero = torch.zeros(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(mean(zero), zero)
    hessian = torch.autograd.functional.hessian(mean, zero).reshape(8, 8)
    best = -torch.linalg.solve(hessian, gradient.flatten()).reshape(4, 2)
    for level, (a, b) in zip(levels.tolist(), best.tolist(), strict=True):
        if coupling == "independent":
            spread = (1 - level) ** 2 * STD**2 + level**2
            slope = (level - (1 - level) * STD**2) / spread
        else:  # sorted pairs: x0 = mean + std eps, so that all paths are straight
            slope = (1 - STD) / ((1 - level) * STD + level)
        assert a == pytest.approx(slope, abs=close)
        assert b == pytest.approx(-MEAN - slope * (1 - level) * MEAN, abs=close)


def test_transport_straightens_and_keeps_both_marginals() -> None:
    def straight(x: Tensor, s: Tensor) -> Tensor:
        at = s.view(-1, 1, 1, 1)
        return (1 - STD) * (x - (1 - at) * MEAN) / ((1 - at) * STD + at) - MEAN

    apart, _, _ = mean_loss(gaussian_loss(), straight, 256, 10)
    coupled, _, _ = mean_loss(gaussian_loss(coupling="ot"), straight, 256, 10)
    assert coupled < 0.02
    assert apart > STD * math.pi / 2
    free, bound = gaussian_loss(), gaussian_loss(coupling="ot")
    one, other = free._drawn(Draw(0, 3, 256)), bound._coupled(Draw(0, 3, 256))
    assert torch.equal(one.x0, other.x0)
    assert torch.equal(one.s, other.s)
    assert torch.equal(one.noise.flatten().sort().values, other.noise.flatten().sort().values)
    assert not torch.equal(one.noise, other.noise)


@pytest.mark.parametrize(
    ("path", "prediction", "start"),
    [
        (paths.vp(paths.betas()), "epsilon", None),
        (paths.vp(paths.betas()), "v_prediction", None),
        (paths.cosine(), "sample", None),
        (paths.edm(), "edm", 80 / 81),
        (paths.flow(), "flow_prediction", None),
    ],
)
def test_on_every_path_the_exact_network_has_the_least_loss(
    path: paths.Path, prediction: str, start: float | None
) -> None:
    # E[x0 | x] of the Gaussian, as each prediction; times that are not the data's alone.
    start = path.start if start is None else start

    def exact(x: Tensor, s: Tensor, off: float = 0.0) -> Tensor:
        found = []
        for row, level in zip(x.double(), s.double().tolist(), strict=True):
            alpha, sigma = path.alpha(level), path.sigma(level)
            x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (row - alpha * MEAN) + off
            eps = (row - alpha * x0) / sigma
            big_a, big_b = predictions.pair(prediction, alpha, sigma, path.sigma_data)
            found.append(big_a * x0 + big_b * eps)
        return torch.stack(found).float()

    made = gaussian_loss(times=(0.2, 0.5, 0.9), path=path, prediction=prediction, start=start)
    best = mean_loss(made, exact, 256, 8)[0]
    for off in (-0.1, 0.1):
        assert mean_loss(made, lambda x, s, off=off: exact(x, s, off), 256, 8)[0] > best * 1.001


def test_conditions_are_dropped_as_often_as_asked_and_noise_stays_with_its_condition() -> None:
    labels = [i % 3 for i in range(600)]
    data = torch.tensor([[-2.0, 0.0, 2.0][label] for label in labels])
    loss = gaussian_loss(300, "ot", data=data, labels=labels, dropout=0.2)
    kept: dict[int, list[float]] = {}
    for step in range(10):
        batch = loss._coupled(Draw(0, step, 300))
        picked = batch.x0.flatten()
        for x, eps, condition in zip(
            picked.tolist(), batch.noise.flatten().tolist(), batch.conditions.tolist(), strict=True
        ):
            assert condition == 9 or condition == labels[data.tolist().index(x)]
            kept.setdefault(condition, []).append(eps)
    assert len(kept[9]) / 3000 == pytest.approx(0.2, abs=0.03)
    for noise in kept.values():
        assert float(torch.tensor(noise).mean()) == pytest.approx(0, abs=0.12)
        assert float(torch.tensor(noise).std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_a_batch_in_parts_is_the_same_batch(coupling: str) -> None:
    halves = [range(4), range(4, 8)]
    parts = halves if coupling == "independent" else None
    whole: Any = gaussian_loss(8, coupling, dropout=0.5)
    cut: Any = gaussian_loss(8, coupling, dropout=0.5, parts=parts)
    for step in (0, 1, 5):
        expected = whole(velocity, Draw(4, step, 8))
        found = [cut(velocity, Draw(4, step, 8, rows)) for rows in halves]
        assert torch.equal(torch.cat([losses for losses, _ in found]), expected[0])
        assert torch.equal(torch.cat([s for _, s in found]), expected[1])
    (first, *_), (one, other, *_) = whole.predict.conditions, cut.predict.conditions
    assert first == one + other

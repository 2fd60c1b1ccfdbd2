"""Couplings of a batch: the cheapest permutation by brute force, every noise used once, and noise that keeps its law by class."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from flowkit.distill.couplings import couple


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(noise: Tensor, data: Tensor) -> float:
    return float((noise - data).flatten(1).square().sum(1).mean())


def brute(noise: Tensor, data: Tensor) -> tuple[int, ...]:
    return min(
        itertools.permutations(range(len(data))),
        key=lambda order: sum(float((noise[i] - x).square().sum()) for i, x in zip(order, data, strict=True)),
    )


@pytest.mark.parametrize("seed", range(5))
def test_transport_is_the_cheapest_of_all_permutations(seed: int) -> None:
    noise, data = normal(6, 2, 3, seed=seed), 0.5 * normal(6, 2, 3, seed=seed + 100) + 1
    assert tuple(couple("ot", noise, data).tolist()) == brute(noise, data)


def test_on_a_line_transport_sorts() -> None:
    noise, data = normal(200, 1), normal(200, 1, seed=1)
    paired = noise[couple("ot", noise, data)]
    assert torch.equal(paired[data[:, 0].argsort()], noise.sort(dim=0).values)


@pytest.mark.parametrize("name", ["independent", "ot", "sinkhorn"])
def test_each_noise_is_used_once(name: str) -> None:
    noise, data = normal(96, 1, 8, 8), normal(96, 1, 8, 8, seed=1).sign()
    order = couple(name, noise, data, torch.arange(96) % 3)
    assert torch.equal(order.sort().values, torch.arange(96))
    assert cost(noise[order], data) <= cost(noise, data)
    # The control, and what other libraries do: pairs drawn from the plan with replacement miss noises and repeat others.
    drawn = order[torch.randint(96, (96,), generator=torch.Generator().manual_seed(0))]
    assert len(drawn.unique()) < 80


def test_the_entropic_plan_lies_between_the_other_two() -> None:
    noise, data = normal(64, 4), normal(64, 4, seed=1)
    costs = [cost(noise[couple("sinkhorn", noise, data, entropy=e)], data) for e in (0.01, 0.1, 1e3)]
    assert costs[0] == pytest.approx(cost(noise[couple("ot", noise, data)], data), rel=0.1)
    assert costs[0] < costs[1] < costs[2] == pytest.approx(cost(noise, data), rel=0.2)
    again = [couple("sinkhorn", noise, data, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[1], again[2])


def test_noise_keeps_its_law_within_each_class() -> None:
    # Two classes at -2 and 2. What sampling gives each class is standard normal noise, so training must too.
    noise, groups = normal(600, 1), torch.arange(600) % 2
    data = 4.0 * groups[:, None] - 2 + 0.1 * normal(600, 1, seed=1)
    within, across = (noise[couple("ot", noise, data, chosen)] for chosen in (groups, None))
    for group in (0, 1):
        assert float(within[groups == group].mean()) == pytest.approx(0, abs=0.15)
        assert float(within[groups == group].std()) == pytest.approx(1, abs=0.12)
        # The control: transport among all gives the left class the left half of the noise, of mean -sqrt(2 / pi).
        assert float(across[groups == group].mean()) == pytest.approx((2 * group - 1) * 0.798, abs=0.1)
    order = couple("ot", noise, data, groups)
    assert torch.equal(groups[order], groups)
    assert cost(noise[order], data) < cost(noise, data)


def test_what_cannot_be_coupled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = normal(4, 2)
    with pytest.raises(ValueError, match="unknown coupling 'exact'; choose independent, ot, sinkhorn"):
        couple("exact", noise, noise)
    with pytest.raises(ValueError, match=r"noise of shape \(4, 2\) does not pair with data of \(3, 2\)"):
        couple("ot", noise, noise[:3])
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        couple("ot", noise, noise / 0)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"coupling 'ot' needs POT: pip install 'flowkit-diffusion\[ot\]'"):
        couple("ot", noise, noise)
    assert couple("independent", noise, noise).tolist() == [0, 1, 2, 3]

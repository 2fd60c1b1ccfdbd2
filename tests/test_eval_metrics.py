"""KID, CMMD, inception score, precision to coverage, CLIP score: brute force, hand-made sets, torch-fidelity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from flowkit.eval.clip_score import clip_score
from flowkit.eval.cmmd import cmmd
from flowkit.eval.inception_score import inception_score, inception_score_adm
from flowkit.eval.kid import kid, kid_subsets, polynomial
from flowkit.eval.mmd import mmd
from flowkit.eval.neighbours import PROTOCOLS, Protocol, neighbours

F8 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F8)


def features(count: int, seed: int = 0, dim: int = 64, scale: float = 1.0) -> Tensor:
    """Like a ReLU network's, float32."""
    x = scale * normal(count, 16, seed=seed) @ normal(16, dim, seed=99) / 4
    return torch.relu(x + 0.3).float()


def brute(x: Tensor, y: Tensor, biased: bool = False) -> float:
    kxx, kyy, kxy = ((a.double() @ b.double().T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    if biased:
        return float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    own = (kxx.sum() - kxx.trace()) / (n * (n - 1)) + (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(own - 2 * kxy.mean())


def fidelity_kid(x: Tensor, y: Tensor, subsets: int, size: int, seed: int = 2020) -> tuple[float, float]:
    found = kid_features_to_metric(x, y, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False, kid_kernel="poly",
                                   kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0)  # fmt: skip
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


@pytest.mark.parametrize("block", [7, 100, 1000])
def test_all_pairs_in_blocks_equal_brute_force(block: int) -> None:
    x, y = features(230), features(170, seed=1, scale=1.2)
    for one, two, tolerance in ((x, y, 1e-7), (x.double(), y.double(), 1e-12)):
        found = mmd(one, two, polynomial, block)
        assert found.unbiased == pytest.approx(brute(x, y), abs=tolerance)
        assert found.biased == pytest.approx(brute(x, y, biased=True), abs=tolerance)
    assert kid(x, y).value == pytest.approx(brute(x, y), abs=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1.05, 2.0])
def test_kid_of_torch_fidelity(scale: float) -> None:
    x, y = features(700, dim=2048), features(600, seed=1, dim=2048, scale=scale)
    mean, std = fidelity_kid(x, y, subsets=10, size=200)
    found = kid_subsets(x, y, 10, 200)
    assert found.value == pytest.approx(mean, rel=1e-6)
    assert found.details["std"] == pytest.approx(std, rel=1e-6)
    assert kid_subsets(x, y, 10, 200, seed=2021).value != pytest.approx(mean, rel=1e-6)


def test_subsets_scatter_around_all_pairs() -> None:
    x, y = features(1000), features(1000, seed=1, scale=1.3)
    subsets = kid_subsets(x, y, 60, 200)
    assert subsets.value == pytest.approx(kid(x, y).value, abs=4 * subsets.details["std"] / math.sqrt(60))


def test_kid_of_equal_distributions_is_zero_within_its_error() -> None:
    for seed in range(5):
        figure = kid(features(600, seed=2 * seed), features(500, seed=2 * seed + 1))
        assert abs(figure.value) < 4 * figure.details["se_both"]
    apart = kid(features(600), features(500, seed=1, scale=1.3))
    assert apart.value > 5 * apart.details["se_both"]


def test_the_error_of_kid_is_the_spread_over_repeated_samples() -> None:
    """60 draws: the spread is known to 9 %."""
    y = features(400, seed=1000, scale=1.3)
    fixed = [kid(features(300, seed=seed), y) for seed in range(60)]
    ratio = float(np.mean([f.se for f in fixed]) / np.std([f.value for f in fixed], ddof=1))
    assert 0.75 < ratio < 1.3
    both = [kid(features(300, seed=seed), features(300, seed=seed + 500, scale=1.3)) for seed in range(60)]
    ratio = float(np.mean([f.details["se_both"] for f in both]) / np.std([f.value for f in both], ddof=1))
    assert 0.75 < ratio < 1.3


def unit(count: int, seed: int = 0, dim: int = 32, shift: float = 0.0) -> Tensor:
    x = normal(count, dim, seed=seed)
    x[:, 0] += shift
    y: Tensor = x / x.norm(dim=1, keepdim=True)
    return y


def test_cmmd_equals_brute_force() -> None:
    x, y = unit(130), unit(170, seed=1, shift=1.0)
    kxx, kyy, kxy = (torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / 200)
                     for a, b in ((x, x), (y, y), (x, y)))  # fmt: skip
    biased = 1000 * float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    own = (kxx.sum() - 130) / (130 * 129) + (kyy.sum() - 170) / (170 * 169)
    assert cmmd(x, y).value == pytest.approx(biased, abs=1e-9)
    assert cmmd(x, y, unbiased=True).value == pytest.approx(1000 * float(own - 2 * kxy.mean()), abs=1e-9)
    # The kernel is nearly 1 - |x - y|^2 / 200 on the sphere.
    assert cmmd(x, y).value == pytest.approx(10 * float((x.mean(dim=0) - y.mean(dim=0)).square().sum()), rel=1e-2)
    assert cmmd(x.float(), y.float()).value == pytest.approx(biased, abs=1e-6)


def test_the_published_cmmd_has_a_floor_that_the_unbiased_one_has_not() -> None:
    x, y = unit(800, dim=256), unit(800, seed=1, dim=256)
    figure = cmmd(x, y, unbiased=True)
    assert cmmd(x, y).value - figure.value == pytest.approx(10 * 2 / 800, rel=1e-2)
    assert abs(figure.value) < 4 * figure.details["se_both"] < cmmd(x, y).value
    with pytest.raises(ValueError, match=r"embedding 3 has length 2; CMMD is defined for unit length"):
        cmmd(torch.cat([x[:3], 2 * x[3:4]]), y)


@pytest.mark.parametrize(("splits", "seed"), [(10, 2020), (3, 7), (10, None), (1, None)])
def test_inception_score_of_torch_fidelity(splits: int, seed: int | None) -> None:
    logits = (2 * normal(523, 40)).float()
    theirs = isc_features_to_metric(logits, splits, shuffle=seed is not None, rng_seed=seed or 0)
    ours = inception_score(logits, splits, seed)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert ours.details["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_inception_scores_with_known_values() -> None:
    certain = torch.full((40, 4), -1000.0).scatter_(1, (torch.arange(40) % 4)[:, None], 1000.0)
    assert inception_score(certain, 5, seed=None).value == pytest.approx(4.0, rel=1e-12)
    assert inception_score(torch.zeros(40, 4)).value == pytest.approx(1.0, rel=1e-12)
    # Sorted by class, each contiguous block holds one class and scores 1; shuffled, nearly 4.
    ordered = certain[(torch.arange(40) % 4).argsort()]
    assert inception_score_adm(ordered, block=10).value == pytest.approx(1.0, rel=1e-12)
    assert inception_score(ordered, 2).value > 3.5


def test_blocks_of_adm_with_a_short_last_one() -> None:
    logits = 2 * normal(25, 6)
    p = logits.softmax(dim=1)
    scores = [float((q * (q.log() - q.mean(dim=0).log())).sum(dim=1).mean().exp()) for q in p.split(10)]
    figure = inception_score_adm(logits, block=10)
    assert figure.details["scores"] == pytest.approx(scores, rel=1e-12)
    assert figure.value == pytest.approx(sum(scores) / 3, rel=1e-12)


def line(*points: float) -> Tensor:
    return torch.tensor(points, dtype=torch.float32)[:, None]


def values(x: Tensor, y: Tensor, protocol: str | Protocol, block: int = 1000) -> tuple[float, ...]:
    return tuple(figure.value for figure in neighbours(x, y, protocol, block).values())


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_neighbours_on_a_line(block: int) -> None:
    """References 0, 1, 2, 3 (k = 1: radius 1); samples 1.5, 4, 9 (radii 2.5, 2.5, 5)."""
    x, y = line(1.5, 4.0, 9.0), line(0.0, 1.0, 2.0, 3.0)
    # 1.5 is in the balls of 1 and 2; 4 at the edge of that of 3; 9 in none. All four are within 2.5 of 1.5.
    assert values(x, y, Protocol(1, closed=True), block) == pytest.approx((2 / 3, 1.0, 1.0, 3 / 4))
    assert values(x, y, Protocol(1, closed=False), block) == pytest.approx((1 / 3, 1.0, 2 / 3, 2 / 4))


def test_copies_are_at_distance_zero() -> None:
    """Five copies of a vector have balls of radius 0, which hold their copies among the samples if they are closed."""
    x = features(200, dim=512) + 100.0
    y = torch.cat([x[:1].repeat(5, 1), features(50, seed=3, dim=512) + 100.0])
    samples = torch.cat([x[:1], x[:1], x[100:]])
    closed, opened = values(samples, y, "torch-fidelity"), values(samples, y, Protocol(3, closed=False))
    balls = torch.cdist(y.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").kthvalue(4).values
    apart = torch.cdist(samples.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert int((balls == 0).sum()) == 5
    for found, inside in ((closed, apart <= balls), (opened, apart < balls)):
        assert found[0] == pytest.approx(float(inside.any(dim=1).double().mean()))
        assert found[2] == pytest.approx(float(inside.sum() / 3 / len(samples)))
        assert found[3] == pytest.approx(float(inside.any(dim=0).double().mean()))
    assert closed[3] > opened[3]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [64, 1000])
def test_precision_and_recall_of_torch_fidelity(k: int, block: int) -> None:
    x, y = features(310, scale=0.8), features(257, seed=1)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=k, prc_batch_size=10000, save_cpu_ram=False, verbose=False)
    found = neighbours(x, y, Protocol(k, closed=True), block)
    assert 0.1 < found["recall"].value < 0.95
    assert found["precision"].value == pytest.approx(theirs["precision"], rel=1e-6)
    assert found["recall"].value == pytest.approx(theirs["recall"], rel=1e-6)


def test_density_and_coverage_against_brute_force_and_the_protocols() -> None:
    x, y = features(150), features(180, seed=1)
    found = neighbours(x, y, "prdc")
    distance = torch.cdist(x.double(), y.double())
    radii = torch.cdist(y.double(), y.double()).fill_diagonal_(0).kthvalue(6).values
    assert found["density"].value == pytest.approx(float((distance < radii).sum() / (5 * 150)))
    assert found["coverage"].value == pytest.approx(float((distance.amin(dim=0) < radii).double().mean()))
    assert {name: (p.k, p.closed) for name, p in PROTOCOLS.items()} == {
        "torch-fidelity": (3, True), "kynkaanniemi": (3, True), "adm": (3, True), "prdc": (5, False)}  # fmt: skip
    assert values(x, y, "adm") != values(x, y, "prdc")
    assert values(y, y, "adm")[:2] == (1.0, 1.0)
    far = values(x + 1000.0, y, "adm")
    assert far == (0.0, 0.0, 0.0, 0.0)


def test_clip_score() -> None:
    images, texts = (
        torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
    )
    figure = clip_score(images, texts)
    scores = [100.0, 100 / math.sqrt(2), 0.0]
    assert figure.value == pytest.approx(sum(scores) / 3, rel=1e-12)
    assert figure.se == pytest.approx(float(np.std(scores, ddof=1)) / math.sqrt(3), rel=1e-12)
    assert clip_score(images, texts, weight=2.5).value == pytest.approx(figure.value / 40, rel=1e-12)


NAN = torch.full((4, 3), math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(normal(4, 3), normal(4, 2)), r"got \(4, 3\) and \(4, 2\)"),
        (lambda: kid(normal(4, 3), normal(1, 3)), r"n >= 2 are needed"),
        (lambda: kid(NAN, normal(4, 3)), "feature vector 0 holds NaN"),
        (lambda: kid(normal(4, 3), NAN), "feature vector 0 holds NaN"),
        (lambda: kid_subsets(normal(4, 3), normal(9, 3), 2, 5), r"n >= 5 are needed, got \(4, 3\)"),
        (lambda: kid_subsets(normal(4, 3), normal(9, 3), 2, 1), "size=1"),
        (lambda: kid_subsets(normal(4, 3), NAN, 2, 4), "NaN or infinity"),
        (lambda: inception_score(normal(4, 3)), "got 4 samples for splits=10"),
        (lambda: inception_score(NAN, 1), r"logits of sample \d"),
        (lambda: inception_score_adm(normal(0, 3)), "got 0 samples"),
        (lambda: neighbours(normal(4, 3), normal(9, 3), "prdc"), "n >= 6 are needed"),
        (lambda: neighbours(normal(4, 3), NAN), "holds NaN"),
        (lambda: neighbours(normal(4, 3), normal(9, 3), "vgg"), "unknown protocol 'vgg'; choose torch-fidelity"),
        (lambda: neighbours(normal(4, 3), normal(9, 3), Protocol(0, True)), "k must be at least 1, got 0"),
        (lambda: clip_score(normal(4, 3), normal(5, 3)), "4 images and 5 texts"),
        (lambda: clip_score(normal(2, 3), torch.zeros(2, 3)), "image or text 0 has length 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_global_switch_to_coarse_products_changes_nothing() -> None:
    x, y = features(300, dim=256), features(300, seed=1, dim=256, scale=1.1)
    expected = kid(x, y), neighbours(x, y)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert (kid(x, y), {k: v.value for k, v in neighbours(x, y).items()}) == (
            expected[0], {k: v.value for k, v in expected[1].items()})  # fmt: skip
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)

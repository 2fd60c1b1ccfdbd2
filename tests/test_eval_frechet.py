"""The Frechet distance against closed forms, identities, feature-space truth and torch-fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from flowkit.eval.exact import ExactStats
from flowkit.eval.frechet import FrechetReference, frechet_distance, frechet_terms, jackknife_distances
from flowkit.eval.intervals import jackknife_error
from flowkit.eval.statistics import FeatureStats

F8 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F8)


def rotation(dim: int, seed: int = 0) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(dim, dim, seed=seed))[0]
    return q


def features(count: int, dim: int, seed: int) -> Tensor:
    """Like a ReLU network's: correlated, non-negative, a common mean."""
    return torch.relu(normal(count, dim, seed=seed) @ normal(dim, dim, seed=seed + 1) / math.sqrt(dim) + 0.3)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=0), torch.atleast_2d(torch.cov(x.T))


def truth(x: Tensor, y: Tensor) -> float:
    """The distance without any covariance: the cross term is the nuclear norm of ``Xc Yc^T / sqrt((n - 1) (m - 1))``."""
    (mx, cx), (my, cy) = moments(x), moments(y)
    cross = torch.linalg.svdvals((x - mx) @ (y - my).T).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
    return float((mx - my).square().sum() + cx.trace() + cy.trace() - 2 * cross)


def theirs(x: Tensor, y: Tensor) -> float:
    one, two = ({"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in (moments(x), moments(y)))
    return float(fid_statistics_to_metric(one, two, verbose=False)[KEY_METRIC_FID])


def test_commuting_covariances_have_a_closed_form() -> None:
    dim = 512
    q, a, b = rotation(dim), normal(dim, seed=1).square() + 0.01, normal(dim, seed=2).square() + 0.01
    shift = normal(dim, seed=3)
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    terms = frechet_terms(torch.zeros(dim), q * a @ q.T, shift, q * b @ q.T)
    assert terms.route == "cholesky"
    assert terms.distance == pytest.approx(expected, abs=1e-9)
    assert terms.cross == pytest.approx(float((a * b).sqrt().sum()), abs=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_isotropic_gaussians(dim: int) -> None:
    mu = normal(dim)
    expected = float(mu.square().sum()) + dim * (math.sqrt(0.3) - math.sqrt(1.7)) ** 2
    assert frechet_distance(torch.zeros(dim), 0.3 * torch.eye(dim, dtype=F8), mu, 1.7 * torch.eye(dim, dtype=F8)) == (
        pytest.approx(expected, rel=1e-13)
    )


def test_one_direction_and_none() -> None:
    dim = 20
    u, v = (normal(dim, seed=s) for s in (1, 2))
    mu, zero = normal(dim, seed=3), torch.zeros(dim, dtype=F8)
    rank_one = float(mu.square().sum() + u @ u + v @ v - 2 * (u @ v).abs())
    terms = frechet_terms(zero, torch.outer(u, u), mu, torch.outer(v, v))
    assert terms[4:7] == (1, 1, "eigen")
    assert terms.distance == pytest.approx(rank_one, rel=1e-12)
    point = torch.zeros(dim, dim, dtype=F8)
    assert frechet_distance(zero, point, mu, torch.outer(v, v)) == pytest.approx(float(mu @ mu + v @ v), rel=1e-13)
    assert frechet_distance(zero, point, mu, point) == pytest.approx(float(mu @ mu), rel=1e-15)


@pytest.mark.parametrize("dim", [3, 64, 512])
def test_the_optimal_map_gives_the_distance(dim: int) -> None:
    """x -> T x with T symmetric positive definite is the optimal map onto S2 = T S1 T, at cost tr S1 (I - T)^2."""
    a, b = normal(dim, dim, seed=1) / math.sqrt(dim), normal(dim, dim, seed=2) / math.sqrt(dim)
    s1, t = a @ a.T + 0.1 * torch.eye(dim, dtype=F8), b @ b.T + 0.3 * torch.eye(dim, dtype=F8)
    s2 = t @ s1 @ t
    assert (s1 @ s2 - s2 @ s1).abs().max() > 1e-2
    gap = torch.eye(dim, dtype=F8) - t
    expected = float((s1 @ gap @ gap).trace())
    terms = frechet_terms(torch.zeros(dim), s1, torch.zeros(dim), (s2 + s2.T) / 2)
    assert terms.route == "cholesky"
    assert terms.distance == pytest.approx(expected, rel=1e-10)


@given(st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_identities(dim: int, seed: int) -> None:
    x, y = features(dim + 20, dim, seed), features(dim + 30, dim, seed + 7)
    one, two = moments(x), moments(y)
    size = float(one[1].trace() + two[1].trace() + (one[0] - two[0]).square().sum())
    distance = frechet_distance(*one, *two)
    near = pytest.approx(distance, abs=1e-10 * size)
    assert frechet_distance(*two, *one) == near
    assert frechet_distance(*moments(3.0 * x), *moments(3.0 * y)) / 9 == near
    q = rotation(dim, seed)
    assert frechet_distance(*moments(x @ q), *moments(y @ q)) == near
    shift = normal(dim, seed=seed)
    assert frechet_distance(one[0] + shift, one[1], two[0] + shift, two[1]) == near


@pytest.mark.parametrize(("count", "route"), [(600, "cholesky"), (100, "eigen")])
def test_the_distance_to_itself_is_zero(count: int, route: str) -> None:
    """The terms, which are not clamped at zero, show it."""
    mu, sigma = moments(features(count, 256, seed=1))
    terms = frechet_terms(mu, sigma, mu, sigma)
    assert terms.route == route
    assert abs(terms.mean + terms.trace1 + terms.trace2 - 2 * terms.cross) < 1e-11 * terms.trace1
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-11 * terms.trace1


def dead(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, ::10] = 0.25
    return x


SINGULAR: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "few and few": lambda: (features(60, 128, 1), features(50, 128, 5)),
    "few and many": lambda: (features(60, 128, 1), features(400, 128, 5)),
    "many and few": lambda: (features(400, 128, 1), features(60, 128, 5)),
    "dead and alive": lambda: (dead(features(400, 128, 1)), features(400, 128, 5)),
    "alive and dead": lambda: (features(400, 128, 1), dead(features(400, 128, 5))),
    "dead in both": lambda: (dead(features(400, 128, 1)), dead(features(400, 128, 5))),
    "one copied feature": lambda: (features(400, 128, 1), features(400, 128, 5)[:, [0, *range(127)]]),
    "as many as features": lambda: (features(128, 128, 1), features(400, 128, 5)),
    "scaled by 100": lambda: (100 * features(60, 128, 1), 100 * features(400, 128, 5)),
}


@pytest.mark.parametrize("case", SINGULAR)
def test_singular_covariances_are_exact(case: str) -> None:
    x, y = SINGULAR[case]()
    terms = frechet_terms(*moments(x), *moments(y))
    assert terms.route == "eigen"
    assert (terms.rank1, terms.rank2) == tuple(int(torch.linalg.matrix_rank(v - v.mean(dim=0))) for v in (x, y))
    assert terms.distance == pytest.approx(truth(x, y), abs=1e-11 * terms.trace1)


@pytest.mark.parametrize("case", SINGULAR)
def test_a_cached_reference_and_features_give_the_same(case: str) -> None:
    """From moments, from features on either side, from statistics that may be overwritten: one distance."""
    x, y = SINGULAR[case]()
    expected, size = truth(x, y), float(torch.cov(x.T).trace())
    near = pytest.approx(expected, abs=1e-11 * size)
    stats = collected(y)
    for reference in (FrechetReference(*moments(x)), FrechetReference.from_features(x)):
        found = [reference.terms(*moments(y)), reference.terms_of(stats), reference.terms_of_features(y),
                 reference.terms_of(stats.copy(), overwrite=True)]  # fmt: skip
        for terms in found:
            assert terms.distance == near
            assert (terms.rank1, terms.rank2) == tuple(int(torch.linalg.matrix_rank(v - v.mean(dim=0))) for v in (x, y))
    assert stats.sha256() == collected(y).sha256()


def collected(x: Tensor) -> FeatureStats:
    stats = FeatureStats.empty(x.shape[1])
    stats.update(x)
    return stats


def test_the_eigenvalues_of_the_product_fail_where_ours_do_not() -> None:
    """Control: the formula of torch-fidelity misses a tolerance 1,000 times wider."""
    x, y = SINGULAR["few and many"]()
    assert abs(theirs(x, y) - truth(x, y)) > 5e-7


@pytest.mark.parametrize("dim", [16, 300])
def test_torch_fidelity_agrees_at_full_rank(dim: int) -> None:
    x, y = features(4 * dim, dim, 1), features(5 * dim, dim, 9)
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(theirs(x, y), rel=1e-9)


@pytest.mark.parametrize(("decades", "route"), [(4, "cholesky"), (10, "cholesky"), (13, "eigen")])
def test_spectra_over_many_decades(decades: int, route: str) -> None:
    """Real features have small but real variances; rounding may not drop or blur them, on either route."""
    dim, q = 128, rotation(128)
    scale = torch.logspace(0, -decades / 2, dim, dtype=F8)
    x, y = normal(400, dim, seed=1) * scale @ q, 1.1 * normal(450, dim, seed=2) * scale @ q
    terms = frechet_terms(*moments(x), *moments(y))
    assert terms[4:7] == (dim, dim, route)
    assert terms.distance == pytest.approx(truth(x, y), abs=1e-11)


def test_arrays_tensors_and_shapes_of_every_kind_are_read_alike() -> None:
    x, y = features(100, 5, 1), features(100, 5, 3)
    (m1, s1), (m2, s2) = moments(x), moments(y)
    expected = frechet_distance(m1, s1, m2, s2)
    assert frechet_distance(m1.numpy(), s1.numpy(), m2.numpy()[None], s2.numpy()[None]) == expected
    assert frechet_distance(m1.tolist(), s1.tolist(), m2[:, None], s2.requires_grad_()) == expected
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = [value.detach().to(dtype) for value in (m1, s1, m2, s2)]
        wide = [value.double() for value in narrow]
        assert frechet_distance(*narrow) == frechet_distance(*wide)
        assert frechet_distance(*narrow) == pytest.approx(expected, abs=torch.finfo(dtype).eps * 10)
    assert frechet_distance(1.0, 4.0, 3.0, 9.0) == pytest.approx(5.0, rel=1e-15)
    assert frechet_distance(np.float32(1), np.float32(4), [3.0], [[9.0]]) == pytest.approx(5.0, rel=1e-15)


def test_a_singular_covariance_rounded_to_float32_is_still_one() -> None:
    """Rounding makes its zero eigenvalues slightly negative; that is no reason to refuse an old statistics file."""
    mu, sigma = (value.float() for value in moments(features(100, 256, 1)))
    assert float(torch.linalg.eigvalsh(sigma.double())[0]) < 0
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0.0, abs=1e-3 * float(sigma.trace()))


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 0, math.nan], EYE, [0, 0, 0], EYE), ValueError, "sigma1 holds NaN or infinity"),
        (([0, 0, 0], EYE, [0, 0, 0], np.full((3, 3), math.inf)), ValueError, "sigma2 holds NaN or infinity"),
        (([0, 0, 0], np.triu(np.ones((3, 3))), [0, 0, 0], EYE), ValueError, "sigma1 is not symmetric"),
        (([0, 0, 0], EYE, [0, 0, 0], np.diag([1.0, 1.0, -0.5])), ValueError, "sigma2 has a negative eigenvalue"),
        (([0, 0, 0], -EYE, [0, 0, 0], EYE), ValueError, "sigma1 has a negative eigenvalue"),
        (([0, 0], EYE, [0, 0, 0], EYE), ValueError, r"got \(2,\) and \(3, 3\)"),
        (([0, 0, 0], EYE, [0, 0], EYE[:2, :2]), ValueError, "3 and 2 dimensions"),
        (([], np.zeros((0, 0)), [], np.zeros((0, 0))), ValueError, r"got \(0,\)"),
        (([0, 0, 0], EYE * 1j, [0, 0, 0], EYE), TypeError, "must be real"),
    ],
)
def test_what_cannot_be_moments_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        frechet_distance(*arguments)


def chunked(x: Tensor, count: int = 20) -> list[FeatureStats]:
    chunks = []
    for part in x.tensor_split(count):
        chunks.append(FeatureStats.empty(x.shape[1]))
        chunks[-1].update(part)
    return chunks


def test_the_jackknife_of_a_mean_is_the_classical_standard_error() -> None:
    values = normal(37).tolist()
    left_out = [(sum(values) - value) / 36 for value in values]
    assert jackknife_error(left_out) == pytest.approx(float(np.std(values, ddof=1)) / math.sqrt(37), rel=1e-12)
    assert math.isnan(jackknife_error([1.0]))


def test_jackknife_distances_are_those_of_the_other_chunks() -> None:
    x, reference = features(205, 8, 1), chunked(features(300, 8, 5), 1)[0]
    distances = list(jackknife_distances(chunked(x), reference))
    parts = x.tensor_split(20)
    for k, distance in enumerate(distances):
        rest = torch.cat([*parts[:k], *parts[k + 1 :]])
        assert distance == pytest.approx(
            frechet_distance(reference.mean, reference.covariance(), *moments(rest)), rel=1e-10
        )


def test_the_standard_error_is_the_spread_over_repeated_samples() -> None:
    """60 independent samples: their spread is known to 9%, the mean of the estimates better; a quarter is 2.7 sigma."""
    dim, mixing = 8, normal(8, 8, seed=99) / 3
    reference = chunked(normal(20_000, dim, seed=100), 1)[0]
    distances, errors = [], []
    for seed in range(60):
        x = normal(1000, dim, seed=seed) @ (torch.eye(dim, dtype=F8) + mixing)
        distances.append(frechet_distance(reference.mean, reference.covariance(), *moments(x)))
        errors.append(jackknife_error(jackknife_distances(chunked(x), reference)))
    ratio = float(np.mean(errors) / np.std(distances, ddof=1))
    assert 0.75 < ratio < 1.3
    # Control: the plain spread of the left-out values, a common mistake, is too small by sqrt(K - 1).
    plain = float(np.std(list(jackknife_distances(chunked(x), reference)), ddof=1))
    assert plain < 0.4 * errors[-1]


def test_one_reference_serves_many_samples_and_is_left_as_it_was() -> None:
    x = features(300, 64, 1)
    reference = FrechetReference(*moments(x))
    for seed, count in enumerate((40, 64, 200, 500)):
        y = features(count, 64, 10 + seed)
        one, two = reference.terms(*moments(y)), frechet_terms(*moments(x), *moments(y))
        assert one == two
        assert one.route == ("cholesky" if count > 64 else "eigen")
        assert reference.distance(collected(y)) == pytest.approx(one.distance, rel=1e-12)
        exact = ExactStats.empty(64)
        exact.update(y)
        assert reference.distance(exact.stats(), overwrite=True) == pytest.approx(one.distance, rel=1e-5)


def test_few_features_never_need_a_covariance() -> None:
    x, y = features(30, 400, 1), features(25, 400, 5)
    terms = FrechetReference.from_features(x).terms_of_features(y)
    assert terms.route == "features"
    assert (terms.rank1, terms.rank2, terms.condition1, terms.condition2) == (29, 24, 0.0, 0.0)
    assert terms.distance == pytest.approx(truth(x, y), rel=1e-12)
    same = FrechetReference.from_features(x).terms_of_features(x)
    assert abs(same.trace1 + same.trace2 - 2 * same.cross) < 1e-12 * same.trace1
    many = FrechetReference.from_features(features(300, 20, 1)).terms_of_features(features(200, 20, 5))
    assert many.route == "cholesky"
    assert many.distance == pytest.approx(truth(features(300, 20, 1), features(200, 20, 5)), rel=1e-11)


def test_conditioning_is_reported() -> None:
    scale = torch.tensor([1.0, 1e-2, 1e-4], dtype=F8)
    regular = frechet_terms(torch.zeros(3), torch.diag(scale), torch.zeros(3), torch.eye(3))
    assert (regular.route, regular.condition2) == ("cholesky", 1.0)
    assert regular.condition1 == pytest.approx(1e-4, rel=1e-12)
    singular = frechet_terms(
        torch.zeros(3), torch.diag(scale * torch.tensor([1.0, 1.0, 0.0])), torch.zeros(3), torch.eye(3)
    )
    assert (singular.route, singular.condition1, singular.rank1) == ("eigen", 0.0, 2)


def test_blocks_of_the_product_cover_every_dimension(device: torch.device) -> None:
    for dim in (255, 256, 257, 600):
        x, y = features(2 * dim, dim, 1), features(2 * dim, dim, 5)
        terms = frechet_terms(*(m.to(device) for v in (x, y) for m in moments(v)))
        assert terms.route == "cholesky"
        assert terms.distance == pytest.approx(truth(x, y), rel=1e-10)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (normal(1, 5), ValueError, r"got \(1, 5\); add images"),
        (normal(5), ValueError, r"got \(5,\)"),
        (torch.full((4, 5), math.nan), ValueError, "NaN"),
        (torch.ones(4, 5, dtype=torch.int64), TypeError, "floating point"),
        (normal(9, 4), ValueError, "5 and 4 dimensions"),
    ],
)
def test_features_that_give_no_distance_are_refused(bad: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FrechetReference(torch.zeros(5), torch.eye(5)).terms_of_features(bad)


def test_statistics_of_one_image_or_another_dimension_are_refused() -> None:
    reference = FrechetReference(torch.zeros(5), torch.eye(5))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="at least 2 images, got 1"):
            reference.distance(collected(normal(1, 5)), overwrite)
        with pytest.raises(ValueError, match="5 and 4 dimensions"):
            reference.distance(collected(normal(9, 4)), overwrite)

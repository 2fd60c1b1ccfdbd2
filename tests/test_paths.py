from __future__ import annotations

import math

import pytest

from flowkit import paths, predictions
from flowkit.paths import Path

PATHS = [
    paths.flow(),
    paths.vp(paths.betas()),
    paths.vp(paths.betas("linear", 1e-4, 0.02)),
    paths.cosine(),
    paths.ve(),
    paths.edm(),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_every_path_is_the_straight_path_in_other_units(path: Path) -> None:
    for s in (0.02, 0.3, 0.5, 0.9):
        alpha, sigma, n = path.alpha(s), path.sigma(s), path.norm(s)
        assert sigma / (alpha + sigma) == pytest.approx(s, rel=1e-14)
        assert (alpha * n, sigma * n) == pytest.approx((1 - s, s), rel=1e-14)
        invariant = {"flow": alpha + sigma, "ve": alpha, "edm": alpha}.get(path.name, alpha**2 + sigma**2)
        assert invariant == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_levels_and_times_invert(path: Path) -> None:
    for s in (0.06, 0.3, 0.5, 0.9):
        assert path.at_level(path.level(s)) == pytest.approx(s, rel=1e-13)
        assert path.at_time(path.time(s)) == pytest.approx(s, rel=1e-12)


def test_clocks_at_known_points() -> None:
    assert paths.flow().time(0.25) == 250
    assert paths.cosine().time(0.5) == pytest.approx(500)  # alpha = sigma at the middle
    assert paths.edm().time(0.5) == pytest.approx(0)  # sigma = 1
    vp = paths.vp([0.1, 0.2, 0.3])
    bars = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]
    for t, bar in enumerate(bars):
        assert vp.alpha(vp.at_time(t)) == pytest.approx(math.sqrt(bar), rel=1e-14)
    between = vp.at_time(0.5)  # log-linear in sigma / alpha
    assert vp.level(between) == pytest.approx(math.sqrt(vp.rhos[0] * vp.rhos[1]), rel=1e-14)


def test_zero_terminal_snr_is_pure_noise_with_a_finite_clock() -> None:
    vp = paths.vp([0.1, 0.2, 1.0])
    assert vp.start == 1
    assert vp.time(1.0) == 2
    assert vp.alpha(vp.at_time(2)) == 0
    s = 0.5 * (vp.at_time(1) + 1)
    assert vp.at_time(vp.time(s)) == pytest.approx(s)


@pytest.mark.parametrize("betas", [[], [0.1], [0.1, 1.5], [0.0, 0.1], [[0.1, 0.2]]])
def test_bad_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas must be"):
        paths.vp(betas)


def test_bad_names_and_times_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown beta_schedule 'quadratic'"):
        paths.betas("quadratic")
    with pytest.raises(ValueError, match="unknown path 'vpp'"):
        paths.named("vpp")
    with pytest.raises(ValueError, match="1001 lies outside"):
        paths.flow().at_time(1001)
    with pytest.raises(ValueError, match="1000 lies outside the trained times"):
        PATHS[1].at_time(1000)
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        paths.edm(sigma_data=0)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("target", predictions.PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_predictions_convert_both_ways(path: Path, prediction: str, target: str) -> None:
    x0, eps = 0.7, -1.3
    for s in (0.1, 0.6, 0.97):
        alpha, sigma = path.alpha(s), path.sigma(s)
        x = alpha * x0 + sigma * eps
        raws = {}
        for kind in (prediction, target):
            a, b = predictions.pair(kind, alpha, sigma)
            raws[kind] = a * x0 + b * eps
        p, q = predictions.row(prediction, predictions.pair(target, alpha, sigma), alpha, sigma)
        assert p * x + q * raws[prediction] == pytest.approx(raws[target], rel=1e-9, abs=1e-9)


def test_edm_predictions_are_the_published_preconditioning() -> None:
    sigma, data, x, raw = 1.7, 0.5, 0.4, -0.9
    total = sigma**2 + data**2
    for kind, sign in (("edm", 1), ("edm_v", -1)):
        p, q = predictions.row(kind, (1.0, 0.0), 1.0, sigma, data)
        x0 = data**2 / total * x + sign * sigma * data / math.sqrt(total) * raw
        assert p * x + q * raw == pytest.approx(x0, rel=1e-14)


def test_undetermined_conversions_are_refused() -> None:
    with pytest.raises(ValueError, match="does not determine the sample at alpha = 0"):
        predictions.row("epsilon", (1.0, 0.0), 0.0, 1.0)
    with pytest.raises(ValueError, match="'sample' does not determine"):
        predictions.row("sample", (0.0, 1.0), 1.0, 0.0)
    assert predictions.row("epsilon", (0.0, 1.0), 0.0, 1.0) == (0.0, 1.0)
    assert predictions.row("v_prediction", (1.0, 0.0), 0.0, 1.0) == (0.0, -1.0)
    with pytest.raises(ValueError, match="unknown prediction type 'noise'"):
        predictions.pair("noise", 1.0, 1.0)

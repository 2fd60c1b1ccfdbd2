"""Standard errors and intervals, FID-infinity, spools on disk, straightness, and the registry of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowkit
from flowkit.eval.exact import ExactStats
from flowkit.eval.frechet import FrechetReference, frechet_distance, jackknife_distances
from flowkit.eval.infinity import extrapolate, fid_infinity
from flowkit.eval.intervals import Figure, interval, jackknife, paired, repeated, student_t
from flowkit.eval.kid import kid, kid_subsets
from flowkit.eval.metrics import METRICS, FeatureSet, measure, required
from flowkit.eval.neighbours import neighbours
from flowkit.eval.spool import FeatureSpool, StatsSpool, read_stats
from flowkit.eval.statistics import FeatureStats
from flowkit.eval.straightness import straightness, transport_cost

F8 = torch.float64
IDENTITY = {"name": "test"}
KINDS = [FeatureStats, ExactStats]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F8)


def collect(x: Tensor, kind: Any = FeatureStats) -> Any:
    stats = kind.empty(x.shape[1], IDENTITY)
    stats.update(x)
    return stats


def chunked(x: Tensor, count: int = 20, kind: Any = FeatureStats) -> list[Any]:
    return [collect(part, kind) for part in x.tensor_split(count)]


STUDENT = [(1, 0.95, 12.7062047364), (2, 0.95, 4.30265272991), (19, 0.95, 2.09302405441), (19, 0.99, 2.86093460647),
           (20, 0.5, 0.686954496449), (100, 0.95, 1.98397151845)]  # fmt: skip


@pytest.mark.parametrize(("degrees", "level", "t"), STUDENT)
def test_students_t(degrees: int, level: float, t: float) -> None:
    assert student_t(degrees, level) == pytest.approx(t, rel=1e-10)


def test_repeated_runs() -> None:
    figure = repeated([2.0, 3.0, 7.0])
    assert (figure.value, figure.details["smallest"]) == (4.0, 2.0)
    assert figure.details["spread"] == pytest.approx(math.sqrt(7))
    assert figure.se == pytest.approx(math.sqrt(7 / 3))
    assert figure.details["interval"] == pytest.approx((4 - 4.30265273 * figure.se, 4 + 4.30265273 * figure.se))
    assert interval(4.0, figure.se, 2) == figure.details["interval"]


def test_the_jackknife_takes_the_bias_of_a_variance_away() -> None:
    """The variance divided by n has the bias -var / n, which the corrected value of single samples removes exactly."""
    x = normal(30).numpy()
    figure = jackknife(float(np.var(x)), [float(np.var(np.delete(x, k))) for k in range(30)])
    assert figure.details["corrected"] == pytest.approx(float(np.var(x, ddof=1)), rel=1e-12)


DIM = 6
REFERENCE = FrechetReference(torch.zeros(DIM), torch.eye(DIM))


def model(noise: Tensor, shift: float) -> Tensor:
    """Two models are two maps of the same noise."""
    return noise * (1.2 + shift) + 0.3 * noise.roll(1, dims=1).square() / 3 + shift


def measured(x: Tensor) -> Figure:
    chunks = chunked(x)
    total = collect(x)
    return jackknife(REFERENCE.distance(total), jackknife_distances(chunks, REFERENCE))


def test_the_interval_of_a_paired_difference_is_tight_and_covers() -> None:
    """100 repetitions at 95 %: coverage below 88 or a width above a third of the unpaired one would be an error."""
    shifts, count, covered, widths, unpaired = (0.0, 0.05), 400, 0, [], []
    large = normal(400_000, DIM, seed=10_000)
    # At this size the distance still has a bias; the mean of a second set of repetitions is what the interval should cover.
    one, other = ([REFERENCE.distance(collect(model(part, s))) for part in large.split(count)] for s in shifts)
    truth = float(np.mean(one) - np.mean(other))
    for seed in range(100):
        noise = normal(count, DIM, seed=seed)
        figures = [measured(model(noise, s)) for s in shifts]
        difference = paired(figures[0], figures[1])
        low, high = difference.details["interval"]
        covered += low <= truth <= high
        widths.append(difference.se)
        unpaired.append(math.hypot(figures[0].se, figures[1].se))
    assert 88 <= covered <= 99
    assert float(np.mean(widths)) < float(np.mean(unpaired)) / 3
    assert measured(model(normal(count, DIM), 0.0)).details["left_out"] != difference.details["left_out"]


def test_pairing_different_samples_gains_nothing() -> None:
    """Control: with other seeds the difference is as uncertain as two independent figures."""
    ratios = []
    for seed in range(20):
        figures = [measured(model(normal(400, DIM, seed=seed + 100 * k), 0.05 * k)) for k in range(2)]
        ratios.append(paired(figures[0], figures[1]).se / math.hypot(figures[0].se, figures[1].se))
    assert 0.85 < float(np.mean(ratios)) < 1.15


def test_fid_infinity_finds_the_distance_that_finite_sets_miss() -> None:
    """Recipe 12: a Gaussian with a known distance to the reference."""
    dim, count = 40, 4000
    scale = torch.linspace(0.9, 1.1, dim, dtype=F8)
    reference = FrechetReference(torch.zeros(dim), torch.eye(dim))
    truth = float((scale - 1).square().sum())
    raw, far, errors = [], [], []
    for seed in range(12):
        chunks = chunked(normal(count, dim, seed=seed) * scale)
        value = reference.distance(collect(normal(count, dim, seed=seed) * scale))
        se = jackknife(value, jackknife_distances(chunks, reference)).se
        figure = fid_infinity(chunks, reference, se)
        raw.append(value)
        far.append(figure.value)
        errors.append(figure.se)
        assert figure.details["counts"][-1] == count
        assert abs(figure.value - truth) < 4 * figure.se
    mean_error = float(np.std(far, ddof=1)) / math.sqrt(12)
    assert float(np.mean(raw)) - truth > 20 * float(np.std(raw, ddof=1)) / math.sqrt(12)
    assert abs(float(np.mean(far)) - truth) < 3 * mean_error
    # The analytic error against the spread of 12, known to 21 %.
    assert 0.5 < float(np.mean(errors) / np.std(far, ddof=1)) < 2


def test_extrapolation_of_a_line_is_exact_and_its_error_is_that_of_the_weights() -> None:
    counts = [1000, 1500, 2500, 4000]
    figure = extrapolate(counts, [3 + 700 / n for n in counts], se=0.1)
    assert figure.value == pytest.approx(3.0, rel=1e-12)
    assert figure.details["slope"] == pytest.approx(700, rel=1e-10)
    # Means of nested sets of independent numbers, many times: the spread of the fitted value.
    fitted = [extrapolate(counts, [float(x[:n].mean()) for n in counts]).value for x in normal(300, 4000, seed=4)]
    predicted = extrapolate(counts, [0.0] * 4, se=1 / math.sqrt(4000)).se
    assert 0.85 < predicted / float(np.std(fitted)) < 1.18
    assert predicted > 1.1 / math.sqrt(4000)


def test_too_few_samples_for_an_extrapolation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 prefixes of at least 12 images .* got 2 from 20 images"):
        fid_infinity(chunked(normal(20, DIM), 4), REFERENCE)
    for counts in ([1, 2], [3, 2, 1], [0, 1, 2]):
        with pytest.raises(ValueError, match="3 growing counts"):
            extrapolate(counts, [1.0] * len(counts))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_on_disk_give_the_same_figures_as_in_memory(tmp_path: Path, kind: Any) -> None:
    x = normal(300, DIM)
    chunks = chunked(x, 5, kind)
    spool = StatsSpool(tmp_path, 5)
    assert spool.missing() == [0, 1, 2, 3, 4]
    for k in (3, 0, 4, 1):
        spool.write(k, chunks[k])
    assert StatsSpool(tmp_path, 5).missing() == [2]
    with pytest.raises(FileNotFoundError, match="chunk-0002"):
        spool[2]
    spool.write(2, chunks[2])
    assert list(jackknife_distances(spool, REFERENCE)) == list(jackknife_distances(chunks, REFERENCE))
    assert fid_infinity(spool, REFERENCE).value == fid_infinity(chunks, REFERENCE).value
    assert isinstance(read_stats(spool.path(0)), kind)
    assert [c.count for c in spool[1:3]] == [60, 60]
    with pytest.raises(ValueError, match="chunk 5 is not one of 0 to 4"):
        spool.write(5, chunks[0])
    with pytest.raises(IndexError):
        spool[5]


def test_a_spool_of_features_is_the_features(tmp_path: Path) -> None:
    x = normal(107, DIM).float()
    spool = FeatureSpool(tmp_path / "features", 107, DIM, block=25, identity=IDENTITY)
    assert spool.missing() == [0, 1, 2, 3, 4]
    for k in (4, 1, 3, 0):
        spool.write(k, x[spool.span(k).start : spool.span(k).stop])
    again = FeatureSpool(tmp_path / "features", 107, DIM, block=25, identity=IDENTITY)
    assert again.missing() == [2]
    with pytest.raises(FileNotFoundError, match="features-000002"):
        again[40:60]
    again.write(2, x[50:75])
    assert not again.missing()
    assert torch.equal(again[:], x)
    assert torch.equal(again[20:80], x[20:80])
    assert torch.equal(again[200:], x[200:])
    order = torch.randperm(107, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[order], x[order])
    y = normal(60, DIM, seed=1).float()
    assert kid(again, y) == kid(x, y)
    assert kid_subsets(again, y, 3, 20) == kid_subsets(x, y, 3, 20)
    assert {k: v.value for k, v in neighbours(again, y, block=30).items()} == {
        k: v.value for k, v in neighbours(x, y, block=30).items()
    }
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == [
        f"features-00000{k}.safetensors" for k in range(5)
    ]


def test_a_spool_refuses_what_would_not_be_the_run(tmp_path: Path) -> None:
    spool = FeatureSpool(tmp_path, 40, DIM, block=25, identity=IDENTITY)
    spool.write(1, normal(15, DIM))
    for features, error, message in (
        (normal(15, DIM), ValueError, "block 0 holds 25 samples, got features of 15"),
        (normal(25, 3), ValueError, r"\(B, 6\)"),
        (torch.full((25, DIM), math.nan), ValueError, "NaN"),
        (torch.ones(25, DIM, dtype=torch.int64), TypeError, "floating"),
    ):
        with pytest.raises(error, match=message):
            spool.write(0, features)
    with pytest.raises(ValueError, match="block 2 is not one of 0 to 1"):
        spool.write(2, normal(25, DIM))
    for other in (
        FeatureSpool(tmp_path, 41, DIM, 25, IDENTITY),
        FeatureSpool(tmp_path, 40, DIM, 25, {"name": "other"}),
    ):
        with pytest.raises(ValueError, match=r"features-000001.*another run"):
            other.missing()
    spool.path(1).write_bytes(spool.path(1).read_bytes()[:-4])
    with pytest.raises(ValueError, match="corrupt"):
        FeatureSpool(tmp_path, 40, DIM, 25, IDENTITY).missing()
    with pytest.raises(ValueError, match="got 0, 6 and 25"):
        FeatureSpool(tmp_path, 0, DIM, 25)


def test_a_straight_flow_and_one_with_a_known_bend() -> None:
    starts, ends = normal(50, 3), normal(50, 3, seed=1)
    times = [1.0, 0.7, 0.4, 0.1, 0.0]
    states = [starts * t + ends * (1 - t) for t in times]
    for velocities in (None, [starts - ends] * 4):
        figure = straightness(states, times, velocities)
        assert figure.value == pytest.approx(0.0, abs=1e-25)
    cost = transport_cost(starts, ends)
    assert cost.value == pytest.approx(float((starts - ends).square().sum(dim=1).mean()))
    # Z_t = Z_0 + t^2 (Z_1 - Z_0) has v = 2 t (Z_1 - Z_0) and S = E |Z_1 - Z_0|^2 int (1 - 2 t)^2 dt, a third of the cost.
    fine = torch.linspace(0, 1, 2001, dtype=F8).tolist()
    bent = [starts + t * t * (ends - starts) for t in fine]
    for velocities in (None, [2 * t * (ends - starts) for t in fine[:-1]]):
        figure = straightness(bent, fine, velocities)
        assert figure.value == pytest.approx(cost.value / 3, rel=2e-3)
        assert figure.details["relative"] == pytest.approx(1 / 3, rel=2e-3)
    # The unit of time does not count, and it may run backwards.
    slow = straightness(bent, [7 - 5 * t for t in fine], [-2 * t * (ends - starts) / 5 for t in fine[:-1]])
    assert slow.value == pytest.approx(figure.value, rel=1e-9)


def test_the_straightness_of_a_recorded_run() -> None:
    pipe = flowkit.load_demo("digits")
    pipe.scheduler = flowkit.RectifiedFlowScheduler.from_config(pipe.scheduler.config, solver="euler")
    recorder = flowkit.Recorder("state", "output")
    with flowkit.attach(pipe, recorder):
        pipe(
            class_labels=[1, 2, 3, 4],
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    run = recorder.trajectories[0]
    times = [*run.sigmas, 0.0]
    outputs, chords = straightness(run.states, times, run.outputs), straightness(run.states, times)
    assert outputs.value == pytest.approx(chords.value, rel=1e-3)
    assert 0 < outputs.details["relative"] < 1
    assert outputs.details["transport_cost"] == pytest.approx(transport_cost(run.states[0], run.states[-1]).value)


NAMES = [
    "fid",
    "fid_infinity",
    "kid",
    "kid_subsets",
    "precision",
    "recall",
    "density",
    "coverage",
    "cmmd",
    "cmmd_unbiased",
    "is",
    "is_adm",
]


def test_every_metric_is_computed_from_what_it_requires() -> None:
    assert list(METRICS) == NAMES
    assert required(["fid"]) == ({"moments"}, {"moments"})
    assert required(["is"]) == ({"logits"}, set())
    assert required(["fid_infinity", "recall", "is"]) == ({"moments", "features", "logits"}, {"moments", "features"})
    x, y = (normal(1200, DIM, seed=seed) for seed in range(2))
    x, y = ((v / v.norm(dim=1, keepdim=True)).float() for v in (x, y))
    samples = FeatureSet(chunked(x), x, normal(1200, 10, seed=3))
    reference = FeatureSet([collect(y)], y)
    names = ["recall", "is", *(n for n in NAMES if n not in ("recall", "is"))]
    shown = []

    def track(sequence: Any, *, total: float, description: str) -> Any:
        shown.append((total, description))
        return sequence

    figures = measure(names, samples, reference, track)
    assert list(figures) == names
    assert shown == [(20, "standard error")]
    stats = [collect(v) for v in (x, y)]
    fid = frechet_distance(*(m for s in stats for m in (s.mean, s.covariance())))
    assert figures["fid"].value == pytest.approx(fid, rel=1e-9)
    assert figures["fid"].details["terms"]["rank1"] == DIM
    assert figures["kid"] == kid(x, y)
    assert figures["recall"].value == neighbours(x, y)["recall"].value
    assert figures["cmmd"].value > figures["cmmd_unbiased"].value
    assert all(math.isfinite(figure.value) for figure in figures.values())
    assert samples.chunks[0].count == 60
    assert measure(["fid"], FeatureSet([collect(x)]), reference)["fid"].value == pytest.approx(fid, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: required(["fid", "FID"]), "unknown metric 'FID'; choose fid, fid_infinity"),
        (lambda: measure(["kid"], FeatureSet([collect(normal(9, 3))])), "kid needs the features of the samples"),
        (lambda: measure(["kid"], FeatureSet(features=normal(9, 3))), "kid needs the features of the reference"),
        (lambda: measure(["recall"], FeatureSet(features=normal(9, 3)), FeatureSet([collect(normal(9, 3))])),
         "precision needs the features of the reference"),
        (lambda: measure(["is"], FeatureSet(features=normal(9, 3))), "is needs the logits of the samples"),
        (lambda: jackknife(1.0, [1.0]), "at least 2 chunks, got 1"),
        (lambda: paired(Figure(1.0), Figure(2.0)), "got no and no delete-one values"),
        (lambda: paired(jackknife(1.0, [1.0, 2.0]), jackknife(1.0, [1.0, 2.0, 3.0])), "got 2 and 3 delete-one values"),
        (lambda: repeated([1.0]), "at least 2 runs, got 1"),
        (lambda: student_t(0, 0.95), "degrees=0"),
        (lambda: student_t(3, 1.0), "level=1.0"),
        (lambda: straightness([normal(2, 3)], [0.0]), "got 1 states"),
        (lambda: straightness([normal(2, 3)] * 3, [0.0, 1.0, 0.5]), "all rising or all falling"),
        (lambda: straightness([normal(2, 3)] * 2, [0.0, 1.0], [normal(2, 4)]), "all of one shape"),
        (lambda: straightness([normal(2, 3)] * 2, [0.0, 1.0], [normal(2, 3)] * 2), "and 2 velocities"),
        (lambda: straightness([normal(2, 3), normal(2, 3) / 0], [0.0, 1.0]), "sample 0 holds NaN or infinity"),
        (lambda: transport_cost(normal(2, 3), normal(3, 3)), r"starts of shape \(2, 3\) and ends of \(3, 3\)"),
        (lambda: StatsSpool("x", 0), "at least 1 chunk, got 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

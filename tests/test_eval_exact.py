"""Exact sums: one set of features, one set of bits, however it was cut, ordered, merged, stored and taken apart."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowkit import weights
from flowkit.eval.exact import ExactStats
from flowkit.eval.frechet import frechet_distance
from flowkit.eval.statistics import FeatureStats, leave_one_out, merged

IDENTITY = {"name": "test"}
N, D = 2500, 9
ROOT = Path(__file__).resolve().parents[1]


def draw(count: int = N, dim: int = D, seed: int = 0, offset: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + offset


def collect(*batches: Tensor, bound: float = 64.0) -> ExactStats:
    stats = ExactStats.empty(batches[0].shape[1], IDENTITY, bound=bound)
    for batch in batches:
        stats.update(batch)
    return stats


def assert_same_bits(one: ExactStats, other: ExactStats) -> None:
    assert one.count == other.count
    for a, b in zip(one.state()[0].values(), other.state()[0].values(), strict=True):
        assert torch.equal(a, b)
    assert one.stats().sha256() == other.stats().sha256()


cuts = st.lists(st.integers(0, N), max_size=8).map(sorted)


@given(cuts, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_batches_ranks_and_order_give_the_same_bits(points: list[int], seed: int) -> None:
    x, random = draw(), Random(seed)
    order = list(range(N))
    random.shuffle(order)
    shuffled = x[order]
    parts = [collect(*shuffled[a:b].split(random.choice([7, 64, 1000, 2000])), shuffled[:0])
             for a, b in itertools.pairwise([0, *points, N])]  # fmt: skip
    while len(parts) > 1:
        one = parts.pop(random.randrange(len(parts)))
        random.choice(parts).merge(one)
    assert_same_bits(parts[0], collect(x))


def test_floating_sums_do_not_give_the_same_bits() -> None:
    """Control: the same splits with `FeatureStats`, and raw float64 sums of features that are not rounded."""
    x = draw()

    def floating(*batches: Tensor) -> FeatureStats:
        stats = FeatureStats.empty(D)
        for batch in batches:
            stats.update(batch)
        return stats

    assert floating(*x.split(64)).sha256() != floating(*x.split(100)).sha256()
    wide = draw().double()
    raw = [sum(part.T @ part for part in wide.split(size)) for size in (64, 100)]
    assert not torch.equal(raw[0], raw[1])


def test_fixed_blocks_merged_in_order_of_index_give_the_same_bits_for_any_world_size() -> None:
    """What `FeatureStats` promises instead: whole blocks, each on one process, merged in their order."""
    blocks = draw().split(125)

    def run(world: int) -> FeatureStats:
        done: dict[int, FeatureStats] = {}
        for rank in range(world):
            for k in range(rank, len(blocks), world):
                done[k] = FeatureStats.empty(D)
                for batch in blocks[k].split(50):
                    done[k].update(batch)
        return merged([done[k] for k in range(len(blocks))])

    assert run(1).sha256() == run(3).sha256() == run(20).sha256()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    x = draw()
    for stop in (0, 1, 1023, 1024, 1777):
        first = collect(x[:stop])
        weights.write(tmp_path / "state.safetensors", *first.state())
        again = ExactStats.from_state(*weights.read(tmp_path / "state.safetensors"))
        assert (again.identity, again.bound, again.count) == (IDENTITY, 64.0, stop)
        again.update(x[stop:])
        assert_same_bits(again, collect(x))


def test_the_moments_are_those_of_the_rounded_features() -> None:
    x = draw()
    stats = collect(x)
    rounded = (x.double() / stats.grid).round() * stats.grid
    assert (rounded - x).abs().max() <= stats.grid / 2
    found = stats.stats()
    torch.testing.assert_close(found.mean, rounded.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance(), torch.cov(rounded.T), rtol=1e-12, atol=1e-13)
    assert torch.equal(found.m2, found.m2.T)


def test_rounding_moves_the_distance_by_less_than_a_millionth() -> None:
    x, y = draw(), draw(seed=1)
    plain = [FeatureStats.empty(D) for _ in range(2)]
    for stats, features in zip(plain, (x, y), strict=True):
        stats.update(features)
    both = [collect(x).stats(), collect(y).stats()]
    exact, direct = (frechet_distance(a.mean, a.covariance(), b.mean, b.covariance()) for a, b in (both, plain))
    assert exact == pytest.approx(direct, rel=1e-6)


def test_a_large_common_mean_costs_no_digits() -> None:
    x = draw(offset=0.0).clamp(-4, 4)
    near, far = collect(x, bound=1024.0).stats(), collect(x + 1000.0, bound=1024.0).stats()
    grid = 1024 / 2**20
    torch.testing.assert_close(far.m2, near.m2, rtol=0, atol=2 * N * 4 * grid)
    rounded = ((x + 1000.0).double() / grid).round() * grid
    torch.testing.assert_close(far.covariance(), torch.cov((rounded - 1000.0).T), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_rounded_from_their_own_values(dtype: torch.dtype) -> None:
    x = draw().to(dtype)
    assert_same_bits(collect(x), collect(x.double()))


@pytest.mark.parametrize("dim", [1, 255, 256, 257, 600])
def test_strips_cover_every_dimension(dim: int) -> None:
    x = draw(50, dim, offset=0.5).clamp(-60, 60)
    rounded = (x.double() * 2**14).round() / 2**14
    torch.testing.assert_close(
        collect(x).stats().covariance(), torch.atleast_2d(torch.cov(rounded.T)), rtol=1e-11, atol=1e-11
    )


def test_the_largest_sums_stay_whole() -> None:
    """Every feature at the bound, so many rows that float64 would round: mean and zero variance are exact."""
    stats = ExactStats.empty(2, bound=1.0)
    x = torch.tensor([[1.0, -1.0]]).expand(2**15, 2)
    for _ in range(63):
        stats.update(x)
    stats.update(x[:-1])
    assert stats.count == 2**21 - 1
    assert float(stats.state()[0]["products"][0, 0]) > 2**53
    assert stats.stats().mean.tolist() == [1.0, -1.0]
    assert not stats.stats().m2.any()
    with pytest.raises(ValueError, match=r"fewer than 2,097,152 images, got 2,097,152"):
        stats.update(x[:1])
    with pytest.raises(ValueError, match="got 4,194,302"):
        stats.merge(stats.copy())


def test_leaving_a_chunk_out_leaves_no_trace() -> None:
    parts = draw().tensor_split(7)
    chunks = [collect(part) for part in parts]
    for k, rest in enumerate(leave_one_out(chunks)):
        assert_same_bits(rest, collect(*parts[:k], *parts[k + 1 :]))
    assert_same_bits(merged(chunks), collect(*parts))
    with pytest.raises(ValueError, match=r"take 2500 features out of \d+"):
        chunks[0].without(collect(draw()))


def test_what_would_break_the_promise_is_refused() -> None:
    stats = collect(draw(10))
    before = stats.stats().sha256()
    x = draw(5)
    x[3, 2] = -64.5
    with pytest.raises(ValueError, match=r"feature 2 of row 3 is -64.5, beyond the bound 64 of the exact statistics"):
        stats.update(x)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 5 feature vectors hold NaN"):
        stats.update(x)
    with pytest.raises(TypeError, match="floating point"):
        stats.update(torch.ones(4, D, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must have shape \(B, 9\)"):
        stats.update(draw(4, 5))
    with pytest.raises(ValueError, match="bound 32 into 64"):
        stats.merge(collect(draw(10), bound=32.0))
    with pytest.raises(ValueError, match="different extractors"):
        stats.merge(ExactStats.empty(D, {"name": "other"}))
    with pytest.raises(ValueError, match="dimension 5 into 9"):
        stats.merge(ExactStats.empty(5, IDENTITY))
    assert (stats.count, stats.stats().sha256()) == (10, before)
    for bound in (0.0, -1.0, 3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="power of two, got"):
            ExactStats.empty(D, bound=bound)
    with pytest.raises(ValueError, match="dim=0"):
        ExactStats.empty(0)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        collect(draw(1)).stats().covariance()
    with pytest.raises(ValueError, match=r"here.safetensors does not hold exact statistics"):
        ExactStats.from_state(*FeatureStats.empty(3).state(), source="here.safetensors")
    tensors, metadata = stats.state()
    with pytest.raises(ValueError, match=r"torch.float64 \(9,\)"):
        ExactStats.from_state({**tensors, "sums": tensors["sums"].double()}, metadata)


@pytest.mark.slow
def test_memory_of_a_jackknife_at_the_size_of_inception(tmp_path: Path) -> None:
    """Exact statistics take less than 150 MB while they are summed and written, a jackknife four matrices and not a fifth."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process can only be reset on Linux")
    script = """
import sys, torch
torch.set_num_threads(1)
from flowkit.eval.exact import ExactStats
from flowkit.eval.frechet import FrechetReference, jackknife_distances
from flowkit.eval.spool import StatsSpool
def megabytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024 / 1e6
def reset():
    open("/proc/self/clear_refs", "w").write("5")
d, g = 2048, torch.Generator().manual_seed(0)
batch = torch.relu(torch.randn(64, d, generator=g) + 0.3)
FrechetReference(torch.zeros(300), torch.eye(300)).terms(torch.zeros(300), torch.eye(300))
spool = StatsSpool(sys.argv[1], 4)
reset()
base = megabytes("VmRSS")
for k in range(4):
    stats = ExactStats.empty(d)
    for _ in range(20):
        stats.update(torch.randn(64, d, generator=g))
    spool.write(k, stats)
    del stats
written = megabytes("VmHWM") - base
stats = spool[0].copy()
for k in range(1, 4):
    stats.merge(spool[k])
stats = stats.stats()
reference = FrechetReference(stats.mean, stats.m2.div_(stats.count - 1))
del stats
reset()
values = list(jackknife_distances(spool, reference))
print(written, megabytes("VmHWM") - base, len(values))
"""
    run = [sys.executable, "-c", script, str(tmp_path)]
    written, left_out, count = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert int(count) == 4
    # The figures cannot be near 0 unless nothing was measured. Libraries of linear algebra work with some memory of their own.
    matrix = 2048 * 2048 * 8 / 1e6
    assert 1.5 * matrix < float(written) < 150
    assert 3 * matrix < float(left_out) < 5.4 * matrix

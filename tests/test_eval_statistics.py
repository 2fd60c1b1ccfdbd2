"""Statistics: any split equals the batch, files keep every bit, bad features are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowkit.eval.exact import ExactStats
from flowkit.eval.frechet import FrechetReference
from flowkit.eval.statistics import FeatureStats, leave_one_out, merged

IDENTITY = {"name": "test", "weights": "abc"}


def draw(count: int, dim: int = 6, seed: int = 0, offset: float = 10.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + offset


def collect(*batches: Tensor, identity: dict[str, str] | None = IDENTITY) -> FeatureStats:
    stats = FeatureStats.empty(batches[0].shape[1], identity)
    for batch in batches:
        stats.update(batch)
    return stats


def assert_is_batch(stats: FeatureStats, x: Tensor, tolerance: float = 1e-13) -> None:
    """Compares with numpy's mean and covariance of all features at once."""
    assert stats.count == len(x)
    expected = np.cov(x.numpy(), rowvar=False)
    np.testing.assert_allclose(stats.mean.numpy(), x.numpy().mean(axis=0), rtol=tolerance)
    assert np.abs(stats.covariance().numpy() - expected).max() <= tolerance * np.abs(expected).max()


cuts = st.lists(st.integers(0, 300), max_size=12).map(sorted)


@given(cuts)
@settings(max_examples=60, deadline=None)
def test_any_split_into_batches_equals_the_batch(points: list[int]) -> None:
    x = draw(300)
    bounds = [0, *points, 300]
    assert_is_batch(collect(*(x[a:b] for a, b in itertools.pairwise(bounds))), x)


@given(cuts, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_split_into_ranks_merged_in_any_order_equals_the_batch(points: list[int], random: object) -> None:
    x = draw(300)
    parts = [collect(x[a:b]) for a, b in itertools.pairwise([0, *points, 300])]
    while len(parts) > 1:
        one = parts.pop(random.randrange(len(parts)))  # type: ignore[attr-defined]
        other = random.choice(parts)  # type: ignore[attr-defined]
        other.merge(one)
    assert_is_batch(parts[0], x)


def test_a_large_common_mean_costs_no_digits_where_uncentred_sums_lose_them() -> None:
    x = draw(1000, offset=1e6)
    expected = np.cov((x - 1e6).numpy(), rowvar=False)

    def error(covariance: Tensor) -> float:
        return float(np.abs(covariance.numpy() - expected).max() / np.abs(expected).max())

    mean = x.mean(dim=0)
    uncentred = (x.T @ x - len(x) * torch.outer(mean, mean)) / (len(x) - 1)
    assert error(collect(*x.split(64)).covariance()) < 1e-9
    assert error(uncentred) > 1e-6


def test_float32_features_are_summed_in_float64() -> None:
    x = draw(2000).float()
    assert_is_batch(collect(*x.split(100)), x.double())


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_leaving_a_chunk_out_equals_never_having_added_it(count: int) -> None:
    x = draw(141)
    parts = x.tensor_split(count)
    chunks = [collect(part) for part in parts]
    before = [chunk.sha256() for chunk in chunks]
    rests = list(leave_one_out(chunks))
    assert len(rests) == count
    for k, rest in enumerate(rests):
        assert_is_batch(rest, torch.cat([*parts[:k], *parts[k + 1 :]]))
    assert [chunk.sha256() for chunk in chunks] == before
    assert_is_batch(merged(chunks), x)


@pytest.mark.parametrize("kind", [FeatureStats, ExactStats])
def test_a_direction_that_only_one_chunk_varies_in_is_gone_without_it(
    kind: type[FeatureStats] | type[ExactStats],
) -> None:
    """Exact sums leave no trace of it; others leave rounding, which the distance takes for none."""
    parts = [draw(10, seed=k, offset=0.0) for k in range(8)]
    for part in parts[1:]:
        part[:, 0] = 0.25
    chunks = []
    for part in parts:
        chunks.append(kind.empty(6))
        chunks[-1].update(part)
    rest = next(leave_one_out(chunks)).stats()
    assert abs(rest.covariance()[0, 0]) <= (0 if kind is ExactStats else 1e-14)
    x = torch.cat(parts[1:])
    sound = FrechetReference.from_features(draw(50, seed=9, offset=0.0))
    terms, expected = sound.terms_of(rest), sound.terms(x.mean(dim=0), torch.cov(x.T))
    assert terms.rank2 == expected.rank2 == 5
    assert terms.distance == pytest.approx(expected.distance, rel=1e-4 if kind is ExactStats else 1e-10)


def test_one_chunk_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="at least 2 chunks"):
        next(leave_one_out([collect(draw(5))]))


def test_safetensors_keep_every_bit_and_the_identity(tmp_path: Path) -> None:
    stats = collect(draw(50))
    path = tmp_path / "folder" / "stats.safetensors"
    stats.save(path)
    again = FeatureStats.load(path)
    assert again.count == 50
    assert again.identity == IDENTITY
    assert torch.equal(again.mean, stats.mean)
    assert torch.equal(again.m2, stats.m2)
    assert again.sha256() == stats.sha256()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_npz_of_ours_holds_what_other_tools_read(tmp_path: Path) -> None:
    stats = collect(draw(50))
    stats.to_npz(tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert np.array_equal(file["mu"], stats.mean.numpy())
        assert np.array_equal(file["sigma"], stats.covariance().numpy())
    again = FeatureStats.from_npz(tmp_path / "stats.npz")
    assert (again.count, again.identity) == (50, IDENTITY)
    assert torch.equal(again.mean, stats.mean)
    torch.testing.assert_close(again.covariance(), stats.covariance(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz_of_other_tools_is_read_bit_for_bit(tmp_path: Path, dtype: type[np.floating]) -> None:
    x = draw(50).numpy()
    mu, sigma = x.mean(axis=0).astype(dtype), np.cov(x, rowvar=False).astype(dtype)
    np.savez(tmp_path / "theirs.npz", mu=mu[None], sigma=sigma[None], other=np.ones(3))
    stats = FeatureStats.from_npz(tmp_path / "theirs.npz")
    assert stats.count is None
    assert stats.identity is None
    assert np.array_equal(stats.mean.numpy(), mu.astype(np.float64))
    assert np.array_equal(stats.covariance().numpy(), sigma.astype(np.float64))
    stats.to_npz(tmp_path / "again.npz")
    assert torch.equal(FeatureStats.from_npz(tmp_path / "again.npz").covariance(), stats.covariance())
    with pytest.raises(ValueError, match="without a count"):
        stats.update(draw(3))
    with pytest.raises(ValueError, match="without a count"):
        collect(draw(3), identity=None).merge(stats)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_and_change_nothing(bad: float) -> None:
    stats = collect(draw(10))
    before = stats.sha256()
    x = draw(5)
    x[3, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 5 feature vectors hold NaN or infinity \(first: row 3"):
        stats.update(x)
    assert stats.sha256() == before


def test_features_of_another_shape_or_type_are_refused() -> None:
    stats = collect(draw(10))
    for features in (draw(4, dim=5), draw(4)[0], draw(4)[None]):
        with pytest.raises(ValueError, match=r"must have shape \(B, 6\)"):
            stats.update(features)
    with pytest.raises(TypeError, match="floating point"):
        stats.update(torch.ones(4, 6, dtype=torch.uint8))


def test_merging_needs_one_extractor() -> None:
    stats = collect(draw(10))
    with pytest.raises(ValueError, match="dimension 5 into 6"):
        stats.merge(collect(draw(10, dim=5)))
    with pytest.raises(ValueError, match="different extractors"):
        stats.merge(collect(draw(10), identity={"name": "other"}))


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two_features(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 images, got {count}"):
        collect(draw(count)).covariance()


def test_no_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        FeatureStats.empty(0)


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_bad_npz_files_are_refused_by_name(tmp_path: Path) -> None:
    eye, path = np.eye(3), tmp_path / "bad.npz"
    skew = eye.copy()
    skew[0, 1] = 0.1
    for arrays, message in (
        ({"mu": np.zeros(3), "sigma": skew}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": eye * np.nan}, "NaN or infinity"),
        ({"mu": np.array([0.0, np.inf, 0.0]), "sigma": eye}, "NaN or infinity"),
        ({"mu": np.zeros(4), "sigma": eye}, r"got \(4,\) and \(3, 3\)"),
        ({"mu": np.zeros(9), "sigma": np.zeros(9)}, r"got \(9,\) and \(9,\)"),
        ({"mu": np.zeros(3)}, "no array sigma"),
        ({"arr_0": np.zeros(3)}, "no array mu or sigma"),
        ({"mu": np.array([object()]), "sigma": eye}, "not a plain .npz"),
    ):
        with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
            FeatureStats.from_npz(write_npz(path, **arrays))
    content = write_npz(path, mu=np.zeros(3), sigma=eye).read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not a zip"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"bad.npz.*not a plain .npz"):
            FeatureStats.from_npz(path)
    with pytest.raises(FileNotFoundError, match=r"missing.npz"):
        FeatureStats.from_npz(tmp_path / "missing.npz")


def test_bad_safetensors_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    stats = collect(draw(10))
    stats.save(path)
    with pytest.raises(ValueError, match=r"stats.safetensors is not a file of statistics.*pixels.mean"):
        FeatureStats.load(path, prefix="pixels.")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"stats.safetensors"):
        FeatureStats.load(path)
    stats.m2[0, 1] += 1.0
    stats.save(path)
    with pytest.raises(ValueError, match=r"stats.safetensors: m2 is not symmetric"):
        FeatureStats.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors"):
        FeatureStats.load(tmp_path / "missing.safetensors")

"""Files of statistics: other tools' are read, ours are read by them, and a hostile one is refused without running it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from flowkit.eval.features import PixelExtractor
from flowkit.eval.formats import read_statistics, write_npz, write_torch_fidelity
from flowkit.eval.frechet import frechet_distance
from flowkit.eval.references import match
from flowkit.eval.statistics import FeatureStats

DIM = 24


def features(seed: int, count: int = 101) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator) @ torch.randn(DIM, DIM, generator=generator) + seed


def stats_of(x: Tensor, identity: dict[str, str] | None = None) -> FeatureStats:
    stats = FeatureStats.empty(x.shape[1], identity)
    stats.update(x)
    return stats


def arrays(stats: FeatureStats) -> dict[str, Any]:
    return {"mu": stats.mean.numpy(), "sigma": stats.covariance().numpy()}


def same(stats: FeatureStats, mu: Any, sigma: Any) -> bool:
    return np.array_equal(stats.mean, mu) and np.array_equal(stats.covariance(), sigma)


def ours(one: FeatureStats, other: FeatureStats) -> float:
    return frechet_distance(one.mean, one.covariance(), other.mean, other.covariance())


def theirs(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID])


def test_npz_goes_both_ways_to_the_same_bits(tmp_path: Path) -> None:
    one, other = stats_of(features(1), {"name": "x"}), stats_of(features(2), {"name": "x"})
    expected = ours(one, other)
    write_npz(tmp_path / "one.npz", one)
    write_npz(tmp_path / "other.npz", other)
    back = [read_statistics(tmp_path / name)[0] for name in ("one.npz", "other.npz")]
    assert [b.identity for b in back] == [{"name": "x"}] * 2
    assert [b.sha256() for b in back] == [one.sha256(), other.sha256()]
    assert ours(*back) == expected
    # Read as pytorch-fid, clean-fid and EDM do, and measured by torch-fidelity's formula.
    loaded = [dict(np.load(tmp_path / name)) for name in ("one.npz", "other.npz")]
    assert theirs(*loaded) == theirs(arrays(one), arrays(other))
    assert theirs(*loaded) == pytest.approx(expected, rel=1e-9)
    # Written as they do.
    np.savez(tmp_path / "theirs.npz", **arrays(one))
    (read,) = read_statistics(tmp_path / "theirs.npz")
    assert same(read, **arrays(one))
    assert (read.count, read.identity) == (None, None)
    assert ours(read, other) == expected


def test_pytorch_fid_and_clean_fid_read_our_npz(tmp_path: Path) -> None:
    if importlib.util.find_spec("pytorch_fid") is None:
        pytest.skip("pytorch-fid is not installed")
    score = importlib.import_module("pytorch_fid.fid_score")
    one = stats_of(features(1))
    write_npz(tmp_path / "one.npz", one)
    mu, sigma = score.compute_statistics_of_path(str(tmp_path / "one.npz"), None, 1, DIM, "cpu")
    assert same(one, mu, sigma)


def test_adm_files_hold_spatial_statistics_too(tmp_path: Path) -> None:
    own, spatial = stats_of(features(1)), stats_of(features(2)[:, :7])
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu_s=spatial.mean, sigma_s=spatial.covariance(), **arrays(own))
    write_npz(tmp_path / "ours.npz", own, spatial)
    for name in ("adm.npz", "ours.npz"):
        first, second = read_statistics(tmp_path / name)
        assert same(first, **arrays(own))
        assert same(second, **arrays(spatial))
    assert read_statistics(tmp_path / "ours.npz")[0].count == 101


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_edm2_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    own, dino = stats_of(features(1)), stats_of(features(2)[:, :9])
    easy = types.ModuleType("dnnlib.util")
    exec("class EasyDict(dict): pass", easy.__dict__)
    easy.EasyDict.__module__ = "dnnlib.util"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
        patch.setitem(sys.modules, "dnnlib.util", easy)
        content = {"fid": easy.EasyDict(arrays(own)), "fd_dinov2": arrays(dino), "num_images": np.int64(101)}
        (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(content, protocol))
    first, second = read_statistics(tmp_path / "edm2.pkl")
    for read, expected in ((first, own), (second, dino)):
        assert read.count == 101
        np.testing.assert_allclose(read.mean, expected.mean, rtol=0)
        np.testing.assert_allclose(read.covariance(), expected.covariance(), rtol=1e-15)


def test_pickles_of_numpy_1_are_read(tmp_path: Path) -> None:
    own = stats_of(features(1))
    content = pickle.dumps({"fid": arrays(own)}, protocol=2).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )
    assert b"numpy.core" in content
    (tmp_path / "old.pkl").write_bytes(content)
    assert same(read_statistics(tmp_path / "old.pkl")[0], **arrays(own))


def test_torch_fidelity_files_are_read_and_written(tmp_path: Path) -> None:
    x = features(1)
    made = fid_features_to_statistics(x)
    torch.save(made, tmp_path / "a-inception-v3-compat-stat-fid-2048.pt")
    (read,) = read_statistics(tmp_path / "a-inception-v3-compat-stat-fid-2048.pt")
    assert same(read, made["mu"].astype(np.float64), made["sigma"])
    torch.save(x, tmp_path / "a-inception-v3-compat-features-2048.pt")
    (read,) = read_statistics(tmp_path / "a-inception-v3-compat-features-2048.pt")
    assert read.count == len(x)
    np.testing.assert_allclose(read.covariance(), made["sigma"], rtol=1e-9, atol=1e-9)

    other = fid_features_to_statistics(features(2))
    write_torch_fidelity(tmp_path / "ours.pt", stats_of(x))
    cached = torch.load(tmp_path / "ours.pt", weights_only=False)
    assert theirs(cached, other) == pytest.approx(theirs(made, other), rel=1e-6)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, call: Callable[..., Any] = os.mkdir, argument: str = "unpickled") -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call, (self.argument,)


@pytest.mark.parametrize("call", [os.mkdir, eval, np.load, pickle.loads])
def test_a_hostile_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    argument = "__import__('os').mkdir('unpickled')" if call is eval else "unpickled"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps({"fid": {"mu": Payload(call, argument)}}, protocol)
        Path("bad.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.pkl was not read: it names .*, which arrays do not need"):
            read_statistics("bad.pkl")
    torch.save({"mu": Payload(call, argument), "sigma": 0}, "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt was not read, it holds more than arrays"):
        read_statistics("bad.pt")
    np.savez("bad.npz", mu=np.array([Payload(call, argument)], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"bad.npz is not a plain .npz"):
        read_statistics("bad.npz")
    assert not Path("unpickled").exists()
    # The files are hostile: the ordinary loader does run them.
    if call is os.mkdir:
        pickle.loads(content)
        assert Path("unpickled").exists()


def test_an_object_array_in_a_pickle_does_not_run_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.array([Payload()], dtype=object), "sigma": np.eye(1)}}))
    with pytest.raises(ValueError, match=r"it names .*mkdir"):
        read_statistics("bad.pkl")
    Path("odd.pkl").write_bytes(pickle.dumps(np.zeros(3), 2).replace(b"latin1", b"base64"))
    with pytest.raises(ValueError, match=r"odd.pkl was not read: it encodes str as 'base64'"):
        read_statistics("odd.pkl")
    assert not Path("unpickled").exists()


def _pickled(content: object) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(content))


GOOD: dict[str, Any] = {"mu": np.zeros(2), "sigma": np.eye(2)}
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.pkl": (lambda path: path.write_bytes(b"\x80\x04junk"), "is broken or no pickle"),
    "b.pkl": (_pickled([1, 2]), "holds list, not EDM2's statistics"),
    "c.pkl": (_pickled({"kid": 1}), r"has neither 'fid' nor 'fd_dinov2' \(found: kid\)"),
    "d.pkl": (_pickled({"fid": {"mu": np.zeros(2)}}), r"has no mu and sigma \(found: mu\)"),
    "e.pkl": (
        _pickled({"fid": {"mu": np.zeros(3), "sigma": np.eye(2)}}),
        r"shape \(d,\) and a sigma of shape \(d, d\)",
    ),
    "f.pt": (lambda path: path.write_bytes(b"junk"), "is broken or not torch-fidelity's|holds more than arrays"),
    "g.pt": (lambda path: torch.save(torch.zeros(3), path), r"holds a tensor torch.float32 \(3,\), not features"),
    "h.pt": (lambda path: torch.save([1], path), r"has no mu and sigma \(found: list\)"),
    "i.npz": (lambda path: path.write_bytes(b"PK junk"), "is not a plain .npz"),
    "j.npz": (lambda path: np.savez(path, arr_0=np.zeros(3)), "has no array mu or sigma"),
    "k.npz": (lambda path: np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2)), "holds NaN or infinity"),
    "l.npz": (
        lambda path: np.savez(path, mu=np.zeros(2), sigma=np.array([[1, 2], [0, 1.0]])),
        "sigma is not symmetric",
    ),
    "m.npz": (lambda path: np.savez(path, mu=np.zeros(2), sigma=np.diag([1.0, -0.5])), "negative eigenvalues"),
    "n.npz": (lambda path: np.savez(path, mu=np.zeros(2), sigma=np.array([[1, 2], [2, 1.0]])), "negative eigenvalues"),
    "o.npz": (
        lambda path: np.savez(path, mu_s=np.zeros(2), sigma_s=np.diag([1, np.inf]), **GOOD),
        "spatial mean or sigma holds NaN",
    ),
    "p.json": (lambda path: path.write_text("{}"), "is no file of statistics; use one that ends with .safetensors"),
    "q.safetensors": (lambda path: path.write_bytes(b"junk"), "corrupt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    write, message = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    if name != "p.json":
        with pytest.raises(FileNotFoundError, match="gone"):
            read_statistics(tmp_path / f"gone{Path(name).suffix}")


def test_float32_and_rounded_statistics_are_accepted(tmp_path: Path) -> None:
    own = stats_of(features(1, count=10))  # singular: rounding makes eigenvalues negative
    np.savez(tmp_path / "s.npz", mu=own.mean.float()[None], sigma=own.covariance().float())
    (read,) = read_statistics(tmp_path / "s.npz")
    assert (read.mean.dtype, read.m2.dtype) == (torch.float64, torch.float64)
    assert torch.equal(read.mean, own.mean.float().double())
    np.savez(tmp_path / "zero.npz", mu=np.zeros(2), sigma=np.zeros((2, 2)))
    assert read_statistics(tmp_path / "zero.npz")[0].m2.any() == torch.tensor(False)


def test_references_take_the_set_of_the_extractors_dimension(tmp_path: Path) -> None:
    """A foreign file does not say which extractor made it, and the record says so."""
    small, large = stats_of(torch.rand(30, 12)), stats_of(torch.rand(300, 192))
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({"fid": arrays(small), "fd_dinov2": arrays(large), "num_images": 30}))
    np.savez(tmp_path / "r.npz", mu_s=large.mean, sigma_s=large.covariance(), **arrays(small))
    for name in ("r.pkl", "r.npz"):
        for grid, expected in ((2, small), (8, large)):
            (found,) = match(tmp_path / name, PixelExtractor(3, grid=grid))
            assert found.stats is not None
            assert torch.equal(found.stats.mean, expected.mean)
            assert found.describe()["extractor"] == "unknown, taken to be the one above"
        with pytest.raises(ValueError, match=r"r.*has 12 features, the extractor 'pixels' 48"):
            match(tmp_path / name, PixelExtractor(3, grid=4))

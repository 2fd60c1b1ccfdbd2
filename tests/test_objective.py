from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from scipy import stats
from torch import Tensor
from torch_fidelity import sample_similarity_lpips as theirs

from flowkit import weights
from flowkit.distill import lpips
from flowkit.distill.objective import Comparison, metric, times

Law = Callable[[np.ndarray], np.ndarray]


def draw(given: str | list[float], count: int = 20_000, seed: int = 0) -> np.ndarray:
    return times(given)(count, torch.Generator().manual_seed(seed)).numpy()


# ----------------------------------------------------------------------------------------------------------------- flow times


def _mode(s: np.ndarray, scale: float = 1.29) -> np.ndarray:
    """Distribution function of f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u), which falls: by a fine table of it."""
    u = np.linspace(0, 1, 100_001)
    f = 1 - u - scale * (np.cos(math.pi * u / 2) ** 2 - 1 + u)
    return np.asarray(np.interp(s, f[::-1], 1 - u[::-1]))


def _logit(s: np.ndarray, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    return np.asarray(stats.norm.cdf((np.log(s) - np.log1p(-s) - mean) / std))


def _u(s: np.ndarray, a: float = 4.0) -> np.ndarray:
    """By the density e^{as} + e^{a(1 - s)}, integrated term by term."""
    return np.asarray((np.exp(a * s) - 1 + np.exp(a) - np.exp(a * (1 - s))) / (2 * (np.exp(a) - 1)))


LAWS: dict[str, Law] = {
    "uniform": lambda s: s,
    "logit-normal": _logit,
    "logit-normal:-0.5,0.7": lambda s: _logit(s, -0.5, 0.7),
    "u-shaped": _u,
    "u-shaped:2": lambda s: _u(s, 2),
    "mode": _mode,
    "mode:-0.6": lambda s: _mode(s, -0.6),
}


@pytest.mark.parametrize("name", LAWS)
def test_flow_times_follow_their_law(name: str) -> None:
    found = draw(name)
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1
    assert stats.kstest(found, LAWS[name]).pvalue > 1e-3
    assert np.array_equal(found, draw(name))
    assert not np.array_equal(found, draw(name, seed=1))
    # The test would see another law.
    assert all(stats.kstest(found, law).pvalue < 1e-3 for other, law in LAWS.items() if other != name)


def test_noise_takes_three_quarters_of_every_batch() -> None:
    for count in (1, 2, 8, 100):
        assert (draw("noise", count) == 1).sum() == round(0.75 * count)
    found = draw("noise")
    assert stats.kstest(found[found < 1], "uniform").pvalue > 1e-3


def test_levels_are_drawn_evenly() -> None:
    found = draw([0.25, 0.5, 1.0], 12)
    assert Counter(found.tolist()) == {0.25: 4, 0.5: 4, 1.0: 4}
    assert found.tolist() != sorted(found.tolist())
    assert np.array_equal(draw("0.25,0.5,1.0", 12), found)
    assert draw("1", 3).tolist() == [1, 1, 1]
    # What is over is drawn without preference: 8 = 2 x 3 + 2, so each level has 2 or 3, and 8/3 on average.
    many = np.stack(
        [[(draw([0.25, 0.5, 1.0], 8, seed) == level).sum() for level in (0.25, 0.5, 1)] for seed in range(600)]
    )
    assert set(many.flatten()) == {2, 3}
    assert stats.chisquare(many.sum(0)).pvalue > 1e-3
    # And the place in the batch says nothing: a process that has the first rows sees every level.
    first = Counter(float(draw([0.25, 0.5, 1.0], 3, seed)[0]) for seed in range(600))
    assert stats.chisquare([first[level] for level in (0.25, 0.5, 1.0)]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cosine", r"'cosine'; there are uniform, logit-normal, u-shaped, mode, noise, and levels"),
        ("", "no law of flow times is called ''"),
        ("0.5,x", "no law of flow times is called '0.5,x'"),
        ("uniform:1", "uniform takes at most 0 numbers"),
        ("logit-normal:a", "logit-normal takes at most 2 numbers"),
        ("logit-normal:0,0", "deviation above 0, got 0,0"),
        ("mode:2", r"from -1 to 1\.7519, .* got 2"),
        ("mode:nan", "got nan"),
        ("u-shaped:0", "above 0 and at most 50, got 0"),
        ("0.5,1.5", r"between 0 \(data\) and 1 \(noise\), got \[0.5, 1.5\]"),
        ([], r"got \[\]"),
        ([math.nan], r"got \[nan\]"),
    ],
)
def test_other_flow_times_are_refused(given: str | list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        times(given)


# ------------------------------------------------------------------------------------------------------------------ distances


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    return a, b


def test_distances_are_their_formulas() -> None:
    a, b = pair(5, 2, 3, 4)
    gap = (a - b).flatten(1).numpy()
    assert np.allclose(metric("l2")(a, b), (gap**2).mean(1), rtol=1e-14)
    for c in (None, 0.5):
        own = 0.00054 * math.sqrt(24) if c is None else c
        wanted = np.sqrt((gap**2).sum(1) + own**2) - own
        assert np.allclose(metric("pseudo-huber", c=c)(a, b), wanted, rtol=1e-13)
    # Small differences: d^2 / (2 c), which sqrt(d^2 + c^2) - c loses in float32.
    found = metric("pseudo-huber", c=1.0)(torch.full((1, 4), 1e-5), torch.zeros(1, 4))
    assert float(found) == pytest.approx(4e-10 / 2, rel=1e-5)
    for name in ("l2", "pseudo-huber"):
        x = a.clone().requires_grad_()
        metric(name)(x, x.detach()).sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()


def test_comparisons_are_their_formulas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowkit.distill.lpips.weight_folders", lambda: [folder])
    output, state = pair(3, 3, 8, 8), pair(3, 3, 8, 8, seed=2)
    s, d = torch.tensor([1.0, 0.25, 0.0]), 3 * 64
    seen = metric("lpips")(*state)
    square = (output[0] - output[1]).double().square().flatten(1).sum(1)
    huber = ((square + (0.00054 * d) ** 2).sqrt() - 0.00054 * d) / d
    blend = Comparison("lpips-huber")(output, state, s)
    assert blend.tolist() == pytest.approx(((1 - s) * huber + seen).tolist(), rel=1e-5)
    divided = Comparison("lpips-huber-1/t")(output, state, s)
    assert divided[:2].tolist() == pytest.approx([float(seen[0]), float(0.75 * huber[1] + seen[1] / 0.25)], rel=1e-5)
    # At data the state is the sample whatever the output: no distance, and none after the division.
    same = state[1].clone().requires_grad_(), state[1]
    (there,) = Comparison("lpips-huber-1/t")((output[0][:1], output[1][:1]), (same[0][:1], same[1][:1]), s[2:]).tolist()
    assert there == pytest.approx(float(huber[0]), rel=1e-5)
    # LPIPS sees samples in either space; the others what they are told to see.
    for space in ("model", "x0"):
        assert torch.equal(Comparison("lpips", space)(output, state, s), seen)
    assert torch.equal(Comparison("l2")(output, state, s), metric("l2")(*output))
    assert torch.equal(Comparison("l2", "x0")(output, state, s), metric("l2")(*state))
    with pytest.raises(
        ValueError, match="lpips-huber compares outputs and samples, which reflow alone has in its space 'model'"
    ):
        Comparison("lpips-huber", "x0")
    with pytest.raises(
        ValueError, match="no distance is called 'lpips-huber-2'; there are l2, pseudo-huber, lpips, lpips-huber, "
    ):
        Comparison("lpips-huber-2")
    with pytest.raises(ValueError, match="unknown space 'x1'; choose model or x0"):
        Comparison("l2", "x1")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l1", {}, "'l1'; there are l2, pseudo-huber, lpips"),
        ("l2", {"c": 0.1}, "c belongs to pseudo-huber"),
        ("pseudo-huber", {"c": -1.0}, r"c=-1\.0: c belongs to pseudo-huber and is above 0"),
        ("pseudo-huber", {"weights": "folder"}, "'pseudo-huber' has no weights, got 'folder'"),
    ],
)
def test_other_distances_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(name, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of the true ones."""
    torch.manual_seed(0)
    into = tmp_path_factory.mktemp("lpips")
    with torch.device("meta"):
        features = torchvision.models.vgg16().features
    features.to_empty(device="cpu")
    trunk = {}
    for name, p in features.state_dict().items():
        spread = math.sqrt(2 / p[0].numel()) if p.ndim > 1 else 0.05
        trunk[f"features.{name}"] = torch.randn(p.shape) * spread
    weights.write(into / f"{lpips.TRUNK[0]}.safetensors", trunk)
    sizes = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, size, 1, 1) for i, size in enumerate(sizes)}
    torch.save(linear, into / f"{lpips.LINEAR[0]}.pth")
    return into


def test_lpips_is_that_of_torch_fidelity(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (2, 3, 3, 64, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    trunk, _ = weights.read(folder / f"{lpips.TRUNK[0]}.safetensors")
    vgg = torchvision.models.vgg16(init_weights=False)
    vgg.features.load_state_dict({k.removeprefix("features."): v for k, v in trunk.items()})
    linear = torch.load(folder / f"{lpips.LINEAR[0]}.pth", weights_only=True)
    with (
        mock.patch.object(theirs, "torchvision_load_pretrained_vgg16", return_value=vgg),
        mock.patch.object(theirs, "load_state_dict_from_url", return_value=linear),
    ):
        wanted = theirs.SampleSimilarityLPIPS("own", sample_similarity_dtype="uint8")(*images).flatten()
    found = metric("lpips", weights=folder)(*(images.float() / 127.5 - 1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert found.shape == (3,)
    # Where nothing is named, torch hub's folder is searched.
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "checkpoints").symlink_to(folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert torch.equal(metric("lpips")(*(images.float() / 127.5 - 1)), found)


def test_lpips_is_a_distance_that_can_be_trained_on(folder: Path) -> None:
    distance = metric("lpips", weights=folder)
    a, b = (x.float() for x in pair(2, 1, 28, 28))
    assert (distance(a, a) == 0).all()
    found = distance(a, b)
    assert (found > 0.01).all()
    torch.testing.assert_close(found, distance(b, a))
    assert float(distance(a, a + 0.1 * (b - a)).mean()) < float(found.mean()) / 2
    torch.testing.assert_close(
        found, distance(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
    )  # grey is three equal channels
    x = a.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.05)
    for _ in range(6):
        optimizer.zero_grad()
        distance(x, b).sum().backward()
        assert x.grad is not None
        assert (x.grad != 0).float().mean() > 0.5
        optimizer.step()
    assert float(distance(x.detach(), b).mean()) < 0.8 * float(found.mean())


def test_lpips_refuses_what_it_cannot_compare_or_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = metric("lpips", weights=folder)
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"\(1 or 3, H, W\), and samples here have the shape \(4, 8, 8\); latents"):
        distance(latents, latents)
    with pytest.raises(
        FileNotFoundError, match=rf"put vgg16-397923af.pth \(from https://.*\) into {tmp_path}; searched there$"
    ):
        metric("lpips", weights=tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=rf"into {tmp_path}/home/hub/checkpoints; searched there"):
        metric("lpips")
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"other")
    (tmp_path / "weights-vgg16-lpips.pth").write_bytes(pickle.dumps(print, 2))
    with pytest.raises(ValueError, match=r"vgg16-397923af.pth has sha256 d9298a10\.\.\., not 397923af"):
        metric("lpips", weights=tmp_path)
    (tmp_path / "vgg16-397923af.safetensors").symlink_to(folder / "vgg16-397923af.safetensors")
    with pytest.raises(ValueError, match=r"weights-vgg16-lpips.pth is cut short or holds more than tensors"):
        metric("lpips", weights=tmp_path)
    weights.write(tmp_path / "weights-vgg16-lpips.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weights-vgg16-lpips.safetensors does not hold the tensors of LPIPS"):
        metric("lpips", weights=tmp_path)
    (tmp_path / "vgg16-397923af.safetensors").unlink()
    weights.write(tmp_path / "vgg16-397923af.safetensors", {"features.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"vgg16-397923af.safetensors does not hold the tensors of LPIPS"):
        metric("lpips", weights=tmp_path)

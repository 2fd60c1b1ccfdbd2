from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flowkit import weights
from flowkit.distill.averages import Averages, coefficients, synthesize, to_gamma, to_sigma_rel

PROFILES = (0.05, 0.1)


def walk(steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[tuple[str, nn.Parameter]], list[list[Tensor]]]:
    """Parameters by name, and what they are to become, update by update: a random walk with a trend."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (3, 4), "layer.bias": (3,)}
    named = [(name, nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in shapes.items()]
    paths = [torch.randn(steps, *shape, generator=generator).cumsum(0) / 10 for shape in shapes.values()]
    trend = torch.arange(steps) / steps
    return named, [[(path[i] + trend[i]).to(dtype) for path in paths] for i in range(steps)]


def follow(kept: Averages, named: list[tuple[str, nn.Parameter]], values: list[list[Tensor]], first: int = 0) -> None:
    for step, own in enumerate(values[first:], first + 1):
        for (_, parameter), value in zip(named, own, strict=True):
            parameter.data.copy_(value)
        kept.update(step)


def powers(values: list[list[Tensor]], sigma_rel: float) -> list[Tensor]:
    """The average by its definition: the share of (tau / t)^gamma's integral that each update covers."""
    edges = (np.arange(len(values) + 1) / len(values)) ** (to_gamma(sigma_rel) + 1)
    share = torch.from_numpy(np.diff(edges))
    return [torch.einsum("i,i...->...", share, torch.stack(own).double()) for own in zip(*values, strict=True)]


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------------------------------- profiles


def test_lengths_and_exponents_are_inverse_to_each_other() -> None:
    known = {0.05: 16.9722, 0.075: 10.2891, 0.10: 6.9372, 0.15: 3.5579, 0.20: 1.8262, 0.25: 0.7198}
    for sigma_rel, gamma in known.items():
        assert to_gamma(sigma_rel) == pytest.approx(gamma, abs=5e-5)
    for sigma_rel in np.linspace(0.001, 0.2886, 300):
        assert to_sigma_rel(to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
    for gamma in np.geomspace(0.01, 1000, 300):
        assert to_gamma(to_sigma_rel(gamma)) == pytest.approx(gamma, rel=1e-12)


def test_the_length_is_the_standard_deviation_of_the_profile() -> None:
    tau = (np.arange(200_000) + 0.5) / 200_000
    for sigma_rel in (0.05, 0.2):
        profile = tau ** to_gamma(sigma_rel)
        mean = (tau * profile).sum() / profile.sum()
        assert math.sqrt(((tau - mean) ** 2 * profile).sum() / profile.sum()) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 0.5, math.nan])
def test_lengths_out_of_range_are_refused(sigma_rel: float, tmp_path: Path) -> None:
    for call in (to_gamma, lambda s: Averages(walk(1)[0], 0.9, (s,)), lambda s: synthesize(tmp_path, s)):
        with pytest.raises(ValueError, match=rf"between 0 and 1/sqrt\(12\) = 0.2887, got {sigma_rel}"):
            call(sigma_rel)
    with pytest.raises(ValueError, match=r"above 0, got -1\.5"):
        to_sigma_rel(-1.5)


# ------------------------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_classic_average_is_that_of_diffusers_bit_for_bit(decay: float) -> None:
    named, values = walk(60)
    kept, theirs = Averages(named, decay), EMAModel([p for _, p in named], decay, foreach=True)
    for step, own in enumerate(values, 1):
        for (_, parameter), value in zip(named, own, strict=True):
            parameter.data.copy_(value)
        kept.update(step)
        theirs.step([p for _, p in named])
        assert all(torch.equal(a, b) for a, b in zip(kept.tensors, theirs.shadow_params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 300])
def test_streamed_averages_are_those_of_the_recorded_sequence(steps: int, dtype: torch.dtype) -> None:
    named, values = walk(steps, dtype)
    kept = Averages(named, 0.99, (*PROFILES, 0.25))
    follow(kept, named, values)
    for sigma_rel in (*PROFILES, 0.25):
        found = kept.profile(sigma_rel)
        assert all(t.dtype == torch.float32 for t in (*found, *kept.tensors))
        assert gap(found, powers(values, sigma_rel)) < 2e-6
    if steps == 300:  # the classic average is no power function, nor is one length the other
        assert gap(kept.tensors, powers(values, 0.1)) > 1e-2
        assert gap(kept.profile(0.05), powers(values, 0.1)) > 1e-2


def test_parameters_without_gradient_are_left_out() -> None:
    named, _ = walk(1)
    named[0][1].requires_grad_(False)
    assert list(Averages(named, 0.9, (0.1,)).state()) == ["ema.layer.bias", "power_0.1.layer.bias"]
    named[1][1].requires_grad_(False)
    with pytest.raises(ValueError, match="none of the parameters needs a gradient"):
        Averages(named, 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma_rel", [None, 0.1])
def test_an_average_is_put_in_and_the_parameters_back(sigma_rel: float | None, dtype: torch.dtype) -> None:
    named, values = walk(20, dtype)
    kept = Averages(named, 0.99, PROFILES)
    follow(kept, named, values)
    average = [t.to(dtype) for t in (kept.tensors if sigma_rel is None else kept.profile(sigma_rel))]

    def inside_and_fail() -> None:
        with kept.applied(sigma_rel):
            assert all(torch.equal(p, t) for (_, p), t in zip(named, average, strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        inside_and_fail()
    assert all(torch.equal(p, v) for (_, p), v in zip(named, values[-1], strict=True))
    assert not torch.equal(average[0], values[-1][0])
    with pytest.raises(ValueError, match=r"sigma_rel 0.2 is not followed, only \[0.05, 0.1\]"), kept.applied(0.2):
        pass


def test_a_restored_average_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    named, values = walk(40)
    through, first = Averages(named, 0.99, PROFILES), Averages(named, 0.99, PROFILES)
    follow(first, named, values[:15])
    weights.write(tmp_path / "state.safetensors", first.state(), {"step": str(first.step)})
    tensors, metadata = weights.read(tmp_path / "state.safetensors")
    again = Averages(named, 0.99, PROFILES)
    again.restore(tensors, int(metadata["step"]))
    follow(again, named, values, 15)
    follow(through, named, values)
    assert again.state().keys() == through.state().keys()
    assert all(torch.equal(t, through.state()[key]) for key, t in again.state().items())
    with pytest.raises(ValueError, match="update 42 cannot follow update 40"):
        again.update(42)
    with pytest.raises(ValueError, match=r"'power_0.2.layer.weight' of shape \(3, 4\) is missing"):
        Averages(named, 0.99, (0.2,)).restore(tensors, 15)
    with pytest.raises(ValueError, match=r"'ema.layer.weight' of shape \(3, 4\) has shape \(2,\)"):
        again.restore({**tensors, "ema.layer.weight": torch.zeros(2)}, 15)


# ------------------------------------------------------------------------------------------------------------------ synthesis


def snapshots(folder: Path, count: int = 16, every: int = 20, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Snapshots of a training, and the parameters after each of its updates."""
    named, values = walk(count * every)
    kept = Averages(named, 0.99, PROFILES)
    for end in range(every, len(values) + 1, every):
        follow(kept, named, values[:end], end - every)
        kept.snapshot(folder, dtype)
    return values


def test_a_length_between_two_is_synthesized(tmp_path: Path) -> None:
    values = snapshots(tmp_path)
    found = synthesize(tmp_path, 0.075)
    assert list(found) == ["layer.bias", "layer.weight"]
    assert found["layer.weight"].dtype == torch.float32
    wanted = dict(zip(("layer.weight", "layer.bias"), powers(values, 0.075), strict=True))
    off = {name: float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in found}
    assert max(off.values()) < 5e-4
    # The nearest average that was followed is no substitute.
    near = synthesize(tmp_path, 0.05)
    assert min(float((near[name] - wanted[name]).norm() / wanted[name].norm()) for name in found) > 20 * max(
        off.values()
    )


def test_profiles_of_16_snapshots_combine_to_within_2e_4() -> None:
    for snapshots_, limit in ((16, 2e-4), (64, 1e-7)):
        terms = [(sigma_rel, float(i + 1)) for sigma_rel in PROFILES for i in range(snapshots_)]
        x, error = coefficients(terms, (0.075, float(snapshots_)))
        assert x.sum() == pytest.approx(1, abs=1e-12)
        assert error**2 < limit  # squared distance of the profiles over the squared norm
        # The same by quadrature: nothing of the closed inner products.
        tau = (np.arange(100_000) + 0.5) / 100_000 * snapshots_

        def profile(sigma_rel: float, at: float, tau: np.ndarray = tau) -> np.ndarray:
            gamma = to_gamma(sigma_rel)
            return np.where(tau <= at, (gamma + 1) * (np.minimum(tau, at) / at) ** gamma / at, 0)

        wanted = profile(0.075, snapshots_)
        made = sum(factor * profile(*term) for factor, term in zip(x, terms, strict=True))
        assert math.sqrt(((made - wanted) ** 2).sum() / (wanted**2).sum()) == pytest.approx(error, rel=2e-2)


@pytest.mark.parametrize("step", [None, 20, 200])
@pytest.mark.parametrize("sigma_rel", PROFILES)
def test_a_length_that_was_followed_comes_back_as_it_was(step: int | None, sigma_rel: float, tmp_path: Path) -> None:
    snapshots(tmp_path)
    stored = weights.read(tmp_path / f"{step or 320:09}.safetensors")[0]
    for name, tensor in synthesize(tmp_path, sigma_rel, step).items():
        torch.testing.assert_close(tensor, stored[f"power_{sigma_rel}.{name}"], rtol=1e-6, atol=1e-7)


def test_half_precision_halves_the_file_and_costs_some_accuracy(tmp_path: Path) -> None:
    values = snapshots(tmp_path / "half", dtype=torch.float16)
    snapshots(tmp_path / "full")
    wanted = powers(values, 0.075)[0]
    off = {
        kind: float((synthesize(tmp_path / kind, 0.075)["layer.weight"] - wanted).norm() / wanted.norm())
        for kind in ("half", "full")
    }
    assert off["full"] < off["half"] < 2e-3


def test_what_cannot_be_synthesized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no snapshots of averaged weights"):
        synthesize(tmp_path, 0.075)
    snapshots(tmp_path, count=2)
    with pytest.raises(ValueError, match=r"no snapshot at step 30 .* there are \[20, 40\]"):
        synthesize(tmp_path, 0.075, 30)
    with pytest.raises(
        ValueError, match=r"2 snapshots of sigma_rel 0.05, 0.1 give .* sigma_rel 0.2 at step 40 that is 47% off"
    ):
        synthesize(tmp_path, 0.2)
    with pytest.raises(ValueError, match=r"1 snapshots of .* 60% off"):
        synthesize(tmp_path, 0.2, 20)
    with pytest.raises(ValueError, match="a snapshot holds power-function averages, and none is followed"):
        Averages(walk(1)[0], 0.9).snapshot(tmp_path)
    (tmp_path / "000000040.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="corrupt, cut short"):
        synthesize(tmp_path, 0.075)


# ------------------------------------------------------------------------------------------------------------------ on shards


def gathered(shards: Tensor) -> Tensor:
    assert isinstance(shards, DTensor)
    return shards.full_tensor()


def _sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = DeviceMesh("cpu", [0, 1])
    named, values = walk(40)
    split = [(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))) for name, p in named]
    parts: list[list[Tensor]] = [[distribute_tensor(value, mesh, [Shard(0)]) for value in own] for own in values]
    kept = Averages(split, 0.99, PROFILES)
    follow(kept, split, parts[:20])
    whole = {key: gathered(t) for key, t in kept.state().items()}
    again = Averages(split, 0.99, PROFILES)
    again.restore(whole, 20)  # from a checkpoint of whole tensors
    again.restore(again.state() | {"ema.layer.bias": kept.state()["ema.layer.bias"]}, 20)  # and of shards
    with again.applied():
        assert torch.equal(gathered(split[0][1]), whole["ema.layer.weight"])
    assert torch.equal(gathered(split[0][1]), values[19][0])
    follow(again, split, parts, 20)
    again.snapshot(Path(folder) / "snapshots")
    whole = {key: gathered(t) for key, t in again.state().items()}
    if rank == 0:
        weights.write(Path(folder) / "state.safetensors", whole)
    distributed.destroy_process_group()


def test_shards_are_averaged_as_the_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_sharded, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    named, values = walk(40)
    kept = Averages(named, 0.99, PROFILES)
    follow(kept, named, values)
    found = weights.read(tmp_path / "state.safetensors")[0]
    assert found.keys() == kept.state().keys()
    assert all(torch.equal(t, found[key]) for key, t in kept.state().items())
    (file,) = (tmp_path / "snapshots").iterdir()
    assert weights.read(file)[1] == {"step": "40", "profiles": "0.05 0.1"}
    assert all(torch.equal(t, found[key]) for key, t in weights.read(file)[0].items())

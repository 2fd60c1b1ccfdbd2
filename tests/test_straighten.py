"""Chords: targets with a known answer, and a student that needs fewer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowkit import Grid, MixtureDenoiser, RectifiedFlowScheduler, optimize_steps, table
from flowkit.distill import Chords, Trajectories, record
from flowkit.distill.straighten import collate, loss

from . import mixtures

QUIET: dict[str, Any] = {"inputs": [0], "progress": False}


def walked(chords: Chords, network: Any, x: Tensor) -> Tensor:
    """The grid's first-order steps from x, with a network of its own at each."""
    scheduler = chords.trajectories.scheduler()
    scheduler.set_grid(chords.grid)
    rows = scheduler.plan(len(chords.grid), None, None, None).rows()
    for k, row in enumerate(rows):
        x = table.step(row, x, network(k, x))[0]
    return x


def test_on_the_flow_path_a_target_is_the_chord(tmp_path: Path) -> None:
    data = record(mixtures.ring(), tmp_path, 6, 20, **QUIET)
    grid = Grid(tuple(data.grid.sigmas[i] for i in (0, 7, 12, 20)))
    chords = Chords(data, grid)
    assert (len(chords), chords.nodes) == (18, (0, 7, 12, 20))
    for number in range(18):
        item, (sample, k) = chords[number], divmod(number, 3)
        states = data[sample]["states"]
        start, end = chords.nodes[k : k + 2]
        assert (item["index"], item["step"], item["inputs"]) == (sample, k, {"class_labels": 0})
        assert item["time"] == pytest.approx(1000 * grid.sigmas[k])
        assert torch.equal(item["x"], states[start])
        chord = (states[end] - states[start]) / (grid.sigmas[k + 1] - grid.sigmas[k])
        assert torch.allclose(item["target"], chord, rtol=1e-9)
    with pytest.raises(IndexError, match="chord 18 is not one of 18"):
        chords[18]


def test_chords_of_a_straight_field_are_its_velocity(tmp_path: Path) -> None:
    # One point as data: the velocity (x - m) / s is constant along each path, so chord and tangent are the same.
    point = MixtureDenoiser.of(torch.full((1, 2, 1, 1), 0.7), 0.0)
    pipe = mixtures.ring()
    pipe.register_modules(unet=point)
    data = record(pipe, tmp_path, 5, 10, **QUIET)
    chords = Chords(data, Grid(tuple(data.grid.sigmas[i] for i in (0, 4, 10))))
    for number in range(len(chords)):
        item = chords[number]
        assert torch.allclose(item["target"], point(item["x"][None], item["time"]).sample[0], rtol=1e-9)
    # The negative control: the ring's field is not straight.
    curved = Chords(record(mixtures.ring(), tmp_path / "ring", 5, 10, **QUIET), chords.grid)
    network = mixtures.ring().unet
    gaps = [
        float((c["target"] - network(c["x"][None], c["time"]).sample[0]).abs().max())
        for c in map(curved.__getitem__, range(10))
    ]
    assert max(gaps) > 0.1


@pytest.mark.parametrize("make", [mixtures.ring, mixtures.planes])
def test_a_network_that_returns_the_chords_ends_where_the_fine_run_does(tmp_path: Path, make: Any) -> None:
    # B6 of the method's properties, on any path: after exact straightening K steps are the fine solution.
    data = record(make(), tmp_path, 4, 30, **QUIET)
    grid = Grid(tuple(data.grid.sigmas[i] for i in (0, 9, 17, 24, 30)), data.grid.path)
    chords = Chords(data, grid)
    items = [[chords[i * 4 + k] for i in range(4)] for k in range(4)]
    start = torch.stack([data[i]["states"][0] for i in range(4)])
    wanted = torch.stack([data[i]["states"][-1] for i in range(4)])
    straight = walked(chords, lambda k, x: torch.stack([item["target"] for item in items[k]]), start)
    assert torch.allclose(straight, wanted, atol=1e-9)
    unet = make().unet
    tangent = walked(chords, lambda k, x: unet(x, chords.times[k]).sample, start)
    assert float((tangent - wanted).abs().max()) > 1e-2


def test_loss_is_the_mean_square() -> None:
    x, target = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    time = torch.tensor([1.0, 2.0, 3.0])
    assert float(loss(lambda x, t: x + t[:, None], x, time, time[:, None].expand(3, 2))) == 0
    assert float(loss(lambda x, t: x, x, time, target)) == pytest.approx(1.0)


def test_no_trajectory_is_on_both_sides_of_a_split(tmp_path: Path) -> None:
    chords = Chords(record(mixtures.ring(), tmp_path, 20, 6, **QUIET), Grid.uniform(3))
    rest, held_out = chords.split(0.25, seed=3)
    own, others = ({part[i]["index"] for i in range(len(part))} for part in (rest, held_out))
    assert (len(own), len(others), own & others) == (15, 5, set())
    assert [list(part.samples) for part in chords.split(0.25, seed=3)] == [list(rest.samples), list(held_out.samples)]
    assert chords.split(0.25, seed=4)[1].samples != held_out.samples
    with pytest.raises(ValueError, match="leaves one part empty"):
        chords.split(0.01)


class Student(nn.Module):
    """The exact network, and for each step of a grid a small one that adds to its velocity."""

    def __init__(self, teacher: MixtureDenoiser, times: list[float]) -> None:
        super().__init__()
        self.teacher, self.times = teacher, times
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)) for _ in times
        ).double()
        for net in self.nets:
            list(net.parameters())[-2].data.zero_()
            list(net.parameters())[-1].data.zero_()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for t, net in zip(self.times, self.nets, strict=True):
            here = time.double().sub(t).abs() < 1e-3
            base = self.teacher(x[here], t).sample
            result[here] = base + net(x[here].flatten(1))[:, :, None, None]
        return result


def test_training_on_chords_lowers_the_error_of_few_steps(tmp_path: Path) -> None:
    pipe = mixtures.ring()
    grid = optimize_steps(pipe, [3], anchors=30, samples=200, held_out=0, budget=60, batch_size=200, **QUIET)[3]
    data = record(pipe, tmp_path, 900, 30, batch_size=300, **QUIET)
    train, test = Chords(data, grid).split(1 / 3)
    torch.manual_seed(0)
    student = Student(pipe.unet, train.times)
    optimizer = torch.optim.Adam(student.nets.parameters(), 3e-3)
    start, wanted = (torch.stack([data[i]["states"][end] for i in test.samples]) for end in (0, -1))

    def error() -> float:
        with torch.no_grad():
            end = walked(test, lambda k, x: student(x, torch.full((len(x),), test.times[k])), start)
        return float((end - wanted).square().mean().sqrt())

    before = error()
    (batch,) = DataLoader(train, len(train), collate_fn=collate)
    for _ in range(120):
        optimizer.zero_grad()
        loss(student, batch["x"], batch["time"], batch["target"]).backward()
        optimizer.step()
    assert error() < 0.7 * before


def test_grids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = record(mixtures.ring(), tmp_path / "all", 2, 4, **QUIET)
    few = record(mixtures.ring(), tmp_path / "few", 2, 4, at=[0, 2, 4], **QUIET)
    noisy = record(mixtures.ring(), tmp_path / "noisy", 2, 4, solver="sde-dpm++2m", **QUIET)
    assert len(Chords(few, Grid.uniform(2))) == 4
    for found, grid, message in (
        (data, Grid((3.0, 1.0, 0.0), "vp"), "belongs to the path 'vp', the trajectories walk 'flow'"),
        (data, Grid((1.0, 0.3, 0.0)), "level 0.3 is not among the 5 recorded ones"),
        (few, Grid.uniform(4), "level 0.75 is not among the 3 recorded ones"),
        (data, Grid((1.0, 0.5, 0.0), solver="unipc"), "made for 'unipc', whose steps hang on those before"),
        (data, Grid((1.0, 0.5, 0.0), solver="ancestral"), "made for 'ancestral', .* or draw noise"),
        (noisy, Grid.uniform(2), "drew noise at every step .solver 'sde-dpm"),
    ):
        with pytest.raises(ValueError, match=message):
            Chords(found, grid)
    scheduler: RectifiedFlowScheduler = Trajectories(tmp_path / "all").scheduler()
    assert scheduler.method.name == "euler"

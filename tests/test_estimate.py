"""What a training will take: counted exactly, timed by a clock that is known, refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowkit.distill.estimate import Estimate, machine_memory, size, weights_of


class Clock:
    """Time that passes by work alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def done() -> None:
            self.now += left.pop(0)

        return done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("flowkit.distill.estimate.time.perf_counter", made)
    return made


def network() -> nn.Module:
    """1000 frozen weights in bfloat16, 100 trained ones in float32, 10 bytes of a buffer."""
    model = nn.Module()
    model.frozen = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16), requires_grad=False)
    model.trained = nn.Parameter(torch.zeros(100))
    model.register_buffer("table", torch.zeros(10, dtype=torch.uint8))
    return model


def test_time_is_that_of_the_faster_call_times_their_number(clock: Clock) -> None:
    found = Estimate.measure(network(), clock.work(3.0, 2.0), 100, clock.work(9.0, 0.5), 8)
    assert (found.training, found.drawing) == (200.0, 4.0)
    assert clock.now == 14.5
    assert found.line().startswith("about 4.0 s for the teacher's samples and 3 min for 100 updates; at least ")
    # What is done already is not timed.
    none = Estimate.measure(network(), clock.work(), 0, clock.work(), 0)
    assert (none.training, none.drawing) == (0.0, 0.0)


def test_memory_and_disk_are_counted_exactly(clock: Clock) -> None:
    found = Estimate.measure(network(), clock.work(1, 1), 1, averages=3, snapshots=5, pairs=10_000, student=2_000)
    # weights 2000 + 400 + 10; gradient and two moments 3 x 400; three averages 3 x 400
    assert found.memory == 2410 + 1200 + 1200
    assert found.activations is None
    assert found.disk == 10_000 + 2 * (400 + 800 + 1200) + 5 * 400 + 2_000
    half = network()
    half.trained = nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))
    assert Estimate.measure(half, clock.work(1, 1), 1).memory == 2000 + 200 + 10 + 600 + 400
    shared = network()
    assert weights_of(shared, shared) == 2410


def test_the_trainer_holds_and_writes_as_much_as_was_counted(tmp_path: Path) -> None:
    model, data = nn.Linear(30, 20), torch.ones(4, 30)
    found = Estimate.measure(model, lambda: model(data).square().mean().backward(), 3)
    assert all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(data).square().mean().backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    counted = sum(t.numel() * t.element_size() for t in (*held, *moments))
    assert found.memory == counted + 4 * 620


def test_an_estimate_is_kept_as_json(clock: Clock) -> None:
    found = Estimate.measure(network(), clock.work(1, 1), 5)
    assert Estimate(**json.loads(json.dumps(found.to_dict()))) == found


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=free) if place.exists() else None)


def of(**values: Any) -> Estimate:
    return Estimate(
        **{"drawing": 0.0, "training": 1.0, "updates": 1, "memory": 1, "activations": None, "disk": 5_000_000, **values}
    )


def test_a_disk_without_room_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    disk(monkeypatch, 3_000_000)
    with pytest.raises(OSError, match=r"takes 5 MB more on the disk, and .*one has 3 MB left; choose another folder"):
        of().check(folder, torch.device("cpu"))
    assert not any(tmp_path.iterdir())
    # What is there already need not be written again.
    folder.mkdir(parents=True)
    (folder / "pairs").write_bytes(bytes(2_500_000))
    of().check(folder, torch.device("cpu"))
    disk(monkeypatch, 5_000_000)
    of().check(tmp_path / "new", torch.device("cpu"))


def test_too_little_memory_is_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cpu = torch.device("cpu")
    there = machine_memory(cpu)
    assert there is not None
    assert there > 2**28
    of(memory=there // 2).check(tmp_path, cpu)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"takes .* of memory, and cpu has .*; train a LoRA"):
        of(memory=2 * there).check(tmp_path, cpu)


def test_activations_are_measured_where_the_device_tells(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(device)
    data = torch.ones(4096, 512, device=device)
    found = Estimate.measure(model, lambda: model(data).square().mean().backward(), 1)
    assert found.activations is not None
    assert found.activations >= 8 * 4096 * 512 * 4
    assert not found.line().count("at least")
    assert machine_memory(device)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size(count) == text

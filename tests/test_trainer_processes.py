"""The training loop on several processes, data parallel and in shards, makes the updates of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowkit import weights
from flowkit.distill import trainer

from .launched import launched

SHARED = """
import json, sys
from pathlib import Path
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from flowkit.distill import Training, trainer
trainer.SAVE_SECONDS = trainer._SAVE_SHARE = 0

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)
    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))

class Network(nn.Module):
    _no_split_modules = ["Block"]
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

def loss(model, draw):
    x = draw.normal(4)
    return (model(x) - 2 * x.roll(1, 1)).square().mean(1), torch.linspace(0, 1, draw.batch)[draw.rows.start:draw.rows.stop]

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
def on_step(done):
    if done == stop:
        os._exit(0)
how = Training(steps=12, batch_size=8, learning_rate=1e-2, profiles=(0.1,), snapshots=2)
found = trainer.train(Network(), loss, how, folder, on_step=on_step)
sharded = any(isinstance(p, DTensor) for p in found.network.parameters())
assert sharded == bool(os.environ.get("ACCELERATE_USE_FSDP"))
if PartialState().is_main_process:
    print("HISTORY", json.dumps(found.history), flush=True)
"""


def shared(folder: Path, processes: int, stop: int = -1, fsdp: bool = False) -> Any:
    """The history of a training; None of one that ends itself."""
    done = launched(SHARED, processes, str(folder), str(stop), fsdp="Block" if fsdp else None)
    if stop >= 0:
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("HISTORY")]
    return json.loads(line.removeprefix("HISTORY"))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_make_the_same_updates_as_one(fsdp: bool, tmp_path: Path) -> None:
    one = shared(tmp_path / "one", 1)
    shared(tmp_path / "two", 2, stop=7, fsdp=fsdp)
    assert trainer.steps_done(tmp_path / "two") in (6, 7)
    two = shared(tmp_path / "two", 2, fsdp=fsdp)
    alone, both = (weights.read(tmp_path / name / trainer.CHECKPOINT)[0] for name in ("one", "two"))
    assert alone.keys() == both.keys()
    for name, value in alone.items():
        assert torch.allclose(value, both[name], atol=1e-5, equal_nan=True), name
    for row, other in zip(one, two, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for (*_, mean), (*_, again) in zip(row["bands"], other["bands"], strict=True):
            assert mean == again or mean == pytest.approx(again, rel=1e-4)

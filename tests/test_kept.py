"""Captured conditioning in a folder is what memory would hold, however often it was killed, and by whomever it was made."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flowkit
from flowkit.distill.conditions import Conditions

from .test_conditions import arguments_of, built
from .tiny_parts import random

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parents[1]


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("family", ["sd15", "lumina", "qwen-image", "z-image", "flux-kontext"])
def test_a_folder_holds_what_memory_would(family: str, tmp_path: Path) -> None:
    inputs, call = arguments_of(family)
    pipe = built(family)
    made = Conditions(pipe, inputs, 6, call=call, batch_size=2)
    kept = Conditions(pipe, inputs, 6, call=call, batch_size=2, folder=tmp_path / "kept")
    done: list[int] = []
    again = Conditions(pipe, inputs, 6, call=call, batch_size=2, folder=tmp_path / "kept", on_input=done.append)
    assert sum(done) == 3
    x, s, samples = random(4, *made.shape), torch.tensor([0.9, 0.2, 0.5, 0.3]), [2, 3, 1, 0]
    with torch.no_grad():
        wanted = made(made.network, x, s, samples)
        for conditions in (kept, again):
            assert torch.equal(conditions(made.network, x, s, samples), wanted)


def test_a_killed_capture_goes_on(tmp_path: Path) -> None:
    pipe, inputs = flowkit.load_demo("digits"), list(range(10))
    whole = tmp_path / "whole"
    Conditions(pipe, inputs, 20, batch_size=3, folder=whole)
    assert len(list(whole.glob("shard-*"))) == 4

    class Killed(Exception):
        pass

    def stop(rows: int) -> None:
        seen.append(rows)
        if len(seen) == 3:  # what was there, and two batches
            raise Killed

    seen: list[int] = []
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        Conditions(pipe, inputs, 20, batch_size=3, folder=folder, on_input=stop)
    assert len(list(folder.glob("shard-*"))) == 2
    (folder / ".shard-000002.safetensors.torn").write_bytes(b"half")
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    rows: list[int] = []
    Conditions(pipe, inputs, 20, batch_size=3, folder=folder, on_input=rows.append)
    assert rows == [6, 3, 1]
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    assert _files(folder) == _files(whole)


@pytest.mark.slow
def test_two_processes_share_a_capture(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from flowkit import load_demo; "
    script += "from flowkit.distill.conditions import Conditions; "
    script += "Conditions(load_demo(), range(10), 20, batch_size=3, folder=Path(sys.argv[1]))"
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path / "two")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    Conditions(flowkit.load_demo("digits"), range(10), 20, batch_size=3, folder=tmp_path / "one")
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    pipe = flowkit.load_demo("digits")
    folder = tmp_path / "kept"
    Conditions(pipe, range(10), 10, folder=folder)
    own: dict[str, Any] = {"inputs": range(10), "count": 10, "folder": folder}
    others: list[tuple[dict[str, Any], str]] = [
        ({"inputs": range(9)}, "inputs"),
        ({"count": 11}, "inputs"),
        ({"batch_size": 5}, "batch_size"),
        ({"call": {"guidance_scale": 2.0}}, "call.guidance_scale"),
    ]
    for other, place in others:
        with pytest.raises(ValueError, match=f"holds captured conditioning with {place} .* choose another folder"):
            Conditions(pipe, **{**own, **other})
    inputs, call = arguments_of("sd15")
    text = tmp_path / "text"
    Conditions(built("sd15"), inputs, 3, call=call, folder=text)
    pipe = built("sd15")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    next(pipe.text_encoder.parameters()).data += 1.0
    with pytest.raises(ValueError, match="holds captured conditioning with weights"):
        Conditions(pipe, inputs, 3, call=call, folder=text)
    pipe = built("sd15")
    pipe.unet = copy.deepcopy(pipe.unet)  # a student: what it is given is the same
    next(pipe.unet.parameters()).data += 1.0
    Conditions(pipe, inputs, 3, call=call, folder=text)
    shard = text / "shard-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is corrupt, cut short or not a safetensors file"):
        Conditions(pipe, inputs, 3, call=call, folder=text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no conditions.json, so it is no folder of captured conditioning"):
        Conditions(pipe, inputs, 3, call=call, folder=tmp_path / "full")

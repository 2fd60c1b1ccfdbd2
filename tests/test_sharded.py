"""A student in shards is the one that a single process makes, and is saved whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowkit import weights
from flowkit.distill import Reflow, run

from .launched import ROOT, launched
from .students import SMALL, tiny

DISTILLED = f"""
import importlib, sys, types
tests = types.ModuleType("small")
tests.__path__ = [{str(ROOT / "tests")!r}]
sys.modules["small"] = tests
import diffusers
from torch.distributed.tensor import DTensor
from flowkit.distill import LoRA, Reflow, run, stage
real = stage.save
def saved(pipe, network, *others):
    print("SHARDED", any(isinstance(p, DTensor) for p in network.parameters()), flush=True)
    real(pipe, network, *others)
stage.save = saved
pipe = importlib.import_module("small.tiny").build("sd15", diffusers.DDIMScheduler())
before = {{name: value.clone() for name, value in pipe.unet.state_dict().items()}}
run(
    Reflow(evaluations=2), pipe, [{{"prompt": "a cat"}}, {{"prompt": "a dog"}}], output=sys.argv[1], samples=40, steps=4,
    call={{"height": 16, "width": 16, "guidance_scale": 3.0}}, batch_size=4, progress=False,
    lora=LoRA(2) if sys.argv[2] == "lora" else None,
)
assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_in_shards_is_saved_whole(kind: str, tmp_path: Path) -> None:
    alone = launched(DISTILLED, 1, str(tmp_path / "one"), kind)
    shared = launched(DISTILLED, 2, str(tmp_path / "two"), kind, fsdp="BasicTransformerBlock")
    assert (alone.returncode, shared.returncode) == (0, 0), alone.stderr[-1500:] + shared.stderr[-1500:]
    assert "SHARDED False" in alone.stdout
    assert "SHARDED True" in shared.stdout
    name = "pytorch_lora_weights.safetensors" if kind == "lora" else "unet/diffusion_pytorch_model.safetensors"
    one, two = (weights.read(tmp_path / folder / name)[0] for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(value, two[key], atol=1e-5) for key, value in one.items())


def test_a_student_in_shards_cannot_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"rounds=2: a student in shards .* run a round at a time"):
        run(Reflow(rounds=2), tiny(), output=tmp_path / "student", **SMALL)
    assert not any(tmp_path.iterdir())

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowkit import weights


def test_round_trip_and_replacement(tmp_path: Path) -> None:
    file = tmp_path / "new" / "w.safetensors"
    for value in (1.0, 2.0):
        weights.write(file, {"a": torch.full((2, 3), value), "b": torch.arange(4)}, {"note": str(value)})
        tensors, metadata = weights.read(file)
        assert torch.equal(tensors["a"], torch.full((2, 3), value))
        assert tensors["b"].tolist() == [0, 1, 2, 3]
        assert metadata == {"note": str(value)}
    assert [p.name for p in file.parent.iterdir()] == ["w.safetensors"]


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    metadata = {f"key {i}": "ü" * i for i in range(20)}
    for i in range(4):
        weights.write(tmp_path / f"{i}", {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}, metadata)
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(4)}) == 1
    assert weights.read(tmp_path / "0")[1] == metadata


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    weights.write(file, {"a": torch.ones(1)})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        weights.write(file, {"a": torch.zeros(1)})
    assert weights.read(file)[0]["a"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_truncated_files_are_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "w.safetensors"
    weights.write(file, {"a": torch.ones(100)})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="corrupt, cut short or not a safetensors"):
        weights.read(file)


@pytest.mark.parametrize("suffix", [".bin", ".pkl", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="pickled weight file"):
        weights.read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        weights.read(tmp_path / "none.safetensors")


def test_a_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    def saved(name: str, scale: float, size: int = 100_000) -> str:
        weights.write(tmp_path / name / "unet" / "model.safetensors", {"a": torch.linspace(0, scale, size)})
        return weights.fingerprint(weights.check_folder(tmp_path / name))

    first = saved("first", 1.0)
    assert saved("again", 1.0) == first
    assert len({first, saved("trained", 1.0001), saved("longer", 1.0, 100_001), saved("small", 1.0, 10)}) == 4


def test_every_component_of_a_folder_needs_safetensors(tmp_path: Path) -> None:
    weights.write(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"a": torch.ones(1)})
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read, the other is there")
    (tmp_path / "unet" / "optimizer.bin").write_bytes(b"no weights of the pipeline")
    assert [p.parent.name for p in weights.check_folder(tmp_path)] == ["unet"]
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"text_encoder.pytorch_model\.bin is a pickled weight file"):
        weights.check_folder(tmp_path)


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    dtypes = (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
    tensors = {f"{'zéa'[k % 3]}{k}": (torch.randn(k % 4, 3) * 9).to(dtypes[k % 7]).T for k in range(20)}
    tensors |= {"number": torch.tensor(2.5)}
    tensors["of many"] = torch.arange(9.0).reshape(3, 3)[:1, 1]
    tensors["of none"] = torch.tensor(7.0).expand(1)
    weights.write(tmp_path / "ours", tensors, {"step": "3"})
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"step": "3"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    sizes = [8 + int.from_bytes(content[:8], "little") for content in (ours, theirs)]
    assert json.loads(ours[8 : sizes[0]]) == json.loads(theirs[8 : sizes[1]])
    assert ours[sizes[0] :] == theirs[sizes[1] :]
    weights.write(tmp_path / "again", dict(reversed(tensors.items())), {"step": "3"})
    assert (tmp_path / "again").read_bytes() == ours

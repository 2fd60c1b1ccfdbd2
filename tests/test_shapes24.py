"""The script that trains the 24-class model: its pictures are what they claim to be, and its folder is one that flowkit reads."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowkit import ClassConditionalPipeline
from flowkit.eval import FeatureStats

from .scripts import script_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The module examples/train_shapes24.py, which finds its own neighbours as when it is run."""
    with script_module(ROOT / "examples" / "train_shapes24.py") as module:
        yield module
    sys.modules.pop("build_assets")


@pytest.fixture
def small(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with so little to do that a run takes a second or two."""
    counts = {"TRAIN_COUNT": 240, "REFERENCE_COUNT": 240, "HELD_OUT_COUNT": 48, "CLASSIFIER_STEPS": 2}
    for name, value in {**counts, "SAMPLES": 24, "SAMPLE_STEPS": 1, "SCALES": (1.0, 1.5)}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return script


class Constant:
    """Stands for a generator; every picture gets the same numbers."""

    def __init__(self, *row: float) -> None:
        self.row = row

    def random(self, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        return np.broadcast_to(np.array(self.row), shape)


def test_a_picture_depends_on_start_and_index_only(script: Any) -> None:
    pixels, labels = script.pictures(script.TRAIN, 240)
    fewer, _ = script.pictures(script.TRAIN, 50)
    assert pixels.shape == (240, 3, 16, 16)
    assert pixels.dtype == torch.uint8
    assert torch.equal(labels, torch.arange(240) % 24)
    assert torch.equal(fewer, pixels[:50])


def test_pictures_are_the_same_bytes_everywhere(script: Any) -> None:
    pixels, _ = script.pictures(script.HELD_OUT, 480)
    assert (
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        == "aae7d5fa9081b4c9dd79acb40f39d77cc7564ed6a7840a170df254afd50723df"
    )


def test_the_three_sets_share_no_picture(script: Any) -> None:
    sets = (script.TRAIN, script.REFERENCE, script.HELD_OUT)
    drawn = [picture.numpy().tobytes() for which in sets for picture in script.pictures(which, 480)[0]]
    assert len(set(drawn)) == 3 * 480


@pytest.mark.parametrize("turn", [0.0, 0.3, 0.5, 1.0])
def test_forms_have_their_areas_at_any_turn(script: Any, turn: float) -> None:
    """White on black at radius 5: coverages add up to the area, whatever the place and the turn."""
    pixels, _ = script.draw(24, Constant(0.3, 0.6, 0.5, 1, turn, 0, 0, 0, 0))
    highest = 255 * script.COLOURS.max(axis=1)
    areas = pixels.max(axis=1).reshape(4, 6, 256).sum(axis=2) / highest
    expected = 25 * np.array([np.pi * 0.9**2, 1.6**2, 3**1.5 * 0.6**2, 4 * 0.7 - 0.7**2])
    np.testing.assert_allclose(areas, np.repeat(expected[:, None], 6, axis=1), rtol=0.03)


def test_classes_differ_where_all_else_is_equal(script: Any) -> None:
    pixels, _ = script.draw(24, Constant(0.5, 0.5, 0.0, 0.0, 0.5, 1, 1, 1, 1))  # small and dim on bright grey
    flat = torch.from_numpy(pixels).double().flatten(1)
    root_mean_square = torch.pdist(flat) / flat.shape[1] ** 0.5
    assert root_mean_square.min() > 3  # ten times what rounding to uint8 makes
    repeated, _ = script.draw(48, Constant(0.5, 0.5, 0.0, 0.0, 0.5, 1, 1, 1, 1))
    assert np.array_equal(repeated[24:], pixels)


def test_a_run_makes_a_folder_that_loads_and_a_second_run_keeps_it(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train_shapes24.py", "--output", str(out), "--steps", "2"])
    small.main()
    pipe = ClassConditionalPipeline.from_pretrained(out)
    assert pipe.num_classes == 24
    assert pipe(class_labels=[0, 24], num_inference_steps=1, output_type="pt").images.shape == (2, 3, 16, 16)
    for extractor, file in zip(small.extractors(out), small.references(out), strict=True):
        stats = FeatureStats.load(file)
        assert stats.count == 240
        assert dict(stats.identity or {}) == dict(extractor.identity)
    rows = json.loads((out / "figures.json").read_text())["rows"]
    assert [row["images"] for row in rows] == ["held-out pictures", "samples, w = 1", "samples, w = 1.5"]
    printed = capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert not [path for path in files if "checkpoint" in path.name]

    small.main()
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files


def test_folders_of_something_else_are_refused(script: Any, tmp_path: Path) -> None:
    script.claim(tmp_path / "run", 10)
    script.claim(tmp_path / "run", 10)
    with pytest.raises(ValueError, match=r"'steps': 10.*'steps': 11.*another --output"):
        script.claim(tmp_path / "run", 11)
    with pytest.raises(ValueError, match="not the folder of a training"):
        script.claim(tmp_path, 10)

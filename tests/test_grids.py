from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkit import paths
from flowkit.grids import Grid


def test_uniform_ends_at_zero_and_wastes_no_call() -> None:
    assert Grid.uniform(4).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)
    vp = paths.vp(paths.betas())
    grid = Grid.uniform(4, vp)
    assert [round(vp.time(vp.at_level(v))) for v in grid.sigmas[:-1]] == [999, 749, 499, 249]
    assert len(grid) == 4
    assert Grid.uniform(2, paths.cosine()).sigmas == pytest.approx((math.inf, 1.0, 0.0))


def test_shift_and_karras_are_the_published_formulas() -> None:
    assert Grid.shifted(2, 3.0).sigmas == pytest.approx((1.0, 0.75, 0.0))
    grid = Grid.karras(3, 0.002, 80.0)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert grid.sigmas == pytest.approx((80.0, middle, 0.002, 0.0), rel=1e-12)
    assert Grid.karras(1).sigmas == pytest.approx((80.0, 0.0))


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12, unique=True), st.booleans())
def test_files_are_exact(tmp_path_factory: pytest.TempPathFactory, levels: list[float], ends: bool) -> None:
    sigmas = (*sorted(levels, reverse=True), *([0.0] if ends or len(levels) < 2 else []))
    grid = Grid(sigmas, solver="euler", timesteps=sigmas[:-1], about={"gain": 0.25})
    file = tmp_path_factory.mktemp("grid") / "grid.json"
    grid.save(file)
    assert Grid.load(file) == grid


def test_infinite_levels_are_plain_json(tmp_path: Path) -> None:
    grid = Grid((math.inf, 1.0, 0.0), "vp")
    grid.save(tmp_path / "g.json")
    strict = json.loads(
        (tmp_path / "g.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert strict["sigmas"] == ["inf", 1.0, 0.0]
    assert Grid.load(tmp_path / "g.json") == grid


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid((1.0,)), "at least a start and an end"),
        (lambda: Grid((0.5, 0.5, 0.0)), "strictly fall"),
        (lambda: Grid((0.1, 0.5)), "strictly fall"),
        (lambda: Grid((1.5, 0.0)), r"lie in \[0, 1\]"),
        (lambda: Grid((1.0, -0.1)), "lie in"),
        (lambda: Grid((math.nan, 0.0)), "strictly fall"),
        (lambda: Grid((1.0, 0.0), "vpp"), "unknown path 'vpp'"),
        (lambda: Grid((1.0, 0.0), timesteps=(3.0, 4.0)), "as many finite timesteps"),
        (lambda: Grid.uniform(0), "at least 1, got 0"),
        (lambda: Grid.uniform(1001, paths.vp(paths.betas())), "1001 steps on a path of 1000"),
        (lambda: Grid.uniform(4, paths.edm()), "use Grid.karras"),
        (lambda: Grid.shifted(4, 0.0), "shift must be a positive number, got 0"),
        (lambda: Grid.karras(4, 1.0, 0.5), "sigma_min < sigma_max"),
    ],
)
def test_bad_grids_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 0]", "{}", '{"format": "flowkit.grid/1"}', '{"format": "flowkit.grid/1", "path": "flow", "sigmas": ["a", 0]}',
     '{"format": "flowkit.grid/1", "path": "flow", "sigmas": [0, 1]}', "\x00\xff"],
)  # fmt: skip
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"bad\.json"):
        Grid.load(file)
    with pytest.raises(FileNotFoundError, match="no grid file"):
        Grid.load(tmp_path / "missing.json")

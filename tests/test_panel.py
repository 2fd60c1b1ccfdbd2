"""The diagnosis of a training: each rule sees what it is for, and is silent where nothing is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowkit.distill.panel import draw, notes

BANDS = [(0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]


def history(
    count: int = 60,
    loss: tuple[float, float] = (1.0, 0.4),
    bands: Any = None,
    norm: float = 0.5,
    seed: int = 0,
    noise: float = 0.1,
) -> list[dict[str, Any]]:
    """Rows of a training whose loss goes from one value to another, with noise of a share of it."""
    draws = np.random.default_rng(seed)
    ends = bands or [loss] * len(BANDS)

    def at(pair: tuple[float, float], k: int) -> float:
        return float((pair[0] + (pair[1] - pair[0]) * k / (count - 1)) * draws.lognormal(0, noise))

    return [
        {
            "step": 10 * k,
            "loss": at(loss, k),
            "gradient_norm": at((norm, norm), k),
            "rate": 1e-3 * (1 - k / count),
            "bands": [
                [low, high, None if k % 5 == 4 else at(pair, k)] for (low, high), pair in zip(BANDS, ends, strict=True)
            ],
        }
        for k in range(count)
    ]


def looks(**columns: list[float]) -> list[dict[str, float]]:
    return [
        {"step": 100 * k, **{key: v[k] for key, v in columns.items()}} for k in range(len(next(iter(columns.values()))))
    ]


GOOD = looks(
    mean_drift=[0.3, 0.1, 0.05],
    variance_ratio=[0.4, 0.9, 0.97],
    rmse=[0.5, 0.2, 0.1],
    straightness=[4.0, 2.0, 1.0],
    straightness_relative=[0.2, 0.1, 0.05],
    fd=[9.0, 3.0, 3.05],
    fd_se=[0.1, 0.1, 0.1],
)


@pytest.mark.parametrize("seed", range(20))
def test_a_good_training_has_no_notes(seed: int) -> None:
    assert notes(history(seed=seed), GOOD, clip=1.0) == []
    assert notes(history(seed=seed), []) == []


def test_too_little_is_not_judged() -> None:
    assert notes([], []) == []
    assert notes(history(8, (1.0, 2.0), norm=5.0), [], clip=1.0) == []


def only(found: list[str]) -> str:
    (note,) = found
    return note


@pytest.mark.parametrize("end", [1.0, 1.5])
def test_a_loss_that_does_not_fall(end: float) -> None:
    flat = [(1.0, end)] * 3
    said = only(notes(history(loss=(1.0, end), bands=flat), GOOD))
    assert said.startswith("the loss does not fall: ")
    assert "try a third and three times the learning rate" in said


def test_a_band_that_rises_while_others_fall() -> None:
    one = [(1.0, 0.4), (1.0, 1.4), (1.0, 0.4)]
    said = only(notes(history(bands=one), GOOD))
    assert said.startswith("the loss at 0.5 <= s < 1 rises")
    assert "draw more of these times" in said
    assert "at s = 1 rises" in only(notes(history(bands=[(1.0, 0.4), (1.0, 0.4), (0.2, 0.5)]), GOOD))
    # All of them rising is no trade between bands.
    assert notes(history(loss=(1.0, 1.5)), [])[1:] == []


def test_noisy_bands_that_stay_are_seldom_taken_for_rising_ones() -> None:
    stays, rises = [(1.0, 0.4), (1.0, 1.0), (1.0, 1.0)], [(1.0, 0.4), (1.0, 2.5), (1.0, 1.0)]
    false = sum(bool(notes(history(200, bands=stays, seed=seed, noise=0.5), [])) for seed in range(100))
    true = sum(bool(notes(history(200, bands=rises, seed=seed, noise=0.5), [])) for seed in range(100))
    assert false <= 3
    assert true >= 97


def test_a_gradient_that_is_always_cut() -> None:
    said = only(notes(history(norm=5.0), GOOD, clip=1.0))
    assert "the gradient is cut to norm 1 in 20 of the last 20 rows (its median is 4.87)" in said
    assert notes(history(norm=5.0), GOOD) == []  # no clip, no note
    assert notes(history(norm=1.0), GOOD, clip=1.0) == []  # half the time


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"mean_drift": [0.1, 0.3]}, "the mean of the samples is 0.30 standard deviations off"),
        ({"variance_ratio": [1.0, 0.5]}, "vary 0.50 times as much as they should: they collapse"),
        ({"variance_ratio": [1.0, 1.6]}, "vary 1.60 times as much as they should; lower the learning rate"),
        ({"fd": [9.0, 3.0, 3.5], "fd_se": [0.1, 0.1, 0.1]}, "rises since step 100, 3 to 3.5: the student is trained too long; "
         "take the average at step 100"),
        ({"fd": [3.0, 3.5]}, "rises since step 0"),
        ({"straightness": [4.0, 4.1, 3.9], "straightness_relative": [0.2] * 3}, "S is 4 at step 0 and 3.9 at step 200"),
    ],
)  # fmt: skip
def test_looks_that_tell_of_something_wrong(columns: dict[str, list[float]], note: str) -> None:
    assert note in only(notes([], looks(**columns)))


@pytest.mark.parametrize(
    "columns",
    [
        {"mean_drift": [0.5, 0.1]},
        {"variance_ratio": [0.5, 0.85]},
        {"fd": [9.0, 3.0, 3.2], "fd_se": [0.1, 0.1, 0.1]},  # within the errors
        {"fd": [3.1]},
        {"straightness": [4.0, 4.1], "straightness_relative": [0.2] * 2},  # two looks
        {"straightness": [0.04, 0.05, 0.04], "straightness_relative": [0.002] * 3},  # straight from the first
        {"rmse": [0.1, 0.2, 0.3]},
    ],
)
def test_looks_that_tell_of_nothing(columns: dict[str, list[float]]) -> None:
    assert notes([], looks(**columns)) == []


@pytest.mark.parametrize("part", ["all", "none", "start"])
def test_the_panel_is_a_picture_of_whatever_there_is(part: str, tmp_path: Path) -> None:
    file = tmp_path / "panel.png"
    rows = {"all": history(), "none": [], "start": history(2)}[part]
    draw(rows, GOOD if part == "all" else GOOD[:1] if part == "start" else [], file, clip=1.0)
    picture = Image.open(file)
    assert picture.format == "PNG"
    assert picture.width == 1430
    assert [p.name for p in tmp_path.iterdir()] == ["panel.png"]

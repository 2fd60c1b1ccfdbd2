from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from hypothesis import given
from hypothesis import strategies as st

from flowkit import paths
from flowkit.grids import GRIDS, Grid, limits, named
from flowkit.schedulers import RectifiedFlowScheduler

from .stock64 import stock64

VP = paths.vp(paths.betas())
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
levels_in_unit = st.lists(st.integers(1, 9990), min_size=1, max_size=12, unique=True).map(
    lambda v: (*(i / 10_000 for i in sorted(v, reverse=True)), 0.0)
)


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


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_of_a_discrete_model_are_those_of_ddim(spacing: str) -> None:
    stock = stock64("DDIMScheduler")(**SD, timestep_spacing=spacing)
    rhos = ((1 - stock.alphas_cumprod) / stock.alphas_cumprod).sqrt()
    for steps in (2, 3, 7, 10, 16, 48, 49, 50, 80, 333, 1000):
        stock.set_timesteps(steps)
        grid = Grid.spaced(steps, VP, spacing)
        assert grid.sigmas[:-1] == pytest.approx(rhos[stock.timesteps].tolist(), rel=1e-9)
        assert grid.sigmas[-1] == 0
    assert Grid.spaced(1, VP, "linspace").sigmas == (VP.rhos[-1], 0.0)  # stock's one step starts at time 0


def test_spacings_of_a_continuous_model() -> None:
    stock = stock64("FlowMatchEulerDiscreteScheduler")()
    for steps in (1, 4, 10):
        stock.set_timesteps(steps)
        assert Grid.spaced(steps, None, "linspace").sigmas == pytest.approx(
            stock.sigmas.tolist(), rel=1e-7
        )  # its limits are float32
    assert Grid.spaced(2, None, "leading").sigmas == pytest.approx((0.5005, 0.001, 0.0))
    assert Grid.spaced(2, paths.flow(1), "leading").sigmas == pytest.approx((0.5005, 0.001, 0.0))
    assert Grid.spaced(4, paths.flow(1)) == Grid.uniform(4)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", [2, 5, 30])
def test_bounded_spacings_are_those_of_stock(name: str, steps: int) -> None:
    stock = stock64("EulerDiscreteScheduler")(**SD, **{f"use_{name}_sigmas": True})
    stock.set_timesteps(steps)
    grid = named(name, steps, VP)
    assert grid.sigmas == pytest.approx(stock.sigmas.tolist(), rel=1e-9)
    assert (grid.sigmas[0], grid.sigmas[-2]) == (VP.rhos[-1], VP.rhos[0])
    flow = stock64("FlowMatchEulerDiscreteScheduler")(**{f"use_{name}_sigmas": True})
    flow.set_timesteps(steps)
    assert named(name, steps, paths.flow()).sigmas == pytest.approx(
        flow.sigmas.tolist(), rel=1e-6
    )  # its limits are float32
    if name != "beta":
        edm = stock64("EDMEulerScheduler")(sigma_schedule=name)
        edm.set_timesteps(steps)
        assert named(name, steps, paths.edm()).sigmas == pytest.approx(edm.sigmas.tolist(), rel=1e-9)


def test_parameters_of_the_bounded_spacings() -> None:
    ends = Grid.beta(9, 1.0, 3.0, alpha=1.0, beta=1.0).sigmas[:-1]
    assert ends == pytest.approx(np.linspace(3, 1, 9).tolist())  # Beta(1, 1) is uniform
    assert (
        Grid.beta(3, 1.0, 3.0, alpha=1.0, beta=5.0).sigmas[1]
        < 2
        < Grid.beta(3, 1.0, 3.0, alpha=5.0, beta=1.0).sigmas[1]
    )
    assert named("karras", 2, paths.ve()).sigmas == (80.0, 0.002, 0.0)
    assert named("exponential", 3, paths.ve(), sigma_min=0.01, sigma_max=100.0).sigmas == pytest.approx(
        (100, 1, 0.01, 0)
    )
    assert limits(paths.cosine(1)) == pytest.approx(limits(paths.cosine(1000)))
    assert limits(paths.flow(1)) == limits(paths.flow(1000)) == (0.001, 1.0)
    assert limits(paths.vp([*paths.betas()[:-1], 1.0]))[1] == VP.rhos[-2]  # zero terminal SNR
    for name in GRIDS:
        grid = named(name, 5, paths.flow())
        assert len(grid) == 5
        assert (grid.path, grid.sigmas[-1]) == ("flow", 0.0)


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match="a beta grid needs SciPy; install it with: pip install scipy"):
        Grid.beta(4)


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"shift": 3.0}, {"shift": 3.0}),
        ({"use_dynamic_shifting": True}, {"mu": 1.15}),
        ({"use_dynamic_shifting": True}, {"mu": -0.4}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.7, "kind": "linear"}),
    ],
)
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_shifts_and_the_stretch_are_those_of_stock(
    config: dict[str, Any], shift: dict[str, Any], terminal: float | None
) -> None:
    stock = stock64("FlowMatchEulerDiscreteScheduler")(**config, shift_terminal=terminal)
    stock.set_timesteps(sigmas=list(Grid.uniform(7).sigmas[:-1]), mu=shift.get("mu"))
    grid = Grid.uniform(7).with_shift(**shift)
    grid = grid if terminal is None else grid.stretched(terminal)
    assert grid.sigmas == pytest.approx(stock.sigmas.tolist(), rel=1e-12)
    if terminal is None:
        assert named("uniform", 7, paths.flow(), **shift) == grid


@given(levels_in_unit, st.floats(0.05, 20.0))
def test_a_shift_multiplies_the_noise_to_signal_ratio(levels: tuple[float, ...], k: float) -> None:
    pushed = Grid(levels).with_shift(k)
    expected = [k * v for v in Grid(levels).on("vp").sigmas]
    assert pushed.on("vp").sigmas == pytest.approx(expected, rel=1e-9)
    assert pushed.with_shift(1 / k).sigmas == pytest.approx(levels, rel=1e-9)
    assert Grid((1.0, *levels)).with_shift(k).sigmas[0] == 1.0


def test_ays_is_the_table_of_diffusers() -> None:
    for model, key in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        assert Grid.ays(model).sigmas == tuple(AysSchedules[f"{key}Sigmas"])
    for model, key in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")):
        times = Grid.ays(model).at_whole_times(VP).timesteps
        assert np.abs(np.array(times) - AysSchedules[f"{key}Timesteps"]).max() <= 1  # they round 124.6 to 124
    assert Grid.ays("svd").path == "edm"


@given(st.integers(1, 60))
def test_resampling_is_log_linear(steps: int) -> None:
    table = Grid.ays("sd15")
    grid = table.resampled(steps)
    assert len(grid) == steps
    assert (grid.sigmas[0], grid.sigmas[-1]) == (table.sigmas[0], 0.0)
    knots = np.interp(np.linspace(0, 9, steps), range(10), np.log(table.sigmas[:-1]))
    assert np.log(grid.sigmas[:-1]) == pytest.approx(knots)


def test_resampling_keeps_what_it_can() -> None:
    fine = Grid.ays("sd15", 19)
    assert fine.sigmas[:-1:2] == Grid.ays("sd15").sigmas[:-1]
    assert fine.sigmas[1] == pytest.approx(math.sqrt(fine.sigmas[0] * fine.sigmas[2]))
    assert Grid((8.0, 4.0, 1.0), "vp", "euler").resampled(4).sigmas == pytest.approx((8.0, 8 / math.sqrt(2), 4, 2, 1.0))
    made = Grid((8.0, 4.0, 1.0), "vp", "euler", about={"gain": 2})
    assert made.resampled(2) is made
    assert (made.resampled(3).solver, made.resampled(3).about) == ("euler", {})


@given(levels_in_unit, st.sampled_from(["vp", "cosine", "ve", "edm"]))
def test_paths_convert_back_and_forth(levels: tuple[float, ...], path: str) -> None:
    there = Grid(levels, timesteps=levels[:-1]).on(path)
    assert there.sigmas == tuple(paths.rho(v) for v in levels)
    assert there.timesteps is None
    assert there.on("flow").sigmas == pytest.approx(levels, rel=1e-12)
    assert there.on("ve").on("cosine").sigmas == there.sigmas


def test_whole_times_are_the_nearest() -> None:
    grid = named("karras", 12, VP).at_whole_times(VP)
    before = [VP.time(VP.at_level(v)) for v in named("karras", 12, VP).sigmas[:-1]]
    assert grid.timesteps is not None
    assert np.abs(np.array(grid.timesteps) - before).max() <= 0.5
    assert all(t.is_integer() for t in grid.timesteps)
    assert grid.sigmas == pytest.approx((*(VP.rhos[int(t)] for t in grid.timesteps), 0.0))
    assert Grid((0.7004, 0.2)).at_whole_times(paths.flow()).sigmas == (0.7, 0.2)


def test_lists_are_read_as_people_write_them() -> None:
    for text in ("1.0, 0.75, 0.5, 0.0", "1,.75,.5,0", " [1.0 0.75 0.5 0.0] ", "(1.0, 7.5e-1, 0.5, 0)"):
        assert Grid.parse(text) == Grid((1.0, 0.75, 0.5, 0.0))
    assert Grid.parse("inf, 2, 0", "vp") == Grid((math.inf, 2.0, 0.0), "vp")


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
        (lambda: Grid.exponential(4, 0.0, 0.5), "sigma_min < sigma_max"),
        (lambda: Grid.beta(4, alpha=0.0), "alpha and beta must be positive numbers, got 0"),
        (lambda: Grid.spaced(4, None, "cubic"), "unknown spacing 'cubic'; choose trailing"),
        (lambda: Grid.ays("flux"), "no Align Your Steps table for 'flux'; choose one of sd15"),
        (lambda: Grid.parse("one, zero"), "not a list of levels: 'one, zero'; write them as"),
        (lambda: Grid.parse(""), "at least a start and an end"),
        (lambda: Grid.parse("14.6, 0"), r"lie in \[0, 1\]"),
        (lambda: Grid((1.0, 0.0)).resampled(3), "one positive level"),
        (lambda: Grid((math.inf, 1.0, 0.0), "vp").resampled(3), r"resample grid.on\('flow'\)"),
        (lambda: Grid.karras(4).with_shift(2.0), r"only flow grids can be shifted, this is one of 'edm'"),
        (lambda: Grid.uniform(4).with_shift(), "either a shift or mu, got shift=None and mu=None"),
        (lambda: Grid.uniform(4).with_shift(2.0, mu=1.0), "either a shift or mu"),
        (lambda: Grid.uniform(4).with_shift(mu=1.0, kind="cubic"), "unknown kind of shift 'cubic'"),
        (lambda: Grid.uniform(4).with_shift(mu=-1.0, kind="linear"), "must be a positive number, got -1"),
        (lambda: Grid.uniform(4).with_shift(mu=1e9), "must be a positive number, got inf"),
        (lambda: Grid.uniform(4).with_shift(mu=math.nan), "must be a positive number, got nan"),
        (lambda: Grid.uniform(4).stretched(1.0), r"terminal must lie in \(0, 1\), got 1"),
        (lambda: Grid.uniform(1).stretched(0.1), "single positive level"),
        (lambda: Grid.uniform(4).on("vpp"), "unknown path 'vpp'"),
        (lambda: Grid.uniform(4).at_whole_times(VP), "belongs to 'flow', the path to 'vp'"),
        (lambda: Grid.karras(4).at_whole_times(paths.edm()), "has no whole times"),
        (
            lambda: named("karras", 60, VP, sigma_max=0.05).at_whole_times(VP),
            "two of 60 levels share a whole model time",
        ),
        (lambda: named("cubic", 4, VP), "unknown grid 'cubic'; choose one of uniform, trailing"),
        (lambda: named("uniform", 4, VP, sigma_min=0.1), "has no sigma_min and sigma_max, got 0.1 and None"),
        (lambda: named("uniform", 4, VP, shift=2.0), "only flow grids can be shifted"),
        (lambda: named("uniform", 4, paths.flow(), shift=2.0, mu=1.0), "either a shift or mu"),
        (lambda: named("ays-svd", 4, VP), "starts at 700, the model knows 14.61; name another grid"),
    ],
)
def test_bad_grids_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 0]", "{}", '{"format": "flowkit.grid/1"}', '{"format": "flowkit.grid/1", "path": "flow", "sigmas": ["a", 0]}',
     '{"format": "flowkit.grid/1", "path": "flow", "sigmas": [0, 1]}', "\x00\xff", "[" * 100_000,
     '{"format": "flowkit.grid/1", "path": "flow", "sigmas": [NaN, 0]}', '{"format": "flowkit.grid/1", "sigmas": [1, 0]}',
     '{"format": "flowkit.grid/1", "path": "flow", "sigmas": [true, false]}',
     '{"format": "flowkit.grid/1", "path": "flow", "sigmas": [[1], [0]]}',
     '{"format": "flowkit.grid/1", "path": "vp", "sigmas": [1' + "0" * 400 + ', 0]}',
     '{"format": "flowkit.grid/1", "path": "vp", "sigmas": [1' + "0" * 5000 + ', 0]}',
     '{"format": "flowkit.grid/1", "path": "' + "x" * 5000 + '", "sigmas": [1, 0]}',
     '{"format": "flowkit.grid/1", "path": "flow", "sigmas": [' + "1, " * 5000 + "0]}",
     " " * (1 << 25)],
)  # fmt: skip
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"bad\.json") as caught:
        Grid.load(file)
    assert len(str(caught.value)) < 600 + len(str(file))
    with pytest.raises(FileNotFoundError, match="no grid file"):
        Grid.load(tmp_path / "missing.json")


def test_a_grid_that_leaves_noise_is_said_to() -> None:
    scheduler = RectifiedFlowScheduler(solver="euler")
    with pytest.warns(
        UserWarning, match=r"the grid ends at sigma 0.1: samples keep noise; end it with 0 unless that is meant"
    ):
        scheduler.set_grid(Grid((1.0, 0.5, 0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_grid(Grid((1.0, 0.5, 0.0)))

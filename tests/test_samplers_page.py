"""docs/samplers.md and the class table of docs/schedulers.md: what they list is what the code and the benchmark say."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowkit import RectifiedFlowScheduler, paths, solvers, table
from flowkit.schedulers import stock

from .scripts import script_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
CLASSES = (ROOT / "docs" / "schedulers.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The module benchmarks/samplers.py, which finds its own neighbours as when it is run."""
    with script_module(ROOT / "benchmarks" / "samplers.py") as module:
        yield module
    sys.modules.pop("sampler_tables")


def test_the_page_shows_what_the_benchmark_prints(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["samplers.py", "--table"])
    benchmark.main()
    printed = capsys.readouterr().out
    shown = "\n".join(re.findall(r"<!-- printed by .*-->\n((?:.*\n)*?)<!-- end -->", PAGE))
    assert shown == printed


def test_the_picture_is_drawn_from_the_rows(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["samplers.py", "--plot", str(tmp_path / "samplers.png")])
    benchmark.main()
    assert (tmp_path / "samplers.png").read_bytes().startswith(b"\x89PNG")
    assert "![Error against network calls on the flow path](samplers.png)" in PAGE
    assert (ROOT / "docs" / "samplers.png").is_file()


@pytest.mark.parametrize("code", re.findall(r"```python\n((?:.*\n)*?)```", PAGE))
def test_examples_run(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_rows_are_those_of_the_solvers_and_settings_as_they_are(benchmark: Any) -> None:
    results = json.loads((ROOT / "benchmarks" / "samplers.json").read_text(encoding="utf-8"))
    settings = {**benchmark.FULL, "paths": benchmark.PATHS}
    assert results["settings"] == settings
    assert list(results["rows"]) == list(benchmark.jobs(settings))
    named = {*benchmark.ROWS, *(name for others in benchmark.SAME.values() for name in others)}
    assert set(solvers.SOLVERS) <= named


def test_rows_can_be_measured_again(benchmark: Any) -> None:
    """From two of the five seeds, so not to the digit."""
    rows = json.loads((ROOT / "benchmarks" / "samplers.json").read_text(encoding="utf-8"))["rows"]
    for name, kind, solver in (("smooth", "flow", "unipc"), ("smooth", "vp", "euler-maruyama")):
        kept = rows[f"{name}/{kind}/{solver}/8"]
        again = benchmark.mixture(name, kind, solver, 8, benchmark.FULL["samples"], 2)
        assert (again["steps"], again["calls"]) == (kept["steps"], kept["calls"])
        assert again.keys() == kept.keys()
        for figure in {"rmse", "w2"} & kept.keys():
            assert again[figure][0] == pytest.approx(kept[figure][0], rel=0.2)
    assert rows["smooth/flow/unipc/8"]["rmse"][0] < 0.1 * rows["smooth/flow/euler/8"]["rmse"][0]


def test_a_killed_run_goes_on_and_other_settings_are_refused(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "ROWS", {name: {"solver": name} for name in ("euler", "sde-dpm++2m")})
    settings = {**benchmark.FAST, "paths": benchmark.PATHS}
    monkeypatch.setattr(sys, "argv", ["samplers.py", "--fast", "--output", str(tmp_path / "whole.json")])
    benchmark.main()
    assert "| sde-dpm++2m | 4 |" in capsys.readouterr().out
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole["settings"] == settings
    assert "rmse" not in whole["rows"]["smooth/flow/sde-dpm++2m/4"]
    assert all("fd" in row for key, row in whole["rows"].items() if key.startswith(("digits", "shapes")))
    ran: list[str] = []

    def noting(job: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append("/".join(map(str, arguments[:3])))
            return job(*arguments)

        return run

    for name in ("mixture", "embedded"):
        monkeypatch.setattr(benchmark, name, noting(getattr(benchmark, name)))
    missing = ("clusters/edm/euler/4", "digits/euler/2")
    kept = {key: row for key, row in whole["rows"].items() if key not in missing}
    (tmp_path / "part.json").write_text(json.dumps({"settings": settings, "rows": kept}))
    again = benchmark.measure(tmp_path / "part.json", settings)
    assert (again["rows"], ran) == (whole["rows"], ["clusters/edm/euler", "digits/euler/2"])
    with pytest.raises(ValueError, match=r"holds rows of samples = 128, not of 64; name another file with --output"):
        benchmark.measure(tmp_path / "part.json", {**settings, "samples": 64})


def test_solvers_that_are_measured_once_are_the_same(benchmark: Any) -> None:
    for kind, options in benchmark.PATHS.items():
        path = RectifiedFlowScheduler(**options).path
        for name, others in benchmark.SAME.items():
            ends = []
            for solver in (name, *others):
                rows = RectifiedFlowScheduler(**options, solver=solver).plan(6, None, None, None).rows()
                start = 80.0 if path.name == "edm" else 1.0
                ends.append(benchmark.run("smooth", path, rows, start * benchmark.noise("smooth", 1, 8), 0))
            for end in ends[1:]:
                assert torch.allclose(end, ends[0], rtol=0, atol=1e-11), (kind, name)


def test_steps_are_those_nearest_to_the_calls(benchmark: Any) -> None:
    def made(solver: str, calls: int) -> tuple[int, int]:
        steps, _, rows = benchmark.steps_for(RectifiedFlowScheduler(solver=solver), calls)
        return steps, len(rows)

    assert [made("heun", n) for n in (4, 8, 16)] == [(2, 3), (4, 7), (8, 15)]
    assert [made("rk4", n) for n in (4, 8, 16)] == [(2, 5), (3, 9), (5, 17)]
    assert [made("unipc", n) for n in (4, 8)] == [(4, 4), (8, 8)]


@pytest.mark.parametrize("kind", ["flow", "vp", "edm"])
def test_the_reference_is_the_probability_flow_ode(benchmark: Any, kind: str) -> None:
    path, z = paths.named(kind), benchmark.noise("smooth", 1, 16)
    scale = 80.0 if kind == "edm" else 1.0
    first = paths.from_rho(80.0) if kind == "edm" else path.start
    prediction = {"flow": "flow_prediction", "edm": "edm"}.get(kind, "epsilon")
    levels = [first * (1 - i / 1000) for i in range(1001)]
    slow = benchmark.run("smooth", path, table.build(solvers.find("euler"), path, prediction, levels), scale * z, 0)
    assert (benchmark.fine("smooth", path, z) - slow).abs().max() < 0.02
    assert (benchmark.fine("smooth", path, z, 1) - slow).abs().max() > 0.1


def test_the_distance_tells_a_mixture_from_a_wider_one(benchmark: Any) -> None:
    exact = benchmark.exact("clusters", 1, 2000)
    assert benchmark.distance("clusters", exact) < 0.15
    assert benchmark.distance("clusters", 1.3 * exact) > 0.2


@pytest.mark.parametrize("name", stock.CLASSES)
def test_the_class_table_says_who_has_a_solver_of_its_own(name: str) -> None:
    rows = [line for line in CLASSES.splitlines() if re.match(rf"\|[^|]*\b{name}\b", line)]
    assert len(rows) == 1
    _, path, _, own = (cell.strip() for cell in rows[0].strip("|").split("|"))
    config = stock.translate({"_class_name": name, **({"stages": 1} if name == "HeliosScheduler" else {})})
    found = stock.own_solver(config)
    assert re.match(r"pass `solver=`|[\w+-]+", own)[0] == (found.name if found else "pass `solver=`")  # type: ignore[index]
    assert path.split(";")[0] == config["path"]


def test_every_class_is_in_the_table_or_refused() -> None:
    listed = set(re.findall(r"\b\w+Scheduler\b", CLASSES))
    assert {*stock.CLASSES, *stock.REFUSED} <= listed

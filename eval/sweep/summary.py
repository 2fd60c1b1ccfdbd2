"""What a sweep found: figures of its objectives, the Pareto front, and the ``results.json`` that its report is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowkit.eval.chart import dominates
from flowkit.eval.metrics import lower_is_better
from flowkit.eval.results import Result
from flowkit.eval.runs import write_json
from flowkit.eval.sweep.cells import shown
from flowkit.eval.sweep.config import SweepConfig
from flowkit.eval.sweep.study import Entry
from flowkit.eval.sweep.worker import CELLS, find_picture

RESULTS = "results.json"
_WITHOUT = ("lora", "guidance")  # a cell may do without them


def objectives(config: SweepConfig, result: Result | Mapping[str, Any]) -> dict[str, float]:
    """Returns the objectives of a cell by key: metrics, "evaluations" (network rows an image), "seconds" (of sampling, in all).

    Args:
        config: the sweep.
        result: the cell's, or its JSON.
    """
    return {
        key: _value(result if isinstance(result, Result) else Result.from_json(result), key)
        for key in config.objectives
    }


def _value(result: Result, key: str) -> float:
    if key == "evaluations":
        return float(result.spec["network_evaluations"] or math.nan)
    return float(result.spec["seconds"]["sampling"]) if key == "seconds" else result[key]


def front(config: SweepConfig, entries: Sequence[Entry]) -> list[Entry]:
    """Returns the Pareto front, by the last objective: done cells that no other is at least as good as in all objectives, and
    better in one."""
    signs = [1.0 if lower_is_better(key) else -1.0 for key in config.objectives]
    costs = {
        entry.slot: [sign * value for sign, value in zip(signs, objectives(config, entry.result).values(), strict=True)]
        for entry in entries
        if entry.result is not None
    }
    found = [e for e in entries if e.slot in costs and not any(dominates(o, costs[e.slot]) for o in costs.values())]
    return sorted(found, key=lambda entry: costs[entry.slot][::-1])


def line(config: SweepConfig, result: Result) -> str:
    """Returns a cell's figures in one line."""
    figures = [f"{key} {figure(value, result.se[key])}" for key, value in result.items()]
    evaluations = result.spec["network_evaluations"]
    cost = [f"{evaluations:g} evaluations"] if evaluations is not None else []
    return ", ".join([*figures, *cost, f"{result.spec['seconds']['sampling']:.1f} s"])


def figure(value: float, se: float) -> str:
    """Returns a figure with its standard error, where that is known."""
    return f"{value:.4g}" + (f" ± {se:.2g}" if math.isfinite(se) else "")


def write(config: SweepConfig, entries: Sequence[Entry], output: Path) -> None:
    """Writes ``results.json``, from which `flowkit.eval.write_report` makes the page."""
    write_json(output / RESULTS, results(config, entries, output))


def results(config: SweepConfig, entries: Sequence[Entry], output: Path) -> dict[str, Any]:
    """Returns the results so far in the schema of `flowkit.eval.write_report`.

    Args:
        config: the sweep.
        entries: its slots.
        output: its folder, where the pictures lie.
    """
    done = sum(entry.state == "done" for entry in entries)
    failed = sum(entry.state == "failed" for entry in entries)
    count = f"{done} of {len(entries)} cells" + (f", {failed} failed" if failed else "")
    names = list(dict.fromkeys(name for entry in entries if entry.cell is not None for name in entry.cell.settings))
    return {
        "title": str(config.name),
        "summary": (
            f"{count}; {config.images:,} images each, from the same seeds and inputs, measured alike. Standard errors are those of "
            f"drawing the samples."
        ),
        "objectives": [{"key": key, "direction": "lower" if lower_is_better(key) else "higher"} for key in config.objectives],
        "spec": {"sweep": config.describe(), **_shared(entries)},
        "rows": [_row(entry, names, output) for entry in entries if entry.state in ("done", "failed") and entry.cell is not None],
    }  # fmt: skip


def _shared(entries: Sequence[Entry]) -> dict[str, Any]:
    first = next((entry.result for entry in entries if entry.result is not None), None)
    return {} if first is None else {"versions": first["spec"]["versions"]}


def _row(entry: Entry, names: Sequence[str], output: Path) -> dict[str, Any]:
    """A cell as a row, with all settings that vary anywhere in the sweep."""
    cell = entry.cell
    assert cell is not None
    settings = {name: _plain(name, cell.get(name)) for name in names if cell.get(name) is not None or name in _WITHOUT}
    row: dict[str, Any] = {"name": cell.name, "settings": settings}
    if entry.result is None:
        return {**row, "error": entry.error}
    spec = entry.result["spec"]
    picture = find_picture(output / CELLS / cell.key)
    samples = spec["samples"]
    figures = entry.result["figures"].items()
    return {
        **row,
        "steps": spec["samples"]["call"].get("num_inference_steps"),
        "evaluations": spec["network_evaluations"],
        "seconds": spec["seconds"]["sampling"],
        "metrics": {key: {**figure, "left_out": spec["features"][key].get("left_out")} for key, figure in figures},
        "pairs": f"{samples['seed']} {samples['count']} {samples['inputs_sha256']}",
        "image": None if picture is None else str(picture.relative_to(output)),
        "spec": {"cell": cell.key, "worker": entry.worker, **spec},
    }


def _plain(name: str, value: Any) -> Any:  # noqa: ANN401
    """A value of an axis as a scalar."""
    if value is None:
        return "none"
    return shown(name, value) if isinstance(value, Mapping) else value

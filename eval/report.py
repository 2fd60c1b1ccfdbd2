"""One self-contained HTML page from the results of a job: what to use, table, plots, pictures, and how to repeat it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowkit.eval import chart, tables
from flowkit.eval import report_paired as paired
from flowkit.eval import report_table as table
from flowkit.eval.report_front import choices, front, plots
from flowkit.eval.report_rows import Results, read
from flowkit.eval.report_spec import outline, split
from flowkit.weights import write_bytes

EXPORTS = {"markdown": "md", "csv": "csv", "latex": "tex"}  # formats that the page offers, and the files' endings


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` beside the ``results.json`` of a job.

    The page holds its style, script and pictures: it makes no network request and can be sent as one file. The schema of
    ``results.json``; ``title``, ``rows`` and each row's ``name`` are required, anything else may be missing or null::

        {"title": str,
         "summary": str,
         "spec": {...},                                                 # whatever repeats the run, shown key by key
         "baseline": "a row's name",                                    # differences are to it; default: the best row
         "objectives": [{"key": "fid", "direction": "lower"},           # what the front is over: metrics, "evaluations",
                        {"key": "evaluations", "direction": "lower"}],  # "seconds"; default: first metric, evaluations
         "rows": [{"name": str, "note": str,
                   "settings": {"solver": str, "steps": int, ...},      # single values; columns and filters where they vary
                   "steps": int,                                        # the same as the setting of this name
                   "evaluations": int | float,                          # network evaluations for one image
                   "seconds": float,                                    # for all images of the row
                   "metrics": {"fid": {"value": float, "se": float,     # se: standard error
                                       "left_out": [float, ...]},       # jackknife: the value without each of K chunks
                               "fid/pixels": {...}},                    # the same metric in another space
                   "pairs": str,                                        # rows with equal ones have the same seeds and inputs
                   "spec": {...},                                       # whatever repeats this row
                   "error": str,                                        # why the row has no metrics
                   "image": "row.png"}],                                # PNG, JPEG or WebP, relative to the directory
         "pictures": [{"image": "compare.png", "caption": str}]}

    Args:
        directory: the job's output folder.

    Returns:
        The path of the page, which appears only when it is complete.

    Raises:
        FileNotFoundError: ``results.json`` or a picture is missing.
        ValueError: ``results.json`` is not JSON of this schema, or a picture is no PNG, JPEG or WebP file inside the directory.
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('a report needs jinja2: pip install "flowkit-diffusion[report]"') from error
    directory = Path(directory)
    page = _page(read(directory))
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.jinja").render(page)
    target = directory / "report.html"
    write_bytes(target, html.encode())
    return target


def _page(results: Results) -> dict[str, Any]:
    """Everything the template draws."""
    rows, columns = results.rows, table.columns(results)
    figures = {column.key: column for column in columns if column.kind == "metric"}
    shared, own = split([row.spec for row in rows if row.spec])
    with_spec = [number for number, row in enumerate(rows) if row.spec]
    style, script = ((Path(__file__).parent / f"report.{ending}").read_text("utf-8") for ending in ("css", "js"))
    return {
        "title": results.title,
        "summary": results.summary,
        "rows": rows,
        "columns": columns,
        "filters": [(i, c, _options(c)) for i, c in enumerate(columns, 1) if c.kind == "setting"],
        "constant": [(table.setting_label(key), text) for key, text in table.constant(rows).items()],
        "choices": choices(results),
        "wanted": next((figures[o.key] for o in results.objectives if o.key in figures), None),
        "front": set(front(rows, results.objectives)),
        "plots": [(plot, figures[plot.key]) for plot in plots(results)],
        "pictures": results.pictures,
        "baseline": results.baseline,
        "compared": paired.compared(results),
        "candidates": paired.candidates(results),
        "intervals": any(cell.interval for column in figures.values() for cell in column.cells),
        "failed": [number for number, row in enumerate(rows) if row.error],
        "least": max(230, *(min(64 * row.picture.width / row.picture.height, 600) for row in rows if row.picture), 0),
        "spec": outline(results.spec),
        "shared": outline(shared),
        "row_specs": [(number, outline(spec)) for number, spec in zip(with_spec, own, strict=True) if spec],
        "geometry": chart,
        "exports": EXPORTS,
        "data": _embedded(_data(results)),
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _options(column: table.Column) -> list[tuple[str, str]]:
    """The values of a setting as (sort key, text), in order; a missing one last."""
    found = {cell.text: cell.key for cell in column.cells}
    known = sorted((key, text) for text, key in found.items() if key is not None)
    return [(str(key), text) for key, text in known] + [("missing", t) for t, key in found.items() if key is None]


def _data(results: Results) -> dict[str, Any]:
    """What the script needs beyond the table: the parts of differences, and the lines of the exports."""
    figures: dict[str, Any] = {}
    for key in paired.compared(results):
        found = [row.measured(key) for row in results.rows]
        figures[key] = {
            "lower": results.metrics[key].lower,
            "rows": [[m.value, paired.places(m.se or 0.0), m.left_out] if m.left_out else None for m in found],
        }
    return {
        "baseline": results.baseline,
        "students": paired.students(results.rows),
        "pairs": [row.pairs for row in results.rows],
        "figures": figures,
        "exports": {name: asdict(tables.lines(results, name)) | {"file": end} for name, end in EXPORTS.items()},
    }


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

"""One self-contained HTML page from the results of a job: table, plots, pictures, and what is needed to repeat it."""

from __future__ import annotations

import base64
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowkit.eval import chart
from flowkit.weights import write_bytes

HIGHER_IS_BETTER = frozenset({"is", "clip", "precision", "recall", "density", "coverage", "accuracy"})
# "fid" is the Fréchet distance in whatever extractor was used, hence FD; a part after the slash names another space.
LABELS = {"fid": "FD", "kid": "KID", "cmmd": "CMMD", "is": "Inception score", "clip": "CLIP score"}
MISSING = "\N{EN DASH}"

_Object = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A PNG file as a data URI, with its size in pixels."""

    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Row:
    """One row of ``results.json``; None where a value is unknown. `metrics` holds (value, standard error)."""

    name: str
    note: str
    steps: float | None
    evaluations: float | None
    seconds: float | None
    metrics: Mapping[str, tuple[float | None, float | None]]
    picture: Picture | None


@dataclass(frozen=True)
class Cell:
    """A number of the table: as read, as sorted (None when missing), and whether it is the best of its column."""

    text: str
    key: float | None
    error: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A sortable column; `better` is "lower", "higher", or empty for what is no metric; `chart` only for metrics."""

    label: str
    cells: Sequence[Cell]
    better: str = ""
    chart: chart.Chart | None = None


@dataclass(frozen=True)
class Outline:
    """The specification as it is shown: (key, text) lines, and what is too long for that as groups to unfold."""

    lines: list[tuple[str, str]]
    groups: list[tuple[str, Outline]]


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` beside the ``results.json`` of a job.

    The page holds its style, script and pictures: it makes no network request and can be sent as one file. The schema of
    ``results.json``; ``title``, ``rows`` and each row's ``name`` are required, anything else may be missing or null::

        {"title": str,
         "summary": str,
         "spec": {...},                                                 # whatever repeats the run, shown key by key
         "rows": [{"name": str, "note": str,
                   "steps": int, "evaluations": int | float,            # network evaluations for one image
                   "seconds": float,                                    # for all images of the row
                   "metrics": {"fid": {"value": float, "se": float},    # se: standard error
                               "fid/pixels": {...}},                    # the same metric in another space
                   "image": "row.png"}],                                # PNG files, relative to the directory
         "pictures": [{"image": "compare.png", "caption": str}]}

    Args:
        directory: the job's output folder.

    Returns:
        The path of the page, which appears only when it is complete.

    Raises:
        FileNotFoundError: ``results.json`` or a picture is missing.
        ValueError: ``results.json`` is not JSON of this schema, or a picture is not a PNG file inside the directory.
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('a report needs jinja2: pip install "flowkit-diffusion[report]"') from error
    directory = Path(directory)
    page = _page(_read(directory / "results.json"), directory)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.jinja").render(page)
    target = directory / "report.html"
    write_bytes(target, html.encode())
    return target


def _page(results: _Object, directory: Path) -> dict[str, Any]:
    """Everything the template draws."""
    rows = [_row(entry, f"rows[{i}]", directory) for i, entry in enumerate(_objects(results, "rows", "the file"))]
    if not rows:
        raise ValueError(f"results.json in {directory} has no rows: finish the job first")
    columns = [
        Column("Steps", [_plain(row.steps) for row in rows]),
        Column("Evaluations", [_plain(row.evaluations) for row in rows]),
        *(_metric(key, rows) for key in dict.fromkeys(key for row in rows for key in row.metrics)),
        Column("Time", [_duration(row.seconds) for row in rows]),
    ]
    pictures = [
        (_picture(entry, f"pictures[{i}]", directory), _text(entry, "caption", f"pictures[{i}]"))
        for i, entry in enumerate(_objects(results, "pictures", "the file"))
    ]
    return {
        "title": _text(results, "title", "the file", required=True),
        "summary": _text(results, "summary", "the file"),
        "rows": rows,
        "columns": [column for column in columns if any(cell.key is not None for cell in column.cells)],
        "pictures": [(picture, caption) for picture, caption in pictures if picture],
        "spec": _outline(_object(results, "spec", "the file")),
        "plot": chart,
    }


def _row(entry: _Object, where: str, directory: Path) -> Row:
    metrics = _object(entry, "metrics", where)
    return Row(
        _text(entry, "name", where, required=True),
        _text(entry, "note", where),
        _number(entry, "steps", where),
        _number(entry, "evaluations", where),
        _number(entry, "seconds", where),
        {key: _measurement(_object(metrics, key, f"{where}.metrics"), f"{where}.metrics.{key}") for key in metrics},
        _picture(entry, where, directory),
    )


def _measurement(entry: _Object, where: str) -> tuple[float | None, float | None]:
    return _number(entry, "value", where), _number(entry, "se", where)


def _metric(key: str, rows: Sequence[Row]) -> Column:
    base, _, space = key.partition("/")
    lower = base not in HIGHER_IS_BETTER
    found = [row.metrics.get(key, (None, None)) for row in rows]
    values = [value for value, _ in found if value is not None]
    best = (min(values) if lower else max(values)) if len(values) > 1 else None
    points = [
        chart.Measured(number, row.name, row.evaluations, value, se)
        for number, (row, (value, se)) in enumerate(zip(rows, found, strict=True), 1)
        if row.evaluations and value is not None
    ]
    return Column(
        LABELS.get(base, base.capitalize()) + (f" ({space})" if space else ""),
        [Cell(*_shown(value, se), best=value is not None and value == best) for value, se in found],
        "lower" if lower else "higher",
        chart.chart(points, lower) if len(points) > 1 else None,
    )


def _shown(value: float | None, se: float | None) -> tuple[str, float | None, str]:
    """A value with the digits that its error supports: two of the error, or four of the value without one."""
    if value is None:
        return MISSING, None, ""
    scale, digits = (se, 2) if se else (abs(value), 4)
    if not scale or scale > 1e-4:
        places = max(0, digits - 1 - math.floor(math.log10(scale))) if scale else 0
        return f"{value:,.{places}f}", value, f"{se:.{places}f}" if se else ""
    return f"{value:.3g}", value, f"{se:.1e}" if se else ""


def _plain(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,g}", value)


def _duration(seconds: float | None) -> Cell:
    if seconds is None:
        return Cell(MISSING, None)
    if seconds < 100:
        return Cell(f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s", seconds)
    minutes, rest = divmod(round(seconds), 60)
    return Cell(f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s", seconds)


def _picture(entry: _Object, where: str, directory: Path) -> Picture | None:
    name = _text(entry, "image", where)
    if not name:
        return None
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise _wrong(name, "a file inside the job's folder", f"{where}.image")
    try:
        data = path.read_bytes()
    except OSError:
        raise FileNotFoundError(f"results.json: {where}.image {name!r} cannot be read: run the job again") from None
    # A PNG file starts with its signature and the IHDR chunk, which holds width and height (PNG specification, 11.2.2).
    header = data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24
    width, height = struct.unpack(">II", data[16:24]) if header else (0, 0)
    if not width or not height:
        raise _wrong(name, "a PNG picture", f"{where}.image")
    return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)


def _outline(entry: _Object) -> Outline:
    outline = Outline([], [])
    for key, value in entry.items():
        lines = list(_flatten(key, value))
        if isinstance(value, dict) and len(lines) > 12:
            outline.groups.append((key, _outline(value)))
        else:
            outline.lines.extend(lines)
    return outline


def _flatten(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Nested objects as (dotted key, text) pairs, in order."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(f"{key}.{name}", inner)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> _Object:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} in {path.parent}: give the output folder of a finished job") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not a JSON file ({error}): run the job again") from None
    if not isinstance(results, dict):
        raise _wrong(results, "an object", "the file")
    return results


def _text(entry: _Object, key: str, where: str, required: bool = False) -> str:
    value = entry.get(key)
    if not isinstance(value, str) and (required or value is not None):
        raise _wrong(value, "a string", f"{where}.{key}")
    return value or ""


def _number(entry: _Object, key: str, where: str) -> float | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise _wrong(value, "a number", f"{where}.{key}")
    return value if value is not None and abs(value) < 1e300 else None  # nan, inf and what no float holds are unknown


def _object(entry: _Object, key: str, where: str) -> _Object:
    value = entry.get(key)
    if value is not None and not isinstance(value, dict):
        raise _wrong(value, "an object", f"{where}.{key}")
    return value or {}


def _objects(entry: _Object, key: str, where: str) -> Sequence[_Object]:
    value = entry.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(inner, dict) for inner in value)):
        raise _wrong(value, "a list of objects", f"{where}.{key}")
    return value or []


def _wrong(value: object, expected: str, where: str) -> ValueError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
    return ValueError(f"results.json: {where} is {shown}, not {expected}: correct the file or run the job again")

"""What ``results.json`` says, read and checked: the rows of a report, its pictures and its objectives."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from flowkit.eval.intervals import jackknife_error
from flowkit.eval.metrics import lower_is_better

Object = Mapping[str, Any]
Scalar = str | int | float | bool | None
FORMATS = ("PNG", "JPEG", "WEBP")
MOST = 1e150


@dataclass(frozen=True)
class Picture:
    """A picture file as a data URI, with its size in pixels."""

    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Measurement:
    """A metric of a row: its value, standard error and delete-one values; None or empty where they are unknown."""

    value: float | None = None
    se: float | None = None
    left_out: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of ``results.json``; None where a value is unknown. The steps are among the settings."""

    name: str
    note: str
    evaluations: float | None
    seconds: float | None
    metrics: Mapping[str, Measurement]
    picture: Picture | None
    settings: Mapping[str, Scalar]
    pairs: str
    spec: Object
    error: str

    def value(self, key: str) -> float | None:
        """Returns what an objective's key stands for: "evaluations", "seconds" or a metric."""
        if key == "evaluations":
            return self.evaluations
        return self.seconds if key == "seconds" else self.measured(key).value

    def measured(self, key: str) -> Measurement:
        """Returns a metric, all unknown where the row does not have it."""
        return self.metrics.get(key, Measurement())


@dataclass(frozen=True)
class Objective:
    """What is wanted of a row: a key of `Row.value`, and whether lower is better."""

    key: str
    lower: bool

    @property
    def better(self) -> str:
        """The direction as a word."""
        return "lower" if self.lower else "higher"


@dataclass(frozen=True)
class Results:
    """A whole ``results.json``: the rows that have failed come last, and `baseline` is one of the others."""

    title: str
    summary: str
    spec: Object
    rows: Sequence[Row]
    pictures: Sequence[tuple[Picture, str]]
    metrics: Mapping[str, Objective]  # by key, in order of appearance
    objectives: Sequence[Objective]
    baseline: int | None


def read(directory: Path) -> Results:
    """Reads the ``results.json`` of a job; its schema is that of `flowkit.eval.report.write_report`.

    Args:
        directory: the job's output folder.

    Returns:
        What the file says, with its pictures.

    Raises:
        FileNotFoundError: ``results.json`` or a picture is missing.
        ValueError: ``results.json`` is not JSON of this schema, or a picture is no PNG, JPEG or WebP file inside the directory.
    """
    results = _load(directory / "results.json")
    rows = [_row(entry, f"rows[{i}]", directory) for i, entry in enumerate(_objects(results, "rows", "the file"))]
    if not rows:
        raise ValueError(f"results.json in {directory} has no rows: finish the job first")
    rows.sort(key=lambda row: bool(row.error))
    pictures = [
        (_picture(entry, f"pictures[{i}]", directory), _text(entry, "caption", f"pictures[{i}]"))
        for i, entry in enumerate(_objects(results, "pictures", "the file"))
    ]
    asked = _objectives(results, rows)
    keys = dict.fromkeys(key for row in rows for key in row.metrics)
    metrics = {key: Objective(key, lower_is_better(key)) for key in keys}
    metrics.update((objective.key, objective) for objective in asked if objective.key in metrics)
    first = next(iter(metrics.values()), None)
    objectives = asked or ([first, Objective("evaluations", True)] if first else [])
    return Results(
        _text(results, "title", "the file", required=True),
        _text(results, "summary", "the file"),
        _object(results, "spec", "the file"),
        rows,
        [(picture, caption) for picture, caption in pictures if picture],
        metrics,
        objectives,
        _baseline(_text(results, "baseline", "the file"), rows, first),
    )


def _row(entry: Object, where: str, directory: Path) -> Row:
    metrics, error = _object(entry, "metrics", where), _text(entry, "error", where)
    if error and metrics:
        raise _wrong(error, "null, although the row has metrics", f"{where}.error")
    settings = dict(_object(entry, "settings", where))
    for key, value in settings.items():
        if isinstance(value, dict | list):
            raise _wrong(value, "a string, a number, true, false or null", f"{where}.settings.{key}")
        if isinstance(value, int | float) and not abs(value) < MOST:
            settings[key] = str(value)
    steps = _number(entry, "steps", where)
    if steps is not None and settings.setdefault("steps", steps) not in (None, steps):
        raise _wrong(settings["steps"], f"the {steps:g} of {where}.steps", f"{where}.settings.steps")
    if steps is not None:
        settings["steps"] = steps
    return Row(
        _text(entry, "name", where, required=True),
        _text(entry, "note", where),
        _number(entry, "evaluations", where),
        _number(entry, "seconds", where),
        {key: _measurement(_object(metrics, key, f"{where}.metrics"), f"{where}.metrics.{key}") for key in metrics},
        _picture(entry, where, directory),
        settings,
        _text(entry, "pairs", where),
        _object(entry, "spec", where),
        error,
    )


def _measurement(entry: Object, where: str) -> Measurement:
    left_out = entry.get("left_out") or []
    if not isinstance(left_out, list) or len(left_out) == 1:
        raise _wrong(left_out, "a list of at least 2 numbers", f"{where}.left_out")
    values = [_number({"left_out": value}, "left_out", where) for value in left_out]
    known = tuple(value for value in values if value is not None)
    value, se = _number(entry, "value", where), _number(entry, "se", where)
    if value is None or len(known) < len(values):
        return Measurement(value, se)
    return Measurement(value, jackknife_error(known) if known and se is None else se, known)


def _objectives(results: Object, rows: Sequence[Row]) -> list[Objective]:
    objectives = []
    for i, entry in enumerate(_objects(results, "objectives", "the file")):
        where = f"objectives[{i}]"
        key, direction = (_text(entry, part, where, required=True) for part in ("key", "direction"))
        if direction not in ("lower", "higher"):
            raise _wrong(direction, '"lower" or "higher"', f"{where}.direction")
        known = {"evaluations", "seconds"} | {metric for row in rows for metric in row.metrics}
        if key not in known and not all(row.error for row in rows):
            raise _wrong(key, f"one of {', '.join(sorted(known))}", f"{where}.key")
        objectives.append(Objective(key, direction == "lower"))
    return objectives


def _baseline(name: str, rows: Sequence[Row], first: Objective | None) -> int | None:
    """The row of that name; the best of the first metric without a name, or when that row has failed."""
    if name:
        found = next((i for i, row in enumerate(rows) if row.name == name), None)
        if found is None:
            raise _wrong(name, "the name of a row", "baseline")
        if not rows[found].error:
            return found
    if first is None:
        return None
    values = [(value if first.lower else -value, i) for i, row in enumerate(rows)
              if (value := row.value(first.key)) is not None]  # fmt: skip
    return min(values)[1] if values else None


def _picture(entry: Object, where: str, directory: Path) -> Picture | None:
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # only the header is read
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                kind, (width, height) = str(image.format), image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _wrong(name, "a PNG, JPEG or WebP picture", f"{where}.image") from None
    return Picture(f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}", width, height)


def _load(path: Path) -> Object:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} in {path.parent}: give the output folder of a finished job") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not a JSON file ({error}): run the job again") from None
    if not isinstance(results, dict):
        raise _wrong(results, "an object", "the file")
    # JSON can spell halves of surrogate pairs, which no UTF-8 file can hold.
    whole: Object = json.loads(json.dumps(results, ensure_ascii=False).encode(errors="replace"))
    return whole


def _text(entry: Object, key: str, where: str, required: bool = False) -> str:
    value = entry.get(key)
    if not isinstance(value, str) and (required or value is not None):
        raise _wrong(value, "a string", f"{where}.{key}")
    return value or ""


def _number(entry: Object, key: str, where: str) -> float | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise _wrong(value, "a number", f"{where}.{key}")
    return value if value is not None and abs(value) < MOST else None  # nan, inf and what no square holds are unknown


def _object(entry: Object, key: str, where: str) -> Object:
    value = entry.get(key)
    if value is not None and not isinstance(value, dict):
        raise _wrong(value, "an object", f"{where}.{key}")
    return value or {}


def _objects(entry: Object, key: str, where: str) -> Sequence[Object]:
    value = entry.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(inner, dict) for inner in value)):
        raise _wrong(value, "a list of objects", f"{where}.{key}")
    return value or []


def _wrong(value: object, expected: str, where: str) -> ValueError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
    return ValueError(f"results.json: {where} is {shown}, not {expected}: correct the file or run the job again")

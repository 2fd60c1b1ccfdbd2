"""The table of a report as text: Markdown, CSV, LaTeX with booktabs, JSON.

Every line is rendered here once. The page holds the same lines and joins those of the rows that it shows; the differences, which
depend on the row that its reader compares with, come last in a line and consist of characters that are escaped one by one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowkit.eval import report_table as table
from flowkit.eval.report_paired import MINUS, Difference, bounds, compared, difference
from flowkit.eval.report_rows import Results, Row, read

FORMATS = ("markdown", "csv", "latex", "json")
STAR = "*"  # of a difference whose interval excludes 0
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # at the beginning of a line it would be an argument of the line before, and so would a star
    STAR: "{*}",
    MINUS: "$-$",
    table.MISSING: "--",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    **{c: f"\\{c}" for c in "{}$&#_%"},
}


@dataclass(frozen=True)
class Lines:
    """A table in one format, in parts that are joined to lines.

    Attributes:
        start: what comes before the head.
        head: the heads of all columns but the differences.
        rule: what comes between the head and the rows.
        rows: the same of each row.
        keys: the metrics whose differences follow in every line.
        against: the heads of the differences, to be followed by the name of the baseline.
        names: the names of the rows.
        separator: stands between cells.
        end: of a line.
        close: what comes after the rows.
        marks: characters of a difference that are written otherwise.
        raw: a difference is three numbers instead of one text; their heads are in `head`, and the name of the baseline ends a line.
    """

    start: str
    head: str
    rule: str
    rows: Sequence[str]
    keys: Sequence[str]
    against: Sequence[str]
    names: Sequence[str]
    separator: str
    end: str
    close: str
    marks: dict[str, str]
    raw: bool


def export(directory: str | os.PathLike[str], format: str) -> str:  # noqa: A002
    """Returns the whole table of a job as text.

    Args:
        directory: the job's output folder, which holds ``results.json``.
        format: "markdown", "csv", "latex" (for the package booktabs) or "json".

    Raises:
        FileNotFoundError: ``results.json`` or a picture is missing.
        ValueError: for another format, and for ``results.json`` that is not as `flowkit.eval.report.write_report` needs it.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    results = read(Path(directory))
    if format == "json":
        found = [_record(results, i) | _raw_differences(results, i) for i in range(len(results.rows))]
        return json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    parts = lines(results, format)
    name = parts.names[results.baseline or 0]
    head = parts.separator.join([parts.head, *(text + name for text in parts.against)])
    body = [parts.separator.join([line, *_tail(results, i, parts, name)]) for i, line in enumerate(parts.rows)]
    return parts.start + head + parts.end + parts.rule + "".join(line + parts.end for line in body) + parts.close


def lines(results: Results, format: str) -> Lines:  # noqa: A002
    """Returns the parts of the table in "markdown", "csv" or "latex"."""
    columns = [column for column in table.columns(results) if column.kind != "difference"]
    keys = compared(results)
    if format == "csv":
        records = [_record(results, i) for i in range(len(results.rows))]
        heads = [key for key in records[0] if any(record[key] is not None for record in records)]
        differences = [f"{key}_{part}" for key in keys for part in _PARTS] + ["baseline"] * bool(keys)
        body = [_csv_line(record[key] for key in heads) for record in records]
        names = [_csv_line([row.name]) for row in results.rows]
        return Lines("", _csv_line(heads + differences), "", body, keys, [], names, ",", "\n", "", {}, raw=True)
    escape, left, separator, end = _TEXT[format]
    sides = ["r" if column.numbers else "l" for column in columns] + ["r"] * len(keys)
    if format == "latex":
        start, rule = f"\\begin{{tabular}}{{l{''.join(sides)}}}\n\\toprule\n", "\\midrule\n"
        close = "\\bottomrule\n\\end{tabular}\n"
    else:
        start, close = "", ""
        rule = f"| --- | {' | '.join('---' if side == 'l' else '---:' for side in sides)} |\n"
    cells = [[_called(row), *(_read_cell(column.cells[i]) for column in columns)] for i, row in enumerate(results.rows)]
    return Lines(
        start,
        left + separator.join(map(escape, ["Method", *(column.label for column in columns)])),
        rule,
        [left + separator.join(map(escape, line)) for line in cells],
        keys,
        [escape(f"{table.label(key)} difference to") + " " for key in keys],
        [escape(row.name) for row in results.rows],
        separator,
        end,
        close,
        {c: escape(c) for c in (MINUS, table.MISSING, STAR) if escape(c) != c},
        raw=False,
    )


def _tail(results: Results, number: int, parts: Lines, baseline: str) -> list[str]:
    """The differences of a row, as the script of the page writes them too."""
    if parts.raw:
        numbers = list(_raw_differences(results, number).values())[:-1]
        return [_csv_line(numbers), baseline] if numbers else []
    cells = []
    for key in parts.keys:
        found = _difference(results, number, key)
        text = f"{found.text}{STAR * bool(found.mark)} {found.interval}" if found else table.MISSING
        cells.append("baseline" if number == results.baseline else "".join(parts.marks.get(c, c) for c in text))
    return cells


_PARTS = ("difference", "difference_low", "difference_high")


def _record(results: Results, number: int) -> dict[str, Any]:
    """A row's facts as plain values."""
    row = results.rows[number]
    record: dict[str, Any] = {"name": row.name, "note": row.note or None}
    taken = {"name", "note", "evaluations", "seconds", "error", "baseline", *results.metrics}
    for key in dict.fromkeys(key for other in results.rows for key in other.settings):
        record[f"setting_{key}" if key in taken else key] = row.settings.get(key)
    record["evaluations"] = row.evaluations
    for key in results.metrics:
        figure, ends = row.measured(key), bounds(row, key) or (None, None)
        record |= {key: figure.value, f"{key}_se": figure.se, f"{key}_low": ends[0], f"{key}_high": ends[1]}
    return record | {"seconds": row.seconds, "error": row.error or None}


def _raw_differences(results: Results, number: int) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key in compared(results):
        found = _difference(results, number, key)
        values = (found.value, found.low, found.high) if found else (None, None, None)
        record |= {f"{key}_{part}": value for part, value in zip(_PARTS, values, strict=True)}
    return record | ({"baseline": results.rows[results.baseline or 0].name} if record else {})


def _difference(results: Results, number: int, key: str) -> Difference | None:
    return difference(results.rows, number, results.baseline or 0, key, results.metrics[key].lower)


def _called(row: Row) -> str:
    return f"{row.name} (failed: {row.error.strip().splitlines()[-1][:160]})" if row.error.strip() else row.name


def _read_cell(cell: table.Cell) -> str:
    return " ".join(filter(None, (cell.text, cell.error and f"\N{PLUS-MINUS SIGN} {cell.error}", cell.interval)))


def _line_of_text(text: str) -> str:
    """Without line ends, control characters, and those that turn the direction of what follows."""
    kept = (c for c in " ".join(text.split()) if c.isprintable() or c in "\u200c\u200d")
    return "".join(kept)


def _markdown(text: str) -> str:
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", _line_of_text(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in _line_of_text(text))


# How a cell is escaped, the beginning of a line, what stands between cells, the end of a line.
_TEXT: dict[str, tuple[Callable[[str], str], str, str, str]] = {
    "markdown": (_markdown, "| ", " | ", " |\n"),
    "latex": (_latex, "", " & ", r" \\" + "\n"),
}


def _csv_line(values: Iterable[Any]) -> str:
    """Values with commas between them; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(
        f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@") else value
        for value in values
    )
    return buffer.getvalue().removesuffix("\r\n")

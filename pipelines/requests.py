"""What samples are asked for, read from text and files: class labels, prompts, grids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowkit.grids import Grid

# Pipeline arguments that hold one value for each sample; in a JSON line or among shared ones any other holds for a whole call.
EACH = re.compile(r"(negative_)?prompt(_\d)?|class_labels|((mask|control)_)?image")
IMAGE = re.compile(r"((mask|control)_)?image")
_LABELS = 1_000_000


def read_labels(text: str) -> list[int]:
    """Reads class labels: numbers and ranges with both ends, "0,3,7" or "0-9".

    Raises:
        ValueError: for anything else.
    """
    labels: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f"labels {text!r} are no list of class labels; write them like 0,3,7 or 0-9")
        if len(labels) + last - first >= _LABELS:
            raise ValueError(
                f"labels {text!r:.60} are more than {_LABELS:,}; give each class once, they are drawn in turn"
            )
        labels += range(first, last + 1)
    return labels


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Reads a file of inputs: one prompt a line, or in a .jsonl one dict of pipeline arguments a line; empty lines do not count.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for an empty file, one that is not UTF-8, or a line that is no dict; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}; check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            rows.append({"prompt": line.strip()})
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}); write one dict a line") from error
        if not isinstance(row, dict) or not row:
            raise ValueError(f'line {number} of {path} is no dict of pipeline arguments; write {{"prompt": "..."}}')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return rows


def spread(rows: list[dict[str, Any]], call: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Moves shared arguments that hold one value for each sample, or that some samples have of their own, to the samples.

    Args:
        rows: arguments of each sample, which win.
        call: arguments of all samples.

    Returns:
        The arguments of each sample and those left for all.
    """
    own = {name for row in rows for name in row}
    moved = {name: value for name, value in call.items() if name in own or EACH.fullmatch(name)}
    return [moved | row for row in rows], {name: value for name, value in call.items() if name not in moved}


def read_grid(text: str) -> str | Grid:
    """Returns the grid of a file, or the name of one as it is."""
    if Path(text).is_file() or Path(text).suffix == ".json" or len(Path(text).parts) > 1:
        return Grid.load(text)
    return text

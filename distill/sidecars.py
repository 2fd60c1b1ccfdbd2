"""Labels and captions of image files, from what lies beside them in the folder or archive.

metadata.jsonl        a line {"file_name": ..., "text" or "label": ...} for each image, relative to the file: as `datasets` has it
NAME.txt, NAME.json   caption of the image NAME.png, or {"text" or "label": ...}: as webdataset has it
NAME.cls              its label, a number or a name
CLASS/...             its label, by the folder at the top
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from flowkit.eval.archives import Files

METADATA = "metadata.jsonl"
BESIDE = (".txt", ".json", ".cls", METADATA)
KEYS = {"label": ("label", "cls", "class"), "caption": ("text", "caption", "prompt")}
_CURE = {
    "label": "put each class into a folder of its own, or the label into NAME.cls, NAME.json or metadata.jsonl",
    "caption": "put it into NAME.txt, NAME.json or metadata.jsonl",
}
Value = int | str


def read(files: Files, images: Sequence[int], wanted: str) -> list[Value]:
    """Returns the label or caption of each image.

    Args:
        files: images and what is beside them, see `BESIDE`.
        images: numbers of the images among the files.
        wanted: "label" or "caption".

    Raises:
        ValueError: for an image without one, or a file that cannot be read.
    """
    places = {name: index for index, name in enumerate(files.names)}
    finder = _from_metadata(files, wanted) or _from_sidecars(files, places, images[0], wanted)
    if finder is None and wanted == "label" and all("/" in files.names[i] for i in images):
        return [files.names[i].partition("/")[0] for i in images]
    values = [None if finder is None else finder(files.names[i]) for i in images]
    if None in values:
        raise ValueError(f"{files.describe(images[values.index(None)])} has no {wanted}; {_CURE[wanted]}")
    return [value for value in values if value is not None]


def numbered(values: Sequence[Value]) -> tuple[list[int], list[str] | None]:
    """Returns labels as numbers, and the names of the classes in order where they had names.

    Raises:
        ValueError: for a mixture of names and numbers, or a negative number.
    """
    names = sorted({value for value in values if isinstance(value, str)})
    if not names:
        labels = [int(value) for value in values]
        if min(labels, default=0) < 0:
            raise ValueError(f"the label {min(labels)} is negative; number the classes from 0")
        return labels, None
    if not all(isinstance(value, str) for value in values):
        number = next(value for value in values if not isinstance(value, str))
        raise ValueError(f"labels are names ({names[0]!r}) and numbers ({number}); keep to one of the two")
    places = {name: number for number, name in enumerate(names)}
    return [places[str(value)] for value in values], names


def pick(row: Any, wanted: str) -> Value | None:  # noqa: ANN401
    """Returns the label or caption in a dict; None where there is none."""
    found = next((row[key] for key in KEYS[wanted] if key in row), None) if isinstance(row, Mapping) else None
    fitting = isinstance(found, str) or (wanted == "label" and isinstance(found, int) and not isinstance(found, bool))
    return found if fitting else None


def _from_metadata(files: Files, wanted: str) -> Callable[[str], Value | None] | None:
    table: dict[str, Value | None] = {}
    found = [i for i, name in enumerate(files.names) if PurePosixPath(name).name == METADATA]
    for i in found:
        folder = PurePosixPath(files.names[i]).parent
        for number, line in enumerate(_text(files, i).splitlines(), 1):
            if line.strip():
                row = _json(line, f"line {number} of {files.describe(i)}")
                if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
                    raise ValueError(f'line {number} of {files.describe(i)} has no "file_name"; write one dict a line')
                table[str(folder / row["file_name"])] = pick(row, wanted)
    return table.get if found else None


def _from_sidecars(
    files: Files, places: Mapping[str, int], first: int, wanted: str
) -> Callable[[str], Value | None] | None:
    ends = (".cls", ".json") if wanted == "label" else (".txt", ".json")

    def beside(name: str) -> tuple[str, int] | None:
        path = PurePosixPath(name)
        # The key of a sample ends at the first dot in webdataset, elsewhere at the last.
        stems = (path.stem, path.name.partition(".")[0])
        named = ((end, places.get(str(path.with_name(stem + end)))) for end in ends for stem in stems)
        return next(((end, place) for end, place in named if place is not None), None)

    def find(name: str) -> Value | None:
        found = beside(name)
        if found is None:
            return None
        end, place = found
        text = _text(files, place).strip()
        if end == ".json":
            return pick(_json(text, files.describe(place)), wanted)
        return int(text) if end == ".cls" and text.isdecimal() else text

    return find if beside(files.names[first]) else None


def _text(files: Files, index: int) -> str:
    try:
        return files.read(index).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{files.describe(index)} is not UTF-8 text ({error}); save it as UTF-8") from error


def _json(text: str, name: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); correct it") from error

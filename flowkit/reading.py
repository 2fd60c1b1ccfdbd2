"""YAML in which every value knows its line, so that a message can name it.

What differs from PyYAML's safe loader: a key that stands twice is refused, ``1e-3`` and ``-.5`` are numbers, and what YAML 1.1
alone takes for one (``010``, ``1:30``) or for a date stays text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]  # keys and indices from the top to a value
Fault = tuple[Place, str]  # what is wrong, as it follows the name of the place: "is 0, not a number above 0"

_CORE = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_WORDS = dict.fromkeys(("yes", "true", "on"), True) | dict.fromkeys(("no", "false", "off"), False)
_BYTES, _DEPTH = 1_000_000, 32
_VALUES = 500_000  # a file of so many bytes holds no more, unless aliases multiply them
_SHOWN = 10


@dataclass(frozen=True)
class Places:
    """Where values stand.

    Attributes:
        file: name of the file; None for a mapping of Python.
        root: its nodes.
        what: the file as a whole holds, such as "sweep".
    """

    file: str | None = None
    root: yaml.Node | None = None
    what: str = "sweep"
    _keys: dict[int, dict[Any, tuple[yaml.Node, yaml.Node]]] = field(default_factory=dict)

    def line(self, place: Place) -> int | None:
        """Returns the line of a value, counted from 1: that of its key in a mapping; None where there is no file.

        A place that is not there has the line of what would hold it.
        """
        return None if self.root is None else [mark.start_mark.line + 1 for mark, _ in self._way(place)][-1]

    def word(self, place: Place) -> str | None:
        """Returns the word that stands for a truth value, such as "on"; None for anything else."""
        if self.root is None:
            return None
        way = list(self._way(place))
        node = way[-1][1] if len(way) > len(place) else None
        return str(node.value) if node is not None and node.tag == f"{_CORE}bool" else None

    def error(self, faults: Iterable[Fault]) -> ValueError:
        """Returns the error that tells the first faults in the order of their lines."""
        ordered = sorted(faults, key=lambda fault: self.line(fault[0]) or 0)
        told = []
        for place, text in ordered[:_SHOWN]:
            line = self.line(place)
            told.append(f"{'' if line is None else f'line {line}: '}{named(place) or f'the {self.what}'} {text}")
        if len(ordered) > _SHOWN:
            told.append(f"and {len(ordered) - _SHOWN} more")
        return ValueError(("" if self.file is None else f"{self.file}, ") + "\n".join(told))

    def _way(self, place: Place) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """What names each value on the way to a place, and its node, as far as there are any; the top first."""
        node = self.root
        if node is None:
            return
        yield node, node
        for part in place:
            if isinstance(node, yaml.MappingNode):
                if id(node) not in self._keys:
                    self._keys[id(node)] = {
                        key.value: (key, value) for key, value in reversed(node.value) if _is_name(key)
                    }
                pair = self._keys[id(node)].get(part)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                pair = node.value[part], node.value[part]
            else:
                pair = None
            if pair is None:
                return
            node = pair[1]
            yield pair


def named(place: Place) -> str:
    """Returns a place as people write it: ``axes.steps[2]``; nothing for the top."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: Any) -> str:  # noqa: ANN401
    """Returns a value as it may stand in a file, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(path: str | PathLike[str], what: str = "sweep") -> tuple[dict[str, Any], Places]:
    """Reads one mapping.

    Args:
        path: of the file.
        what: it holds, for messages.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for what is not one mapping in UTF-8 of at most a megabyte, with each key once and no tags.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} file at {path}; check the path")
    if (size := path.stat().st_size) > _BYTES:
        raise ValueError(
            f"{path.name} has {size:,} bytes, far more than a {what}; keep long lists in files of their own"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deep; a {what} has a few levels") from error
    except yaml.YAMLError as error:
        raise _reworded(error, text, path.name, what) from error
    places = Places(path.name, root, what)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path.name} holds no settings; write `name: value`, one a line")
    faults: list[Fault] = []
    values = _Values(faults).of(root, ())
    if faults:
        raise places.error(faults)
    return values, places


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping of Python as `read_yaml` would: dicts, lists, text, numbers, truth values and None.

    Raises:
        ValueError: for anything else in it; names the field.
    """
    faults: list[Fault] = []

    def copied(value: Any, place: Place) -> Any:  # noqa: ANN401
        if len(place) > _DEPTH:
            raise Places().error([(place[:2], "is nested too deep, or within itself; a sweep has a few levels")])
        if isinstance(value, Mapping):
            faults.extend(
                (place, f"has the key {key!r:.60}, which is not text") for key in value if not isinstance(key, str)
            )
            return {key: copied(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(item, (*place, number)) for number, item in enumerate(value)]
        if value is None or isinstance(value, (str, bool)):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value)
        if isinstance(value, PathLike):
            return str(value)
        faults.append((place, f"is {value!r:.60}; give text, a number, a list or a mapping"))
        return None

    result: dict[str, Any] = copied(values, ())
    if faults:
        raise Places().error(faults)
    return result


class _Values:
    """Makes values of nodes, and notes what is refused."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults, self._open = faults, set[int]()
        self._count = 0.0

    def of(self, node: yaml.Node, place: Place) -> Any:  # noqa: ANN401
        self._count += 1
        if self._count > _VALUES or id(node) in self._open or len(place) > _DEPTH:
            if self._count != math.inf:  # told once; nothing more is read
                self.faults.append(
                    (place[:1], "is nested too deep, or repeats itself through aliases; write the values out")
                )
            self._count = math.inf
            return None
        tag = node.tag.removeprefix(_CORE)
        if tag not in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map"):
            self.faults.append((place, f"has the tag {node.tag!r:.60}, and tags are not read; leave it out"))
            return None
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        self._open.add(id(node))
        value = self._list(node, place) if isinstance(node, yaml.SequenceNode) else self._dict(node, place)
        self._open.discard(id(node))
        return value

    def _list(self, node: yaml.SequenceNode, place: Place) -> list[Any]:
        return [self.of(item, (*place, number)) for number, item in enumerate(node.value)]

    def _dict(self, node: yaml.Node, place: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = _scalar(key_node), key_node.start_mark.line + 1
            if not _is_name(key_node):
                why = "merges are not read; write the fields out" if key == "<<" else "names are text; put it in quotes"
                self.faults.append((place, f"has the key {shown(key)} in line {line}, and {why}"))
            elif key in lines:
                self.faults.append(((*place, key), f"stands in line {lines[key]} and in line {line}; keep one"))
            else:
                lines[key] = line
                values[key] = self.of(value_node, (*place, key))
        return values


def _is_name(node: yaml.Node) -> bool:
    return isinstance(_scalar(node), str) and node.tag != f"{_CORE}merge"


def _scalar(node: yaml.Node) -> Any:  # noqa: ANN401
    """The value of a scalar; what is none is told by its kind."""
    if not isinstance(node, yaml.ScalarNode):
        return [] if isinstance(node, yaml.SequenceNode) else {}
    text, tag = str(node.value), node.tag.removeprefix(_CORE)
    if tag == "null":
        return None
    if tag == "bool" and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    digits = text.replace("_", "")
    if tag == "int" and _WHOLE.fullmatch(text) and len(digits) < 100:
        return int(digits)
    if tag == "float" and text.lower().endswith((".inf", ".nan")):
        return float(text.replace(".", ""))
    if (tag == "float" and ":" not in text) or (tag == "str" and node.style is None and _NUMBER.fullmatch(text)):
        try:
            return float(digits)
        except ValueError:
            return text
    return text


def _reworded(error: yaml.YAMLError, text: str, file: str, what: str) -> ValueError:
    """PyYAML's error in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return ValueError(
            f"{file}, line {line}: the character {chr(error.character)!r} is not allowed in YAML; remove it"
        )
    line = mark.line + 1 if mark is not None else 1
    context = getattr(error, "context", None) or ""
    if "single document" in context:
        return ValueError(f"{file}, line {line}: a second document begins here; keep one {what} a file")
    if "\\t" in str(problem):
        return ValueError(f"{file}, line {line}: there is a tab; indent with spaces")
    return ValueError(f"{file}, line {line}: no YAML, {problem}{f' {context}' if context else ''}; correct the line")

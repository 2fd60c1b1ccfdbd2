"""Provenances as a report shows them: key by key, what is long unfolding, what all rows share said once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_LINES = 12  # more unfold


@dataclass(frozen=True)
class Outline:
    """A specification as it is shown: (key, text) lines, and what is too long for that as groups to unfold."""

    lines: list[tuple[str, str]]
    groups: list[tuple[str, Outline]]


def outline(entry: Mapping[str, Any]) -> Outline:
    """Returns a provenance as lines and groups."""
    shown = Outline([], [])
    for key, value in entry.items():
        lines = list(_flatten(key, value))
        if isinstance(value, dict) and len(lines) > MOST_LINES:
            shown.groups.append((key, outline(value)))
        else:
            shown.lines.extend(lines)
    return shown


def split(specs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Splits provenances into what is the same in all of two or more, and what is each one's own."""
    shared: dict[str, Any] = {}
    rest: list[dict[str, Any]] = [{} for _ in specs]
    for key in dict.fromkeys(key for spec in specs for key in spec):
        values: list[Any] = [spec.get(key) for spec in specs]
        if len(specs) > 1 and all(key in spec and spec[key] == values[0] for spec in specs):
            shared[key] = values[0]
        elif all(isinstance(value, dict) for value in values):
            inner, values = split(values)
            shared |= {key: inner} if inner else {}
            for own, value in zip(rest, values, strict=True):
                own |= {key: value} if value else {}
        else:
            for own, spec in zip(rest, specs, strict=True):
                own |= {key: spec[key]} if key in spec else {}
    return shared, rest


def _flatten(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Nested objects as (dotted key, text) pairs, in order."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(f"{key}.{name}", inner)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

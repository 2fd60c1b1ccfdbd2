"""Faults of settings in our words: what pydantic found, each once, with its place and a cure."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from flowkit.reading import Fault, Place, Places, shown

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
Text = Annotated[str, Field(min_length=1)]
_LARGE = 2**64


def unreadable(data: Any, place: Place = ()) -> Iterator[Fault]:  # noqa: ANN401
    """Yields numbers out of any range, and text that no file can hold."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from unreadable(value, (*place, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from unreadable(value, (*place, number))
    elif isinstance(data, float) and not math.isfinite(data):
        yield place, f"is {data}; give a finite number"
    elif isinstance(data, int) and abs(data) >= _LARGE:
        yield (
            place,
            f"is a number of {len(str(data)) if abs(data) < 10**4000 else 'over 4000'} digits; give a smaller one",
        )
    elif isinstance(data, str) and re.search("[\0\ud800-\udfff]", data):
        yield place, f"is {data!r:.60}, which holds no proper character; correct it"


def told(error: ValidationError, data: Any, places: Places, model: type[BaseModel]) -> Iterator[Fault]:  # noqa: ANN401
    """Yields the faults that pydantic found.

    Args:
        error: what it raised.
        data: what it was given.
        places: of the data.
        model: what the data was to be; the description of each field says what its value has to be.
    """
    seen = set[Place]()
    for one in error.errors():
        place, value = _reached(one["loc"], data)
        if one["type"] == "missing":
            place = one["loc"]
        if (
            place in seen or one["type"] == "default_factory_not_called"
        ):  # the fault is in what the default is made from
            continue
        seen.add(place)
        name, fields = _field(place, model)
        match one["type"]:
            case "missing":
                yield place, f"is missing; give {fields[name].description}"
            case "extra_forbidden":
                yield place, f"is no field; {_meant(name, fields)}"
            case "value_error":
                yield place, str(one["ctx"]["error"])
            case "sweep":
                yield place, one["msg"]
            case _:
                yield place, f"is {shown(value)}{_word(value, places.word(place))}, not {fields[name].description}"


def near(name: str, known: Iterable[str]) -> str:
    """Returns a cure: the name that was meant, or all."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {found[0]}?" if found else f"choose {', '.join(known)}"


def _field(place: Place, model: type[BaseModel]) -> tuple[str, dict[str, FieldInfo]]:
    """The name of the field at a place, and those beside it."""
    name, fields = str(place[0]), model.model_fields
    if len(place) > 1 and name in fields:
        kinds = (fields[name].annotation, *get_args(fields[name].annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                return str(place[1]), kind.model_fields
    return name, fields


def _word(value: Any, written: str | None) -> str:  # noqa: ANN401
    """Says how a word became a truth value."""
    if isinstance(value, bool) and written not in (None, "true", "false"):
        return f" (YAML takes the word {written} for a truth value; put it in quotes)"
    return ""


def _reached(loc: Place, data: Any) -> tuple[Place, Any]:  # noqa: ANN401
    """How far a place of pydantic's, which also names kinds of values, leads into the data, and what is there."""
    place: Place = ()
    for part in loc:
        inside = isinstance(data, dict) and part in data
        if not inside and not (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            break
        place, data = (*place, part), data[part]
    return place, data


def _meant(name: str, fields: Mapping[str, FieldInfo]) -> str:
    """A cure for an unknown name."""
    group, _, own = name.partition(".")
    return f"write {group}: {{{own}: VALUE}}" if own and group in fields else near(name, fields)

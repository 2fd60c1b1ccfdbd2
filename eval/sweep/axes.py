"""The axes of a sweep: what each setting may be, lists of values, and ranges for a search."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from flowkit.reading import Fault, Place, shown
from flowkit.validation import STRICT, Text

SETTINGS = ("model", "lora", "scheduler", "solver", "grid", "steps", "guidance_scale", "guidance")
GROUPS = ("knobs", "call")  # their settings are written knobs.NAME and call.NAME
# What each setting has to be, for messages.
WANTED = {
    "model": "digits, shapes, a folder, or owner/name of the hub",
    "lora": "a file, a folder, owner/name of the hub, or none",
    "scheduler": "flowkit, keep, or a class of diffusers",
    "solver": "the name of a solver",
    "grid": "the name of a grid, a file, or none",
    "steps": "a whole number of at least 1",
    "guidance_scale": "a number",
    "guidance": "none, or a method with its arguments such as {method: AdaptiveGuidance, threshold: 0.991}",
}
_RANGES = ("steps", "guidance_scale")  # settings that a search may draw from a range, beside knobs and arguments


def _method(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("method"), str):
        raise ValueError("names no method; write {method: AdaptiveGuidance, threshold: 0.991}")
    return value


Steps = Annotated[int, Field(ge=1)]
_Without = BeforeValidator(lambda value: None if value == "none" else value)
# None: without a LoRA, on the solver's own grid, with the pipeline's own guidance.
OptionalText = Annotated[Text | None, _Without]
Guidance = Annotated[Annotated[dict[str, Any], AfterValidator(_method)] | None, _Without]


class Range(BaseModel):
    """Numbers that a search may choose: low, low + step, ... up to high; any between where there is no step."""

    model_config = STRICT

    low: int | float = Field(description="a number")
    high: int | float = Field(description="a number")
    step: int | float | None = Field(default=None, description="a number above 0")
    log: bool = Field(default=False, description="true or false")

    @property
    def whole(self) -> bool:
        """Whether it is one of whole numbers, as it is where all that is given is whole."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    def ends(self) -> list[int | float]:
        """Returns the lowest and the highest number."""
        return [self.low, self.high]

    def number(self, value: float) -> int | float:
        """Returns a number as the range has them, whole or not."""
        return int(value) if self.whole else float(value)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high


class _RefusedError(Exception):
    """Holds what is wrong with one axis."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults


def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


_TYPES = {
    **{name: _adapter(Text) for name in ("model", "scheduler", "solver")},
    **{name: _adapter(OptionalText) for name in ("lora", "grid")},
    "steps": _adapter(Steps),
    "guidance_scale": _adapter(float),
    "guidance": _adapter(Guidance),
}


def normalised(value: Any) -> list[Any]:  # noqa: ANN401
    """Returns axes as a list of mappings from settings to lists or ranges.

    Raises:
        ValidationError: with every fault.
    """
    faults: list[Fault] = []
    result: list[dict[str, Any]] = []
    for number, mapping in enumerate(value if isinstance(value, list) and value else [value]):
        lead: Place = (number,) if isinstance(value, list) and value else ()
        if not isinstance(mapping, dict) or not mapping:
            faults.append((lead, f"is {shown(mapping)}, not a mapping from settings to lists; write {{steps: [4, 8]}}"))
            continue
        result.append({})
        for name, choices in mapping.items():
            try:
                result[-1][name] = _axis(name, choices)
            except _RefusedError as error:
                faults += [((*lead, name, *place), text) for place, text in error.faults]
    if faults:
        details = [
            InitErrorDetails(type=PydanticCustomError("sweep", "{text}", {"text": text}), loc=place, input=None)
            for place, text in faults
        ]
        raise ValidationError.from_exception_data("axes", details)
    return result


def _axis(name: str, choices: Any) -> list[Any] | Range:  # noqa: ANN401
    group, _, own = name.partition(".")
    free = group in GROUPS and bool(own)
    if not free and name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(SETTINGS)}, knobs.NAME or call.NAME"
        raise _RefusedError(((), f"is no setting; {hint}"))
    if isinstance(choices, dict):
        return _range(name, choices, free)
    if not isinstance(choices, list):
        raise _RefusedError(((), f"is {shown(choices)}, not a list; write [{shown(choices)}], or move it to the top"))
    if not choices:
        raise _RefusedError(((), "is an empty list; give a value, or leave it out"))
    values: list[Any] = []
    faults: list[Fault] = []
    seen = set[Any]()
    for number, choice in enumerate(choices):
        try:
            values.append(choice if free else _TYPES[name].validate_python(choice))
        except ValidationError as error:
            told = [str(e["ctx"]["error"]) for e in error.errors() if e["type"] == "value_error"]
            faults.append(((number,), told[0] if told else f"is {shown(choice)}, not {WANTED[name]}"))
            continue
        if (same := _comparable(values[-1])) in seen:
            faults.append(((number,), f"is {shown(choice)}, which stands before it; keep one"))
        seen.add(same)
    if faults:
        raise _RefusedError(*faults)
    return values


def _range(name: str, choices: dict[str, Any], free: bool) -> Range:
    if not free and name not in _RANGES:
        raise _RefusedError(
            ((), f"is a mapping, not a list; only {', '.join(_RANGES)}, knobs.NAME and call.NAME may be ranges")
        )
    try:
        found = Range.model_validate(choices)
    except ValidationError as error:
        raise _RefusedError(*dict.fromkeys(_part(e) for e in error.errors())) from error
    low, high, step = found.low, found.high, found.step
    if not low < high:
        text = f"runs from {low} to {high}; give low below high"
    elif step is not None and step <= 0:
        text = f"has the step {step}; give a number above 0"
    elif found.log and (low <= 0 or step not in (None, 1) or (step and not found.whole)):
        text = f"is logarithmic from {low}{'' if step is None else f' with the step {step}'}; start above 0, and leave step out"
    elif name == "steps" and not (found.whole and low >= 1):
        text = f"runs from {low} to {high}; give whole numbers of at least 1"
    elif name == "guidance_scale":
        return Range(low=float(low), high=float(high), step=None if step is None else float(step), log=found.log)
    else:
        return found
    raise _RefusedError(((), text))


def _part(error: Any) -> Fault:  # noqa: ANN401
    """What is wrong with one number of a range."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return (), f"is a range without {name}; write {{low: 2, high: 32}}, or a list of values"
    if error["type"] == "extra_forbidden":
        return (name,), "is no part of a range; write {low: 2, high: 32, step: 1, log: true}, or a list of values"
    return (name,), f"is {shown(error['input'])}, not {Range.model_fields[name].description}"


def _comparable(value: Any) -> Any:  # noqa: ANN401
    """Equal for values that are one: 1 and 1.0, but not true."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number else json.dumps(value, sort_keys=True)

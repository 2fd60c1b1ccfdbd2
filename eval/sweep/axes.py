"""The axes of a sweep: what each setting may be, lists of values, and ranges for a search."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from flowkit.eval.sweep.reading import Place, shown

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
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


Text = Annotated[str, Field(min_length=1)]
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

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high


class _Refusal(NamedTuple):
    place: Place
    text: str


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
    refused: list[_Refusal] = []
    one = isinstance(value, dict)
    mappings = [value] if one else value
    if not isinstance(mappings, list) or not mappings:
        refused.append(_Refusal((), f"is {shown(value)}, not a mapping from settings to lists of values; write one such as "
                                "{steps: [4, 8]}"))  # fmt: skip
        mappings = []
    result = []
    for number, mapping in enumerate(mappings):
        lead: Place = () if one else (number,)
        if not isinstance(mapping, dict) or not mapping:
            refused.append(_Refusal(lead, f"is {shown(mapping)}, not a mapping from settings to lists of values; write one such as "
                                    "{steps: [4, 8]}"))  # fmt: skip
            continue
        checked = {}
        for name, choices in mapping.items():
            try:
                checked[name] = _axis(name, choices)
            except _RefusedError as error:
                refused += [_Refusal((*lead, name, *place), text) for place, text in error.refused]
        result.append(checked)
    if refused:
        details = [
            InitErrorDetails(type=PydanticCustomError("sweep", "{text}", {"text": text}), loc=place, input=None)
            for place, text in refused
        ]
        raise ValidationError.from_exception_data("axes", details)
    return result


class _RefusedError(Exception):
    """Holds what is wrong with one axis."""

    def __init__(self, refused: list[_Refusal]) -> None:
        self.refused = refused


def _axis(name: str, choices: Any) -> list[Any] | Range:  # noqa: ANN401
    group, _, own = name.partition(".")
    free = group in GROUPS and bool(own)
    if not free and name not in SETTINGS:
        near = difflib.get_close_matches(name, [*SETTINGS, "knobs.", "call."], 1)
        hint = f"did you mean {near[0]}{'NAME' if near[0].endswith('.') else ''}? " if near else ""
        raise _RefusedError(
            [_Refusal((), f"is no setting; {hint}Settings are {', '.join(SETTINGS)}, knobs.NAME and call.NAME")]
        )
    if isinstance(choices, dict):
        return _range(name, choices, free)
    if not isinstance(choices, list):
        raise _RefusedError(
            [_Refusal((), f"is {shown(choices)}, not a list; write [{shown(choices)}], or move it to the top")]
        )
    if not choices:
        raise _RefusedError([_Refusal((), "is an empty list; give at least one value, or leave it out")])
    values: list[Any] = []
    refused: list[_Refusal] = []
    for number, choice in enumerate(choices):
        try:
            value = choice if free else _TYPES[name].validate_python(choice)
        except ValidationError as error:
            told = [str(e["ctx"]["error"]) for e in error.errors() if e["type"] == "value_error"]
            refused.append(_Refusal((number,), told[0] if told else f"is {shown(choice)}, not {WANTED[name]}"))
            continue
        if any(_same(value, other) for other in values):
            refused.append(_Refusal((number,), f"is {shown(choice)}, which stands before it; keep one"))
        values.append(value)
    if refused:
        raise _RefusedError(refused)
    return values


def _range(name: str, choices: dict[str, Any], free: bool) -> Range:
    if not free and name not in _RANGES:
        raise _RefusedError([_Refusal((), f"is a mapping, not a list of values; only {', '.join(_RANGES)}, knobs.NAME and "
                                      "call.NAME may be ranges")])  # fmt: skip
    try:
        found = Range.model_validate(choices)
    except ValidationError as error:
        raise _RefusedError(list(dict.fromkeys(_part(e) for e in error.errors()))) from error
    low, high, step = found.low, found.high, found.step
    if not low < high:
        text = f"runs from {low} to {high}; give low below high"
    elif step is not None and step <= 0:
        text = f"has step {step}; give a number above 0"
    elif found.log and (low <= 0 or (step or 1) != 1 or (step and not found.whole)):
        text = f"is logarithmic from {low} with step {step or 'none'}; start above 0, and leave step out"
    elif name == "steps" and not (found.whole and low >= 1):
        text = f"runs from {low} to {high}; steps are whole numbers of at least 1"
    else:
        if name == "guidance_scale":
            return Range(low=float(low), high=float(high), step=None if step is None else float(step), log=found.log)
        return found
    raise _RefusedError([_Refusal((), text)])


def _part(error: Any) -> _Refusal:  # noqa: ANN401
    """What is wrong with one number of a range."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return _Refusal((), f"is a range without {name}; write {{low: 2, high: 32}}")
    if error["type"] == "extra_forbidden":
        return _Refusal(
            (name,), "is no part of a range; write {low: 2, high: 32, step: 1, log: true}, or a list of values"
        )
    return _Refusal((name,), f"is {shown(error['input'])}, not {Range.model_fields[name].description}")


def _same(value: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether two values are one; True is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)

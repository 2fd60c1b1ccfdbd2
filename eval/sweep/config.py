"""The configuration of a sweep: its fields, and `read`, which tells every fault with its line before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError

from flowkit.eval.sweep import cells, checks, identity, reading
from flowkit.eval.sweep.axes import GROUPS, STRICT, WANTED, Guidance, OptionalText, Range, Steps, Text, normalised
from flowkit.eval.sweep.cells import Cell
from flowkit.eval.sweep.reading import Fault, Place, Places, named, shown


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("holds a value twice; keep one")
    return values


def _listed(value: Any) -> Any:  # noqa: ANN401
    return [value] if isinstance(value, str) else value


Names = Annotated[list[Text], Field(min_length=1), AfterValidator(_distinct)]
Labels = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[list[Text], Field(min_length=1)]


class Search(BaseModel):
    """How cells are chosen: all of a grid, or by a sampler of Optuna."""

    model_config = STRICT

    sampler: Literal["grid", "tpe", "nsga2", "random"] = Field(default="grid", description="grid, tpe, nsga2 or random")
    trials: int | None = Field(
        default=None, ge=1, le=checks.MOST_CELLS, description=f"a whole number from 1 to {checks.MOST_CELLS}"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description=f"a whole number from 0 to {2**32 - 1}")


Source = str | PathLike[str] | Mapping[str, Any]


class SweepConfig(BaseModel):
    """A sweep, as `read` makes it: the fields of its file, see ``docs/sweeps.md``, with axes as a list of mappings.

    Paths are as they were given; `path` finds them.
    """

    model_config = STRICT

    name: Text = Field(max_length=100, description="text of at most 100 characters")
    model: Text | None = Field(None, description=WANTED["model"])
    lora: OptionalText = Field(None, description=WANTED["lora"])
    scheduler: Text = Field("flowkit", description=WANTED["scheduler"])
    solver: Text | None = Field(None, description=WANTED["solver"])
    grid: OptionalText = Field(None, description=WANTED["grid"])
    steps: Steps | None = Field(None, description=WANTED["steps"])
    guidance_scale: float | None = Field(None, description=WANTED["guidance_scale"])
    guidance: Guidance = Field(None, description=WANTED["guidance"])
    knobs: dict[str, Any] = Field({}, description="a mapping of the scheduler's knobs")
    call: dict[str, Any] = Field({}, description="a mapping of the pipeline's arguments")

    reference: Text | Names | None = Field(
        None, description="digits, shapes, a file, a folder of images, or a list of them"
    )
    metrics: Annotated[Names, BeforeValidator(_listed)] = Field(["fid"], description="a list of metrics such as [fid]")
    extractor: Text | Names | None = Field(None, description="the name of an extractor, or a list of names")
    images: int = Field(ge=2, description="a whole number of at least 2")
    batch_size: int = Field(64, ge=1, description="a whole number of at least 1")
    seed: int = Field(0, description="a whole number")
    exact: bool = Field(False, description="true or false")
    keep: int = Field(8, ge=0, description="a whole number of at least 0")
    labels: Text | Labels | None = Field(None, description="text such as 0-9, or a list of class labels")
    prompts: Text | Prompts | None = Field(None, description="a file of prompts, or a list of texts")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16"
    )
    device: Text = Field("auto", description="auto, cpu, cuda, or another device of torch")
    variant: Text | None = Field(None, description="the name of a variant of the weights")

    objectives: Names = Field(
        default_factory=lambda data: [*data.get("metrics", ())[:1], checks.COSTS[0]],
        description="a list of the metrics' keys, evaluations and seconds",
    )
    search: Search = Field(Search(), description="a mapping such as {sampler: tpe, trials: 100}")
    storage: Text | None = Field(None, description="a URL such as postgresql://user@host/db")
    trackers: Annotated[list[Text], AfterValidator(_distinct)] = Field(
        [], description="a list of trackers such as [tensorboard]"
    )
    retries: int = Field(2, ge=0, description="a whole number of at least 0")
    heartbeat: int = Field(15, ge=1, le=3600, description="a whole number of seconds from 1 to 3600")
    axes: Annotated[list[dict[str, list[Any] | Range]], BeforeValidator(normalised)] = Field(
        description="a mapping from settings to lists of values"
    )
    _file: Path | None = PrivateAttr(None)
    _base: Path = PrivateAttr(Path())

    @property
    def file(self) -> Path | None:
        """The file that it was read from; None for a mapping of Python."""
        return self._file

    def path(self, text: str) -> Path:
        """Returns the path of a file that the sweep names: beside its own file, or for a mapping in the current folder."""
        return self._base / text

    def source(self) -> dict[str, Any]:
        """Returns a mapping that `read` makes the same sweep of."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return {**data, "axes": data["axes"][0] if len(data["axes"]) == 1 else data["axes"]}

    def cells(self) -> list[Cell]:
        """Returns the cells of a grid, see `flowkit.eval.sweep.cells.expand`."""
        return cells.expand(self)

    def cell(self, settings: Mapping[str, Any]) -> Cell:
        """Returns the cell of values that a search has chosen, see `flowkit.eval.sweep.cells.make`."""
        return cells.make(self, settings)

    def choices(self) -> dict[str, list[Any] | Range]:
        """Returns what a search chooses from, by setting."""
        return dict(self.axes[0])

    def describe(self) -> dict[str, Any]:
        """Returns what results depend on, see `flowkit.eval.sweep.identity.describe`."""
        return identity.describe(self)


def read(source: Source, base: Path | None = None) -> SweepConfig:
    """Reads a sweep and checks all that can be told without loading a model.

    Args:
        source: a YAML file, or its content as a mapping of Python.
        base: folder that the paths of a mapping start from; None means the current one.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a sweep that cannot run: its first ten faults, each with line, field and cure.
    """
    if isinstance(source, Mapping):
        file, (data, places) = None, (reading.plain(source), Places())
    else:
        file, (data, places) = Path(source).resolve(), reading.read_yaml(source)
    if faults := list(checks.unreadable(data)):
        raise places.error(faults)
    if data.get("name") is None:
        data["name"] = "sweep" if file is None else file.stem
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise places.error(_told(error, data, places)) from error
    config._file, config._base = file, base or (Path() if file is None else file.parent)
    if faults := list(checks.check(config)):
        one = isinstance(data["axes"], dict)
        raise places.error([_as_written(fault) if one else fault for fault in faults])
    return config


def _as_written(fault: Fault) -> Fault:
    """A fault of axes that are one mapping in the file."""
    place, text = fault
    return (*place[:1], *place[2:]) if place[:2] == ("axes", 0) else place, text.replace("axes[0]", "axes", 1)


def _told(error: ValidationError, data: Any, places: Places) -> Iterator[Fault]:  # noqa: ANN401
    """The faults that pydantic found, each once, in our words."""
    seen = set[Place]()
    for one in error.errors():
        place, value = _reached(one["loc"], data)
        if (
            place in seen or one["type"] == "default_factory_not_called"
        ):  # the fault is in what the default is made from
            continue
        seen.add(place)
        fields = Search.model_fields if place[:1] == ("search",) and len(place) > 1 else SweepConfig.model_fields
        field = fields.get(str((place or one["loc"])[1 if fields is Search.model_fields else 0]))
        match one["type"]:
            case "missing":
                yield (
                    place,
                    f"{named(one['loc'])} is missing; give {SweepConfig.model_fields[str(one['loc'][0])].description}",
                )
            case "extra_forbidden":
                yield place, f"{named(place)} is no field; {_meant(str(place[-1]), fields)}"
            case "value_error":
                yield place, f"{named(place)} {one['ctx']['error']}"
            case "sweep":
                yield place, f"{named(place)} {one['msg']}"
            case _:
                wanted = "" if field is None else str(field.description)
                yield place, f"{named(place)} is {shown(value)}{_word(value, places.written(place))}, not {wanted}"


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


def _meant(name: str, fields: Mapping[str, Any]) -> str:
    """A cure for an unknown name."""
    group, _, own = name.partition(".")
    if own and group in GROUPS:
        return f"write {group}: {{{own}: VALUE}}"
    near = difflib.get_close_matches(name, fields, 1)
    return f"did you mean {near[0]}?" if near else f"choose {', '.join(fields)}"

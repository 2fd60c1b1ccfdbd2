"""The configuration of a sweep: its fields, and `read`, which tells every fault with its line before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError

from flowkit import reading
from flowkit.eval.sweep import cells, checks, identity
from flowkit.eval.sweep.axes import WANTED, Guidance, OptionalText, Range, Steps, normalised
from flowkit.eval.sweep.cells import Cell
from flowkit.reading import Fault, Places
from flowkit.validation import STRICT, Text, told, unreadable

_NAME = 100  # characters


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("holds a value twice; keep one")
    return values


def _listed(value: Any) -> Any:  # noqa: ANN401
    return [value] if isinstance(value, str) else value


Names = Annotated[list[Text], Field(min_length=1), AfterValidator(_distinct)]
Labels = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


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
    """A sweep, as `read` makes it.

    The first eleven fields are settings: of all cells, or one a cell where they stand in the axes. Paths are as they were given;
    `path` finds them.

    Attributes:
        name: of the study; that of the file where none is given.
        model: "digits" or "shapes", a folder of diffusers, or a hub repository.
        lora: a file or folder of weights, or a hub repository; None for none.
        scheduler: "flowkit", "keep" or a class of diffusers, see `flowkit.pipelines.swap.make`.
        solver: of our scheduler; None means that of the model's scheduler.
        grid: of our scheduler, a name or a file; None means that of the model's scheduler.
        steps: denoising steps, >= 1; None means those of the grid's file, or the pipeline's.
        guidance_scale: w of the pipeline, 1 being conditional only; None means the pipeline's.
        guidance: ``method``, a class of `flowkit.guidance`, with its arguments or the ``file`` of its ``save``; None for none.
        knobs: of the scheduler.
        call: arguments of the pipeline.
        reference: of the metrics, see `flowkit.eval.evaluate`; None for none.
        metrics: "METRIC", or "METRIC/EXTRACTOR".
        extractor: one or several; None means the reference's own.
        images: number of samples of a cell, >= 2.
        batch_size: images at a time.
        seed: of the noise, the same in all cells.
        exact: sums without rounding.
        keep: pictures kept of each cell.
        labels: class labels such as "0-9", or a list; drawn in turn.
        prompts: a file, see `flowkit.pipelines.requests.read_prompts`, or a list; drawn in turn.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto" or a name of torch's.
        variant: of the weights of a hub repository, such as "fp16".
        objectives: keys of metrics, "evaluations" or "seconds"; all are made small.
        search: how cells are chosen.
        storage: URL of the study's database; None means SQLite in the output folder.
        trackers: names of accelerate's.
        retries: how often a cell whose worker was killed is given to another.
        axes: mappings from settings (also ``knobs.NAME`` and ``call.NAME``) to lists or ranges; their cells are joined.
    """

    model_config = STRICT

    name: Text = Field(max_length=_NAME, description=f"text of at most {_NAME} characters")
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

    reference: Text | Texts | None = Field(
        None, description="digits, shapes, a file, a folder of images, or a list of them"
    )
    metrics: Annotated[Names, BeforeValidator(_listed)] = Field(["fid"], description="a list of metrics such as [fid]")
    extractor: Text | Names | None = Field(None, description="the name of an extractor, or a list of different ones")
    images: int = Field(ge=2, description="a whole number of at least 2")
    batch_size: int = Field(64, ge=1, description="a whole number of at least 1")
    seed: int = Field(0, description="a whole number")
    exact: bool = Field(False, description="true or false")
    keep: int = Field(8, ge=0, description="a whole number of at least 0")
    labels: Text | Labels | None = Field(None, description="text such as 0-9, or a list of class labels")
    prompts: Text | Texts | None = Field(None, description="a file of prompts, or a list of texts")
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
    if faults := list(unreadable(data)):
        raise places.error(faults)
    if data.get("name") is None:
        data["name"] = "sweep" if file is None else file.stem[:_NAME]
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise places.error(told(error, data, places, SweepConfig)) from error
    config._file, config._base = file, base or (Path() if file is None else file.parent)
    if faults := list(checks.check(config)):
        raise places.error(map(_as_written, faults) if isinstance(data["axes"], dict) else faults)
    return config


def _as_written(fault: Fault) -> Fault:
    """A fault where axes are one mapping in the file, and no list."""
    place, text = fault
    return (place[:1] + place[2:] if place[:2] == ("axes", 0) else place), text

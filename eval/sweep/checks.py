"""What can be told of a sweep before anything is loaded: names, files, arguments, and settings that contradict each other."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # type: ignore[import-untyped]

from flowkit import assets, solvers, weights
from flowkit.eval.metrics import METRICS, required
from flowkit.eval.sweep import cells
from flowkit.eval.sweep.axes import GROUPS, SETTINGS
from flowkit.eval.sweep.reading import Fault, Place, named, shown
from flowkit.grids import Grid
from flowkit.pipelines import loading, swap
from flowkit.pipelines.requests import EACH, IMAGE

if TYPE_CHECKING:
    from flowkit.eval.sweep.config import SweepConfig

MOST_CELLS = 100_000
COSTS = ("evaluations", "seconds")  # objectives beside the metrics
# Arguments and knobs that have a field of their own, or that the measurement sets.
_ELSEWHERE = {
    "call.num_inference_steps": "write steps",
    "call.guidance_scale": "write guidance_scale",
    "knobs.solver": "write solver",
    "knobs.grid": "write grid",
    **{f"call.{name}": "it is set from seed and batch_size"
       for name in ("generator", "batch_size", "num_images_per_prompt")},
    **{f"call.{name}": "it is set by the measurement" for name in ("output_type", "return_dict")},
}  # fmt: skip
_ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError)


def unreadable(data: Any, place: Place = ()) -> Iterator[Fault]:  # noqa: ANN401
    """Yields numbers that are not finite, and text that no file can hold."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from unreadable(value, (*place, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from unreadable(value, (*place, number))
    elif isinstance(data, float) and not math.isfinite(data):
        yield place, f"{named(place)} is {data}; give a finite number"
    elif isinstance(data, str) and re.search("[\0\ud800-\udfff]", data):
        yield place, f"{named(place)} holds a character that is none; write it as UTF-8"


def metric_keys(config: SweepConfig) -> list[str]:
    """Returns the keys that `flowkit.eval.evaluate` gives the figures of the sweep's metrics."""
    extractors = config.extractor if isinstance(config.extractor, list) else [config.extractor]
    keys = []
    for text in config.metrics:
        metric, _, own = text.partition("/")
        keys += [text] if own else [metric, *(f"{metric}/{name}" for name in extractors[1:])]
    return list(dict.fromkeys(keys))


def check(config: SweepConfig) -> Iterator[Fault]:
    """Yields the faults of a sweep whose fields are each of the right kind; axes are numbered."""
    yield from _layout(config)
    yield from _measurement(config)
    yield from _inputs(config)
    yield from _values(config)
    yield from _together(config)


def _layout(config: SweepConfig) -> Iterator[Fault]:
    """Where settings stand, and how many cells there are."""
    swept = {name: ("axes", number, name) for number, axes in enumerate(config.axes) for name in axes}
    fixed = config.model_fields_set & set(SETTINGS) | {f"{g}.{name}" for g in GROUPS for name in getattr(config, g)}
    for name in sorted(fixed & swept.keys()):
        yield swept[name], f"{named(swept[name])} stands at the top as well; keep one"
    lacking = [number for number, axes in enumerate(config.axes) if config.model is None and "model" not in axes]
    if lacking:
        yield (), "model is missing; write one such as model: digits"
    search, sampler = config.search, config.search.sampler
    if sampler == "grid":
        if search.trials is not None:
            yield (
                ("search", "trials"),
                "search.trials is of a search, and the sampler grid takes every cell; leave it out",
            )
        for number, axes in enumerate(config.axes):
            for name in (name for name, choices in axes.items() if not isinstance(choices, list)):
                place = ("axes", number, name)
                yield (
                    place,
                    f"{named(place)} is a range, and the sampler grid takes lists; write search: {{sampler: tpe, trials: 100}}",
                )
        count = sum(math.prod(len(c) for c in axes.values() if isinstance(c, list)) for axes in config.axes)
        if count > MOST_CELLS:
            yield ("axes",), f"axes make {count:,} cells, more than {MOST_CELLS:,}; search them, or leave values out"
        return
    if search.trials is None:
        yield (
            ("search",),
            f"search lacks trials, which the sampler {sampler} needs; write {{sampler: {sampler}, trials: 100}}",
        )
    if len(config.axes) > 1:
        yield (
            ("axes",),
            f"axes are {len(config.axes)} mappings, and the sampler {sampler} takes one; use the sampler grid",
        )


def _measurement(config: SweepConfig) -> Iterator[Fault]:
    """Metrics, references, objectives, and the machine."""
    known = True
    for number, text in enumerate(config.metrics):
        if text.partition("/")[0] not in METRICS:
            known = False
            place = ("metrics", number)
            yield (
                place,
                f"{named(place)} is {shown(text)}, which is no metric; {_near(text.partition('/')[0], METRICS)}",
            )
    if known:
        keys = metric_keys(config)
        for number, text in enumerate(config.objectives):
            if text not in (*keys, *COSTS):
                place = ("objectives", number)
                yield (
                    place,
                    f"{named(place)} is {shown(text)}; choose of the metrics' keys {', '.join(keys)}, or {', '.join(COSTS)}",
                )
        needing = [text for text in config.metrics if required([text.partition("/")[0]])[1]]
        if needing and config.reference is None:
            yield (
                ("reference",),
                f"reference is missing, and {needing[0]} needs one; write one such as reference: digits",
            )
    several, given = isinstance(config.reference, list), config.reference
    extractors = len(config.extractor) if isinstance(config.extractor, list) else 1
    if isinstance(given, list) and len(given) != extractors:
        yield (
            ("reference",),
            f"reference is a list of {len(given)} for {extractors} extractors; give one, or one for each",
        )
    for number, name in enumerate(given if isinstance(given, list) else [given] if given else []):
        where: Place = ("reference", number) if several else ("reference",)
        if name not in assets.NAMES and not config.path(name).exists():
            yield (
                where,
                f"{named(where)} is {shown(name)}, and there is none; choose {', '.join(assets.NAMES)}, a file or a folder",
            )
    try:
        if config.device != "auto":
            torch.device(config.device)
    except RuntimeError:
        yield ("device",), f"device is {shown(config.device)}, which torch does not know; choose auto, cpu or cuda"
    if config.storage is not None and not re.fullmatch(r"\w+(\+\w+)?://.+", config.storage):
        yield ("storage",), "storage is no URL; write one such as postgresql://user@host/db"
    trackers = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    for number, name in enumerate(config.trackers):
        if name not in trackers:
            yield (
                ("trackers", number),
                f"trackers[{number}] is {shown(name)}, which accelerate does not have; {_near(name, trackers)}",
            )


def _inputs(config: SweepConfig) -> Iterator[Fault]:
    """Labels and prompts, and what else says the same."""
    if config.labels is not None and config.prompts is not None:
        yield ("prompts",), "prompts and labels both say what to draw; keep one"
        return
    place: Place = ("labels",) if config.labels is not None else ("prompts",)
    try:
        rows = cells.inputs(config) or [{}]
    except _ERRORS as error:
        yield place, f"{named(place)}: {error}"
        return
    own = {name for row in rows for name in row}
    if pictures := sorted(name for name in own if IMAGE.fullmatch(name)):
        yield place, f"{named(place)} give {pictures[0]}, and a sweep reads no pictures; leave it out"
    taken = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
    for setting, where in _places(config):
        name = taken.get(setting) or setting.removeprefix("call.")
        if setting not in taken and name == setting:
            continue
        if where[0] == "axes" and EACH.fullmatch(name):
            yield where, f"{named(where)} is of each sample, not of a cell; write it in a .jsonl of prompts"
        elif name in own and (where[0] == "axes" or setting in taken):
            yield where, f"{named(where)} stands in the prompts as well; keep one"


def _values(config: SweepConfig) -> Iterator[Fault]:
    """Values of settings, each for itself."""
    finds: dict[str, Callable[[str], Any]] = {
        "model": lambda name: _model(config, name),
        "lora": lambda name: _lora(config, name),
        "scheduler": lambda name: name in ("flowkit", "keep") or swap.stock_class(name),
        "solver": solvers.find,
        "grid": lambda name: cells.find_grid(config, name),
    }
    for setting, place in _places(config):
        if setting in _ELSEWHERE:
            yield place, f"{named(place)} cannot be given; {_ELSEWHERE[setting]}"
        if setting not in finds:
            continue
        for where, value in _choices(config, setting, place):
            try:
                _ = None if value is None else finds[setting](value)
            except _ERRORS as error:
                yield where, f"{named(where)}: {error}"


def _together(config: SweepConfig) -> Iterator[Fault]:
    """Settings that contradict each other in a cell: each kind of contradiction once a mapping."""
    for number, axes in enumerate(config.axes):
        lead = ("axes", number)

        def pairs(one: str, other: str, axes: Mapping[str, Any] = axes) -> Iterator[cells.Cell]:
            """A cell for each pair of values of two settings."""
            rest = {name: _listed(choices)[0] for name, choices in axes.items()}
            for first in _listed(axes[one]) if one in axes else [None]:
                for second in _listed(axes[other]) if other in axes else [None]:
                    chosen = {one: first, other: second}
                    yield cells.make(config, rest | {name: value for name, value in chosen.items() if name in axes})

        yield from _first(lead, _scheduled(config, axes, pairs))
        yield from _first(lead, _lengths(config, pairs))
        yield from _guided(config, number, pairs)


def _first(lead: Place, texts: Iterator[str]) -> Iterator[Fault]:
    for text in texts:
        yield lead, text
        return


Pairs = Callable[..., Iterator[cells.Cell]]


def _scheduled(config: SweepConfig, axes: Mapping[str, Any], pairs: Pairs) -> Iterator[str]:
    """A solver, grid or knobs for a scheduler that does not take them."""
    cure = (
        "use a list of two mappings in axes, one for each scheduler"
        if config.search.sampler == "grid"
        else "search one scheduler at a time"
    )
    names = ["solver", "grid", *sorted({*axes, *cells.base(config)} - set(SETTINGS))]
    for name in names:
        if name.startswith("call."):
            continue
        for cell in pairs("scheduler", name):
            scheduler, value = cell.get("scheduler"), cell.get(name)
            if scheduler == "flowkit" or value is None:
                continue
            if name in ("solver", "grid"):
                why = f"which the scheduler {scheduler!r} does not take"
            elif scheduler == "keep":
                why = "and the scheduler 'keep' leaves the model's own as it is"
            elif name.removeprefix("knobs.") not in inspect.signature(swap.stock_class(scheduler).__init__).parameters:
                why = f"which {scheduler} does not have"
            else:
                continue
            yield f"the cell {cell.name!r} has {name} = {value!r}, {why}; {cure}"


def _lengths(config: SweepConfig, pairs: Pairs) -> Iterator[str]:
    """Numbers of steps that a grid file does not have."""
    for cell in pairs("grid", "steps"):
        grid, steps = cell.get("grid"), cell.get("steps")
        found = None if grid is None else cells.find_grid(config, grid)
        if isinstance(found, Grid) and steps is not None and steps != len(found):
            yield (f"the cell {cell.name!r} has {steps} steps, and the grid of {grid} has {len(found)}; use a list of two mappings "
                   "in axes, one without steps")  # fmt: skip


def _guided(config: SweepConfig, number: int, pairs: Pairs) -> Iterator[Fault]:
    """Guidance that cannot be built."""
    seen = set()
    for cell in pairs("guidance", "guidance_scale"):
        try:
            cells.guidance(config, cell)
        except _ERRORS as error:
            if str(error) not in seen:
                seen.add(str(error))
                axis = config.axes[number].get("guidance")
                index = axis.index(cell.get("guidance")) if isinstance(axis, list) else 0
                place: Place = ("guidance",) if axis is None else ("axes", number, "guidance", index)
                yield place, f"{named(place)}: {error}"


def _places(config: SweepConfig) -> Iterator[tuple[str, Place]]:
    """Each setting that is given, and where."""
    for setting in SETTINGS:
        if getattr(config, setting) is not None:
            yield setting, (setting,)
    for group in GROUPS:
        for name in getattr(config, group):
            yield f"{group}.{name}", (group, name)
    for number, axes in enumerate(config.axes):
        for setting in axes:
            yield setting, ("axes", number, setting)


def _choices(config: SweepConfig, setting: str, place: Place) -> Iterator[tuple[Place, Any]]:
    if place[0] != "axes":
        yield place, getattr(config, setting)
        return
    choices = config.axes[int(place[1])][setting]
    for number, value in enumerate(_listed(choices)):
        yield (*place, number), value


def _listed(choices: Any) -> list[Any]:  # noqa: ANN401
    return choices if isinstance(choices, list) else choices.ends()


def _model(config: SweepConfig, name: str) -> None:
    path = config.path(name)
    if name in assets.NAMES or (path / loading.INDEX).is_file():
        return
    if path.exists():
        raise ValueError(
            f"{name} has no {loading.INDEX}, so it is no pipeline; give a folder that save_pretrained wrote"
        )
    if not loading.REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"no model {name!r}; choose {', '.join(assets.NAMES)}, a folder, or owner/name of the hub"
        )


def _lora(config: SweepConfig, name: str) -> None:
    path = config.path(name)
    if path.is_file():
        weights.check(path)
    elif not path.exists() and (path.suffix or not loading.REPOSITORY.fullmatch(name)):
        raise FileNotFoundError(f"no LoRA {name!r}; give a .safetensors file, a folder, or owner/name of the hub")


def _near(name: str, known: Any) -> str:  # noqa: ANN401
    """A cure: the name that was meant, or all."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}"

"""What can be told of a sweep before anything is loaded: names, files, arguments, and settings that contradict each other."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # type: ignore[import-untyped]

from flowkit import assets, solvers, weights
from flowkit.eval.metrics import METRICS
from flowkit.eval.sweep import cells
from flowkit.eval.sweep.axes import GROUPS, SETTINGS
from flowkit.grids import Grid
from flowkit.pipelines import loading, swap
from flowkit.pipelines.requests import EACH, IMAGE
from flowkit.reading import Fault, Place, shown
from flowkit.schedulers import RectifiedFlowScheduler, stock_classes
from flowkit.validation import near

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
    **{f"call.{name}": "it comes from seed and batch_size"
       for name in ("generator", "batch_size", "num_images_per_prompt")},
    **{f"call.{name}": "the measurement sets it" for name in ("output_type", "return_dict")},
}  # fmt: skip
_WEIGHTS = {".safetensors", *weights.PICKLES}
_ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError)
# Of separators, of what Windows refuses, or of dots and spaces at an end.
_NO_FOLDER = re.compile(r"[/\\:*?\"<>|\x00-\x1f\x7f]|^[. ]|[. ]$")


def metric_keys(config: SweepConfig) -> list[str]:
    """Returns the keys that `flowkit.eval.evaluate` gives the figures of the sweep's metrics."""
    extractors = config.extractor if isinstance(config.extractor, list) else [config.extractor]
    keys = []
    for text in config.metrics:
        keys += [text] if "/" in text else [text, *(f"{text}/{name}" for name in extractors[1:])]
    return list(dict.fromkeys(keys))


def check(config: SweepConfig) -> Iterator[Fault]:
    """Yields the faults of a sweep whose fields are each of the right kind."""
    yield from _layout(config)
    yield from _metrics(config)
    yield from _references(config)
    yield from _machine(config)
    yield from _inputs(config)
    yield from _guidance(config)
    names = list(_names(config))
    yield from names
    if not names:  # what is unknown has no length and no knobs
        yield from _contradictions(config)


def _layout(config: SweepConfig) -> Iterator[Fault]:
    """The name, where settings stand, and how many cells there are."""
    if _NO_FOLDER.search(config.name):
        yield ("name",), f"is {shown(config.name)}, which cannot name a folder; use letters, digits, spaces and .-_"
    fixed = config.model_fields_set & set(SETTINGS) | {f"{g}.{name}" for g in GROUPS for name in getattr(config, g)}
    for setting, place in _places(config):
        if place[0] == "axes" and setting in fixed:
            yield place, "stands at the top as well; keep one"
    if config.model is None and any("model" not in axes for axes in config.axes):
        yield ("model",), "is missing; write one such as model: digits"
    trials, sampler = config.search.trials, config.search.sampler
    if sampler == "grid":
        if trials is not None:
            yield (
                ("search", "trials"),
                f"is {trials}, and the sampler grid takes all cells; leave it out, or name a sampler",
            )
        for setting, place in _places(config):
            if place[0] == "axes" and not isinstance(config.axes[int(place[1])][setting], list):
                yield place, "is a range, and the sampler grid takes lists; write search: {sampler: tpe, trials: 100}"
        count = sum(math.prod(len(_listed(c)) for c in axes.values()) for axes in config.axes)
        if count > MOST_CELLS:
            yield ("axes",), f"make {count:,} cells, more than {MOST_CELLS:,}; leave values out, or search them"
        return
    if trials is None:
        yield ("search",), f"lacks trials, which the sampler {sampler} needs; write {{sampler: {sampler}, trials: 100}}"
    if len(config.axes) > 1:
        yield ("axes",), f"are {len(config.axes)} mappings, and the sampler {sampler} takes one; use the sampler grid"


def _metrics(config: SweepConfig) -> Iterator[Fault]:
    names = [text.partition("/")[0] for text in config.metrics]
    for number, name in enumerate(names):
        if name not in METRICS:
            yield ("metrics", number), f"is {shown(config.metrics[number])}, which is no metric; {near(name, METRICS)}"
        elif METRICS[name].reference is not None and config.reference is None:
            yield (
                ("metrics", number),
                f"is {shown(config.metrics[number])}, which needs a reference; write reference: digits",
            )
    keys = metric_keys(config)
    for number, name in enumerate(config.objectives if METRICS.keys() >= set(names) else ()):
        if name not in (*keys, *COSTS):
            yield (
                ("objectives", number),
                f"is {shown(name)}, which is not measured; choose {', '.join((*keys, *COSTS))}",
            )


def _references(config: SweepConfig) -> Iterator[Fault]:
    several = isinstance(config.reference, list)
    names = config.reference if isinstance(config.reference, list) else [config.reference] if config.reference else []
    extractors = len(config.extractor) if isinstance(config.extractor, list) else 1
    if several and len(names) != extractors:
        yield ("reference",), f"is a list of {len(names)}, and extractors are {extractors}; give one, or one for each"
    for number, name in enumerate(names):
        if name not in assets.NAMES and not config.path(name).exists():
            place: Place = ("reference", number) if several else ("reference",)
            yield place, f"is {shown(name)}, which is not there; choose {', '.join(assets.NAMES)}, a file or a folder"


def _machine(config: SweepConfig) -> Iterator[Fault]:
    """Device, storage and trackers."""
    try:
        torch.device("cpu" if config.device == "auto" else config.device)
    except RuntimeError:
        yield ("device",), f"is {shown(config.device)}, which torch does not know; choose auto, cpu or cuda"
    if config.storage is not None and not re.fullmatch(r"\w+(\+\w+)?://.+", config.storage):  # may hold a password
        yield ("storage",), "is no URL; write one such as postgresql://user@host/db"
    trackers = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    for number, name in enumerate(config.trackers):
        if name not in trackers:
            yield ("trackers", number), f"is {shown(name)}, which accelerate does not have; {near(name, trackers)}"


def _inputs(config: SweepConfig) -> Iterator[Fault]:
    """Labels and prompts, and what else says the same."""
    place: Place = ("prompts",) if config.labels is None else ("labels",)
    if config.labels is not None and config.prompts is not None:
        yield ("prompts",), "say what to draw, and so do the labels; keep one"
        return
    try:
        rows = cells.inputs(config) or [{}]
    except _ERRORS as error:
        yield place, f"cannot be read: {error}"
        return
    own = {name for row in rows for name in row}
    if pictures := sorted(name for name in own if IMAGE.fullmatch(name)):
        yield place, f"have the argument {pictures[0]}, and sweeps read no pictures; leave it out"
    for name in {name for setting, _, name in _values(config) if setting == "model" and name in assets.NAMES}:
        top = assets.num_classes(name) - 1
        labels = [row.get("class_labels", -1) for row in rows]
        for label in [x for x in labels if not (isinstance(x, int) and 0 <= x <= top)][:1]:
            what = "are missing" if label == -1 else f"hold {shown(label)}"
            yield ("labels",), f"{what}, and the model {name} draws the classes 0 to {top}; write labels: 0-{top}"
    for setting, where in _places(config):
        name = {"steps": "num_inference_steps", "guidance_scale": setting}.get(setting, setting.removeprefix("call."))
        if where[0] == "axes" and setting.startswith("call.") and EACH.fullmatch(name):
            yield where, "is an argument of each sample, not of a cell; write it in a .jsonl of prompts"
        elif name in own and (where[0] == "axes" or setting in SETTINGS):
            yield where, f"stands in the prompts as well, as {name}; keep one"


def _guidance(config: SweepConfig) -> Iterator[Fault]:
    """Guidance that cannot be built, with the first scale where it takes the cell's."""
    faults: dict[Fault, None] = {}
    for number, axes in enumerate(config.axes):
        scale = _listed(axes["guidance_scale"])[0] if "guidance_scale" in axes else config.guidance_scale
        for index, value in enumerate(_listed(axes["guidance"]) if "guidance" in axes else [config.guidance]):
            try:
                cells.build_guidance(config, value, scale)
            except _ERRORS as error:
                place = ("axes", number, "guidance", index) if "guidance" in axes else ("guidance",)
                faults[place, f"cannot be built: {error}"] = None
    yield from faults


def _names(config: SweepConfig) -> Iterator[Fault]:
    """Values of settings, each for itself."""
    finds: dict[str, Callable[[str], Any]] = {
        "model": lambda name: loading.check_name(name, config.path(name)),
        "lora": lambda name: _lora(config, name),
        "scheduler": lambda name: name in ("flowkit", "keep") or swap.stock_class(name),
        "solver": solvers.find,
        "grid": lambda name: cells.find_grid(config, name),
    }
    for setting, place in _places(config):
        if setting in _ELSEWHERE:
            yield place, f"cannot be given here; {_ELSEWHERE[setting]}"
        elif setting.startswith("knobs.") and (own := setting.removeprefix("knobs.")) not in (known := _knobs()):
            yield place, f"is no knob of a scheduler; {near(own, known)}"
    for setting, place, value in _values(config):
        if setting in finds and value is not None:
            try:
                finds[setting](value)
            except _ERRORS as error:
                yield place, f"cannot be used: {error}"


def _contradictions(config: SweepConfig) -> Iterator[Fault]:
    """Settings that do not go together in a cell: the first of each mapping."""
    cure = (
        "use a list of two mappings in axes"
        if config.search.sampler == "grid"
        else "search one scheduler, or one grid, at a time"
    )
    for number, axes in enumerate(config.axes):
        values = {name: [value] for name, value in cells.base(config).items()}
        values |= {name: _listed(choices) for name, choices in axes.items()}
        told = next(itertools.chain(_idle(values), _lengths(config, values)), None)
        if told is not None:
            chosen, why = told
            picked = {name: chosen.get(name, _listed(choices)[0]) for name, choices in axes.items()}
            yield ("axes", number), f"make the cell {cells.make(config, picked).name!r}, and {why}; {cure}"


_Contradiction = tuple[Mapping[str, Any], str]  # settings, and why they do not go together


def _idle(values: Mapping[str, list[Any]]) -> Iterator[_Contradiction]:
    """A solver, grid or knobs with a scheduler that does not take them."""
    for scheduler in values["scheduler"]:
        if scheduler == "flowkit":
            continue
        known = set[str]()
        if scheduler != "keep":
            known = {f"knobs.{name}" for name in inspect.signature(swap.stock_class(scheduler).__init__).parameters}
        for name in [n for n in values if n not in known and (n in ("solver", "grid") or n.startswith("knobs."))]:
            for value in _some(values[name])[:1]:
                yield (
                    {"scheduler": scheduler, name: value},
                    f"the scheduler {scheduler!r} takes no {name.rpartition('.')[2]}",
                )


def _lengths(config: SweepConfig, values: Mapping[str, list[Any]]) -> Iterator[_Contradiction]:
    """Numbers of steps that a grid file does not have."""
    for text in _some(values.get("grid", ())):
        grid = cells.find_grid(config, text)
        for steps in _some(values.get("steps", ())):
            if isinstance(grid, Grid) and steps != len(grid):
                yield {"grid": text, "steps": steps}, f"the grid {text} has {len(grid)} steps, not {steps}"


def _some(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


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


def _values(config: SweepConfig) -> Iterator[tuple[str, Place, Any]]:
    """Each value of a setting, and where it stands."""
    for setting, place in _places(config):
        if place[0] != "axes":
            yield setting, place, cells.base(config)[setting]
            continue
        for number, value in enumerate(_listed(config.axes[int(place[1])][setting])):
            yield setting, (*place, number), value


def _listed(choices: Any) -> list[Any]:  # noqa: ANN401
    return choices if isinstance(choices, list) else choices.ends()


@functools.cache
def _knobs() -> list[str]:
    """The parameters of all schedulers that we know."""
    names = [name for name in (*stock_classes.CLASSES, *stock_classes.REFUSED) if hasattr(diffusers, name)]
    kinds = [RectifiedFlowScheduler, *(getattr(diffusers, name) for name in names)]
    return sorted(
        {name for kind in kinds for name in inspect.signature(kind.__init__).parameters} - {"self", "args", "kwargs"}
    )


def _lora(config: SweepConfig, name: str) -> None:
    path = config.path(name)
    if path.is_file():
        weights.check(path)
    elif path.is_dir() and not list(path.glob("*.safetensors")):
        raise ValueError(f"{name} holds no .safetensors; give a LoRA's folder or file")
    elif not path.exists() and (path.suffix in _WEIGHTS or not loading.REPOSITORY.fullmatch(name)):
        raise ValueError(f"there is no LoRA {name!r}; give a .safetensors file, a folder, or owner/name of the hub")

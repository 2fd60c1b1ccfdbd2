"""Cells: one way to sample each, and what a pipeline, its scheduler and its guidance are given for it."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkit import assets
from flowkit import guidance as methods
from flowkit.eval.sweep.axes import GROUPS, SETTINGS
from flowkit.grids import GRIDS, Grid
from flowkit.hooks.parts import Part
from flowkit.pipelines.requests import read_grid, read_labels, read_prompts, spread

if TYPE_CHECKING:
    from flowkit.eval.sweep.config import SweepConfig

_SLUG = 60
_UNSAFE = re.compile(r"[^\w.+=]+", re.ASCII)


@dataclass(frozen=True)
class Cell:
    """One way to sample.

    Attributes:
        settings: what the axes say of it, by name.
        base: what the sweep says of all cells.
        key: name of its folder: what varies, for people, and a hash of all its settings.
        name: what varies, for people.
    """

    settings: Mapping[str, Any]
    base: Mapping[str, Any]
    key: str
    name: str

    def get(self, setting: str) -> Any:  # noqa: ANN401
        """Returns a setting, such as "steps" or "call.height": the cell's own, else that of all; None where neither has it."""
        return self.settings.get(setting, self.base.get(setting))


def base(config: SweepConfig) -> dict[str, Any]:
    """Returns the settings that stand at the top of a sweep."""
    found = {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}
    return found | {
        f"{group}.{name}": value for group in GROUPS for name, value in sorted(getattr(config, group).items())
    }


def expand(config: SweepConfig) -> list[Cell]:
    """Returns all cells of a grid, each once: equal models together, within them equal LoRAs, else in the order of the file."""
    common, names = base(config), varying(config)
    found: dict[str, Cell] = {}
    for axes in config.axes:
        for values in itertools.product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            found.setdefault(_canonical(_all(common, settings)), _cell(settings, common, names))
    cells = list(found.values())
    ranks: dict[Any, int] = {}
    for cell in cells:
        ranks.setdefault(("model", cell.get("model")), len(ranks))
        ranks.setdefault(("lora", cell.get("lora")), len(ranks))
    return sorted(cells, key=lambda cell: [ranks[name, cell.get(name)] for name in ("model", "lora")])


def make(config: SweepConfig, settings: Mapping[str, Any]) -> Cell:
    """Returns the cell of chosen values.

    Raises:
        ValueError: for other settings than the axes have, or values that they do not have.
    """
    axes = next((axes for axes in config.axes if axes.keys() == settings.keys()), None)
    if axes is None:
        raise ValueError(
            f"a cell has one value for each of {', '.join(config.axes[0])}, got {', '.join(settings) or 'none'}"
        )
    for name, value in settings.items():
        choices = axes[name]
        if value not in choices:
            raise ValueError(f"{name}={value!r:.60} is not among its choices, {choices!r:.80}")
    return _cell({name: settings[name] for name in axes}, base(config), varying(config))


def varying(config: SweepConfig) -> list[str]:
    """Returns the settings that differ between cells."""
    common = base(config)
    names = {name for axes in config.axes for name in axes}
    found = []
    for name in sorted(names, key=lambda name: (SETTINGS.index(name) if name in SETTINGS else len(SETTINGS), name)):
        values = set()
        for axes in config.axes:
            choices = axes.get(name, [common.get(name)])
            values |= {_canonical(choice) for choice in (choices if isinstance(choices, list) else choices.ends())}
        if len(values) > 1:
            found.append(name)
    return found


def model(config: SweepConfig, cell: Cell) -> str:
    """Returns the model as `flowkit.pipelines.loading.find` takes it: a folder beside the sweep's file by its path."""
    name = str(cell.get("model"))
    return str(config.path(name)) if name not in assets.NAMES and config.path(name).exists() else name


def lora(config: SweepConfig, cell: Cell) -> str | None:
    """Returns the file, folder or hub repository of the cell's LoRA; None for none."""
    name = cell.get("lora")
    return str(config.path(name)) if name is not None and config.path(name).exists() else name


def references(config: SweepConfig) -> str | list[str] | None:
    """Returns the reference as `flowkit.eval.evaluate` takes it, files by their paths."""

    def found(name: str) -> str:
        return name if name in assets.NAMES else str(config.path(name))

    if isinstance(config.reference, list):
        return [found(name) for name in config.reference]
    return None if config.reference is None else found(config.reference)


def inputs(config: SweepConfig) -> list[dict[str, Any]] | None:
    """Returns the arguments of each sample, cycled where there are fewer; None where samples have none of their own.

    Arguments of ``call`` that hold one value for each sample, such as a negative prompt, are among them.

    Raises:
        FileNotFoundError, ValueError: for a file of prompts that cannot be used.
    """
    rows = spread(_rows(config), config.call)[0]
    return rows if rows != [{}] else None


def call(config: SweepConfig, cell: Cell) -> dict[str, Any]:
    """Returns the arguments of the pipeline that hold for all samples of a cell."""
    fixed = spread(_rows(config), config.call)[1]
    steps, grid = cell.get("steps"), _grid(config, cell)
    if steps is None and isinstance(grid, Grid):
        steps = len(grid)
    given = {"num_inference_steps": steps, "guidance_scale": cell.get("guidance_scale")}
    return fixed | {name: value for name, value in given.items() if value is not None} | _group(cell.settings, "call")


def knobs(config: SweepConfig, cell: Cell) -> dict[str, Any]:
    """Returns the knobs of the scheduler for `flowkit.pipelines.swap.make`: solver, grid and others."""
    given = {"solver": cell.get("solver"), "grid": _grid(config, cell)}
    return {name: value for name, value in given.items() if value is not None} | _group(
        {**cell.base, **cell.settings}, "knobs"
    )


def guidance(config: SweepConfig, cell: Cell) -> Part | None:
    """Builds the guidance of a cell; None for none.

    Methods that combine the two outputs themselves take the cell's guidance scale where none is given.

    Raises:
        FileNotFoundError, TypeError, ValueError: for an unknown method, or arguments or a file that it does not take.
    """
    chosen = cell.get("guidance")
    if chosen is None:
        return None
    kind, arguments = guidance_class(chosen["method"]), {k: v for k, v in chosen.items() if k != "method"}
    if "file" in arguments:
        if not hasattr(kind, "load"):
            raise ValueError(f"{kind.__name__} is not read from files; give its arguments")
        if len(arguments) > 1:
            raise ValueError(
                f"{kind.__name__} has all of {', '.join(arguments.keys() - {'file'})} from its file; leave them out"
            )
        loaded: Part = kind.load(config.path(str(arguments["file"])))
        return loaded
    known = inspect.signature(kind).parameters
    if "scale" in known and "scale" not in arguments and cell.get("guidance_scale") is not None:
        arguments["scale"] = cell.get("guidance_scale")
    if unknown := sorted(arguments.keys() - known.keys()):
        raise TypeError(f"{kind.__name__} has no {unknown[0]!r}; it takes {', '.join(known)}")
    if lacking := [n for n, p in known.items() if p.default is p.empty and n not in arguments]:
        others = " or guidance_scale" if "scale" in lacking else " or a file" if hasattr(kind, "load") else ""
        raise TypeError(f"{kind.__name__} lacks {lacking[0]!r}; give it{others}")
    for name, value in arguments.items():
        if isinstance(known[name].default, bool) and not isinstance(value, bool):
            raise TypeError(f"{name} of {kind.__name__} is {value!r:.60}; give true or false")
    built: Part = kind(**arguments)
    return built


def guidance_class(name: str) -> Any:  # noqa: ANN401
    """Returns a method of `flowkit.guidance` by the name of its class.

    Raises:
        ValueError: for an unknown one.
    """
    known = {n: kind for n, kind in vars(methods).items() if isinstance(kind, type) and issubclass(kind, Part)}
    if name not in known:
        raise ValueError(f"unknown method {name!r:.60}; choose {', '.join(sorted(known))}")
    return known[name]


def find_grid(config: SweepConfig, text: str) -> str | Grid:
    """Returns the grid of a file beside the sweep's, or the name of one as it is.

    Raises:
        FileNotFoundError, ValueError: for a file that is not there or holds no grid, and for an unknown name.
    """
    path = config.path(text)
    if path.is_file() or path.suffix == ".json" or len(Path(text).parts) > 1:
        return read_grid(str(path))
    if text not in GRIDS:
        raise ValueError(f"unknown grid {text!r:.60}; choose {', '.join(GRIDS)}, or a file")
    return text


def _grid(config: SweepConfig, cell: Cell) -> str | Grid | None:
    text = cell.get("grid")
    return None if text is None else find_grid(config, text)


def _rows(config: SweepConfig) -> list[dict[str, Any]]:
    """Labels or prompts, one dict a sample."""
    if config.labels is not None:
        labels = read_labels(config.labels) if isinstance(config.labels, str) else config.labels
        return [{"class_labels": label} for label in labels]
    if isinstance(config.prompts, str):
        return read_prompts(config.path(config.prompts))
    return [{"prompt": prompt} for prompt in config.prompts or ()] or [{}]


def _group(settings: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The settings of knobs or call, without the prefix."""
    return {name.removeprefix(f"{group}."): value for name, value in settings.items() if name.startswith(f"{group}.")}


def _canonical(value: Any) -> str:  # noqa: ANN401
    """Equal values, equal text."""
    return json.dumps(value, sort_keys=True)


def _all(common: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a cell; one without a LoRA is one where nothing is said of it."""
    return {name: value for name, value in {**common, **settings}.items() if value is not None or name not in SETTINGS}


def _cell(settings: Mapping[str, Any], common: Mapping[str, Any], names: list[str]) -> Cell:
    everything = _all(common, settings)
    varies = {name: everything[name] for name in names if name in everything}
    words = (word for name, value in varies.items() for word in _words(name, value))
    slug = "-".join(filter(None, (_UNSAFE.sub("-", word).strip("-.") for word in words)))
    digest = hashlib.sha256(_canonical(everything).encode()).hexdigest()[:8]
    key = f"{slug[:_SLUG].rstrip('-.') or 'cell'}-{digest}"
    return Cell(dict(settings), common, key, ", ".join(shown(*item) for item in varies.items()) or "plain")


def _words(name: str, value: Any) -> Iterator[str]:  # noqa: ANN401
    """A setting for the name of a folder."""
    if name in ("model", "lora", "grid"):
        yield Path(value).name
    elif name == "steps":
        yield f"{value}steps"
    elif name == "guidance_scale":
        yield f"w{value:g}"
    elif name == "guidance":
        yield from (Path(str(item)).name for item in value.values())
    else:
        yield f"{name.partition('.')[2]}={value}" if "." in name else str(value)


def shown(name: str, value: Any) -> str:  # noqa: ANN401
    """Returns a setting for people, with what it is of."""
    if name == "steps":
        return f"{value} step{'' if value == 1 else 's'}"
    if name == "guidance_scale":
        return f"w = {value:g}"
    if name == "guidance":
        return f"{value['method']}({', '.join(f'{k}={v}' for k, v in value.items() if k != 'method')})"
    if name in ("lora", "grid"):
        return f"{'LoRA' if name == 'lora' else name} {value}"
    return f"{name.partition('.')[2]} = {value}" if "." in name else str(value)

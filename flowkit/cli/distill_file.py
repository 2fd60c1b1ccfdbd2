"""The YAML file of ``flowkit distill``: its fields, and `read`, which tells every fault with its line before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, Field, ValidationError, create_model

from flowkit import assets
from flowkit.distill.runs import METHODS
from flowkit.distill.settings import Training
from flowkit.distill.shards import Trajectories
from flowkit.distill.student import LoRA
from flowkit.pipelines import loading
from flowkit.pipelines.requests import read_labels, read_prompts
from flowkit.reading import Fault, Place, read_yaml, shown
from flowkit.validation import STRICT, Text, told, unreadable

_ERRORS = (ValueError, TypeError, OSError, ImportError)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_CALL = {"num_inference_steps": "the method records with steps of its own", "guidance_scale": "write guidance_scale"}


def _field(words: str, **limits: Any) -> Any:  # noqa: ANN401
    return Field(None, description=words, **limits)


class _Common(BaseModel):
    """The fields of every method; None means not given."""

    model_config = STRICT

    method: Text | None = _field("the name of a method")
    model: Text | None = _field("digits, shapes, a folder, or owner/name of the hub")
    output: Text | None = _field("the name of a folder")
    prompts: Text | list[Text] | None = _field("a file of prompts, or a list of texts", min_length=1)
    labels: Text | list[int] | None = _field("text such as 0-9, or a list of class labels", min_length=1)
    negative_prompt: Text | None = _field("text")
    guidance_scale: float | None = _field("a number")
    call: dict[str, Any] | None = _field("a mapping of the pipeline's arguments")
    samples: int | None = _field("a whole number of at least 1", ge=1)
    real: Text | None = _field("images, as the data of flowkit train flow")
    pairs: Text | None = _field("the folder of a recording")
    reference: Text | None = _field("digits, shapes, a file of statistics, or a folder of images")
    num_images: int | None = _field("a whole number of at least 2", ge=2)
    batch_size: int | None = _field("a whole number of at least 1", ge=1)
    seed: int | None = _field("a whole number")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = _field("auto, float32, bfloat16 or float16")
    device: Text | None = _field("auto, cpu, cuda, or another device of torch")
    variant: Text | None = _field("the name of a variant of the weights")


@cache
def model(method: str) -> type[BaseModel]:
    """Returns the fields of a method's file: the common ones, and mappings for ``options``, ``training`` and ``lora``."""
    groups: dict[str, type] = {"options": METHODS[method], "training": Training, "lora": LoRA}
    fields: dict[str, Any] = {
        name: (_plain(kind) | None, _field(f"a mapping such as {{{dataclasses.fields(kind)[0].name}: VALUE}}"))
        for name, kind in groups.items()
    }
    return create_model(f"{method}File", __base__=_Common, **fields)


def read(path: Path, method: str) -> dict[str, Any]:
    """Reads a file.

    Args:
        path: of the file; files and folders that it names lie beside it, but for ``output``.
        method: that is asked for.

    Returns:
        The fields that are given, names of files and folders as paths from here.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a distillation that cannot run: its first ten faults, each with line, field and cure.
    """
    data, places = read_yaml(path, "distillation")
    faults = list(unreadable(data))
    if faults:
        raise places.error(faults)
    chosen = data.get("method")
    if chosen is not None and chosen != method:
        cure = f"run flowkit distill {chosen}" if chosen in METHODS else f"choose {', '.join(METHODS)}"
        raise places.error([(("method",), f"is {shown(chosen)}, and the command is of {method}; {cure}")])
    try:
        config = model(method).model_validate(data)
    except ValidationError as error:
        faults += told(error, data, places, model(method))
    faults += _check(data, path.parent, method, {place for place, _ in faults})
    if faults:
        raise places.error(faults)
    found = config.model_dump(exclude_none=True, exclude={"method"})
    base = path.parent
    for name in ("pairs", "prompts"):
        if isinstance(found.get(name), str):
            found[name] = base / found[name]
    for name in ("reference", "model", "real"):
        if name in found and (base / found[name]).exists() and found[name] not in assets.NAMES:
            found[name] = str(base / found[name])
    for name in {"options", "training", "lora"} & found.keys():
        found[name] = {key: tuple(value) if isinstance(value, list) else value for key, value in found[name].items()}
    return found


def _check(data: Mapping[str, Any], base: Path, method: str, wrong: set[Place]) -> Iterator[Fault]:
    """What is of the right kind, and yet cannot be; places that are wrong already are passed over."""
    given = {name: value for name, value in data.items() if (name,) not in wrong and value is not None}
    if {"labels", "prompts"} <= given.keys():
        yield ("prompts",), "say what to draw, and so do the labels; keep one"
    for name in sorted(_CALL.keys() & given.get("call", {}).keys()):
        yield ("call", name), f"cannot be given here; {_CALL[name]}"
    checks: dict[str, Callable[[Any], Any]] = {
        "model": lambda name: loading.check_name(name, base / name),
        "labels": lambda labels: read_labels(labels) if isinstance(labels, str) else None,
        "prompts": lambda name: read_prompts(base / name) if isinstance(name, str) else None,
        "pairs": lambda name: Trajectories(base / name),
        "reference": lambda name: _exists(name, base / name),
        "device": _device,
    }
    for name in checks.keys() & given.keys():
        try:
            checks[name](given[name])
        except _ERRORS as error:
            yield (name,), f"cannot be used: {error}"
    kinds: dict[str, Any] = {"options": METHODS[method], "training": Training}
    for group in kinds.keys() & given.keys():
        values = {name: value for name, value in given[group].items() if (group, name) not in wrong}
        yield from _values(group, kinds[group], values)


def _device(name: str) -> None:
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"torch knows no device {name!r}; choose auto, cpu or cuda") from error


def _exists(name: str, path: Path) -> None:
    if name not in assets.NAMES and not path.exists():
        raise FileNotFoundError(f"there is no {name!r}; choose {', '.join(assets.NAMES)}, a file or a folder")


def _values(group: str, kind: Any, given: Mapping[str, Any]) -> Iterator[Fault]:  # noqa: ANN401
    """Values that their class refuses: each for itself, and if there are none, all together."""
    needed = {"steps": 1} if kind is Training else {}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    wrong = False
    for name, value in values.items():
        try:
            kind(**{**needed, name: value})
        except _ERRORS as error:
            wrong = True
            yield (group, name), f"cannot be used: {error}"
    if not wrong:
        try:
            kind(**{**needed, **values})
        except _ERRORS as error:
            yield (group,), f"cannot be used: {error}"


def _plain(kind: Any) -> type[BaseModel]:  # noqa: ANN401
    """The fields of a dataclass as a mapping's, none of them required."""
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {
        field.name: (_listed(hints[field.name]) | None, _field(_words(hints[field.name])))
        for field in dataclasses.fields(kind)
    }
    return create_model(kind.__name__, __config__=STRICT, **fields)


def _parts(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """The kinds of a union, None left out."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(part for part in parts if part is not type(None))


def _listed(hint: Any) -> Any:  # noqa: ANN401
    """A type as YAML knows it, where what is a tuple here is a list."""
    parts = [_as_list(part) for part in _parts(hint)]
    return Union[tuple(parts)]  # noqa: UP007


def _as_list(kind: Any) -> Any:  # noqa: ANN401
    origin = get_origin(kind)
    sequence = inspect.isclass(origin) and issubclass(origin, Sequence)
    return types.GenericAlias(list, get_args(kind)[:1]) if sequence else kind


def _words(hint: Any) -> str:  # noqa: ANN401
    """What a value has to be."""
    return " or ".join(_WORDS.get(part, "a list") for part in _parts(hint))

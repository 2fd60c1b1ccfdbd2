"""What the results of a sweep depend on, as plain values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkit.eval.sweep import cells
from flowkit.eval.sweep.axes import GROUPS, SETTINGS, Range
from flowkit.grids import GRIDS

if TYPE_CHECKING:
    from flowkit.eval.sweep.config import SweepConfig

_FIELDS = (
    *("reference", "metrics", "extractor", "images", "batch_size", "seed", "exact", "dtype", "variant"),
    *("objectives", *GROUPS),
)


def describe(config: SweepConfig) -> dict[str, Any]:
    """Returns the values of JSON that decide the results of cells, or which cells there are.

    Files that decide (grids, guidance, LoRAs, prompts) have the hash of their content beside their name. Name, storage, trackers,
    retries, pictures kept, device and the number of trials decide nothing of a cell: a study may go on with others.
    """
    inputs = json.dumps(cells.inputs(config), sort_keys=True)
    return {
        **{name: getattr(config, name) for name in _FIELDS},
        **{name: _described(config, name, getattr(config, name)) for name in SETTINGS},
        "inputs": None if inputs == "null" else hashlib.sha256(inputs.encode()).hexdigest(),
        "search": config.search.model_dump(exclude={"trials"}),
        "axes": [
            {
                name: choices.model_dump()
                if isinstance(choices, Range)
                else [_described(config, name, value) for value in choices]
                for name, choices in axes.items()
            }
            for axes in config.axes
        ],
    }


def _described(config: SweepConfig, setting: str, value: Any) -> Any:  # noqa: ANN401
    """A value, with the hash of its file."""
    if setting == "guidance" and value is not None and "file" in value:
        return {**value, "sha256": _sha256(config.path(value["file"]))}
    if setting == "grid" and value is not None and (value not in GRIDS or config.path(value).is_file()):
        return {"file": value, "sha256": _sha256(config.path(value))}
    if setting == "lora" and value is not None and config.path(value).is_file():
        return {"file": value, "sha256": _sha256(config.path(value))}
    return value


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

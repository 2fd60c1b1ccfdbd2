"""The folder of a sweep: what was asked for, the study where no server has it, cells with their pictures, results and report.

sweep.json          the configuration, and where its files and its study are
study.db            the study, unless a database server has it
cells/KEY/          the run of a cell: figures and record, its picture, and features while it is not done
references/         features of the reference's images, shared by the cells
results.json        what is known so far, after each cell
report.html         the page
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from flowkit.eval.provenance import first_difference
from flowkit.eval.runs import write_json
from flowkit.eval.sweep.config import SweepConfig, read
from flowkit.weights import check_writable

SETTINGS = "sweep.json"
_FORMAT = "flowkit.sweep/1"


def check(folder: Path, config: SweepConfig, resume: bool) -> None:
    """Refuses a folder that this sweep cannot use, before anything is loaded.

    Args:
        folder: made later if missing.
        config: the sweep.
        resume: whether a sweep that is there may be gone on with.

    Raises:
        OSError: for a place that cannot be written.
        ValueError: for a folder of something else, of another sweep, or of any where it shall not be resumed.
    """
    check_writable(folder)
    if not (folder / SETTINGS).is_file():
        if folder.exists() and any(
            entry.name != "study.db" and not entry.name.startswith(".") for entry in folder.iterdir()
        ):
            raise ValueError(
                f"{folder} is not empty and holds no {SETTINGS}, so it is no folder of a sweep; choose another"
            )
        return
    if not resume:
        raise ValueError(f"{folder} holds a sweep already; pass resume=True to go on with it, or choose another folder")
    if found := first_difference(_content(folder)["describes"], json.loads(json.dumps(config.describe()))):
        place, old, new = found
        raise ValueError(f"{folder} holds a sweep of another configuration: {place} was {old!r:.80}, now it is {new!r:.80}; choose "
                         "another output, and another name where they share a database")  # fmt: skip


def make(folder: Path, config: SweepConfig, storage: str | None) -> None:
    """Writes what `load` reads.

    Args:
        folder: of the sweep.
        config: the sweep.
        storage: URL of its database, whose password is left out; None means SQLite in the folder.
    """
    write_json(
        folder / SETTINGS,
        {
            "format": _FORMAT,
            "base": str(config.path("").absolute()),
            "storage": None if storage is None else make_url(storage).render_as_string(),
            "config": config.source(),
            "describes": config.describe(),
        },
    )


def load(folder: Path, storage: str | None = None) -> tuple[SweepConfig, str | None]:
    """Returns the sweep of a folder, and the URL of its database; None for SQLite in the folder.

    Args:
        folder: of the sweep.
        storage: URL that is used in place of the one in the folder.

    Raises:
        FileNotFoundError: where there is no sweep.
        ValueError: for one whose files have changed, or whose database asks for a password.
    """
    content = _content(folder)
    config = read(content["config"], Path(content["base"]))
    if found := first_difference(content["describes"], json.loads(json.dumps(config.describe()))):
        place, old, new = found
        raise ValueError(f"the sweep in {folder} has changed since it began: {place} was {old!r:.80}, now it is {new!r:.80}; put "
                         "its files back")  # fmt: skip
    storage = storage or content["storage"]
    if storage is not None and make_url(storage).password == "***":
        raise ValueError(f"the database of {folder} asks for a password, which is not kept; pass --storage URL, or leave the "
                         "password to ~/.pgpass or PGPASSWORD")  # fmt: skip
    return config, storage


def _content(folder: Path) -> Mapping[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"no {SETTINGS} in {folder}, so no sweep began there; pass the output folder of one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another folder") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no sweep of this version; choose another folder")
    return content

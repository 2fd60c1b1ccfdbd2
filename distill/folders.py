"""The folder of a run: complete under its name, or unfinished in a folder beside it, with the settings that it depends on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowkit.eval.provenance import first_difference
from flowkit.eval.runs import write_json
from flowkit.pipelines.loading import STUDENT
from flowkit.weights import check_writable

SETTINGS, HISTORY, CONDITIONS = STUDENT, "training.json", "conditions"
# Temporary files of `flowkit.weights.writing`.
_TORN = re.compile(r"\..+\.\w+\.\w{8}")


def open_folder(folder: Path, work: Path, settings: Mapping[str, Any], resume: bool) -> bool:
    """Returns whether a run is finished; what it left of another try is removed, if that is wanted.

    Args:
        folder: of the finished run.
        work: of the unfinished one, made with its settings if missing.
        settings: values of JSON; a run with others is refused by the name of what differs.
        resume: whether a run that is there is gone on with.

    Raises:
        OSError: for a folder that cannot be written.
        ValueError: for a folder of something else, or a run of other settings.
    """
    check_writable(folder)
    for place in (folder, work):
        _check_ours(place)
        if not resume and place.exists():
            shutil.rmtree(place)
    if _compare(folder, settings):
        _tidy(folder)
        return True
    if not _compare(work, settings):
        write_json(work / SETTINGS, settings)
    return False


def finish(work: Path, folder: Path) -> None:
    """Gives the folder its name, and removes what only an unfinished run needs."""
    if folder.exists():
        folder.rmdir()
    work.rename(folder)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Removes checkpoints, conditioning and what a killed write left; after the rename, since they take long to make again."""
    torn = (file for file in folder.rglob(".*") if _TORN.fullmatch(file.name))
    for file in (*folder.glob("training*/*.safetensors"), *torn):
        file.unlink()
    shutil.rmtree(folder / CONDITIONS, ignore_errors=True)


def _check_ours(folder: Path) -> None:
    """Refuses a folder with anything that no run of ours left there."""
    if not folder.exists() or (folder / SETTINGS).is_file():
        return
    # A run that was killed while it wrote its settings leaves a hidden temporary file.
    if not folder.is_dir() or any(not entry.name.startswith(f".{SETTINGS}.") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not the folder of a distillation; choose another output")


def _compare(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds a run, which must have the same settings."""
    file = folder / SETTINGS
    if not file.is_file():
        return False
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({error}); start anew with resume=False, on the command line --overwrite"
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file} does not hold the settings of a run; start anew with resume=False")
    if found := first_difference({k: stored.get(k) for k in settings}, dict(settings)):
        place, before, now = found
        raise ValueError(f"{folder} holds a run with {place}={before!r:.80}, this one has {now!r:.80}; choose another output, or "
                         "start anew with resume=False, on the command line --overwrite")  # fmt: skip
    return True

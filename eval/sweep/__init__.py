"""Sweeps: many ways to sample, measured alike, shared by any number of workers, and shown on one page."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowkit.eval.sweep.study import Entry


def run_sweep(
    config: str | PathLike[str] | Mapping[str, Any],
    output: str | PathLike[str] | None = None,
    resume: bool = True,
    storage: str | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Entry]:
    """Measures every cell of a sweep, and writes ``results.json`` and ``report.html``.

    All cells share seeds, inputs, reference and extractor, so that their differences are paired. Called by several processes, here
    or on other machines, with the same sweep and database, they share the cells; each returns when all cells are done. Killed at
    any moment, it goes on where it stopped, in the middle of a cell too. A cell that fails is noted with its error, and the rest go
    on. Started by ``accelerate launch``, all processes share one cell at a time.

    Args:
        config: a YAML file, or its content; ``docs/sweeps.md`` has every field.
        output: folder, made if missing; workers on several machines should share it, for resuming and for the pictures. None means
            the sweep's name, in the current folder.
        resume: go on with the sweep in ``output``; False refuses a folder that holds one.
        storage: URL of the database in place of the configuration's; None there too means SQLite in ``output``.
        retry_failed: give cells that failed another try.
        progress: show how far it is.

    Returns:
        The cells in order: settings, state ("done" or "failed"), figures and record, error.

    Raises:
        FileNotFoundError: for a file, a reference or weights that are not there.
        ImportError: for an extra or a tracker that is not installed.
        OSError: for a database that cannot be reached, a folder that cannot be written, or a full disk.
        ValueError: for a faulty configuration, with line and field, or a folder or study of another one.
    """
    try:
        import optuna  # noqa: F401
        import psutil  # type: ignore[import-untyped]  # noqa: F401
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ImportError(f'a sweep needs {error.name}: pip install "flowkit-diffusion[sweep]"') from error
    from flowkit.eval.sweep.runner import run

    return run(config, output, resume, storage, retry_failed, progress)

"""``flowkit sweep``: commands are declared here and carried out in `flowkit.cli.sweeping`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

sweep = typer.Typer(no_args_is_help=True, help="Measure many ways to sample, and see which to use.")

_File = Annotated[Path, typer.Argument(metavar="FILE", help="The sweep, a YAML file; docs/sweeps.md has every field.")]
_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of the sweep.")]
_Storage = Annotated[
    str | None,
    typer.Option(
        help="Database of the study, such as postgresql://user@host/database, in place of the sweep's own.",
        show_default="the sweep's, or SQLite in the output folder",
        metavar="URL",
    ),
]


@sweep.command("run")
def _run(
    file: _File,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder, made if missing.", show_default="the sweep's name", metavar="DIR"),
    ] = None,
    storage: _Storage = None,
) -> None:
    """Measure every cell and write the report; run again to go on after a stop.

    Start it several times, here or on machines that share the database, and the workers share the cells. A cell on several GPUs:
    accelerate launch -m flowkit.cli sweep run FILE
    """
    from flowkit.cli.sweeping import run

    run(file, output, storage)


@sweep.command("plan")
def _plan(file: _File) -> None:
    """Show the cells and what they will cost, from one batch of each kind; nothing is written."""
    from flowkit.cli.sweeping import plan

    plan(file)


@sweep.command("resume")
def _resume(
    folder: _Folder,
    failed: Annotated[bool, typer.Option("--failed", help="Give failed cells another try.")] = False,
    storage: _Storage = None,
) -> None:
    """Go on with a sweep, from its folder."""
    from flowkit.cli.sweeping import resume

    resume(folder, failed, storage)


@sweep.command("status")
def _status(folder: _Folder, storage: _Storage = None) -> None:
    """Show which cells are done, running, waiting and failed, and the time left."""
    from flowkit.cli.sweeping import status

    status(folder, storage)


@sweep.command("best")
def _best(
    folder: _Folder,
    evaluations: Annotated[
        float | None, typer.Option(help="Only cells of at most so many network evaluations an image.", metavar="N")
    ] = None,
    storage: _Storage = None,
) -> None:
    """Show the Pareto front: cells that no other beats in every objective."""
    from flowkit.cli.sweeping import best

    best(folder, evaluations, storage)


@sweep.command("export")
def _export(
    folder: _Folder,
    file_format: Annotated[Literal["markdown", "csv", "latex", "json"], typer.Option("--format")] = "markdown",
    output: Annotated[Path | None, typer.Option(help="File to write, in place of printing.", metavar="FILE")] = None,
    storage: _Storage = None,
) -> None:
    """Print the table of all cells, as far as they are done."""
    from flowkit.cli.sweeping import export

    export(folder, file_format, output, storage)

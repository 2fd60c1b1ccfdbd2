"""``flowkit report``: the page of a job, or its table as text; the work is in `flowkit.eval`, imported when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def report(
    directory: Annotated[
        Path, typer.Argument(help="Folder of a job that holds results.json, such as flowkit-demo.", metavar="DIR")
    ],
    table: Annotated[
        Literal["markdown", "csv", "latex", "json"] | None,
        typer.Option(help="Print the table in this format instead of writing the page."),
    ] = None,
) -> None:
    """Write report.html: one file with what to use, table, plots, pictures, and how to repeat it."""
    if table:
        from flowkit.eval.tables import export

        typer.echo(export(directory, table), nl=False)
        return
    from flowkit.eval.report import write_report

    typer.echo(f"Report: {write_report(directory)}")

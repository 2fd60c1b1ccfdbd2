"""Options that commands share: one declaration, one help text."""

from __future__ import annotations

from typing import Annotated

import typer

WHAT, MACHINE = "What to draw", "Output and machine"  # groups of options in the help

Model = Annotated[
    str, typer.Argument(help="digits or shapes (embedded), a folder of diffusers, or owner/name of a hub model.")
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="What to draw; give it again for more.", metavar="TEXT", rich_help_panel=WHAT),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to draw.", metavar="TEXT", rich_help_panel=WHAT)]
Labels = Annotated[
    str | None, typer.Option(help="Classes to draw, such as 0,3,7 or 0-9.", metavar="LIST", rich_help_panel=WHAT)
]
Device = Annotated[
    str,
    typer.Option(help="auto is cuda where there is one, else cpu.", metavar="NAME", rich_help_panel=MACHINE),
]
Variant = Annotated[
    str | None, typer.Option(help="Variant of the weights, such as fp16.", metavar="NAME", rich_help_panel=MACHINE)
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep each network on the CPU until it is needed.", rich_help_panel=MACHINE),
]

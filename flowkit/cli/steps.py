"""``flowkit steps``: the command is declared here and carried out in `flowkit.cli.stepping`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand

from flowkit.cli.declared import MACHINE, WHAT, Device, Labels, Model, NegativePrompt, Offload, Prompt, Variant

_SEARCH, _MEASURE = "How to search", "What to measure"  # groups of options in the help
_NUMBERS = re.compile(r"\d[\d,]*")


class Numbers(TyperCommand):
    """A command whose ``--steps 2 4 6`` is ``--steps 2,4,6``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Joins the numbers after ``--steps``."""
        joined: list[str] = []
        for arg in args:
            if joined[-2:-1] == ["--steps"] and _NUMBERS.fullmatch(joined[-1]) and _NUMBERS.fullmatch(arg):
                joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


def steps(
    model: Model,
    numbers: Annotated[
        str,
        typer.Option("--steps", help="Numbers of steps to find a grid for: 4, or several as 2 4 6 8.", metavar="K ..."),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the grids, made if missing; run again to go on after a stop.", metavar="DIR")
    ],
    prompt: Prompt = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one a line, or a .jsonl of pipeline arguments.", rich_help_panel=WHAT),
    ] = None,
    negative_prompt: NegativePrompt = None,
    labels: Labels = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale that the grids are for.",
            show_default="the pipeline's",
            metavar="W",
            rich_help_panel=WHAT,
        ),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other argument of the pipeline: height=512.", metavar="NAME=VALUE", rich_help_panel=WHAT
        ),
    ] = None,
    method: Annotated[
        Literal["bellman", "evolve"],
        typer.Option(help="bellman: anchors of a fine run; evolve: evolutionary search.", rich_help_panel=_SEARCH),
    ] = "bellman",
    objective: Annotated[
        Literal["final", "local", "fid"],
        typer.Option(
            help="final: the error of the last sample; local: the sum of each step's own error, without a search, which can lose "
            "to even steps; fid, of evolve alone: FD from --reference.",
            rich_help_panel=_SEARCH,
        ),
    ] = "final",
    solver: Annotated[
        str | None,
        typer.Option(
            help="Solver that will run on the grids, a deterministic one.",
            show_default="the model's own if its scheduler is ours, or euler",
            metavar="NAME",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    anchors: Annotated[
        int, typer.Option(help="Fine steps, whose levels a grid chooses from.", metavar="N", rich_help_panel=_SEARCH)
    ] = 100,
    samples: Annotated[
        int, typer.Option(help="Trajectories to search on, at least 2.", metavar="N", rich_help_panel=_SEARCH)
    ] = 100,
    budget: Annotated[
        int,
        typer.Option(
            help="Network evaluations of each sample that a search may take for each number of steps.",
            metavar="N",
            rich_help_panel=_SEARCH,
        ),
    ] = 500,
    seed: Annotated[int, typer.Option(help="Seed of all noise.", metavar="N", rich_help_panel=_SEARCH)] = 0,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Further samples, on which errors are measured, at least 2.",
            show_default="as many as --samples",
            metavar="N",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to measure FD against: digits, shapes, a file of statistics, or images.",
            show_default="no FD",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each FD.", metavar="N", rich_help_panel=_MEASURE)] = 2000,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples of a call.",
            show_default="4 with prompts, 64 otherwise",
            metavar="N",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or auto.", metavar="NAME", rich_help_panel=MACHINE)
    ] = "auto",
    device: Device = "auto",
    variant: Variant = None,
    offload: Offload = False,
) -> None:
    """Find the best levels for a few steps of your model and solver, and measure them against uniform, Karras and its scheduler.

    Says what it will cost before it starts. Killed at any moment, the same command goes on where it stopped.
    """
    from flowkit.cli.options import Options
    from flowkit.cli.stepping import Search, run

    run(
        Options(
            model=model,
            output=output,
            prompts=prompt or (),
            prompts_file=prompts,
            negative_prompt=negative_prompt,
            labels=labels,
            seed=seed,
            batch_size=batch_size,
            scheduler="keep",
            guidance=guidance,
            arguments=arg or (),
            dtype=dtype,
            device=device,
            variant=variant,
            offload=offload,
        ),
        Search(numbers, method, objective, solver, anchors, samples, budget, held_out, reference, num_images),
    )

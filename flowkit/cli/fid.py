"""Options of ``flowkit fid``; `flowkit.cli.evaluation` carries the commands out, and is imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

_IMAGES, _HOW, _MACHINE = "Images", "How a model is sampled", "Output and machine"


class _Default(TyperGroup):
    """``flowkit fid SOURCE`` is ``flowkit fid evaluate SOURCE``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Puts the name of the command in where there is none."""
        if not args or args[0] not in self.commands:
            args = ["evaluate", *(args or ["--help"])]
        return super().parse_args(ctx, args)


fid = typer.Typer(
    cls=_Default, add_completion=False, help="Measure images or a model: FID and other metrics, with error bars."
)

Source = Annotated[
    str,
    typer.Argument(help="A model: digits, shapes, a folder of diffusers or owner/name of the hub; or images: a folder, .zip, .tar "
                   "or .npz."),
]  # fmt: skip
Count = Annotated[
    int | None,
    typer.Option("--num-images", help="Number of images.", metavar="N", show_default="all images, 50,000 of a model"),
]
Labels = Annotated[
    str | None,
    typer.Option(help="Classes to draw in turn, such as 0,3,7 or 0-9.", metavar="LIST", rich_help_panel=_HOW),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="File of prompts, one a line, or a .jsonl of pipeline arguments.", rich_help_panel=_HOW),
]
Steps = Annotated[
    int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's", metavar="N", rich_help_panel=_HOW)
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's", metavar="W", rich_help_panel=_HOW)
]
Scheduler = Annotated[
    str, typer.Option(help="flowkit, keep, or a class of diffusers.", metavar="NAME", rich_help_panel=_HOW)
]
Solver = Annotated[str | None, typer.Option(help="Solver of our scheduler.", metavar="NAME", rich_help_panel=_HOW)]
Grid = Annotated[
    str | None, typer.Option(help="Grid of our scheduler, a name or a file.", metavar="NAME|FILE", rich_help_panel=_HOW)
]
Arg = Annotated[
    list[str] | None,
    typer.Option(help="Any other argument of the pipeline.", metavar="NAME=VALUE", rich_help_panel=_HOW),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of a model's noise.", show_default="0", metavar="N", rich_help_panel=_HOW)
]
Batch = Annotated[int, typer.Option(help="Images at a time.", metavar="N", rich_help_panel=_MACHINE)]
Dtype = Annotated[
    str, typer.Option(help="Of a model: float32, bfloat16, float16 or auto.", metavar="NAME", rich_help_panel=_MACHINE)
]
Device = Annotated[
    str, typer.Option(help="Of a model: auto is cuda where there is one.", metavar="NAME", rich_help_panel=_MACHINE)
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Sums without rounding, in which no order counts.", rich_help_panel=_MACHINE)
]
Channels = Annotated[int, typer.Option(help="Of image files: 3 or 1.", metavar="N", rich_help_panel=_IMAGES)]
Size = Annotated[
    int | None,
    typer.Option(
        help="Crop image files to squares and resize them to so many pixels.", metavar="N", rich_help_panel=_IMAGES
    ),
]
Alpha = Annotated[
    str, typer.Option(help="Transparent files: refuse, white, black or drop.", metavar="NAME", rich_help_panel=_IMAGES)
]


@fid.command("evaluate")
def _evaluate(
    source: Source,
    reference: Annotated[
        str | None,
        typer.Option(
            help="digits, shapes, a file of statistics (.safetensors, .npz, .pkl, .pt), or images.", show_default="none"
        ),
    ] = None,
    num_images: Count = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Any of fid, fid_infinity, kid, kid_subsets, precision, recall, density, coverage, cmmd, cmmd_unbiased, is, "
            "is_adm; kid/fid-clean is of that extractor alone.",
            metavar="LIST",
        ),
    ] = "fid",
    extractor: Annotated[
        str | None,
        typer.Option(
            help="classifier, pixels, fid-tf, adm, fid-clean, fid-pytorch, fid-torchmetrics, fd-dinov2, cmmd, clip.",
            show_default="the reference's own",
            metavar="LIST",
        ),
    ] = None,
    labels: Labels = None,
    prompts: Prompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = "flowkit",
    solver: Solver = None,
    grid: Grid = None,
    arg: Arg = None,
    seed: Seed = None,
    channels: Channels = 3,
    size: Size = None,
    alpha: Alpha = "refuse",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; run again to go on after a stop.", metavar="DIR", rich_help_panel=_MACHINE
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write figures and record to a file.", metavar="FILE", rich_help_panel=_MACHINE)
    ] = None,
    batch_size: Batch = 64,
    exact: Exact = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure images or a model against a reference, with error bars and a record.

    Also: flowkit fid stats | weights | compare | summarize, each with --help. On several GPUs: accelerate launch -m flowkit.cli
    fid ...
    """
    from flowkit.cli.evaluation import Sampling, evaluate

    sampling = Sampling(source, num_images, labels, prompts, steps, guidance, scheduler, solver, grid, arg or (), seed, channels,
                        size, alpha, batch_size, exact, dtype, device)  # fmt: skip
    evaluate(sampling, reference, metrics.split(","), extractor, output, json)


@fid.command("stats")
def _stats(
    source: Source,
    output: Annotated[
        Path, typer.Option(help="The .safetensors or .npz file; other tools read the latter.", metavar="FILE")
    ],
    extractor: Annotated[
        str | None, typer.Option(help="As of flowkit fid.", show_default="that of --like, or fid-tf", metavar="NAME")
    ] = None,
    like: Annotated[str | None, typer.Option(help="A reference whose extractor to use.", metavar="REFERENCE")] = None,
    num_images: Count = None,
    labels: Labels = None,
    prompts: Prompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = "flowkit",
    solver: Solver = None,
    grid: Grid = None,
    arg: Arg = None,
    seed: Seed = None,
    channels: Channels = 3,
    size: Size = None,
    alpha: Alpha = "refuse",
    batch_size: Batch = 64,
    exact: Exact = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Make reference statistics of images or of a model's samples."""
    from flowkit.cli.evaluation import Sampling, stats

    sampling = Sampling(source, num_images, labels, prompts, steps, guidance, scheduler, solver, grid, arg or (), seed, channels,
                        size, alpha, batch_size, exact, dtype, device)  # fmt: skip
    stats(sampling, extractor, like, output)


@fid.command("weights")
def _weights(
    file: Annotated[Path, typer.Argument(help="Inception's .pth file of torch-fidelity or pytorch-fid.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to.", metavar="DIR", show_default="where flowkit looks for weights"),
    ] = None,
) -> None:
    """Convert Inception weights to safetensors, and check their hash."""
    from flowkit.cli.evaluation import weights

    weights(file, output)


@fid.command("compare")
def _compare(
    one: Annotated[Path, typer.Argument(help="Folder or result.json of an evaluation.")],
    other: Annotated[Path, typer.Argument(help="The same of another model or sampler, with the same seed and inputs.")],
    level: Annotated[float, typer.Option(help="Of the interval.", metavar="P")] = 0.95,
) -> None:
    """Print paired differences of two evaluations, with intervals."""
    from flowkit.cli.evaluation import compare

    compare(one, other, level)


@fid.command("summarize")
def _summarize(
    results: Annotated[
        list[Path], typer.Argument(help="Folders or result.json files that differ in their seed alone.")
    ],
    level: Annotated[float, typer.Option(help="Of the interval.", metavar="P")] = 0.95,
) -> None:
    """Print means and spreads over blocks of seeds."""
    from flowkit.cli.evaluation import summarize

    summarize(results, level)

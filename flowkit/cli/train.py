"""``flowkit train``: its commands are declared here and carried out in `flowkit.cli.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flowkit.cli.declared import MACHINE, Device, Model, Variant

_DATA, _TRAINING, _LOOK = "The data", "How to train", "What to look at"  # groups of options in the help

train = typer.Typer(help="Train a model from data.", no_args_is_help=True)


@train.callback()
def _commands() -> None:
    pass


@train.command("flow")
def flow(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="digits or shapes (embedded); a folder or .zip of images, a folder for each class, or a .txt or metadata.jsonl "
            "of captions; shards of webdataset, as 'data/{000..063}.tar'; an .npz; or a data set of datasets, a folder or a name.",
            metavar="PATH|NAME",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the model, made if missing; run again to go on after a stop.", metavar="DIR")
    ],
    init: Annotated[
        Literal["random", "weights"],
        typer.Option(help="Begin with new weights, or with those of MODEL.", rich_help_panel=_TRAINING),
    ] = "random",
    lora: Annotated[
        int | None,
        typer.Option(
            help="Train adapters of this rank, with --init weights.",
            show_default="all weights",
            metavar="RANK",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.", metavar="N", rich_help_panel=_TRAINING)] = 3_000,
    batch_size: Annotated[
        int, typer.Option(help="Images of an update, over all processes.", metavar="N", rich_help_panel=_TRAINING)
    ] = 64,
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate, of AdamW.", metavar="X", rich_help_panel=_TRAINING)
    ] = 1e-3,
    ema: Annotated[
        float,
        typer.Option(help="Decay of the averaged weights, the result.", metavar="X", rich_help_panel=_TRAINING),
    ] = 0.999,
    times: Annotated[
        str,
        typer.Option(
            help="Law of the flow times: uniform, logit-normal, u-shaped, mode, or levels as 0.25,0.5,1.",
            metavar="NAME",
            rich_help_panel=_TRAINING,
        ),
    ] = "uniform",
    coupling: Annotated[
        Literal["independent", "ot", "sinkhorn"],
        typer.Option(
            help="Which noise goes with which image: any, or by optimal transport within the batch and class.",
            rich_help_panel=_TRAINING,
        ),
    ] = "independent",
    dropout: Annotated[
        float,
        typer.Option(
            help="How often label or caption is left out, for guidance.", metavar="P", rich_help_panel=_TRAINING
        ),
    ] = 0.1,
    precision: Annotated[
        Literal["no", "bf16", "fp16"],
        typer.Option(help="Arithmetic of the network; no is float32.", rich_help_panel=_TRAINING),
    ] = "no",
    accumulate: Annotated[
        int, typer.Option(help="Parts of a batch, for less memory.", metavar="N", rich_help_panel=_TRAINING)
    ] = 1,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Recompute activations, for less memory.", rich_help_panel=_TRAINING),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seed of weights, order and noise.", metavar="N", rich_help_panel=_TRAINING)
    ] = 0,
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels along each side; images are resized and their middle cut out.",
            show_default="the model's own",
            metavar="N",
            rich_help_panel=_DATA,
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images.", rich_help_panel=_DATA)] = False,
    alpha: Annotated[
        Literal["refuse", "white", "black", "drop"],
        typer.Option(help="What becomes of transparent images.", rich_help_panel=_DATA),
    ] = "refuse",
    split: Annotated[str, typer.Option(help="Split of datasets.", metavar="NAME", rich_help_panel=_DATA)] = "train",
    image_column: Annotated[
        str | None,
        typer.Option(
            help="Column of datasets.", show_default="the one of images", metavar="NAME", rich_help_panel=_DATA
        ),
    ] = None,
    condition_column: Annotated[
        str | None,
        typer.Option(help="Column of datasets.", show_default="label, or text", metavar="NAME", rich_help_panel=_DATA),
    ] = None,
    every: Annotated[
        int,
        typer.Option(
            help="Draw and measure samples every N updates; 0 is at the end alone.", metavar="N", rich_help_panel=_LOOK
        ),
    ] = 0,
    sample_steps: Annotated[
        int, typer.Option(help="Denoising steps of these samples.", metavar="N", rich_help_panel=_LOOK)
    ] = 16,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to measure FD against: digits, shapes, a file of statistics, or images.",
            show_default="no FD",
            rich_help_panel=_LOOK,
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each FD.", metavar="N", rich_help_panel=_LOOK)] = 2_000,
    tracker: Annotated[
        str | None,
        typer.Option(help="Of accelerate: tensorboard, wandb, ...", metavar="NAME", rich_help_panel=_LOOK),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that decode images ahead.",
            show_default="one for each core but one, 8 at most",
            metavar="N",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Device = "auto",
    variant: Variant = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Remove what an earlier training left in the folder.", rich_help_panel=MACHINE
        ),
    ] = False,
) -> None:
    """Train a flow on images: MODEL says architecture, path and conditions (labels, captions or none).

    Says what it will take before it starts. Killed at any moment, the same command goes on where it stopped, and ends the same. On
    several GPUs: accelerate launch -m flowkit.cli train flow ...
    """
    from flowkit.cli.options import Options
    from flowkit.cli.training import run

    run(
        Options(model=model, output=output, scheduler="keep", device=device, variant=variant, overwrite=overwrite),
        data,
        lora=lora,
        training={
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "ema": ema,
            "precision": precision,
            "accumulate": accumulate,
            "checkpointing": checkpointing,
            "every": every,
            "tracker": tracker,
        },
        init=init,
        times=times,
        coupling=coupling,
        dropout=dropout,
        flip=flip,
        size=size,
        alpha=alpha,
        split=split,
        image_column=image_column,
        condition_column=condition_column,
        sample_steps=sample_steps,
        reference=reference,
        num_images=num_images,
        workers=workers,
        seed=seed,
    )

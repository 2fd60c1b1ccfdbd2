"""The command line, ``flowkit COMMAND``.

Commands are declared here and carried out elsewhere: a command's module, and torch with it, is imported when the command runs,
so that ``--help`` and wrong options answer at once.
"""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from flowkit.cli.declared import MACHINE, WHAT, Device, Labels, Model, NegativePrompt, Offload, Prompt, Variant
from flowkit.cli.distill import distill
from flowkit.cli.fid import fid
from flowkit.cli.report import report
from flowkit.cli.steps import Numbers, steps
from flowkit.cli.sweep import sweep
from flowkit.cli.train import train

# What users cause: a wrong value, a missing or unreadable file, a missing extra, a run that ended in NaN, too little
# memory.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError)


class _Commands(TyperGroup):
    """Turns what a command raises into one line and an exit code."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Runs the command: exit code 2 on a user's error, 130 when interrupted."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without a ± shall not cost the rest
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has left (`| head`), which is not an error of ours
            raise
        except USER_ERRORS as error:
            if ctx.params["show_traceback"]:
                traceback.print_exc()
            typer.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            raise typer.Exit(2) from None


_HOW = "How to sample"  # a group of options in the help

app = typer.Typer(
    cls=_Commands,
    help="More quality per network evaluation from diffusion and flow models of diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import flowkit

        typer.echo(f"flowkit {flowkit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the full traceback of an error, not its one line alone.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("demo")
def _demo(
    data: Annotated[
        Literal["digits", "shapes"],
        typer.Option(help="Embedded model: real handwritten digits (8x8, grey) or drawn shapes (16x16, colour)."),
    ] = "digits",
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures, results.json and report.html; made if missing.")
    ] = Path("flowkit-demo"),
    fast: Annotated[bool, typer.Option("--fast", help="About 30 seconds: fewer images and training steps.")] = False,
    samples: Annotated[int, typer.Option(help="Images sampled for each row of the table.", metavar="N")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of all noise, the same for every row.", metavar="N")] = 0,
) -> None:
    """Swap the scheduler, optimise steps, distil a one-step student, and measure each of them."""
    from flowkit.cli.demo import run

    run(data=data, output=output, fast=fast, samples=samples, seed=seed)


@app.command("grid")
def _grid(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Grid files, lists such as 1.0,0.6,0.0, or names: uniform (also called trailing), leading, linspace, "
            "straight, karras, exponential, beta, ays-sd15, ays-sdxl, ays-svd.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of a named grid; files and lists are resampled to it, log-linearly.",
            metavar="N",
            min=1,
            max=10_000,
            show_default="the first file's or list's, or 10",
        ),
    ] = None,
    path: Annotated[
        Literal["flow", "vp", "cosine", "ve", "edm"] | None,
        typer.Option(
            help="Path to build on, and to convert files to; vp has Stable Diffusion's betas.",
            show_default="a file's own, vp or edm for ays, flow for the rest",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Take the path of a saved pipeline or scheduler instead.", metavar="DIR"),
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Push flow grids towards noise by K > 0.", metavar="K")] = None,
    mu: Annotated[
        float | None,
        typer.Option(help="The same by exp(M), as dynamic shifting does.", metavar="M"),
    ] = None,
    terminal: Annotated[
        float | None,
        typer.Option(help="Stretch flow grids to this last level before 0.", metavar="S"),
    ] = None,
    whole_times: Annotated[
        bool, typer.Option("--whole-times", help="Move each level to the nearest whole model time.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print every solver's facts, and its table of the run on each SOURCE.")
    ] = False,
    solver: Annotated[str | None, typer.Option(help="The same for one solver.", metavar="NAME")] = None,
    for_stock: Annotated[
        str | None,
        typer.Option(
            help="Print the call that puts a stock scheduler on the grid: a class of diffusers, or a saved pipeline or "
            "scheduler. A class is built from --model if given, else with its defaults.",
            metavar="CLASS|DIR",
        ),
    ] = None,
    stock_mu: Annotated[
        float | None,
        typer.Option(help="The mu that this scheduler will be given.", metavar="M"),
    ] = None,
    comfyui: Annotated[
        bool, typer.Option("--comfyui", help="Print the levels for ComfyUI's ManualSigmas node.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the grid to a file.", metavar="FILE")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the levels: a .png, .svg or .pdf file.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show, compare, convert and export grids: the noise levels of a sampler's steps."""
    if not (sources or show or solver):
        raise ValueError("no grid named; name one such as uniform, a file or a list, or add --show for the solvers")
    from flowkit.cli.grid import run

    run(
        sources or (),
        steps=steps,
        path=path,
        model=model,
        shift=shift,
        mu=mu,
        terminal=terminal,
        whole_times=whole_times,
        show=show,
        solver=solver,
        for_stock=for_stock,
        stock_mu=stock_mu,
        comfyui=comfyui,
        save=save,
        plot=plot,
        as_json=as_json,
    )


@app.command("sample")
def _sample(
    model: Model,
    output: Annotated[
        Path, typer.Option(help="Folder of the samples, made if missing; run again to go on after a stop.")
    ],
    lora: Annotated[
        Path | None,
        typer.Option(help="Adapters: a .safetensors file or a folder, such as a student's.", metavar="FILE|DIR"),
    ] = None,
    prompt: Prompt = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts, one a line; in a .jsonl one dict of pipeline arguments a line, which win over the options.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    negative_prompt: NegativePrompt = None,
    labels: Labels = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of samples, going round the inputs.",
            show_default="one for each input",
            metavar="N",
            rich_help_panel=WHAT,
        ),
    ] = None,
    start: Annotated[int, typer.Option(help="Index of the first sample.", metavar="N", rich_help_panel=WHAT)] = 0,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the run. Sample i is a function of (seed, i), in any batch and any process.",
            metavar="N",
            rich_help_panel=WHAT,
        ),
    ] = 0,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other argument of the pipeline, its value in JSON or text: height=512, true_cfg_scale=4, image=cat.png.",
            metavar="NAME=VALUE",
            rich_help_panel=WHAT,
        ),
    ] = None,
    scheduler: Annotated[
        str,
        typer.Option(
            help="flowkit: ours, from the configuration of the model's own; keep: the model's own; or a class of diffusers.",
            metavar="NAME",
            rich_help_panel=_HOW,
        ),
    ] = "flowkit",
    solver: Annotated[
        str | None,
        typer.Option(
            help="Solver of our scheduler, such as unipc or heun.",
            show_default="the model's own",
            metavar="NAME",
            rich_help_panel=_HOW,
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Grid of our scheduler: a file of flowkit, or a name such as uniform or karras.",
            show_default="the model's own",
            metavar="NAME|FILE",
            rich_help_panel=_HOW,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps.", show_default="the grid's, or the pipeline's", metavar="N", rich_help_panel=_HOW
        ),
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Static shift of a flow grid towards noise.", metavar="X", rich_help_panel=_HOW)
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Noise of stochastic steps: 0 none, 1 ancestral.", metavar="X", rich_help_panel=_HOW),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale.", show_default="the pipeline's", metavar="W", rich_help_panel=_HOW),
    ] = None,
    knob: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other knob of the scheduler: timestep_spacing=trailing, sigma_max=10.",
            metavar="NAME=VALUE",
            rich_help_panel=_HOW,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples of a call.",
            show_default="1 for video and sound, 4 with prompts, 16 otherwise",
            metavar="N",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png, or npz (one file, arr_0 uint8 NHWC, labels in arr_1); of video webp, gif, mp4 or npz; of sound wav.",
            show_default="png, webp, wav",
            metavar="NAME",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    fps: Annotated[int, typer.Option(help="Frames a second of a video.", metavar="N", rich_help_panel=MACHINE)] = 16,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: float32 on the CPU, elsewhere as the weights are saved.",
            metavar="NAME",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    device: Device = "auto",
    variant: Variant = None,
    offload: Offload = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Remove samples of other settings in the folder.", rich_help_panel=MACHINE),
    ] = False,
) -> None:
    """Sample from any model of diffusers: same seeds, same samples, whatever the batch and the number of processes.

    Killed at any moment, the same command goes on where it stopped. On several GPUs: accelerate launch -m flowkit.cli sample ...
    """
    from flowkit.cli.options import Options
    from flowkit.cli.sample import run

    run(
        Options(
            model=model,
            output=output,
            lora=lora,
            prompts=prompt or (),
            prompts_file=prompts,
            negative_prompt=negative_prompt,
            labels=labels,
            count=count,
            start=start,
            seed=seed,
            batch_size=batch_size,
            scheduler=scheduler,
            solver=solver,
            grid=grid,
            steps=steps,
            shift=shift,
            eta=eta,
            guidance=guidance,
            knobs=knob or (),
            arguments=arg or (),
            file_format=file_format,
            fps=fps,
            dtype=dtype,
            device=device,
            variant=variant,
            offload=offload,
            overwrite=overwrite,
        )
    )


app.command("steps", cls=Numbers)(steps)
app.add_typer(distill, name="distill")
app.add_typer(fid, name="fid")
app.command("report")(report)
app.add_typer(sweep, name="sweep")
app.add_typer(train, name="train")


def main() -> None:
    """Runs the command line on ``sys.argv``; the entry point of the ``flowkit`` script."""
    app(prog_name="flowkit")

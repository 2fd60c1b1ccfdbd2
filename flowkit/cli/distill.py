"""``flowkit distill``: a command a method, declared here and carried out in `flowkit.cli.distilling`.

Options are rows of tables, those that all methods share and those of each; one that is not given is None, and then the file of
``--config`` decides, or the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flowkit.cli.declared import MACHINE, WHAT, Labels, NegativePrompt, Prompt, Variant

distill = typer.Typer(
    no_args_is_help=True,
    help="Train a student that needs few steps; docs/distill.md says which method is for whom.",
)

_METHOD, _TRAINING, _MEASURE = "The method", "The training", "What to measure"  # groups of options in the help


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:  # noqa: ANN401
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(
    name: str,
    kind: Any,  # noqa: ANN401
    words: str,
    shown: str | bool = False,
    metavar: str | None = None,
    panel: str | None = None,
    flags: Sequence[str] = (),
) -> inspect.Parameter:
    """An option.

    Args:
        name: of the parameter, and of the option where ``flags`` names none.
        kind: of its value, beside None.
        words: of the help.
        shown: the default, for the help.
        metavar: the value in the help.
        panel: group of options.
        flags: names of the option.
    """
    option = typer.Option(*flags, help=words, show_default=shown, metavar=metavar, rich_help_panel=panel)
    return _parameter(name, Annotated[kind | None, option])


_MODEL = typer.Argument(
    help="The teacher: digits or shapes (embedded), a folder of diffusers, or owner/name of a hub model.",
    show_default="that of --config",
)
_SHARED = (
    _parameter("model", Annotated[str | None, _MODEL]),
    _option("config", Path, "YAML file of settings, as in docs/distill.md; options win.", False, "FILE"),
    _option("output", Path, "Folder of the student; run again to go on after a stop.", "that of --config", "DIR"),
    _parameter("prompt", Prompt),
    _option("prompts", Path, "File of prompts, one a line, or a .jsonl of pipeline arguments.", False, "FILE", WHAT),
    _parameter("negative_prompt", NegativePrompt),
    _parameter("labels", Labels),
    _option(
        "guidance", float, "Guidance scale of the teacher. The student learns what it gives, and is called without.",
        "the pipeline's", "W", WHAT,
    ),
    _option("arg", list[str], "Any other argument of the pipeline: height=512.", False, "NAME=VALUE", WHAT),
    _option(
        "samples", int, "Samples of the teacher to learn from.", "10,000, and at least one for each input", "N", WHAT
    ),
    _option(
        "real", str, "Real images to learn from beside the samples, as --data of flowkit train flow.", False, "DATA", WHAT
    ),
    _option("pairs", Path, "An earlier recording in the place of a new one.", False, "DIR", WHAT),
    _option("seed", int, "Seed of all noise.", "0", "N", WHAT),
    _option("steps", int, "Updates.", "the method's", "N", _TRAINING),
    _option("lora", int, "Train adapters of this rank, not all weights.", False, "RANK", _TRAINING),
    _option("learning_rate", float, "Highest learning rate.", "0.001", "X", _TRAINING),
    _option("precision", Literal["no", "bf16", "fp16"], "Arithmetic of the student.", "no", None, _TRAINING),
    _option("train_batch_size", int, "Rows of an update, over all processes.", "64", "N", _TRAINING),
    _option("accumulate", int, "Parts of a batch, one after the other: less memory.", "1", "N", _TRAINING),
    _option(
        "checkpointing", bool, "Recompute activations: less memory, a third more time.", "no", None, _TRAINING,
        ["--checkpointing/--no-checkpointing"],
    ),
    _option("ema", float, "Decay of the averaged weights, the result.", "0.99", "X", _TRAINING),
    _option("profiles", str, "Lengths of power-function averages to keep: 0.05,0.1.", False, "LIST", _TRAINING),
    _option("every", int, "Updates between two looks at the student; 0: at the end.", "0", "N", _TRAINING),
    _option("tracker", str, "Of accelerate: tensorboard, wandb, ...", False, "NAME", _TRAINING),
    _option(
        "setting", list[str], "Any other of flowkit.distill.Training: warmup=0.1.", False, "NAME=VALUE", _TRAINING
    ),
    _option(
        "reference", str, "What to measure FD against: digits, shapes, a file of statistics, or images.", "no FD",
        None, _MEASURE,
    ),
    _option("num_images", int, "Images of each FD.", "2000", "N", _MEASURE),
    _option("batch_size", int, "Samples of a call of the teacher.", "4 with prompts, 64 otherwise", "N", MACHINE),
    _option("dtype", str, "Of the teacher: float32, bfloat16, float16 or auto.", "auto", "NAME", MACHINE),
    _option("device", str, "auto is cuda where there is one, else cpu.", "auto", "NAME", MACHINE),
    _parameter("variant", Variant),
    _option("overwrite", bool, "Remove what another run left there.", False, None, MACHINE, ["--overwrite"]),
)  # fmt: skip

_EVALUATIONS = _option(
    "evaluations", int, "Network evaluations of the teacher for each sample.", "8, with guidance 25", "N", _METHOD
)
_SOLVER = _option("solver", str, "Solver of the teacher, a deterministic one.", "unipc", "NAME", _METHOD)


def _times(shown: str) -> inspect.Parameter:
    words = "Flow times of a batch: noise, uniform, u-shaped, logit-normal, mode, or levels: 0.25,0.5,1.0."
    return _option("times", str, words, shown, "NAME", _METHOD)


def _metric(shown: str, kinds: Any = Literal["l2", "pseudo-huber", "lpips"]) -> inspect.Parameter:  # noqa: ANN401
    return _option("metric", kinds, "Distance made small.", shown, None, _METHOD)


def _student_steps(shown: str) -> inspect.Parameter:
    return _option("student_steps", int, "Steps that the student is made for.", shown, "K", _METHOD)


def _command(method: str, words: str, *own: inspect.Parameter) -> None:
    """Declares the command of a method.

    Args:
        method: its name.
        words: of the help.
        own: the options of the method alone; their names are the fields of its class, but for ``student_steps``, its ``steps``.
    """

    def command(**given: Any) -> None:  # noqa: ANN401
        from flowkit.cli.distilling import run

        names = [parameter.name for parameter in own]
        options = {name: given.pop(name) for name in names}
        run(method, {n.removeprefix("student_"): value for n, value in options.items() if value is not None}, given)

    parameters = [*_SHARED, *own]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = f"{words}\n\n{_AGAIN}"
    distill.command(method)(command)


_AGAIN = (
    "Says what it will cost before it starts. Killed at any moment, the same command goes on where it stopped. On several GPUs: "
    "accelerate launch -m flowkit.cli distill ..."
)

_command(
    "reflow",
    "Straighten the paths of the teacher: one step is enough, and more steps are still better.",
    _option("rounds", int, "How often the student becomes the next teacher.", "1", "K", _METHOD),
    _EVALUATIONS,
    _SOLVER,
    _times("noise"),
    _metric("l2", Literal["l2", "pseudo-huber", "lpips", "lpips-huber", "lpips-huber-1/t"]),
    _option("space", Literal["model", "x0"], "What is compared: the output, or the sample.", "model", None, _METHOD),
)
_command(
    "onestep",
    "Learn the samples of the teacher in one step, or a few: the best for a number of steps that is fixed.",
    _student_steps("1"),
    _EVALUATIONS,
    _SOLVER,
    _metric("pseudo-huber"),
)
_command(
    "reverse",
    "Learn the noise of a sample in one step: a fast encoder, for flowkit.distill.invert.",
    _EVALUATIONS,
    _SOLVER,
    _metric("l2", Literal["l2", "pseudo-huber"]),
)
_command(
    "boss",
    "Find the best grid of a few Euler steps, and learn to walk it like the teacher walks many (BOSS).",
    _student_steps("4"),
    _option("anchors", int, "Steps of the teacher, whose levels the grid is chosen from.", "100", "N", _METHOD),
    _option("search", int, "Trajectories that the grid is chosen on.", "100", "N", _METHOD),
    _metric("l2", Literal["l2", "pseudo-huber"]),
)
_command(
    "rectified-diffusion",
    "Reflow that keeps the teacher's path and prediction: for Stable Diffusion and other diffusions.",
    _option("phases", int, "Parts of the path, with a step of the student each.", "1", "K", _METHOD),
    _EVALUATIONS,
    _SOLVER,
    _times("uniform"),
    _metric("pseudo-huber"),
)

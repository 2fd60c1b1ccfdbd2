"""What ``flowkit train`` does: a model is loaded, trained, and saved with how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import torch
import typer
from rich.console import Console

from flowkit import assets
from flowkit.cli.options import Options
from flowkit.cli.sample import agreed, join, memory_told
from flowkit.distill import LoRA, Training, train_flow
from flowkit.pipelines import loading
from flowkit.pipelines.sampling import parameters
from flowkit.weights import check_writable

_SAMPLE = {"class_labels": "--labels 0", "prompt": "--prompt TEXT"}


def run(given: Options, data: str, *, lora: int | None, training: Mapping[str, Any], **how: Any) -> None:  # noqa: ANN401
    """Carries out ``flowkit train flow``.

    Args:
        given: the model, its folder and device.
        data: what it is trained on.
        lora: rank of the adapters; None trains all weights.
        training: settings of `flowkit.distill.Training`.
        **how: further arguments of `flowkit.distill.train_flow`.

    Raises:
        ValueError, TypeError, OSError, ImportError: as of `flowkit.distill.train_flow`.
    """
    settings = Training(**training)
    check_writable(given.output)
    state = join(given.device)
    console = Console(stderr=True, quiet=not state.is_main_process)
    if state.num_processes > 1:  # one downloads, the others find it there
        agreed(state, lambda: loading.find(given.model, given.variant) if state.is_main_process else None)
    pipe = agreed(state, lambda: _load(given, state.device, console))
    with memory_told():
        made = train_flow(
            pipe, data, output=given.output, training=settings, lora=None if lora is None else LoRA(lora),
            resume=not given.overwrite, **how,
        )  # fmt: skip
    if state.is_main_process:
        typer.echo(f"the model, how it went and what it drew: {given.output}")
        if lora is not None:
            typer.echo(f"to use it: pipe.load_lora_weights({str(given.output)!r}), on {given.model}")
        else:
            inputs = [text for name, text in _SAMPLE.items() if name in parameters(made)]
            output = shlex.quote(str(given.output))
            typer.echo(" ".join(["to sample: flowkit sample", output, *inputs, "--output samples"]))
    if state.num_processes > 1:
        state.destroy_process_group()


def _load(given: Options, here: torch.device, console: Console) -> Any:  # noqa: ANN401
    """The model on its device."""
    device = loading.choose_device(given.device, here)
    source = loading.find(given.model, given.variant)
    console.print(f"loading {given.model} ({source.pipeline})", highlight=False)
    pipe = loading.load(source, loading.choose_dtype(given.dtype, device), given.variant)
    if source.name in assets.NAMES and device.type == "cpu":
        torch.set_num_threads(1)  # so small a network gains nothing from more
    return pipe.to(device)

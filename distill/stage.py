"""What is done around a training, whatever it learns: an estimate, looks while it runs, a picture of it, a saved student."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from flowkit.distill import folders, panel, trainer, watch
from flowkit.distill import student as students
from flowkit.distill.card import Score
from flowkit.distill.draw import Draw
from flowkit.distill.estimate import Estimate, weights_of
from flowkit.distill.settings import Training
from flowkit.distill.trainer import Loss
from flowkit.distill.watch import Watch
from flowkit.eval.intervals import Figure
from flowkit.eval.processes import Processes
from flowkit.eval.runs import write_json
from flowkit.progress import bar
from flowkit.schedulers import RectifiedFlowScheduler

PANEL = "training.png"


def sharded() -> bool:
    """Returns whether accelerate's configuration cuts the network into shards (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def check_reference(reference: object) -> None:
    """Refuses a Fréchet distance of a network in shards.

    Raises:
        ValueError: for it.
    """
    if sharded() and reference is not None:
        raise ValueError("a network in shards (FSDP) is in step on all processes, which a Fréchet distance is not; leave out "
                         "reference, and measure the student with flowkit fid")  # fmt: skip


def forecast(
    network: nn.Module,
    loss: Loss,
    how: Training,
    work: Path,
    done: int,
    pipe: Any,  # noqa: ANN401
    lora: bool,
    processes: Processes,
    show: bool,
    *,
    draw: Callable[[], object] | None = None,
    draws: int = 0,
    pairs: int = 0,
    rounds: int = 1,
) -> None:
    """Says what a training will take, and refuses a disk without room.

    Args:
        network: to be trained.
        loss: its loss.
        how: the settings.
        work: folder of the unfinished run.
        done: number of updates behind it.
        pipe: the teacher, whose folder the student's is alike.
        lora: whether adapters alone are saved.
        processes: that share it.
        show: print it.
        draw: one call of the teacher; None where nothing is drawn.
        draws: number of such calls by this process.
        pairs: bytes of what is recorded.
        rounds: number of trainings.

    Raises:
        OSError: for a disk without room.
    """

    def update() -> None:
        for rows in how.parts(processes.count, processes.rank):
            loss(network, Draw(0, 0, how.batch_size, rows))[0].mean().backward()

    components = (part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module))
    found = Estimate.measure(
        network, update, rounds * how.steps - done, draw, rounds * draws, averages=1 + len(how.profiles),
        snapshots=how.snapshots * len(how.profiles) * rounds, pairs=rounds * pairs,
        student=0 if lora else weights_of(*components),
    )  # fmt: skip
    if show:
        Console(stderr=True).print(found.line(), highlight=False, soft_wrap=True)
    found.check(work, torch.device(pipe.device))


def train(
    network: nn.Module,
    loss: Loss,
    how: Training,
    folder: Path,
    *,
    seed: int,
    looks: Watch | None,
    processes: Processes,
    show: bool,
) -> nn.Module:
    """Trains a network, see `flowkit.distill.trainer.train`, with a bar, and leaves its course as JSON and as a picture.

    Args:
        network: to be trained.
        loss: its loss.
        how: the settings.
        folder: of the checkpoint and all that is written.
        seed: of the draws.
        looks: at the student while it trains; None for none.
        processes: that share it.
        show: show the bar.

    Returns:
        The network, holding the averaged weights.
    """
    with bar(show) as display:
        task = display.add_task("updates", total=how.steps)
        trained = trainer.train(
            network,
            loss,
            how,
            folder,
            seed=seed,
            on_step=lambda done: display.update(task, completed=done),
            watch=looks,
        )
    if processes.main:
        write_json(folder / folders.HISTORY, {"history": trained.history})
        with contextlib.suppress(ImportError):  # no picture without matplotlib
            panel.draw(trained.history, watch.rows(folder), folder / PANEL, how.clip)
    return trained.network


def score(name: str, looks: Watch, how: Training, network: nn.Module) -> Score:
    """Returns the Fréchet distance of the last look at a student; all processes call it.

    Args:
        name: of the row of the model card.
        looks: with a reference.
        how: the settings.
        network: the student, holding the averaged weights.
    """
    last = watch.rows(looks.folder)[-1]
    if "fd" not in last:  # a run that was gone on with after its last update, and asks for the distance only now
        last = {**looks(how.steps, network)}
    return Score(name, looks.steps, Figure(last["fd"], last.get("fd_se", math.nan)))


def course(training: Path, work: Path, how: Training) -> dict[str, Any]:
    """Returns what a model card shows of a training: "picture" and "panel", files below ``work``, or None, and "notes".

    Args:
        training: folder of the training.
        work: that of the card.
        how: the settings.
    """
    history = json.loads((training / folders.HISTORY).read_text(encoding="utf-8"))["history"]
    place, pictures = training.relative_to(work), sorted(training.glob("samples-*.png"))
    return {
        "picture": str(place / pictures[-1].name) if pictures else None,
        "panel": str(place / PANEL) if (training / PANEL).exists() else None,
        "notes": panel.notes(history, watch.rows(training), how.clip),
    }


def save(
    pipe: Any,  # noqa: ANN401
    network: nn.Module,
    how: students.How,
    scheduler: RectifiedFlowScheduler,
    training: Path,
    work: Path,
    seed: int,
) -> None:
    """Saves a student; what lies in shards is put together from the checkpoint.

    Args:
        pipe: around the network that was prepared; in shards, around one that is still whole.
        network: the student.
        how: full or LoRA.
        scheduler: the student's.
        training: folder of the checkpoint.
        work: where to save.
        seed: of adapters.
    """
    if not sharded():
        students.save(pipe, network, scheduler, work)
        return
    with students.prepared(pipe, how, seed) as whole:
        whole.load_state_dict(trainer.averages(training), strict=False)
        students.save(pipe, whole, scheduler, work)

"""`run`: a distillation and its folder, which is complete or absent.

While a run is unfinished everything lies in ``<output>.unfinished``: the settings, what was recorded, checkpoints. The student is
saved there too, and then the folder takes its final name.

    distill.json        what the student depends on, and how it is called
    README.md           how it was made, how to use it, what was measured
    pairs-1, ...        what was recorded of the teacher of each round; of no use to the student
    real-1, ...         likewise of real images, where they were given
    training-1, ...     the course of each round: training.json, training.png, pictures; averages, where profiles were kept
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowkit.distill import folders
from flowkit.distill.boss import Boss
from flowkit.distill.distillation import Distillation
from flowkit.distill.method import Method
from flowkit.distill.onestep import OneStep
from flowkit.distill.rectified import RectifiedDiffusion
from flowkit.distill.reflow import Reflow
from flowkit.distill.reverse import Reverse
from flowkit.distill.settings import Training
from flowkit.distill.student import LoRA
from flowkit.eval.processes import Processes
from flowkit.eval.references import Reference
from flowkit.pipelines.sampling import Inputs

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Reflow, OneStep, Reverse, Boss, RectifiedDiffusion)
}


def run(
    method: str | Method,
    teacher: Any,  # noqa: ANN401
    inputs: Inputs = None,
    *,
    output: str | os.PathLike[str],
    samples: int | None = None,
    steps: int | None = None,
    call: Mapping[str, Any] | None = None,
    pairs: str | os.PathLike[str] | None = None,
    student: nn.Module | None = None,
    lora: LoRA | None = None,
    real: Any = None,  # noqa: ANN401
    training: Training | None = None,
    reference: Reference = None,
    num_images: int = 2_000,
    resume: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Any:  # noqa: ANN401
    """Distils a student and saves it as a diffusers folder, or a LoRA.

    It may be killed at any moment: called again with the same arguments it goes on, and on one machine ends with the same bits; a
    finished run is loaded at once. Processes started by ``accelerate launch`` share recording and training.

    Args:
        method: "reflow", or an object with options of its own, such as ``flowkit.distill.Reflow(rounds=2)``.
        teacher: any diffusers pipeline that `flowkit.attach` takes; it is left as it was.
        inputs: arguments of each recorded sample, cycled when there are fewer; see `flowkit.pipelines.sampling.as_inputs`: prompts,
            labels. For a class-conditional teacher None means all classes in turn.
        output: folder of the student, which loads like any pipeline.
        samples: number of recorded samples; None means one for each input, 10,000 at least, or those of ``pairs``.
        steps: number of updates; None means what the method trains for, see its `training`.
        call: arguments shared by all samples. With ``guidance_scale`` above 1 the student learns the guided result, and is called
            without guidance.
        pairs: folder of an earlier recording of this teacher by `flowkit.distill.record`, to be used in place of a new one.
        student: network that is trained, called like the teacher's and with outputs of the same shape; None means a copy of the
            teacher's.
        lora: adapters that are trained in the place of all weights; None means all weights.
        real: real images, with labels or captions where the teacher takes them, see `flowkit.distill.data.open_examples`; each
            joins the pairs beside the noise that the teacher leads it back to (`flowkit.distill.real`). None means samples alone.
        training: the settings, ``steps`` and ``batch_size`` among them; None means the method's own.
        reference: what the Fréchet distance of teacher and student is measured against, see `flowkit.eval.evaluate`; None measures
            none.
        num_images: of each Fréchet distance.
        resume: go on where an earlier call stopped; False removes what it left.
        seed: of all noise.
        batch_size: of the updates, where ``training`` does not say, and of the teacher.
        progress: print an estimate of the time, then bars with the time left.

    Returns:
        The student, loaded from the folder, on the teacher's device.

    Raises:
        OSError: for a folder that cannot be written, or a disk without room, before the start.
        TypeError: for a teacher or inputs of a kind that cannot be used.
        ValueError: for an unknown method or a number out of range; where the folder holds a run with another teacher or other
            settings, or something else; for pairs of another teacher or path, images that the teacher cannot be shown, a student of
            another shape, a teacher without weights; and for a loss that is not finite, which keeps the last checkpoint.
    """
    chosen = _method(method)
    if training is None:
        training = Training(
            **{**chosen.training, "batch_size": batch_size, **({} if steps is None else {"steps": steps})}
        )
    elif steps is not None:
        raise ValueError(f"steps={steps} is given beside training, which has {training.steps}; give one of them")
    watched = {"reference": reference, "num_images": num_images}
    job = Distillation(
        chosen, teacher, inputs, samples, call, pairs, student, lora, real, training, watched, seed, batch_size
    )
    folder = Path(output)
    work = folder.with_name(f"{folder.name}.unfinished")
    processes = Processes.join(torch.device(teacher.device))
    settings = processes.agree(job.settings)
    fresh = not (work / folders.SETTINGS).exists()
    finished = processes.agree(lambda: folders.open_folder(folder, work, settings, resume) if processes.main else False)
    if not processes.share(finished):
        try:
            predict = job.prepare(work, processes, progress)
        except Exception:
            if fresh and processes.main:  # nothing was begun that could be gone on with
                shutil.rmtree(work, ignore_errors=True)
            raise
        job.carry_out(predict, work, processes, progress)
        processes.agree(lambda: folders.finish(work, folder) if processes.main else None)
        processes.wait()
    return job.load(folder)


def _method(given: str | Method) -> Method:
    if not isinstance(given, str):
        return given
    if given not in METHODS:
        raise ValueError(f"unknown method {given!r}; choose {', '.join(METHODS)}")
    return METHODS[given]()

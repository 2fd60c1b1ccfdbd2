"""`run`: a distillation and its folder, which is complete or absent.

While a run is unfinished everything lies in ``<output>.unfinished``: the settings, the pairs, a checkpoint. The student is saved
there too, and then the folder takes its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from rich.console import Console

from flowkit.distill.reflow import CHECKPOINT, Reflow
from flowkit.eval.provenance import describe
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar
from flowkit.schedulers import save_pretrained
from flowkit.weights import write_bytes

METHODS = {"reflow": Reflow}
SETTINGS = "distill.json"
_FORMAT = "flowkit.distill/1"


def run(
    method: str,
    teacher: Any,  # noqa: ANN401
    inputs: Inputs = None,
    *,
    output: str | os.PathLike[str],
    samples: int | None = None,
    steps: int | None = None,
    resume: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Any:  # noqa: ANN401
    """Distils a student and saves it as a diffusers folder.

    It may be killed at any moment: called again with the same arguments it goes on, and on the CPU ends with the same bits; a
    finished run is loaded at once.

    Args:
        method: "reflow" (see `flowkit.distill.reflow`).
        teacher: the pipeline to learn from; it is left as it was.
        inputs: arguments of each recorded sample, cycled when there are fewer; see `flowkit.pipelines.sampling.as_inputs`. For a
            class-conditional teacher the labels; None means all classes in turn.
        output: folder of the student, which loads like any pipeline; beside the model it holds the settings, ``distill.json``,
            and the samples of the pairs.
        samples: number of pairs; None means one for each input, 10,000 at least.
        steps: number of updates; None means 3,000.
        resume: go on where an earlier call stopped; False removes what it left.
        seed: of all noise.
        batch_size: samples at a time.
        progress: print an estimate of the time, then bars with the time left.

    Returns:
        The student, loaded from the folder, on the teacher's device.

    Raises:
        TypeError: for a teacher or inputs of a kind that the method cannot use.
        ValueError: for an unknown method or a number out of range; where the folder holds a run with another teacher or other
            settings, or something else; and for a loss that is not finite, which keeps the last checkpoint.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    job = METHODS[method](teacher, inputs, samples, steps, seed, batch_size)
    output = Path(output)
    work = output.with_name(f"{output.name}.unfinished")
    for folder in (output, work):
        _check_ours(folder)
        if not resume and folder.exists():
            shutil.rmtree(folder)
    settings = {"format": _FORMAT, "method": method, **job.settings(), "teacher": fingerprint(teacher.unet)}
    finished = _compare(output, settings)
    if not finished:
        if not _compare(work, settings):
            write_bytes(work / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        if progress:
            Console(stderr=True).print(job.forecast(work))
        with bar(progress) as display:
            student = job.student(work, display)
        save_pretrained(student, work)
        for torn in work.glob(".*"):  # what a killed write left
            torn.unlink()
        if output.exists():
            output.rmdir()
        work.rename(output)
    (output / CHECKPOINT).unlink(missing_ok=True)
    return type(teacher).from_pretrained(output).to(teacher.device)


def fingerprint(network: ModelMixin) -> str:
    """Returns the SHA-256 of a diffusers model's configuration and weights."""
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(describe(config), sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_ours(folder: Path) -> None:
    """Refuses a folder with anything that no run of ours left there."""
    if not folder.exists() or (folder / SETTINGS).is_file():
        return
    # A run that was killed while it wrote its settings leaves a hidden temporary file.
    if not folder.is_dir() or any(not entry.name.startswith(f".{SETTINGS}.") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not the folder of a distillation; choose another output")


def _compare(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds a run, which must have the same settings."""
    if not (folder / SETTINGS).is_file():
        return False
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS} is not JSON ({error}); start anew with resume=False") from error
    for key, value in settings.items():
        if stored.get(key) != value:
            raise ValueError(f"{folder} holds a run with {key}={stored.get(key)!r}, this one has {value!r}; choose another "
                             "output, or start anew with resume=False")  # fmt: skip
    return True

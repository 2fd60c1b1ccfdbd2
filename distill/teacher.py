"""A teacher's call: without its guidance, and whether an earlier recording is of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flowkit.distill.conditions import Conditions
from flowkit.distill.shards import Trajectories
from flowkit.eval.provenance import describe, fingerprint, first_difference, hash_inputs
from flowkit.pipelines.sampling import Inputs, as_inputs, parameters
from flowkit.schedulers import RectifiedFlowScheduler


def scale_of(pipe: Any) -> str:  # noqa: ANN401
    """Returns the name of the scale of classifier-free guidance; ``guidance_scale`` beside it is told to the network."""
    return "true_cfg_scale" if "true_cfg_scale" in parameters(pipe) else "guidance_scale"


def unguided(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Returns the arguments of a pipeline's call without its classifier-free guidance."""
    return {k: v for k, v in call.items() if not k.startswith("negative_prompt")} | {scale_of(pipe): 1.0}


def check_unguided(pipe: Any, inputs: Inputs, call: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Refuses guidance that cannot be left out of a student's call.

    Args:
        pipe: the teacher, guided.
        inputs: of the samples, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all.

    Raises:
        ValueError: for it.
    """
    name = scale_of(pipe)
    known = name in parameters(pipe) and name not in as_inputs(pipe, inputs)(0)
    if not known or Conditions(pipe, inputs, 1, call=unguided(pipe, call)).guided:
        raise ValueError(f"a student of guided samples is called without guidance, and {name}=1.0 in call does not end that of "
                         f"a {type(pipe).__name__} with these inputs; give {name} in call alone")  # fmt: skip


def check_pairs(pairs: Trajectories, pipe: Any, inputs: Inputs, call: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Refuses a recording of another teacher, other inputs or another path, without its ends, or with noise in its steps.

    Args:
        pairs: the recording.
        pipe: the teacher.
        inputs: of the samples, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all.

    Raises:
        ValueError: for it; the first setting that differs is named.
    """
    held = pairs.settings
    mine = {
        "pipeline": type(pipe).__qualname__,
        "weights": fingerprint(pipe),
        "inputs": hash_inputs(as_inputs(pipe, inputs), len(pairs)),
        "call": describe(call),
        "path": asdict(RectifiedFlowScheduler.from_config(pipe.scheduler, solver="euler").path),
    }
    theirs = {
        "pipeline": held["samples"]["pipeline"]["class"],
        "weights": held["samples"]["pipeline"]["weights_sha256"],
        "inputs": held["samples"]["inputs_sha256"],
        "call": held["samples"]["call"],
        "path": asdict(pairs.scheduler().path),
    }
    if found := first_difference(theirs, mine):
        place, before, now = found
        raise ValueError(f"the pairs in {pairs.folder} were made with {place} {before!r:.80}, and here it is {now!r:.80}; "
                         "record them again, or leave out pairs")  # fmt: skip
    if not pairs.at or pairs.at[0] != 0 or pairs.at[-1] != len(pairs.grid):
        raise ValueError(
            f"the recording in {pairs.folder} holds states at {pairs.at}; a method needs the first and the last"
        )
    pairs.check_deterministic()

"""Runs of a pipeline that guidance is fitted to: recorded batch by batch, on noise of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from flowkit import rng
from flowkit.hooks import Attachment, Guidance, Part, Recorder, Trajectory, attach
from flowkit.hooks.parts import State
from flowkit.pipelines.sampling import Inputs, blocks, parameters, sample_outputs

# Index of the fit's own seed: beyond every sample's, so that no fit shares noise with an evaluation under the same seed.
_FIT = 2**63 + 1


class Unguided(Guidance):
    """The conditional output alone: what guidance is measured against."""

    def plan(self, step: int, sigma: float, state: State) -> str:
        """Returns "cond"."""
        return "cond"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Returns the conditional output twice."""
        return (cond, cond), dict(state)


def recorded(
    pipe: Any,  # noqa: ANN401
    *parts: Part,
    keep: tuple[str, ...],
    samples: int,
    inputs: Inputs = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[tuple[Trajectory, Attachment]]:
    """Runs a pipeline and records it; what it makes of its last sample is left out where it has an output_type.

    Args:
        pipe: the pipeline.
        *parts: attached beside the recorder.
        keep: what `Recorder` keeps.
        samples: number of samples, >= 1.
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        call: arguments shared by all.
        seed: of the noise, which is not that of `flowkit.eval.evaluate` under the same seed.
        batch_size: samples at a time.

    Yields:
        Each batch's trajectory, and what was attached while it was made.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for what the pipeline or the hooks refuse, and a call of more than one run.
    """
    shared = dict(call or {})
    if "output_type" in parameters(pipe):
        shared = {"output_type": "latent", **shared}
    own = rng.sample_seed(seed, _FIT)
    for block in blocks(pipe, samples, inputs=inputs, batch_size=batch_size):
        recorder = Recorder(*keep)
        with attach(pipe, recorder, *parts) as attached:
            for _ in sample_outputs(pipe, [block], seed=own, inputs=inputs, call=shared):
                pass
        if len(recorder.trajectories) != 1:
            raise ValueError(f"{type(pipe).__name__} denoises {len(recorder.trajectories)} times in one call; fit to a pipeline "
                             "that denoises once")  # fmt: skip
        yield recorder.trajectories[0], attached

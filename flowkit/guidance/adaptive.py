"""Adaptive guidance: drop the unconditional pass where it no longer tells anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowkit.guidance.checks import finite
from flowkit.guidance.runs import Unguided, recorded
from flowkit.hooks.parts import Guidance, Plan, State, check_space, reported, to_space
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of the angle between two batches of samples, ``<a, b> / (|a| |b|)``.

    Args:
        a: shape (B, ...).
        b: same shape.

    Returns:
        Shape (B,), in at least float32, within [-1, 1]; 0 where either is zero.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.flatten(1).to(wide), b.flatten(1).to(wide)
    norms = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(wide).tiny)
    result: Tensor = (a * b).sum(1) / norms
    return result.clamp(-1, 1)


class AdaptiveGuidance(Guidance):
    """Adaptive guidance (AG): guidance until the two outputs agree (Castillo et al. 2023, arXiv 2312.12487).

    With the conditional output c and the unconditional u, flattened for each sample,

        gamma = <c, u> / (|c| |u|);

    from the evaluation after the first one with ``gamma >= threshold`` on, the sample needs no unconditional pass, for good, and
    c takes the place of u. Until then nothing is changed, so the result is bit-equal to plain guidance up to there. A negative
    prompt has no effect after the cut.

    Gamma depends on the space: a threshold found for one does not hold in another, nor for another model.

    Args:
        threshold: any real number; above 1 nothing is ever cut, below -1 everything after the first evaluation.
        space: where gamma is measured, "model" (the network's output as it is), "x0", "eps" or "velocity".
        per_sample: whether each sample is cut for itself; False cuts the whole batch when its least gamma reaches the threshold,
            which keeps all calls of the network at one of two batch sizes.

    Attributes:
        about: what `calibrate` expects of it; empty otherwise.

    Raises:
        TypeError: for a threshold that is not one number.
        ValueError: for a threshold that is not finite, or an unknown space.
    """

    def __init__(self, threshold: float = 0.991, space: str = "x0", per_sample: bool = True) -> None:
        self.threshold = finite("threshold", threshold, "a cosine such as 0.991 cuts late, 2 never")
        self.space = check_space(space)
        self.per_sample = bool(per_sample)
        self.about: dict[str, float] = {}

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "both" while nothing is cut, then a bool tensor (B,) on the CPU, true where it is not, "cond" when all are."""
        guided: Tensor | None = state.get("guided")
        if guided is None or guided.all():
            return "both"
        return guided if guided.any() else "cond"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Returns the outputs as they are, c for u where u is None, and latches the samples that reached the threshold.

        The state gets ``guided``, a bool tensor (B,) on the CPU: which samples need another unconditional pass. The report has
        ``cosine``, (B,), NaN for the samples that were cut before.
        """
        if uncond is None:
            return (cond, cond), reported(state, cosine=torch.full((len(cond),), math.nan))
        gamma = cosine(to_space(cond, self.space, state), to_space(uncond, self.space, state))
        # One transfer a step, and none once all samples are cut; the plan needs the numbers on the host.
        gamma = gamma.detach().cpu()
        guided: Tensor = state.get("guided", torch.ones(len(cond), dtype=torch.bool))
        # In float64: a threshold just above 1 must not be rounded to it.
        left = ~(gamma.double() >= self.threshold)
        if not self.per_sample:
            left = left.any().expand_as(left)
        shown = gamma.masked_fill(~guided, math.nan)
        return (cond, uncond), reported({**state, "guided": guided & left}, cosine=shown)

    @classmethod
    def calibrate(
        cls,
        pipe: Any,  # noqa: ANN401
        inputs: Inputs = None,
        *,
        saving: float | None = None,
        tolerance: float | None = None,
        space: str = "x0",
        per_sample: bool = True,
        call: Mapping[str, Any] | None = None,
        samples: int = 64,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> AdaptiveGuidance:
        """Finds the threshold for a pipeline, its scheduler, number of steps and guidance scale.

        A cosine up to the cut is that of full guidance, so one pass with full guidance tells the saving of every threshold.

        Args:
            pipe: a diffusers pipeline.
            inputs: arguments of each sample, cycled when there are fewer, see `flowkit.pipelines.sampling.as_inputs`: prompts or
                labels of the kind that it will be used with.
            saving: share of the network rows of full guidance to save, in (0, 0.5); the nearest that a threshold gives is taken.
                None with ``tolerance``.
            tolerance: largest RMS distance of the final samples from those of full guidance, as a share of that of samples
                without guidance, in (0, 1); the threshold that saves most within it is found by bisection. None with ``saving``.
            space: see the class.
            per_sample: see the class; False is for batches of ``batch_size``.
            call: arguments shared by all samples: number of steps, guidance scale.
            samples: number of samples, >= 1.
            seed: of the noise.
            batch_size: samples at a time.
            progress: show a bar with the time left.

        Returns:
            The guidance; its ``about`` holds the saving on these samples, and with ``tolerance`` the distance.

        Raises:
            TypeError: for arguments that the pipeline does not take.
            ValueError: for not exactly one of saving and tolerance, a number out of range, a saving that no threshold gives, and a
                pipeline that cannot be attached to or has no guidance in this call.
        """
        if (saving is None) == (tolerance is None):
            raise ValueError(f"got saving={saving} and tolerance={tolerance}; give one of them, such as saving=0.25")
        if saving is not None and not 0 < saving < 0.5:
            raise ValueError(f"saving must lie in (0, 0.5), got {saving}; at 0.5 no unconditional row would be left")
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}; 1 is as far as no guidance at all")
        given: dict[str, Any] = {
            "samples": samples,
            "inputs": inputs,
            "call": call,
            "seed": seed,
            "batch_size": batch_size,
        }
        with bar(progress) as display:

            def run(part: Guidance, text: str) -> tuple[list[Tensor], list[Tensor]]:
                """Final samples and cosines, (B, N), of each batch."""
                task, last, cosines = display.add_task(text, total=samples), [], []
                for trajectory, attached in recorded(pipe, part, keep=("state",), **given):
                    last.append(trajectory.states[-1].double())
                    shown = [step.report["cosine"] for step in attached.steps if "cosine" in step.report]
                    cosines.append(torch.stack(shown, 1).double() if shown else torch.empty(len(last[-1]), 0))
                    display.update(task, advance=len(last[-1]))
                return last, cosines

            full, cosines = run(cls(2.0, space), "full guidance")
            table = torch.cat([batch if per_sample else batch.amin(0, keepdim=True) for batch in cosines])
            thresholds = _between(table)
            savings = [_saving(table, threshold) for threshold in thresholds]
            if saving is not None:
                if saving > savings[0]:
                    raise ValueError(f"saving={saving} is more than the {savings[0]:.4g} of a cut after the first evaluation; ask "
                                     "for less, or use LinearAdaptiveGuidance")  # fmt: skip
                best = min(range(len(savings)), key=lambda i: abs(savings[i] - saving))
                result = cls(thresholds[best], space, per_sample)
                result.about = {"saving": savings[best]}
                return result
            apart = _rms(run(Unguided(), "no guidance")[0], full)
            # Thresholds from ``high`` on are known to do; a difference of half a percent is not worth another run.
            savings.append(0.0)
            low, high, miss = 0, len(thresholds), 0.0
            while savings[low] - savings[high] > 0.005:
                middle = (low + high) // 2
                found = (
                    _rms(run(cls(thresholds[middle], space, per_sample), f"saving {savings[middle]:.1%}")[0], full)
                    / apart
                )
                if found <= tolerance:  # type: ignore[operator]
                    high, miss = middle, found
                else:
                    low = middle + 1
            result = cls(thresholds[high] if high < len(thresholds) else 2.0, space, per_sample)
            result.about = {"saving": savings[high], "distance": miss}
            return result


def _between(cosines: Tensor) -> list[float]:
    """Thresholds, rising, half-way between neighbouring cosines, so that rounding does not decide; the first is below all."""
    values = cosines.flatten().unique()
    if len(values) > 512:  # more do not tell savings apart
        values = values[torch.linspace(0, len(values) - 1, 512).round().long()]
    low = values[:1] - 1e-3
    return [float(v) for v in torch.cat([low, (values[1:] + values[:-1]) / 2])]


def _saving(cosines: Tensor, threshold: float) -> float:
    """Share of the rows of full guidance that a threshold saves: a row for each evaluation after the one that reached it."""
    reached = (cosines >= threshold).long().cumsum(1).clamp(max=1)
    return float((reached[:, :-1].sum(1)).double().mean()) / (2 * cosines.shape[1])


def _rms(x: list[Tensor], y: list[Tensor]) -> float:
    return float(torch.cat([(a - b).flatten(1) for a, b in zip(x, y, strict=True)]).square().mean().sqrt())

"""LinearAG: an unconditional output from the conditional one and both of earlier evaluations, by least squares.

After Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models" (arXiv 2312.12487).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit import weights
from flowkit.guidance import identity as identities
from flowkit.guidance.least_squares import Moments, default_pattern, greedy_pattern
from flowkit.guidance.least_squares import fit as least_squares
from flowkit.guidance.runs import recorded
from flowkit.hooks.parts import Guidance, State
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar

_FORMAT = "flowkit.linear/1"
_CURE = "calibrate it again with these settings"


class LinearAdaptiveGuidance(Guidance):
    """Guidance with an estimated unconditional output on some evaluations, which then cost one network row in place of two.

    On evaluation k of ``steps`` it is

        u_hat_k = sum_{i <= k} b_i^c c_i + sum_{i < k} b_i^u u_i [+ intercept],

    where u_i is itself an estimate for i in ``steps``, with one number b for all pixels, channels and prompts. It is selecting:
    the pipeline's own scale is applied to (c, u_hat). The outputs are those of the network, whatever it predicts.

    Calibrate it for the model, scheduler, number of steps and guidance scale that it is used with. A negative prompt acts through
    the true evaluations alone, and through the calibration.

    Args:
        coefficients: b^c and b^u of each of E estimated evaluations, (E, 2, N) for runs of N evaluations; zero where an output is
            not used, as b^c after k and b^u from k on must be. Kept in float64.
        steps: the E estimated evaluations, rising, each in [1, N): the first is always a true one.
        intercept: (E, C, ...) that broadcasts to a sample for each; None means 0.
        identity: what it was fitted on, see `flowkit.guidance.identity`; a run of another kind is refused. None means any of N
            evaluations.
        about: how it was fitted, for people.

    Raises:
        ValueError: for shapes that do not fit together, or values that are not finite.
    """

    def __init__(
        self,
        coefficients: Tensor | Sequence[Any],
        steps: Iterable[int],
        *,
        intercept: Tensor | None = None,
        identity: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        b = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
        self.steps = tuple(int(k) for k in steps)
        if b.ndim != 3 or b.shape[1] != 2 or len(b) != len(self.steps):
            raise ValueError(f"coefficients have shape {tuple(b.shape)} for {len(self.steps)} estimated evaluations; give "
                             "(E, 2, N): of conditional and unconditional outputs of N evaluations, for each")  # fmt: skip
        count = b.shape[2]
        if sorted(set(self.steps)) != list(self.steps) or not all(1 <= k < count for k in self.steps):
            raise ValueError(f"estimated evaluations must rise from 1 to {count - 1} at most, got {list(self.steps)}; the first of "
                             "a run, 0, is always a true one")  # fmt: skip
        if not torch.isfinite(b).all() or (intercept is not None and not torch.isfinite(intercept).all()):
            raise ValueError("coefficients hold NaN or infinity; fit them again, with ridge=1e-4")
        for k, (of_c, of_u) in zip(self.steps, b, strict=True):
            if of_c[k + 1 :].any() or of_u[k:].any():
                raise ValueError(f"the estimate of evaluation {k} uses outputs that are not there yet; set b^c after {k} and b^u "
                                 f"from {k} on to 0")  # fmt: skip
        if intercept is not None and (intercept.ndim < 2 or len(intercept) != len(self.steps)):
            raise ValueError(f"the intercept has shape {tuple(intercept.shape)} for {len(self.steps)} estimated evaluations; give "
                             "(E, C, ...), which broadcasts to a sample for each")  # fmt: skip
        self.coefficients, self.intercept = b, intercept
        self.identity = dict(identity) if identity is not None else None
        self.about = dict(about or {})
        self._row = {k: j for j, k in enumerate(self.steps)}
        # The last evaluation that needs an output, by (0 or 1, number of the output); what none needs is not kept.
        self._last = {
            (kind, i): k for k, rows in zip(self.steps, b, strict=True) for kind in (0, 1) for i in range(count) if rows[kind, i]
        }  # fmt: skip

    @property
    def evaluations(self) -> int:
        """Number N of evaluations of a run."""
        return self.coefficients.shape[2]

    @property
    def saving(self) -> float:
        """Part of the network rows of full guidance that a run saves, in [0, 0.5)."""
        return len(self.steps) / (2 * self.evaluations)

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Refuses a network of another class than the one it was fitted on."""
        identities.check_network(self, run, _CURE)

    def plan(self, step: int, sigma: float, state: State) -> str:
        """Returns "cond" on the estimated evaluations and "both" on the others.

        Raises:
            ValueError: for a run of another number of evaluations or other noise levels than it was fitted on.
        """
        identities.check_step(self, step, sigma, state, _CURE)
        return "cond" if step in self._row else "both"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Returns the conditional output and the true or estimated unconditional one.

        Args:
            cond: (B, C, ...).
            uncond: same shape; None on the estimated evaluations, where it is not read.
            step: number of the evaluation.
            sigma: its noise level.
            state: keeps the outputs that later estimates need under "linear".

        Returns:
            (c, u) and the next state. The sum is taken in float32 at least and returned in the dtype of ``cond``.

        Raises:
            ValueError: for a run of another kind, and where an output that is needed is missing.
        """
        identities.check_step(self, step, sigma, state, _CURE)
        kept: dict[tuple[int, int], Tensor] = {**state.get("linear", {}), (0, step): cond}
        if step in self._row:
            uncond = self._estimate(kept, step)
        elif uncond is None:
            raise ValueError(
                f"evaluation {step} is a true one and has no unconditional output; run what plan() asks for"
            )
        kept[1, step] = uncond
        kept = {key: value for key, value in kept.items() if self._last.get(key, -1) > step}
        return (cond, uncond), {**state, "linear": kept}

    def _estimate(self, kept: Mapping[tuple[int, int], Tensor], step: int) -> Tensor:
        cond, row = kept[0, step], self._row[step]
        wide = torch.promote_types(cond.dtype, torch.float32)
        total = torch.zeros_like(cond, dtype=wide)
        for kind, i in self.coefficients[row].nonzero().tolist():
            if (kind, i) not in kept:
                raise ValueError(f"the estimate of evaluation {step} needs the outputs of evaluation {i}, which this run did not "
                                 "pass; start at the first one, without strength or a start in the middle")  # fmt: skip
            total = torch.add(total, kept[kind, i].to(wide), alpha=float(self.coefficients[row, kind, i]))
        if self.intercept is not None:
            own = self.intercept[row].to(total)
            try:
                own = own.expand(cond.shape[1:])
            except RuntimeError as error:
                raise ValueError(f"the intercept is for samples of shape {tuple(own.shape)}, these have {tuple(cond.shape[1:])}; "
                                 f"{_CURE}") from error  # fmt: skip
            total = total + own
        return total.to(cond.dtype)

    @classmethod
    def fit(
        cls,
        runs: Iterable[Any],
        steps: Iterable[int] | None = None,
        *,
        saving: float | None = None,
        intercept: str | None = None,
        ridge: float = 1e-6,
        history: int | None = None,
    ) -> LinearAdaptiveGuidance:
        """Fits the coefficients by least squares to runs with full guidance, in float64.

        Estimates are fitted one after another, each on the estimates before it where it will use those. The runs are read once
        and summed up, never held; the choice of evaluations takes no second look.

        Args:
            runs: trajectories recorded with "cond" and "uncond", or pairs of lists of these outputs, N tensors (B, C, ...) each.
            steps: evaluations to estimate. None means as ``saving`` says, or without it every second one of the first half and
                all of the second half.
            saving: part of the network rows of full guidance to save, in (0, 0.5); gives ``round(2 N saving)`` estimates, N - 1 at
                most. Which ones is found by dropping, one by one, the estimate without which the rest errs least.
            intercept: None, "channel" (one a channel, axis 1) or "element". On classes that were not in the fit none is as good:
                on the embedded digits (20 steps, scale 3, the default pattern) all three leave 6.3 % of the squared distance
                between no guidance and full guidance, on the shapes (12 steps) 9.8, 9.6 and 10.0 %. The first evaluation, a true
                one, already tells what is constant.
            ridge: added to the diagonal of the correlation matrix, >= 0; 0 is ordinary least squares.
            history: evaluations before the current one that an estimate uses, which bounds the memory, 2 tensors each; None means
                all. 3 do nearly as well.

        Returns:
            The guidance. ``about`` holds the part of the mean square of u - c that each estimate misses on these runs.

        Raises:
            TypeError: for runs that are neither.
            ValueError: for numbers out of range, no runs, or runs that differ in shape or identity.
        """
        moments, identity = Moments(intercept), None
        for run in runs:
            identity = _add(moments, run, identity)
        return cls._of(moments, identity, steps, saving, ridge, history)

    @classmethod
    def calibrate(
        cls,
        pipe: Any,  # noqa: ANN401
        inputs: Inputs = None,
        *,
        saving: float | None = 0.4,
        steps: Iterable[int] | None = None,
        call: Mapping[str, Any] | None = None,
        samples: int = 100,
        intercept: str | None = None,
        ridge: float = 1e-6,
        history: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> LinearAdaptiveGuidance:
        """Runs a pipeline with full guidance and fits the coefficients to it, a batch at a time.

        Args:
            pipe: a diffusers pipeline, with the scheduler that it will be used with.
            inputs: arguments of each sample, cycled when there are fewer, see `flowkit.pipelines.sampling.as_inputs`: prompts or
                labels of the kind that it will be used with.
            saving: part of the network rows of full guidance to save, see `fit`; None means the pattern of ``steps=None`` there.
            steps: evaluations to estimate, in place of ``saving``.
            call: arguments shared by all samples: number of steps, guidance scale.
            samples: number of samples, >= 1; there are few coefficients, so few are needed.
            intercept: see `fit`.
            ridge: see `fit`.
            history: see `fit`.
            seed: of the noise.
            batch_size: samples at a time; memory holds 2 N outputs of each.
            progress: show a bar with the time left.

        Returns:
            The guidance, for runs of this pipeline with this many evaluations at these noise levels.

        Raises:
            TypeError: for arguments that the pipeline does not take.
            ValueError: for numbers out of range, and a pipeline that cannot be attached to or has no guidance in this call.
        """
        saving = saving if steps is None else None
        _check_numbers(steps, saving, ridge, history)
        moments, identity = Moments(intercept), None
        runs = recorded(
            pipe, keep=("cond", "uncond"), samples=samples, inputs=inputs, call=call, seed=seed, batch_size=batch_size
        )
        with bar(progress) as display:
            task = display.add_task("full guidance", total=samples)
            for run, _ in runs:
                identity = _add(moments, run, identity)
                display.update(task, completed=moments.samples)
        return cls._of(moments, identity, steps, saving, ridge, history)

    @classmethod
    def _of(
        cls,
        moments: Moments,
        identity: Mapping[str, Any] | None,
        steps: Iterable[int] | None,
        saving: float | None,
        ridge: float,
        history: int | None,
    ) -> LinearAdaptiveGuidance:
        """The guidance from what was summed up."""
        if not moments.samples:
            raise ValueError("there are no runs to fit; record some with full guidance")
        _check_numbers(steps, saving, ridge, history)
        count = moments.evaluations
        if steps is not None:
            chosen = sorted(int(k) for k in steps)
            if not chosen or len(set(chosen)) < len(chosen) or not all(1 <= k < count for k in chosen):
                raise ValueError(
                    f"steps must be different evaluations from 1 to {count - 1}, got {chosen}; the first, 0, is always a true one"
                )
        elif saving is not None:
            chosen = greedy_pattern(moments, min(count - 1, round(2 * count * saving)), ridge, history)
        else:
            chosen = default_pattern(count)
        if not chosen:
            raise ValueError(
                f"with saving={saving} none of {count} evaluations is estimated; ask for more, or take more steps"
            )
        fitted = least_squares(moments, chosen, ridge, history)
        about = {
            "missed": fitted.relative,
            "samples": moments.samples,
            "intercept": moments.intercept,
            "ridge": ridge,
            "history": history,
        }
        return cls(fitted.coefficients, chosen, intercept=fitted.intercept, identity=identity, about=about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to one safetensors file, with its identity in the metadata."""
        tensors = {"coefficients": self.coefficients, "steps": torch.tensor(self.steps, dtype=torch.int64)}
        if self.intercept is not None:
            tensors["intercept"] = self.intercept
        metadata = {"format": _FORMAT, "about": json.dumps(self.about)}
        if self.identity is not None:
            metadata["identity"] = json.dumps(identities.to_json(self.identity))
        weights.write(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearAdaptiveGuidance:
        """Reads what `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: for a file that is corrupt, or of something else.
        """
        tensors, metadata = weights.read(path)
        if metadata.get("format") != _FORMAT or not {"coefficients", "steps"} <= tensors.keys():
            raise ValueError(f"{Path(path)} holds no coefficients of LinearAdaptiveGuidance (format {metadata.get('format')!r}); "
                             "pass a file that its save() wrote")  # fmt: skip
        try:
            b, steps = tensors["coefficients"], tensors["steps"]
            if b.dtype != torch.float64 or b.ndim != 3 or steps.dtype != torch.int64:
                raise ValueError(f"coefficients are {b.dtype} of shape {tuple(b.shape)} and steps {steps.dtype}")
            identity = identities.from_json(json.loads(metadata.get("identity", "null")), b.shape[-1])
            about = json.loads(metadata.get("about", "{}"))
            return cls(b, steps.tolist(), intercept=tensors.get("intercept"), identity=identity, about=about)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{Path(path)} is damaged ({error}); copy it again or calibrate anew") from error


def _add(moments: Moments, run: Any, identity: Mapping[str, Any] | None) -> Mapping[str, Any] | None:  # noqa: ANN401
    """Adds a run; returns the identity of all."""
    if isinstance(run, (tuple, list)):
        if len(run) != 2:
            raise TypeError(f"a run must be a pair of lists (cond, uncond), got {len(run)} entries; zip the two")
        cond, uncond = run
    elif hasattr(run, "cond") and hasattr(run, "uncond"):
        cond, uncond = run.cond, run.uncond
    else:
        raise TypeError(f"a run must be a Trajectory or a pair of lists (cond, uncond), got {type(run).__name__}")
    missing = [i for xs in (cond, uncond) for i, x in enumerate(xs) if x is None]
    if missing or not len(cond) or len(cond) != len(uncond):
        raise ValueError(
            f"a run has {len(cond)} conditional and {len(uncond)} unconditional outputs, and none at evaluations {missing}; "
            "record 'cond' and 'uncond' of a call with guidance, a guidance_scale above 1"
        )
    own = identities.of(run)
    if moments.samples and own is not None and identity is not None:
        identities.check_same(identity, own)
    moments.add(cond, uncond)
    return identity if own is None else own


def _check_numbers(steps: Iterable[int] | None, saving: float | None, ridge: float, history: int | None) -> None:
    if steps is not None and saving is not None:
        raise ValueError(f"got steps={steps} and saving={saving}; give one of them")
    if saving is not None and not 0 < saving < 0.5:
        raise ValueError(f"saving must lie in (0, 0.5), got {saving}; at 0.5 no unconditional row would be left")
    if not ridge >= 0:
        raise ValueError(f"ridge must not be negative, got {ridge}; 0 is ordinary least squares")
    if history is not None and history < 0:
        raise ValueError(f"history must not be negative, got {history}; None means all evaluations")

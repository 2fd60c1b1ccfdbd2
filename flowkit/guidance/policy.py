"""Searched guidance policies: for each evaluation no guidance, or full guidance with a scale of its own.

After Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models" (arXiv 2312.12487), who
search them by gradient descent, as DARTS does architectures (Liu et al. 2019, arXiv 1806.09055).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowkit.guidance import identity as identities
from flowkit.guidance import policy_search
from flowkit.guidance.dynamic import DynamicGuidance
from flowkit.guidance.policy_search import Option, Rollout, Snapshot
from flowkit.guidance.runs import recorded
from flowkit.hooks.parts import Guidance, State, reported
from flowkit.pipelines.sampling import Inputs, as_inputs, parameters
from flowkit.progress import bar
from flowkit.weights import write_bytes

_FORMAT = "flowkit.policy/1"
_CURE = "search again with these settings"
_LARGEST = 1 << 24  # bytes of a file


class PolicyGuidance(Guidance):
    """Guidance by a table: one option for each evaluation of a run.

    "cond" and "uncond" take that output alone, one network row; a number w is ``u + w (c - u)``, two. It is combining, so the
    pipeline's own scale only has to be above 1. Where a pipeline calls its network apart for the two outputs, conditional first,
    "uncond" saves nothing.

    Args:
        options: "cond", "uncond" or a finite scale for each of N evaluations; 1 and 0 are taken as "cond" and "uncond".
        identity: what it was searched on, see `flowkit.guidance.identity`; a run of another kind is refused. None means any of N
            evaluations.
        about: how it was found and what it costs, for people; any JSON values.

    Raises:
        TypeError: for an option that is neither.
        ValueError: for another word, a scale that is not finite, or no options.
    """

    combines = True

    def __init__(
        self,
        options: Iterable[Option],
        *,
        identity: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = _checked(options)
        if not self.options:
            raise ValueError("there are no options; give one for each evaluation, such as ['cond', 7.5, 'cond']")
        self.identity = dict(identity) if identity is not None else None
        self.about = dict(about or {})

    @property
    def evaluations(self) -> int:
        """Number N of evaluations of a run."""
        return len(self.options)

    @property
    def rows(self) -> int:
        """Network rows that a sample costs, from N to 2 N."""
        return policy_search.rows(self.options)

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Refuses a network of another class than the one it was searched on."""
        identities.check_network(self, run, _CURE)

    def plan(self, step: int, sigma: float, state: State) -> str:
        """Returns "cond", "uncond" or, for a scale, "both".

        Raises:
            ValueError: for a run of another number of evaluations or other noise levels than it was searched on.
        """
        identities.check_step(self, step, sigma, state, _CURE)
        option = self.options[step]
        return option if isinstance(option, str) else "both"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the option's prediction, ``c``, ``u`` or ``u + w (c - u)``, rounded as pipelines round theirs.

        Args:
            cond: (B, C, ...); not read for "uncond".
            uncond: same shape; read for "uncond" and scales.
            step: number of the evaluation.
            sigma: its noise level.
            state: of the run; nothing is kept there, and ``scale`` is reported.

        Raises:
            ValueError: for a run of another kind, and where the unconditional output is needed and missing.
        """
        identities.check_step(self, step, sigma, state, _CURE)
        option = self.options[step]
        after = reported(state, scale=policy_search.strength(option))
        if option == "cond":
            return cond, after
        if uncond is None:
            raise ValueError(
                f"evaluation {step} is {option!r} and has no unconditional output; run what plan() asks for"
            )
        return (uncond if isinstance(option, str) else uncond + option * (cond - uncond)), after

    @classmethod
    def search(
        cls,
        pipe: Any,  # noqa: ANN401
        inputs: Inputs = None,
        *,
        scale: float = 7.5,
        scales: Iterable[float] | None = None,
        penalty: float = 0.1,
        rows: int | None = None,
        call: Mapping[str, Any] | None = None,
        samples: int = 16,
        iterations: int = 100,
        seed: int = 0,
        batch_size: int = 8,
        progress: bool = True,
    ) -> PolicyGuidance:
        """Searches the policy whose last samples are nearest to those of full guidance, for what its rows may cost.

        The pipeline runs once with full guidance. Then network and scheduler run again for each iteration with a mixture of the
        options at every evaluation, which gradient descent sharpens (`flowkit.guidance.policy_search.descend`), and its likeliest
        options are tried against the others, one by one (`refine` there; not in the paper). The network stays as it is. An
        iteration costs some 6 N rows a sample of a batch, and the memory of one evaluation with gradients.

        Args:
            pipe: a diffusers pipeline with a deterministic solver, with the scheduler that the policy will be used with.
            inputs: arguments of each sample, cycled when there are fewer, see `flowkit.pipelines.sampling.as_inputs`.
            scale: w of the full guidance to imitate, > 0 and not 1. The pipeline's own is set to it unless ``call`` or ``inputs``
                have one.
            scales: scales to choose from, beside "cond" and "uncond"; None means 1/2, 1, 3/2 and 2 times ``scale``: a stronger step
                makes up for others without guidance.
            penalty: what all rows of full guidance would cost, as a part of the squared distance between no and full guidance,
                >= 0; 0 asks for the nearest policy, whatever it costs.
            rows: most rows a sample, from N to 2 N; a penalty is searched for it, in 6 times the iterations, and ``penalty`` not
                used. None means any.
            call: arguments shared by all samples, such as the number of steps.
            samples: number of samples.
            iterations: updates of the mixture, >= 1.
            seed: of the noise.
            batch_size: samples at a time.
            progress: show a bar with the time left.

        Returns:
            The policy. ``about`` holds its settings and what a run of the pipeline with it gave on the same samples: ``distance``,
            the squared distance from full guidance at the end as a part of that without guidance, and ``rows`` a sample.

        Raises:
            TypeError: for arguments that the pipeline does not take.
            ValueError: for numbers out of range, and a pipeline whose run cannot be repeated: a stochastic solver, a mask, network
                arguments that change from step to step.
        """
        scale = float(scale)
        given = tuple(scale * part for part in (0.5, 1.0, 1.5, 2.0)) if scales is None else tuple(scales)
        options = list(dict.fromkeys(("cond", "uncond", *_checked(given))))  # the first wins a tie
        _check_numbers(scale, penalty, iterations)
        shared = _guided(pipe, inputs, dict(call or {}), scale)
        common: dict[str, Any] = {
            "samples": samples,
            "inputs": inputs,
            "call": shared,
            "seed": seed,
            "batch_size": batch_size,
        }
        rollouts, identity, snapshot = [], None, Snapshot()
        with bar(progress) as display:
            task = display.add_task("full guidance", total=samples)
            for run, _ in recorded(pipe, DynamicGuidance((), [scale]), snapshot, keep=("state",), **common):
                rollouts.append(Rollout.of(run, snapshot, scale))
                identity = run.identity
                display.advance(task, len(run.states[0]))
            count = len(rollouts[0].timesteps)
            if rows is not None and not count <= rows <= 2 * count:
                raise ValueError(f"rows must lie between {count} and {2 * count} for {count} evaluations, got {rows}")
            rounds = 1 if rows is None else policy_search.ROUNDS
            task = display.add_task("search", total=rounds * (iterations + count))

            def on_iteration() -> None:
                display.advance(task)

            if rows is None:
                found = policy_search.descend(rollouts, options, penalty, iterations, on_iteration)
                found = policy_search.refine(rollouts, options, found, penalty, on_iteration)
            else:
                found, penalty = policy_search.within(rollouts, options, rows, iterations, on_iteration)
            policy, errors, cost = cls(found, identity=identity), 0.0, 0
            task = display.add_task("searched policy", total=samples)
            for rollout, (run, attached) in zip(
                rollouts, recorded(pipe, policy, keep=("state",), **common), strict=True
            ):
                last = run.states[-1].to(rollout.target)
                errors += float((last.float() - rollout.target.float()).square().mean()) * len(last)
                cost += attached.rows
                display.advance(task, len(last))
        base = sum(rollout.base * len(rollout.start) for rollout in rollouts)
        policy.about = {
            "scale": scale,
            "options": options,
            "penalty": penalty if math.isfinite(penalty) else None,
            "samples": samples,
            "iterations": iterations,
            "seed": seed,
            "rows": cost / samples,
            "distance": errors / base,
        }
        return policy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as JSON, whole or not at all."""
        identity = None if self.identity is None else identities.to_json(self.identity)
        values = {"format": _FORMAT, "options": list(self.options), "identity": identity, "about": self.about}
        write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PolicyGuidance:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: for a file of something else, or a damaged one.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no policy at {file}; check the path, or write one with save()")
        if (size := file.stat().st_size) > _LARGEST:
            raise ValueError(f"{file} has {size} bytes, far more than a policy; write it again with save()")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON ({error}); write it again with save()") from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"{file} holds no policy; expected the format {_FORMAT!r}, which save() writes")
        options, about = values.get("options"), values.get("about", {})
        try:
            if not isinstance(options, list) or not isinstance(about, dict):
                raise ValueError(f"options are {options!r:.60} and about {about!r:.60}")
            identity = identities.from_json(values.get("identity"), len(options))
            return cls(options, identity=identity, about=about)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} is damaged ({error}); copy it again or search anew") from error


def _checked(options: Iterable[Option]) -> tuple[Option, ...]:
    """The options with 1 and 0 by their names, which cost less."""
    if isinstance(options, str):
        raise TypeError(f"options are one string, {options!r}; give a list, one for each evaluation")
    checked: list[Option] = []
    for option in options:
        if isinstance(option, str):
            if option not in ("cond", "uncond"):
                raise ValueError(f"unknown option {option!r:.60}; choose 'cond', 'uncond' or a guidance scale")
            checked.append(option)
            continue
        if isinstance(option, bool) or not hasattr(option, "__float__"):
            raise TypeError(f"an option must be 'cond', 'uncond' or a guidance scale, got {option!r:.60}")
        if not math.isfinite(value := float(option)):
            raise ValueError(f"a guidance scale must be finite, got {value}; 7.5 is usual")
        checked.append({1.0: "cond", 0.0: "uncond"}.get(value, value))
    return tuple(checked)


def _check_numbers(scale: float, penalty: float, iterations: int) -> None:
    if not 0 < scale < math.inf or scale == 1:
        raise ValueError(f"scale must be a positive number and not 1, which is no guidance, got {scale}; 7.5 is usual")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must not be negative, got {penalty}; 0 means that rows cost nothing")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}; 100 will do")


def _guided(pipe: Any, inputs: Inputs, call: dict[str, Any], scale: float) -> dict[str, Any]:  # noqa: ANN401
    """The shared arguments, with the pipeline's guidance switched on where its one argument for that is not given."""
    known, own = parameters(pipe), as_inputs(pipe, inputs)(0)
    name = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    if name in known and name not in call and name not in own:
        call[name] = max(scale, 2.0)
    return call

"""What guidance that was fitted to a pipeline was fitted on, and its refusal in a run of another kind.

An identity is a dict of "pipeline" and "network", names of classes, and "levels", the noise level of each evaluation as
`Guidance.plan` gets it: the ``identity`` of a recorded `Trajectory`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from flowkit.hooks.parts import Evaluation, State

Identity = Mapping[str, Any]


class Fitted(Protocol):
    """Guidance that was fitted to runs of ``evaluations`` network evaluations; ``identity`` is None where more is not known."""

    identity: dict[str, Any] | None

    @property
    def evaluations(self) -> int:
        """Number of evaluations of a run."""


def of(run: Any) -> dict[str, Any] | None:  # noqa: ANN401
    """Returns the identity of a trajectory; None for a run that has none."""
    identity = getattr(run, "identity", None)
    return dict(identity) if identity else None


def check_same(ours: Identity, other: Identity) -> None:
    """Refuses to fit one thing to runs of two kinds.

    Raises:
        ValueError: where networks or levels differ.
    """
    levels, others = ours.get("levels", []), other.get("levels", [])
    if ours.get("network") != other.get("network") or not _close(levels, others):
        raise ValueError(
            f"runs of {ours.get('network')} at {_shown(levels)} and of {other.get('network')} at {_shown(others)} "
            "cannot be fitted together; record all with one pipeline and number of steps"
        )


def check_network(part: Fitted, run: Any, cure: str) -> None:  # noqa: ANN401
    """Refuses a pipeline whose network is of another class.

    Args:
        part: the guidance.
        run: what `Part.begin` gets.
        cure: end of the message.

    Raises:
        ValueError: for another class.
    """
    wanted = None if part.identity is None else part.identity.get("network")
    names = [type(getattr(network, "_orig_mod", network)).__name__ for network in run.networks]
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"{type(part).__name__} was fitted to {wanted}, the pipeline runs {' and '.join(names)}; {cure}"
        )


def check_step(part: Fitted, step: int, sigma: float, state: State, cure: str) -> None:
    """Refuses an evaluation that is not one of those it was fitted to.

    Args:
        part: the guidance.
        step: number of the evaluation.
        sigma: its noise level; nan is not compared.
        state: of the run; the number of evaluations is compared where it holds one.
        cure: end of the message.

    Raises:
        ValueError: for another number of evaluations, or another level.
    """
    evaluation: Evaluation | None = state.get("evaluation")
    count = step + 1 if evaluation is None else evaluation.steps
    if step >= part.evaluations or (evaluation is not None and count != part.evaluations):
        more = "" if evaluation is not None else " at least"
        raise ValueError(
            f"{type(part).__name__} is for runs of {part.evaluations} evaluations, this one has {count}{more}; {cure}"
        )
    levels = (part.identity or {}).get("levels")
    if levels and not _close([levels[step]], [sigma]):
        raise ValueError(
            f"{type(part).__name__} was fitted at level {levels[step]:g} of evaluation {step}, this run has {sigma:g}; {cure}"
        )


def to_json(identity: Identity) -> dict[str, Any]:
    """Returns an identity as plain JSON values; levels that are no numbers of JSON are written as words."""
    levels = [v if math.isfinite(v) else str(v) for v in identity.get("levels", [])]
    return {**identity, "levels": levels}


def from_json(value: Any, evaluations: int) -> dict[str, Any] | None:  # noqa: ANN401
    """Reads what `to_json` returns, or null.

    Raises:
        ValueError: for anything else, or levels of another number of evaluations.
    """
    if value is None:
        return None
    if isinstance(value, Mapping) and isinstance(value.get("levels"), list):
        levels = value["levels"]
        if all(isinstance(v, (int, float)) or v in ("inf", "nan") for v in levels) and len(levels) in (0, evaluations):
            return {**value, "levels": [float(v) for v in levels]}
    raise ValueError(
        f"its identity is not that of a run of {evaluations} evaluations: {json.dumps(value, default=str):.120}"
    )


def _close(levels: list[float], others: list[float]) -> bool:
    """Whether levels are the same: in the float32 that schedulers export them in, and where either is not known."""
    return len(levels) == len(others) and all(
        math.isnan(a) or math.isnan(b) or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
        for a, b in zip(levels, others, strict=True)
    )


def _shown(levels: list[float]) -> str:
    return f"{len(levels)} levels" + (f" from {levels[0]:g} to {levels[-1]:g}" if levels else "")

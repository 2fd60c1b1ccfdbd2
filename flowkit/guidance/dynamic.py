"""Dynamic classifier-free guidance: the scale is chosen anew at every step, for each sample, by evaluators of the result.

Papalampidi et al. 2025 (arXiv 2509.16131): all candidates ``D_k = u + s_k (c - u)`` come from one pair of network outputs, so a
search over the scale costs no network call, only small evaluators of the predictions of x0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flowkit.guidance.evaluators import Evaluator
from flowkit.hooks.parts import Guidance, Plan, State, column, reported, to_space


class DynamicGuidance(Guidance):
    """Chooses at each step, for each sample, the guidance scale whose prediction of x0 scores best.

        s* = argmax_k sum_j a_j(sigma) z_jk,      D = u + s* (c - u),

    with ``z_jk`` the score of candidate k by evaluator j, less its mean over the candidates and divided by its standard deviation
    (over K, not K - 1). Where the spread of a sample's scores is within their rounding, all its z are 0: the evaluator does not
    care. Ties go to the candidate nearest to the default scale, so the order of the candidates does not matter.

    How the paper normalises and weights is not spelled out in what is known of it; z and the adaptive weights are ours: ``a_j`` is
    the evaluator's ``reliability(sigma)``, its power to discriminate at that noise level measured on held-out data (see
    `flowkit.guidance.evaluator_training`), and 1 for an evaluator that has none. Only ratios of weights matter; where all are 0,
    the default scale is taken.

    Args:
        evaluators: one `flowkit.guidance.evaluators.Evaluator` or several; none only with a single scale, which is static guidance.
        scales: candidates in diffusers' convention, 1 being conditional only; all different. None is a line search: one evaluator
            with ``best`` gives its optimum, which is clamped to ``bounds``.
        default: the scale outside ``interval`` and of ties, one of the candidates. None means the middle one (the lower of two),
            and with a line search the lower bound.
        weights: "adaptive", or one fixed weight >= 0 for each evaluator.
        interval: (low, high) in diffusers' ``sigmas``, low <= sigma <= high is where scales are chosen; None means everywhere. With
            a default of 1, steps outside it cost no unconditional call.
        bounds: (low, high) of the line search.
        rows: most rows of one evaluator call; more candidates than fit are scored one group after the other. A call has at least
            one candidate of the whole batch.

    Raises:
        TypeError: for an evaluator that cannot be called.
        ValueError: for numbers that are not finite, out of order or of the wrong count, a default that is no candidate, no
            evaluator, or a line search without ``best``.
    """

    combines = True

    def __init__(
        self,
        evaluators: Evaluator | Sequence[Evaluator],
        scales: Sequence[float] | None = (1.0, 2.5, 5.0, 7.5, 10.0, 15.0),
        default: float | None = None,
        weights: Literal["adaptive"] | Sequence[float] = "adaptive",
        interval: tuple[float, float] | None = None,
        bounds: tuple[float, float] = (1.0, 15.0),
        rows: int = 256,
    ) -> None:
        self.evaluators: tuple[Evaluator, ...] = (
            tuple(evaluators) if isinstance(evaluators, Sequence) else (evaluators,)
        )
        for j, evaluator in enumerate(self.evaluators):
            if not callable(evaluator):
                raise TypeError(
                    f"evaluator {j} is {evaluator!r:.80}; give a function (x0, sigma, conditioning) -> scores"
                )
        self.bounds = _pair("bounds", bounds)
        self.interval = None if interval is None else _pair("interval", interval)
        self.scales = None if scales is None else _candidates(scales)
        if self.scales is None:
            if len(self.evaluators) != 1 or not hasattr(self.evaluators[0], "best"):
                names = ", ".join(map(_name, self.evaluators)) or "none"
                raise ValueError(
                    f"scales=None takes one evaluator with best(cond_x0, uncond_x0), got {names}; give the candidates"
                )
            self.default = self.bounds[0] if default is None else float(default)
            if not self.bounds[0] <= self.default <= self.bounds[1]:
                raise ValueError(f"default={default} lies outside bounds={self.bounds}; choose a scale within them")
        else:
            if not self.evaluators and len(self.scales) > 1:
                raise ValueError(f"{len(self.scales)} scales and no evaluator to choose; give one, or a single scale")
            self.default = self.scales[(len(self.scales) - 1) // 2] if default is None else float(default)
            if self.default not in self.scales:
                raise ValueError(
                    f"default={default} is not one of the scales {list(self.scales)}; add it or choose one of them"
                )
            # argmax takes the first of equal scores, so the order decides ties.
            self.scales = tuple(sorted(self.scales, key=lambda s: (abs(s - self.default), s)))
        if weights != "adaptive" and (isinstance(weights, str) or len(weights) != len(self.evaluators)):
            raise ValueError(
                f"weights={weights!r} for {len(self.evaluators)} evaluators; give 'adaptive' or one for each"
            )
        self.weights = None if isinstance(weights, str) else tuple(float(a) for a in weights)
        if self.weights is not None and not all(0 <= a < math.inf for a in self.weights):
            raise ValueError(
                f"weights must be finite and at least 0, got {list(self.weights)}; 0 leaves an evaluator out"
            )
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}; 256 is the default")
        self.rows = rows

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "both", or "cond" outside the interval where the default is 1.

        Raises:
            ValueError: for an interval where the noise level is not known.
        """
        return "cond" if not self._within(sigma) and self.default == 1.0 else "both"

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns D at the chosen scales; reports ``scale``, (B,).

        Args:
            cond: conditional output, (B, C, ...).
            uncond: unconditional output; None is scale 1.
            step: number of the evaluation.
            sigma: its noise level, passed on to the evaluators.
            state: of the run so far. Without ``state["evaluation"]`` the outputs are taken as predictions of x0.

        Raises:
            ValueError: for scores that are not finite or not of shape (B,), a reliability that is no weight, or an unknown path.
        """
        if uncond is None:
            return cond, reported(state, scale=1.0)
        line = cond - uncond
        if not self._within(sigma) or (self.scales is not None and len(self.scales) == 1):
            return uncond + self.default * line, reported(state, scale=cond.new_full((len(cond),), self.default))
        if self.scales is None:
            scale = self._line_search(cond, uncond, step, sigma, state)
            return (uncond + column(scale, cond) * line).to(cond.dtype), reported(state, scale=scale)
        candidates = [uncond + s * line for s in self.scales]
        scores = self._scores(candidates, step, sigma, state)
        choice = (self._weights(scores, step, sigma)[:, None, None] * _normalised(scores)).sum(0).argmax(0)
        chosen = candidates[0]
        for k, candidate in enumerate(candidates[1:], 1):
            chosen = torch.where(column(choice == k, cond), candidate, chosen)
        return chosen, reported(state, scale=scores.new_tensor(self.scales)[choice])

    def _within(self, sigma: float) -> bool:
        if self.interval is not None and math.isnan(sigma):
            raise ValueError(
                f"interval={self.interval} needs the scheduler's noise levels, which are not known; leave it out"
            )
        return self.interval is None or self.interval[0] <= sigma <= self.interval[1]

    def _line_search(self, cond: Tensor, uncond: Tensor, step: int, sigma: float, state: State) -> Any:  # noqa: ANN401
        """The optimum of the only evaluator, (B,), within the bounds."""
        best: Any = self.evaluators[0].best  # type: ignore[attr-defined]  # checked at construction
        wide = torch.promote_types(cond.dtype, torch.float32)
        with torch.no_grad():
            found = best(to_space(cond, "x0", state).to(wide), to_space(uncond, "x0", state).to(wide))
        scale = found.to(wide).clamp(*self.bounds) if isinstance(found, Tensor) else found
        self._check(0, scale, len(cond), step, sigma)
        return scale

    def _scores(self, candidates: list[Tensor], step: int, sigma: float, state: State) -> Tensor:
        """The scores, (J, K, B), in at least float32."""
        evaluation = state.get("evaluation")
        conditioning = {} if evaluation is None else evaluation.conditioning
        batch = len(candidates[0])
        group = max(1, self.rows // batch)
        wide = torch.promote_types(candidates[0].dtype, torch.float32)
        parts = []
        for start in range(0, len(candidates), group):
            some = candidates[start : start + group]
            with torch.no_grad():
                x0 = to_space(torch.stack(some), "x0", state).to(wide).flatten(0, 1)
                repeated = _repeated(conditioning, batch, len(some))
                found = [evaluator(x0, sigma, repeated) for evaluator in self.evaluators]
            for j, values in enumerate(found):
                self._check(j, values, len(x0), step, sigma)
            parts.append(torch.stack([v.to(wide) for v in found]).unflatten(1, (-1, batch)))
        return torch.cat(parts, dim=1)

    def _check(self, j: int, values: Any, rows: int, step: int, sigma: float) -> None:  # noqa: ANN401
        where = f"evaluator {j} ({_name(self.evaluators[j])}) at step {step}, sigma = {sigma:g}"
        if not isinstance(values, Tensor) or values.shape != (rows,):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{where}: scores must have shape ({rows},), got {got}; return one score for each row of x0"
            )
        if not torch.isfinite(values).all():
            raise ValueError(
                f"{where}: scores hold NaN or infinity; keep them finite, or set interval= to leave this level out"
            )

    def _weights(self, scores: Tensor, step: int, sigma: float) -> Tensor:
        """The weights a_j, (J,)."""
        if self.weights is not None:
            return scores.new_tensor(self.weights)
        found = [float(getattr(e, "reliability", lambda sigma: 1.0)(sigma)) for e in self.evaluators]
        for j, value in enumerate(found):
            if not 0 <= value < math.inf:
                raise ValueError(f"evaluator {j} ({_name(self.evaluators[j])}) at step {step}, sigma = {sigma:g}: reliability is "
                                 f"{value}; return a finite number of at least 0")  # fmt: skip
        return scores.new_tensor(found)


def _normalised(scores: Tensor) -> Tensor:
    """The scores, (J, K, B), to mean 0 and standard deviation 1 over the candidates; 0 where they differ by rounding alone."""
    std, mean = torch.std_mean(scores, dim=1, correction=0, keepdim=True)
    rounding = 4 * torch.finfo(scores.dtype).eps * scores.abs().amax(dim=1, keepdim=True)
    return torch.where(std > rounding, (scores - mean) / std, 0.0)


def _repeated(value: Any, batch: int, times: int) -> Any:  # noqa: ANN401
    """Conditioning of a batch for several candidates, one batch after the other; what has no row a sample stays as it is."""
    if isinstance(value, Tensor):
        per_sample = value.ndim > 0 and len(value) == batch
        return value.repeat(times, *[1] * (value.ndim - 1)) if per_sample else value
    if isinstance(value, Mapping):
        return {key: _repeated(item, batch, times) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_repeated(item, batch, times) for item in value)
    return value


def _candidates(scales: Sequence[float]) -> tuple[float, ...]:
    """The candidates in rising order."""
    values = tuple(sorted(float(s) for s in scales))
    if not values or not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        raise ValueError(
            f"scales must be finite and all different, at least one, got {list(scales)!r:.80}; e.g. (1, 2.5, 5, 7.5)"
        )
    return values


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = values if len(values) == 2 else (math.nan, math.nan)
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {tuple(values)}; swap or complete them")
    return float(low), float(high)


def _name(evaluator: Any) -> str:  # noqa: ANN401
    return getattr(evaluator, "__name__", type(evaluator).__name__)

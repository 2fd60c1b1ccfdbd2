"""The least squares of LinearAG: every fit, for every choice of evaluations, follows from one Gram matrix of a run.

With ``d_i = u_i - c_i`` and the samples of all trajectories as rows, the columns of a run of N evaluations are
``[c_0 ... c_{N-1}, d_0 ... d_{N-1}]``. An estimate is a linear combination of columns, so an estimate that uses estimates is one
too, and the Gram matrix of columns gives its error. Nothing of size is kept, whatever the number of trajectories.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INTERCEPTS = (None, "channel", "element")
_RANK = 1e-13  # eigenvalues of a correlation matrix in float64 below this, relative to the largest, are rounding


class Moments:
    """Sums over samples, in float64, added up one sample and channel at a time.

    Args:
        intercept: whose means are taken out before the fit: None, "channel" (axis 1) or "element".

    Raises:
        ValueError: for another intercept.
    """

    def __init__(self, intercept: str | None = None) -> None:
        if intercept not in INTERCEPTS:
            raise ValueError(f"unknown intercept {intercept!r}; choose None, 'channel' or 'element'")
        self.intercept = intercept
        self.samples = 0
        self.shape: tuple[int, ...] = ()
        self._products = self._sums = self._shift = torch.empty(0)

    @property
    def evaluations(self) -> int:
        """Number N of evaluations of a run; 0 before the first."""
        return len(self._products) // 2

    def add(self, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> None:
        """Adds a batch of trajectories.

        Args:
            cond: conditional outputs of N evaluations, each (B, C, ...).
            uncond: the unconditional ones of the same trajectories.

        Raises:
            ValueError: for lists of other lengths or shapes than before, or values that are not finite.
        """
        count, shape = len(cond), tuple(cond[0].shape[1:]) if len(cond) else ()
        if not count or len(uncond) != count or any(x.shape != cond[0].shape for x in (*cond, *uncond)):
            raise ValueError(
                f"got {count} conditional and {len(uncond)} unconditional outputs; give one of each for every evaluation, "
                "all of one shape (B, C, ...)"
            )
        if self.samples and (count, shape) != (self.evaluations, self.shape):
            raise ValueError(f"a trajectory has {count} evaluations of shape {shape}, those before it {self.evaluations} of "
                             f"shape {self.shape}; fit trajectories of one kind together")  # fmt: skip
        for sample in range(len(cond[0])):
            self._add_sample([x[sample] for x in cond], [x[sample] for x in uncond])

    def _add_sample(self, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> None:
        shape = cond[0].shape
        channels = shape[0] if shape else 1
        # Means are summed as differences from the first sample's, so that a constant leaves rounding of itself alone.
        first = not self.samples
        if first:
            self.shape = tuple(shape)
            self._products = torch.zeros(2 * len(cond), 2 * len(cond), dtype=torch.float64)
        means, sums = [], []
        for channel in range(channels):
            c, u = (torch.stack([x.reshape(channels, -1)[channel].double().cpu() for x in xs]) for xs in (cond, uncond))
            columns = torch.cat([c, u - c])
            if not torch.isfinite(columns).all():
                raise ValueError(f"sample {self.samples} holds NaN or infinity; leave its trajectory out")
            if self.intercept:
                group = columns if self.intercept == "element" else columns.mean(1, keepdim=True)
                columns = columns - (group if first else self._shift[:, channel])
                means.append(group)
                sums.append(columns if self.intercept == "element" else columns.sum(1, keepdim=True))
            self._products += columns @ columns.T
        if self.intercept:
            self._shift = torch.stack(means, 1) if first else self._shift
            self._sums = torch.stack(sums, 1) if first else self._sums + torch.stack(sums, 1)
        self.samples += 1

    def gram(self) -> Tensor:
        """Returns the mean products of the columns, (2N, 2N); with an intercept, of their differences from its means."""
        size = max(1, self._elements)
        if not self.intercept:
            return self._products / (self.samples * size)
        flat = self._sums.flatten(1)
        per_group = self.samples * size / flat.shape[1]
        return (self._products - flat @ flat.T / per_group) / (self.samples * size)

    def means(self) -> Tensor:
        """Returns the means of the columns, (2N, C, 1, ...) or (2N, C, ...) as the intercept is."""
        flat = self._sums.flatten(1)
        per_group = self.samples * self._elements / flat.shape[1]
        groups = self.shape if self.intercept == "element" else (self.shape[0], *[1] * (len(self.shape) - 1))
        return (self._shift.flatten(1) + flat / per_group).reshape(-1, *groups)

    @property
    def _elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Fit:
    """Coefficients of the estimated evaluations.

    Attributes:
        coefficients: (E, 2, N), of conditional and unconditional outputs.
        intercept: (E, C, ...), or None.
        residuals: mean square of ``u_hat - u`` on the data of the fit, one for each of E.
        relative: the same as a part of the mean square of ``u - c``.
    """

    coefficients: Tensor
    intercept: Tensor | None
    residuals: list[float]
    relative: list[float]


def fit(moments: Moments, steps: Iterable[int], ridge: float = 0.0, history: int | None = None) -> Fit:
    """Fits the estimates of some evaluations, one after another, each on what it will have when used.

    For k in steps it minimises the mean square of ``u_hat_k - u_k`` over b,

        u_hat_k = sum_{i <= k} b_i^c c_i + sum_{i < k} b_i^u u~_i [+ intercept],

    where ``u~_i`` is the estimate for i in steps and u_i for others. The solution is written as c_k plus a combination of c_i and
    ``u~_i - c_i``, whose coefficients ridge draws to 0; so does the minimum norm where columns depend on each other.

    Args:
        moments: of the trajectories.
        steps: evaluations to estimate.
        ridge: added to the correlation matrix's diagonal, >= 0.
        history: number of evaluations before k that its estimate uses, >= 0; None means all.
    """
    count, wanted = moments.evaluations, sorted(steps)
    gram = moments.gram()
    unit = torch.eye(2 * count, dtype=torch.float64)
    vectors = list(unit[count:])  # u~_i - c_i in terms of the columns
    rows, intercepts, residuals, relative = [], [], [], []
    means = moments.means() if moments.intercept else None
    for k in wanted:
        first = 0 if history is None else max(0, k - history)
        features = torch.stack([*unit[first : k + 1], *vectors[first:k]])
        target = unit[count + k]
        weights = _solve(features @ gram @ features.T, features @ gram @ target, ridge)
        vectors[k] = weights @ features
        of_c, of_d = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        of_c[first : k + 1], of_d[first:k] = weights[: k + 1 - first], weights[k + 1 - first :]
        if means is not None:  # estimates have the means of what they estimate
            shape = [-1, *[1] * (means.ndim - 1)]
            intercepts.append(means[count + k] - (torch.cat([of_c, of_d]).reshape(shape) * means).sum(0))
        own = torch.zeros(count, dtype=torch.float64)
        own[k] = 1.0
        rows.append(torch.stack([own + of_c - of_d, of_d]))
        error = target - vectors[k]
        residuals.append(max(0.0, float(error @ gram @ error)))
        whole = float(gram[count + k, count + k])
        relative.append(residuals[-1] / whole if whole > 0 else 0.0)
    empty = torch.zeros(0, 2, count, dtype=torch.float64)
    return Fit(
        torch.stack(rows) if rows else empty, torch.stack(intercepts) if intercepts else None, residuals, relative
    )


def _solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """The solution of least norm in standardised columns."""
    scale = matrix.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values, basis = torch.linalg.eigh(matrix / torch.outer(scale, scale))
    kept = values > _RANK * values[-1]
    inverse = torch.where(kept, 1.0 / torch.where(kept, values + ridge, 1.0), 0.0)
    return torch.as_tensor(basis @ (inverse * (basis.T @ (right / scale))) / scale)


def default_pattern(evaluations: int) -> list[int]:
    """Returns the evaluations to estimate that alternate with true ones in the first half and are all of the second."""
    half = evaluations // 2
    return [k for k in range(1, evaluations) if k >= half or k % 2]


def greedy_pattern(moments: Moments, count: int, ridge: float = 0.0, history: int | None = None) -> list[int]:
    """Returns ``count`` evaluations to estimate: of all but the first, one after another is dropped that helps the rest most.

    What counts is the sum of the residuals of the fits that remain, each with its estimates in place.

    Args:
        moments: of the trajectories.
        count: number of evaluations to estimate, < N.
        ridge: as in `fit`.
        history: as in `fit`.
    """
    steps = list(range(1, moments.evaluations))
    while len(steps) > count:
        trials = [[k for k in steps if k != dropped] for dropped in steps]
        steps = min(trials, key=lambda trial: sum(fit(moments, trial, ridge, history).residuals))
    return steps

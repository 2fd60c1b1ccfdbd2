"""The guidance methods that are pure functions of one step: against closed forms, exact networks and plain guidance."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from flowkit import MixtureDenoiser, paths
from flowkit.guidance import AdaptiveGuidance, IntervalGuidance, ProjectedGuidance, ZeroStarGuidance
from flowkit.guidance.adaptive import cosine
from flowkit.hooks.parts import Evaluation, Guidance, Level

NATURAL = {"flow": "flow_prediction", "vp": "epsilon", "ve": "epsilon", "edm": "edm"}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cfg(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
    return uncond + w * (cond - uncond)


def at(x: Tensor, path: str = "flow", s: float = 0.6, prediction: str | None = None, **more: Any) -> dict[str, Any]:
    """A state as the hook fills it."""
    level = Level(paths.named(path), s, prediction or NATURAL[path])
    known: dict[str, Any] = {"step": 0, "steps": 10, "conditioning": {}, **more}
    return {"evaluation": Evaluation(x, level, **known)}


C, U, X = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
METHODS: list[Guidance] = [
    AdaptiveGuidance(),
    IntervalGuidance(0.1, 0.9),
    ProjectedGuidance(3.0, norm_threshold=1.0, momentum=-0.5),
    ZeroStarGuidance(3.0),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("given", [True, False])
def test_methods_are_pure_and_keep_the_state(method: Guidance, given: bool) -> None:
    state = {**at(X, step=3), "mine": 1}
    before = dict(state)
    cond, uncond = C.clone(), U.clone()
    first, after = method.combine(cond, uncond if given else None, 3, 0.6, state)
    again, _ = method.combine(cond, uncond if given else None, 3, 0.6, state)
    assert state == before
    assert torch.equal(cond, C)
    assert torch.equal(uncond, U)
    assert after["mine"] == 1
    assert "report" in after
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if not given:
        assert torch.equal(first if method.combines else first[1], C)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_results_have_the_dtype_of_the_network(method: Guidance) -> None:
    c, u = C.bfloat16(), U.bfloat16()
    result, _ = method.combine(c, u, 3, 0.6, at(X.bfloat16(), step=3))
    assert (result if method.combines else result[1]).dtype == torch.bfloat16


# Adaptive guidance


def test_cosine_is_that_of_flattened_samples() -> None:
    a, b = (
        torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 0.0]]]),
        torch.tensor([[[1.0, 1.0]], [[6.0, 8.0]], [[1.0, 2.0]]]),
    )
    assert cosine(a, b).tolist() == pytest.approx([math.sqrt(0.5), 1, 0], abs=1e-7)
    assert cosine(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert cosine(a, -a)[1] == -1


def steps(method: AdaptiveGuidance, gammas: list[list[float]]) -> tuple[list[Any], list[list[float]]]:
    """Runs a method on pairs of unit vectors with given cosines, one row a step; returns the plans and the reported cosines."""
    state: dict[str, Any] = {}
    plans, shown = [], []
    for step, row in enumerate(gammas):
        plan = method.plan(step, 0.5, state)
        gamma = torch.tensor(row)
        c = torch.stack([torch.ones_like(gamma), torch.zeros_like(gamma)], 1)
        u = torch.stack([gamma, (1 - gamma**2).clamp_min(0).sqrt()], 1)
        (c2, u2), state = method.combine(c, None if plan == "cond" else u, step, 0.5, state)
        assert c2 is c
        assert u2 is (c if plan == "cond" else u)
        plans.append(plan.tolist() if isinstance(plan, Tensor) else plan)
        shown.append(state["report"]["cosine"].tolist())
    return plans, shown


def test_each_sample_is_cut_for_good_one_evaluation_after_its_threshold() -> None:
    rows = [[0.5, 0.2], [0.95, 0.4], [0.1, 0.8], [0.1, 0.93], [0.1, 0.1]]
    plans, shown = steps(AdaptiveGuidance(0.9), rows)
    assert plans == ["both", "both", [False, True], [False, True], "cond"]
    nan = math.nan
    assert shown[:2] == [pytest.approx(row) for row in rows[:2]]
    assert shown[2:] == [pytest.approx(row, nan_ok=True) for row in ([nan, 0.8], [nan, 0.93], [nan, nan])]


def test_a_batch_is_cut_when_its_least_cosine_reaches_the_threshold() -> None:
    rows = [[0.95, 0.2], [0.1, 0.95], [0.92, 0.91], [0.1, 0.1]]
    assert steps(AdaptiveGuidance(0.9, per_sample=False), rows)[0] == ["both", "both", "both", "cond"]


def test_thresholds_outside_of_cosines_never_and_always_cut() -> None:
    equal = [[1.0, 1.0]] * 3
    assert steps(AdaptiveGuidance(1.0), equal)[0] == ["both", "cond", "cond"]
    assert steps(AdaptiveGuidance(1.00000001), equal)[0] == ["both"] * 3
    opposite = [[-1.0, -1.0]] * 3
    assert steps(AdaptiveGuidance(-1.1), opposite)[0] == ["both", "cond", "cond"]
    assert steps(AdaptiveGuidance(-0.9), opposite)[0] == ["both"] * 3


def test_the_cosine_depends_on_the_space() -> None:
    """At high noise eps of both is nearly the noise itself, their x0 is not (exact network of a mixture)."""
    model = MixtureDenoiser.of(torch.tensor([[[-1.0, 1.0]], [[1.0, 1.0]]]), 0.3, labels=torch.tensor([0, 1]))
    s = 0.9
    x = (1 - s) * torch.tensor([[[1.0, 1.0]]]) + s * torch.tensor([[[0.9, -1.3]]])
    c, u = (model(x.double(), 1000 * s, torch.tensor([label])).sample for label in (1, 0))
    seen = {}
    for space in ("model", "x0", "eps", "velocity"):
        _, state = AdaptiveGuidance(space=space).combine(c, u, 0, s, at(x.double(), "flow", s))
        seen[space] = state["report"]["cosine"].item()
    x0 = [model.posterior(x, s, torch.tensor([label]))[0] for label in (1, 0)]
    assert seen["x0"] == pytest.approx(cosine(*x0).item(), abs=1e-9)
    assert seen["model"] == pytest.approx(seen["velocity"], abs=1e-12)
    assert seen["eps"] > 0.95 > 0.5 > seen["x0"]


# Interval


def test_an_interval_is_open_below_and_closed_above() -> None:
    method = IntervalGuidance(0.2, 0.8)
    assert [method.plan(0, s, {}) for s in (0.1, 0.2, 0.3, 0.8, 0.9)] == ["cond", "cond", "both", "both", "cond"]
    assert IntervalGuidance(0, math.inf).plan(0, 1e9, {}) == "both"
    (c, u), _ = method.combine(C, U, 0, 0.5, {})
    assert c is C
    assert u is U


@pytest.mark.parametrize("path", ["flow", "vp", "ve"])
def test_both_units_give_the_same_steps(path: str) -> None:
    known = paths.named(path)
    ends = 0.3, 0.7  # flow times
    by_sigma = IntervalGuidance(known.level(ends[0]), known.level(ends[1]))
    by_snr = IntervalGuidance(paths.log_snr(ends[1]) - 1e-9, paths.log_snr(ends[0]) - 1e-9, unit="log_snr")
    plans = []
    for s in (0.1, 0.3, 0.4, 0.7, 0.8):
        sigma = known.level(s)
        plans.append(by_snr.plan(0, sigma, at(X, path, s)))
        assert plans[-1] == by_sigma.plan(0, sigma, {})
    assert plans == ["cond", "cond", "both", "both", "cond"]


def test_an_interval_needs_the_level() -> None:
    with pytest.raises(ValueError, match="needs the scheduler's noise levels, which are not known; swap in"):
        IntervalGuidance(0.0, 1.0).plan(0, math.nan, {})


def test_log_snr_needs_a_path() -> None:
    with pytest.raises(ValueError, match="needs the scheduler's path"):
        IntervalGuidance(-1, 1, unit="log_snr").plan(0, 0.5, {})


# Adaptive projected guidance


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
def test_without_projection_it_is_plain_guidance(path: str) -> None:
    result, _ = ProjectedGuidance(6.5, eta=1).combine(C, U, 0, 0.6, at(X, path))
    assert torch.allclose(result, cfg(C, U, 6.5), atol=1e-12)
    assert not torch.allclose(result, ProjectedGuidance(6.5).combine(C, U, 0, 0.6, at(X, path))[0], atol=0.1)


def test_the_update_is_orthogonal_to_x0_and_bounded() -> None:
    state, w, r = at(X, "vp"), 4.0, 0.7
    evaluation = state["evaluation"]
    result, _ = ProjectedGuidance(w, norm_threshold=r).combine(C, U, 0, 0.6, state)
    c, u, guided = (evaluation.to(raw, "x0").flatten(1) for raw in (C, U, result))
    update = (guided - c) / (w - 1)
    assert (update * c).sum(1).abs().max() < 1e-12
    d = c - u
    d = d * (r / d.norm(dim=1, keepdim=True)).clamp_max(1)
    expected = d - (d * c).sum(1, keepdim=True) / c.square().sum(1, keepdim=True) * c
    assert torch.allclose(update, expected, atol=1e-12)
    assert update.norm(dim=1).max() < r
    far, _ = ProjectedGuidance(w, norm_threshold=1e3).combine(C, U, 0, 0.6, state)
    assert torch.equal(far, ProjectedGuidance(w).combine(C, U, 0, 0.6, state)[0])


def test_momentum_is_a_running_sum_of_what_is_not_yet_rescaled() -> None:
    method = ProjectedGuidance(2.0, eta=1, momentum=-0.5, norm_threshold=3.0)
    state: dict[str, Any] = {}
    total = torch.zeros_like(C)
    for step in range(3):
        c, u = normal(3, 2, 4, 4, seed=10 + step), normal(3, 2, 4, 4, seed=20 + step)
        total = (c - u) - 0.5 * total
        norm = total.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        assert norm.min() > 3
        result, state = method.combine(c, u, step, 0.5, state)
        assert torch.allclose(result, c + 3.0 * total / norm, atol=1e-12)


def test_a_scale_of_one_needs_no_second_pass() -> None:
    for method in (ProjectedGuidance(1.0), ZeroStarGuidance(1.0, zero_init=0)):
        assert method.plan(0, 1.0, {}) == "cond"
        assert method.combine(C, None, 0, 1.0, at(X))[0] is C
        assert torch.allclose(method.combine(C, U, 0, 1.0, at(X))[0], C, atol=1e-12)


# CFG-Zero*


def test_the_unconditional_velocity_is_scaled_by_its_projection() -> None:
    w = 4.0
    result, _ = ZeroStarGuidance(w, zero_init=0).combine(C, U, 5, 0.6, at(X))
    for i in range(len(C)):
        a = (C[i] * U[i]).sum() / (U[i] ** 2).sum()
        assert torch.allclose(result[i], a * U[i] + w * (C[i] - a * U[i]), atol=1e-12)
    # An unconditional velocity that is off by a factor gives the same.
    assert torch.allclose(result, ZeroStarGuidance(w, zero_init=0).combine(C, 3 * U, 5, 0.6, at(X))[0], atol=1e-12)
    assert not torch.allclose(cfg(C, U, w), cfg(C, 3 * U, w), atol=0.1)


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample", "v_prediction"])
def test_the_first_velocities_are_zero_and_need_no_second_pass(prediction: str) -> None:
    method = ZeroStarGuidance(4.0)
    assert method.plan(0, 1.0, {}) == "cond"
    state = at(X, s=0.98, prediction=prediction)
    result, _ = method.combine(C, None, 0, 0.98, state)
    assert state["evaluation"].to(result, "velocity").abs().max() < 1e-13
    if prediction == "flow_prediction":
        assert not result.any()


@pytest.mark.parametrize(("zero_init", "total", "zeroed"), [(0.04, 28, 1), (0.04, 40, 1), (0.04, 50, 2), (0.04, 8, 1),
                                                            (0.29, 100, 29), (3, 8, 3), (0, 8, 0)])  # fmt: skip
def test_how_many_are_zeroed(zero_init: float, total: int, zeroed: int) -> None:
    method = ZeroStarGuidance(4.0, zero_init)
    plans = [method.plan(step, 0.9, at(X, step=step, steps=total)) for step in range(total)]
    assert plans == ["cond"] * zeroed + ["both"] * (total - zeroed)


def test_zero_star_is_for_flow_models_of_known_length() -> None:
    with pytest.raises(ValueError, match="is for flow models and this one is on the 'vp' path"):
        ZeroStarGuidance(4.0).combine(C, None, 0, 1.0, at(X, "vp"))
    with pytest.raises(ValueError, match=r"zero_init=0\.04 is a fraction"):
        ZeroStarGuidance(4.0).plan(1, 0.9, {})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AdaptiveGuidance(math.nan), ValueError, "threshold must not be NaN"),
        (lambda: AdaptiveGuidance(math.inf), ValueError, "threshold must be finite, got inf"),
        (lambda: AdaptiveGuidance(cast(Any, "high")), TypeError, "threshold must be one number, got 'high'"),
        (lambda: AdaptiveGuidance(space="pixels"), ValueError, "unknown space 'pixels'"),
        (lambda: IntervalGuidance(0.8, 0.2), ValueError, "from 0.8 to 0.2 is empty"),
        (lambda: IntervalGuidance(0.2, 0.2), ValueError, "is empty"),
        (lambda: IntervalGuidance(-1, 0.2), ValueError, "must not be negative, got low=-1"),
        (lambda: IntervalGuidance(0, math.nan), ValueError, "high must not be NaN"),
        (lambda: IntervalGuidance(0, 1, unit=cast(Any, "step")), ValueError, "unknown unit 'step'"),
        (lambda: ProjectedGuidance(math.inf), ValueError, "scale must be finite"),
        (
            lambda: ProjectedGuidance(5, norm_threshold=0),
            ValueError,
            "norm_threshold must be positive, got 0; use None",
        ),
        (lambda: ProjectedGuidance(5, momentum=-1), ValueError, r"momentum must lie in \(-1, 1\), got -1"),
        (lambda: ZeroStarGuidance(5, zero_init=-0.1), ValueError, "zero_init=-0.1 is neither"),
        (lambda: ZeroStarGuidance(5, zero_init=1.5), ValueError, "zero_init=1.5 is neither"),
        (lambda: ZeroStarGuidance(True), TypeError, "scale must be one number, got True"),
    ],
)
def test_bad_arguments_are_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()

"""Solvers against exact solutions: orders of convergence, moments of a Gaussian, and ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit import gauges, paths, solvers, table
from flowkit.analytic import MixtureDenoiser
from flowkit.paths import Path
from flowkit.solvers import Solver

MEANS = torch.tensor(
    [
        [1.2, 0.3, -0.5, 0.1],
        [-0.9, 0.8, 0.4, -0.6],
        [0.2, -1.1, 0.9, 0.7],
        [-0.4, -0.3, -1.2, 1.0],
        [0.6, 1.0, 0.2, -1.1],
    ]
)
BETAS = paths.betas()


def uniform(count: int, start: float = 1.0, end: float = 0.0) -> list[float]:
    return [start + (end - start) * i / count for i in range(count + 1)]


def inner(count: int) -> list[float]:
    return uniform(count, 0.999, 0.01)


def karras(count: int) -> list[float]:
    high, low = 80 ** (1 / 7), 0.02 ** (1 / 7)
    return [paths.from_rho((high + i / count * (low - high)) ** 7) for i in range(count + 1)]


def vp_times(count: int) -> list[float]:
    path = paths.vp(BETAS)
    return [path.at_time(999 - i * 979 / count) for i in range(count + 1)]


def sample(
    method: Solver | str, path_name: str, levels: Sequence[float], prediction: str | None = None, **options: object
) -> Tensor:
    """Solves the ODE of the exact mixture from fixed noise; returns y at the last level."""
    model = MixtureDenoiser.of(MEANS, 0.6, path=path_name, prediction_type=prediction)
    path = model.path
    method = solvers.solver(method, path) if isinstance(method, str) else method
    rows = table.build(method, path, model.prediction, levels, **options)  # type: ignore[arg-type]
    y = normal(0)

    def network(x: Tensor, time: float) -> Tensor:
        output: Tensor = model(x * path.input_scale(path.at_time(time)), time).sample
        return output

    end: Tensor = table.solve(rows, y / path.norm(levels[0]), network, lambda i: normal(i + 1)) * path.norm(levels[-1])
    return end


def normal(seed: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RK4 = replace(solvers.find("rk4"), gauge="flow")
DETERMINISTIC = [name for name, method in solvers.SOLVERS.items() if not method.noise]
# Of higher order than what users get by name, and the third order that the published DPM-Solver++(3M) misses.
HIGHER = {
    "deis-3": replace(solvers.find("deis"), order=3),
    "unipc-3": replace(solvers.find("unipc"), order=3),
    "exact-3m": replace(solvers.find("dpm++3m"), rules=("mid", "exact")),
    "singlestep-3": replace(solvers.find("dpm++2s"), inner=(1 / 3, 2 / 3), order=3, rules=("exact",)),
}


@cache
def exact(path_name: str, grid: Callable[[int], list[float]]) -> Tensor:
    return sample(RK4, path_name, grid(600))


def slope(
    method: Solver | str, path_name: str, grid: Callable[[int], list[float]], counts: tuple[int, int] = (160, 320)
) -> float:
    few, many = (
        (sample(method, path_name, grid(n)) - exact(path_name, grid)).square().mean().sqrt().item() for n in counts
    )
    return math.log2(few / many)


# A Karras grid hides the lower order of the first steps; the others show it, so that only these methods keep their own.
ORDERS = [
    *((name, "ve", karras, solvers.find(name).accuracy) for name in DETERMINISTIC),
    *((name, "vp", vp_times, solvers.find(name).accuracy) for name in ("euler", "heun", "midpoint", "ralston", "edm", "ab2")),
    *((name, "vp", vp_times, 2) for name in ("dpm++2s", "dpm++2m", "deis")),
    *((name, "flow", inner, solvers.find(name).accuracy) for name in ("euler", "heun", "midpoint", "ralston", "ab2", "unipc")),
    *((name, "flow", inner, 2) for name in ("dpm++2s", "dpm++2m", "ab3", "ab4")),
    *((name, "ve", karras, order) for name, order in (("deis-3", 3), ("unipc-3", 4), ("exact-3m", 3), ("singlestep-3", 3))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path_name", "grid", "order"), ORDERS)
def test_observed_order_of_convergence(
    name: str, path_name: str, grid: Callable[[int], list[float]], order: float
) -> None:
    assert slope(HIGHER.get(name, name), path_name, grid) == pytest.approx(order, abs=0.18)


def from_exact_start(method: Solver, count: int) -> float:
    """Error of a run on the flow path whose first predictions are those of exact states, not of steps of lower order."""
    levels = inner(count)
    model = MixtureDenoiser.of(MEANS, 0.6)
    started, y = [], normal(0)
    for i in range(method.order - 1):
        started.append(model(y, 1000 * levels[i]).sample)
        step = [levels[i] + (levels[i + 1] - levels[i]) * k / 40 for k in range(41)]
        y = table.solve(table.build(RK4, paths.flow(), "flow_prediction", step), y, lambda x, t: model(x, t).sample)
    rows = table.build(method, paths.flow(), "flow_prediction", levels)[len(started) :]
    history = tuple(reversed(started))  # in the flow gauge the predictions are the network's outputs
    for row in rows:
        y, history = table.step(row, y, model(y, row.time).sample, history)
    return (y - exact("flow", inner)).square().mean().sqrt().item()


@pytest.mark.parametrize(("name", "order"), [("ab2", 2), ("ab3", 3), ("ab4", 4)])
def test_order_from_exact_start_values(name: str, order: int) -> None:
    method = replace(solvers.find(name), gauge="flow")
    few, many = from_exact_start(method, 160), from_exact_start(method, 320)
    assert math.log2(few / many) == pytest.approx(order, abs=0.15)


def test_a_wrong_coefficient_loses_the_order() -> None:
    wrong = Solver("wrong", 2, gauge="flow", tableau=((1.0,), (0.4, 0.6)))
    assert slope(wrong, "flow", inner) < 1.3
    held = replace(solvers.find("dpm++2m"), order=1)
    assert slope(held, "ve", karras) < 1.3
    # What the published DPM-Solver++(3M) leaves out, against "exact-3m" above.
    assert slope("dpm++3m", "ve", karras) < 2.2


@pytest.mark.parametrize("gauge", ["eps", "x0", "flow"])
def test_first_order_is_one_row_in_every_gauge(gauge: solvers.Gauge) -> None:
    levels = uniform(6, 0.95, 0.05)
    reference = sample("euler", "flow", levels)
    assert (sample(Solver("g", 1, gauge=gauge), "flow", levels) - reference).abs().max() < 1e-12


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_paths_and_predictions_do_not_change_the_result(name: str, prediction: str) -> None:
    levels = uniform(7, 0.93, 0.05)
    method = replace(solvers.find(name), gauge=solvers.find(name).gauge or "flow")
    reference = sample(method, "flow", levels)
    for path_name in ("flow", "vp", "cosine", "ve", "edm"):
        if path_name == "vp":  # a clock of its own: hand over exact times
            times = [paths.vp(BETAS).time(s) for s in levels[:-1]]
            got = sample(method, path_name, [*map(paths.vp(BETAS).at_time, times), levels[-1]], prediction)
        else:
            got = sample(method, path_name, levels, prediction)
        assert (got - reference).abs().max() < 1e-10, path_name


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++3m"])
@pytest.mark.parametrize("count", [6, 10, 20])
def test_a_leap_at_the_end_of_a_flow_grid_is_not_extrapolated_over(name: str, count: int) -> None:
    """Flow-match Euler's grid ends at sigma 0.001 before 0: without the limit the last extrapolation is most of the error."""
    levels = [*np.linspace(1.0, 0.001, count).tolist(), 0.0]
    fine = [a + (b - a) * k / 20 for a, b in pairwise(levels) for k in range(20)]
    truth = sample(RK4, "flow", [*fine, 0.0])
    limited = solvers.solver(name, paths.flow())
    assert limited.reach == 2
    errors = [(sample(m, "flow", levels) - truth).square().mean().sqrt().item() for m in (limited, solvers.find(name))]
    assert errors[0] < 0.5 * errors[1]


def _moments(method: Solver, path: Path, levels: Sequence[float], std: float, **options: Any) -> float:
    """Variance at the end for data N(0, std^2): exact, since every row is then linear in what went before."""
    rows = table.build(method, path, "flow_prediction", levels, **options)
    n = path.norm(levels[0])
    x = {"start": math.hypot((1 - levels[0]) * std, levels[0]) / n}  # x as a combination of independent normals
    history: list[dict[str, float]] = []
    for i, row in enumerate(rows):
        alpha, sigma = path.alpha(row.s), path.sigma(row.s)
        total = alpha**2 * std**2 + sigma**2
        velocity = (sigma - alpha * std**2) / total  # raw = velocity * x
        prediction = {k: (row.p + row.q * velocity) * v for k, v in x.items()}
        history = [prediction, *history]
        new = {k: row.a * v for k, v in x.items()}
        for weight, stored in zip(row.b, history, strict=False):
            for k, v in stored.items():
                new[k] = new.get(k, 0.0) + weight * v
        if row.c:
            new[f"noise {i}"] = row.c
        x = new
    return sum(v**2 for v in x.values())


SDE_EXACT = replace(solvers.find("sde-dpm++2m"), rules=("exact",))


@pytest.mark.parametrize(
    ("method", "eta", "order"),
    [
        ("euler", 1.0, 1.0),
        ("euler", 0.5, 1.0),
        ("ancestral", 1.0, 1.0),
        ("ancestral", 0.5, 1.0),
        ("euler-maruyama", 1.0, 1.0),
        ("euler-maruyama", 0.5, 1.0),
        ("sde-dpm++2m", 1.0, 2.0),
        ("sde-dpm++2m", 0.5, 2.0),
        (SDE_EXACT, 1.0, 2.0),
        (replace(SDE_EXACT, order=1), 1.0, 1.0),
        (replace(solvers.find("euler-maruyama"), gauge="eps"), 1.0, 1.0),
        (replace(solvers.find("sde-dpm++2m"), gauge="eps"), 1.0, 2.0),  # SDE-DPM-Solver of Lu et al. 2022
        (replace(solvers.find("ancestral"), noise="rf"), 0.7, 1.0),
        ("dpm++2m", None, 2.0),
        ("heun", None, 2.0),
        # A step down and exact noise up keep the marginal: the order is that of the step.
        ("heun", 0.8, 2.0),
        ("dpm++2s", 0.8, 2.0),
    ],
)
@pytest.mark.parametrize("path", [paths.flow(), paths.ve()], ids=lambda path: path.name)
def test_weak_order_by_exact_moments(method: Solver | str, eta: float | None, order: float, path: Path) -> None:
    std, end = 0.4, 0.01
    n = path.norm(end)
    exact = (((1 - end) * std) ** 2 + end**2) / n**2
    method = solvers.solver(method, path) if isinstance(method, str) else method
    errors = [abs(_moments(method, path, uniform(n, 0.995, end), std, eta=eta) - exact) for n in (640, 1280)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("name", [name for name, method in solvers.SOLVERS.items() if method.noise])
@pytest.mark.parametrize("path_name", ["flow", "vp", "cosine"])
def test_full_runs_of_stochastic_solvers_end_with_the_variance_of_the_data(name: str, path_name: str) -> None:
    path, std = paths.named(path_name), 0.5
    levels = uniform(800, path.start)
    method = solvers.solver(name, path)
    assert _moments(method, path, levels, std) == pytest.approx(std**2, rel=0.02)
    assert abs(_moments(method, path, levels, std, s_noise=1.1) / std**2 - 1) > 0.04


def churned(count: int, s_churn: float, s_noise: float = 1.0) -> tuple[list[float], list[float]]:
    """Raised levels of the calls, and the levels where steps end, on the Karras grid of sigmas 80 to 0.002, then 0."""
    sigmas = [(80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(count)]
    gamma = min(s_churn / count, math.sqrt(2) - 1)
    raised = [v * (1 + gamma) if 0.05 <= v <= 50 else v for v in sigmas]
    return [paths.from_rho(v) for v in (*raised, 0.0)], [paths.from_rho(v) for v in (*sigmas[1:], 0.0)]


@pytest.mark.parametrize("s_churn", [0.0, 10.0, 40.0])
def test_churn_is_algorithm_2_of_karras(s_churn: float) -> None:
    """Against the algorithm itself, which adds noise at the start of a step (Karras et al. 2022)."""
    count, s_noise = 18, 1.003
    levels, ends = churned(count, s_churn)
    path, model = paths.ve(), MixtureDenoiser.of(MEANS, 0.6, path="ve")
    sigmas = [80.0, *map(paths.rho, ends)]
    hats = list(map(paths.rho, levels))

    def slope_at(x: Tensor, sigma: float) -> Tensor:
        slope: Tensor = (x - model.posterior(x, paths.from_rho(sigma))[0]) / sigma
        return slope

    def noise(step: int) -> Tensor:
        return normal(100 + step)

    x = 80.0 * normal(0)
    for i in range(count):
        x = x + s_noise * math.sqrt(max(0.0, hats[i] ** 2 - sigmas[i] ** 2)) * noise(i)
        d = slope_at(x, hats[i])
        euler = x + (sigmas[i + 1] - hats[i]) * d
        x = euler
        if sigmas[i + 1] > 0:
            x = euler + (sigmas[i + 1] - hats[i]) * (slope_at(euler, sigmas[i + 1]) - d) / 2
    rows = table.build(solvers.find("edm"), path, "epsilon", levels, ends=ends, churned=True, s_noise=s_noise)
    assert len(rows) == 2 * count - 1
    assert sum(row.c > 0 for row in rows) == sum(h > v for h, v in zip(hats[1:-1], sigmas[1:-1], strict=True))
    start = 80.0 * normal(0) + s_noise * math.sqrt(max(0.0, hats[0] ** 2 - 6400.0)) * noise(0)
    ours = table.solve(rows, start, lambda y, t: model(y, t).sample, lambda i: noise(rows[i].step + 1))
    assert (ours - x).abs().max() < 1e-11


def test_churned_edm_has_weak_order_2_and_too_much_noise_shows() -> None:
    std, path = 0.4, paths.ve()

    def error(count: int, s_noise: float = 1.0) -> float:
        levels = uniform(count, 0.98, 0.05)
        sigmas = list(map(paths.rho, levels))
        raised = [paths.from_rho(v * (1 + 4.0 / count)) for v in sigmas[:-1]]
        options = {"ends": levels[1:], "churned": True, "s_noise": s_noise}
        return abs(
            _moments(solvers.find("edm"), path, [*raised, levels[-1]], std, **options) - (std**2 + sigmas[-1] ** 2)
        )

    assert math.log2(error(320) / error(640)) == pytest.approx(2.0, abs=0.12)
    assert error(320, 1.1) > 0.02


def test_ancestral_noise_keeps_the_marginal_and_too_much_does_not() -> None:
    path, std, end = paths.vp(BETAS), 0.7, 0.2
    exact = path.alpha(end) ** 2 * std**2 + path.sigma(end) ** 2
    levels, method = uniform(500, path.start, end), solvers.solver("euler", path)
    for eta in (0.0, 1.0):
        assert _moments(method, path, levels, std, eta=eta) == pytest.approx(exact, rel=1e-2)
    assert _moments(method, path, levels, std, eta=1.0, s_noise=1.1) > 1.05 * exact


def test_weights_are_exact_on_polynomials() -> None:
    """Exact weights integrate any polynomial of their degree in the clock."""
    s, t, nodes = 0.7, 0.55, [0.7, 0.8, 0.95]
    q = gauges.weights("flow", "u", "exact", s, t, nodes)
    for power in range(3):
        exact = (t ** (power + 1) - s ** (power + 1)) / (power + 1) / (t - s)
        assert q @ np.array(nodes) ** power == pytest.approx(exact, rel=1e-13)
    rules: list[tuple[solvers.Gauge, str, solvers.Rule]] = [
        ("x0", "lambda", "mid"), ("eps", "lambda", "exact"), ("x0", "lambda", "bh1"), ("eps", "lambda", "bh1"),
        ("x0", "lambda", "half"), ("x0", "lambda", "outer"), ("eps", "index", "exact"), ("x0", "u", "exact"),
    ]  # fmt: skip
    for gauge, tau, rule in rules:
        for count in (1, 2, 3):
            assert gauges.weights(gauge, tau, rule, s, t, nodes[:count]).sum() == pytest.approx(1, rel=1e-12)


def test_weights_as_if_steps_were_equal_are_those_of_adams_and_bashforth() -> None:
    nodes = [0.7, 0.8, 0.85, 0.95]
    for known in ([1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]):
        assert gauges.weights("eps", "index", "exact", 0.7, 0.6, nodes[: len(known)]) == pytest.approx(known, rel=1e-12)
    assert gauges.weights("eps", "index", "exact", 0.8, 0.7, nodes[:2]) == pytest.approx([0.5, 0.5], rel=1e-12)


@pytest.mark.parametrize("h", [0.001, 0.1, 3.0, 50.0])
def test_quadrature_has_the_closed_form_moments_of_the_x0_gauge(h: float) -> None:
    """The mean of log-SNR over the step under the density exp(lambda); float32 phi functions lose it for small h."""
    s = 0.9
    t = (s / (1 - s) * math.exp(-h)) / (1 + s / (1 - s) * math.exp(-h))
    older = 0.95
    h_old = math.log((1 - s) / s) - math.log((1 - older) / older)
    moment = h / -math.expm1(-h) - 1  # of (lambda - lambda_s) over the step
    q = gauges.weights("x0", "lambda", "exact", s, t, [s, older])
    assert q[1] == pytest.approx(-moment / h_old, rel=1e-9 if h < 0.01 else 1e-11)


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("path_name", ["flow", "vp", "cosine"])
def test_both_ends_are_finite(name: str, path_name: str) -> None:
    for count in (1, 2, 3, 9):
        levels = uniform(count)
        if path_name == "vp":
            levels[0] = paths.vp(BETAS).start
        y = sample(name, path_name, levels, "v_prediction")
        assert torch.isfinite(y).all()


def test_calls_and_storage() -> None:
    path = paths.flow()
    twice, once = dict.fromkeys(("heun", "edm", "dpm++2s"), 9), dict.fromkeys(("midpoint", "ralston"), 10)
    calls = twice | once | {"rk4": 17}
    for name, method in solvers.SOLVERS.items():
        rows = table.build(solvers.solver(name, path), path, "flow_prediction", uniform(5))
        assert len(rows) == calls.get(name, 5)
        assert len({row.step for row in rows}) == 5
        assert max(row.keep for row in rows) == method.stored
        assert rows[-1].keep == 0
        assert any(row.c for row in rows) == bool(method.noise)
        assert rows[-1].c == 0


def test_facts_say_what_a_method_is() -> None:
    assert solvers.find("unipc").facts.startswith(
        "order 3; 1 evaluation a step; deterministic; converges to the probability-flow ODE; stores 2; 2 without its corrector"
    )
    assert solvers.find("sde-dpm++2m").facts == (
        "weak order 2; 1 evaluation a step; stochastic; converges to the SDE of the same marginals; stores 1"
    )
    assert "4 evaluations a step" in solvers.find("rk4").facts


def test_a_repeated_level_is_an_identity_row() -> None:
    levels = [1.0, 0.75, 0.75, 0.5, 0.0]
    for name in solvers.SOLVERS:
        assert torch.isfinite(sample(name, "flow", levels)).all()
    path = paths.flow()
    row = table.build(solvers.solver("dpm++2m", path), path, "flow_prediction", levels)[1]
    x, raw = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    assert torch.allclose(table.step(row, x, raw, (torch.zeros_like(x),))[0], x, atol=1e-14)


def test_flow_euler_is_one_multiply_add() -> None:
    path = paths.flow()
    row = table.build(solvers.solver("euler", path), path, "flow_prediction", [0.8, 0.5])[0]
    x, raw = torch.randn(2, 3, 4)
    assert torch.equal(table.step(row, x, raw)[0], torch.add(x, raw, alpha=0.5 - 0.8))


def test_half_precision_is_summed_in_float32_and_the_input_is_kept() -> None:
    path = paths.flow()
    rows = table.build(solvers.solver("unipc", path), path, "flow_prediction", uniform(4))
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    before = x.clone()
    result, history = table.step(rows[0], x, torch.ones_like(x))
    assert result.dtype == torch.float32
    assert history[0].dtype == torch.float32
    assert torch.equal(x, before)


def test_bad_tables_are_refused() -> None:
    path = paths.flow()
    with pytest.raises(ValueError, match="unknown solver 'eular'; choose one of"):
        solvers.solver("eular", path)
    for name, options, message in (
        ("dpm++2m", {"eta": 1.0}, "eta = 1 needs a one-step solver, but this is 'dpm"),
        ("unipc", {"eta": 1.0}, "eta = 1 would put noise into the corrector of 'unipc'"),
        ("ab2", {"churned": True, "ends": uniform(3)[1:]}, "s_churn needs a one-step solver, but this is 'ab2'"),
        ("ancestral", {"churned": True, "ends": uniform(3)[1:]}, "'ancestral' draws noise of its own"),
        ("edm", {"churned": True, "ends": uniform(3)[1:], "eta": 0.5}, "eta = 0.5 and s_churn both add noise"),
        ("euler", {"eta": 1.5}, "eta = 1.5 asks for more noise than there is"),
        ("euler", {"eta": -0.5}, "eta must be a number >= 0, got -0.5"),
        ("euler-maruyama", {"eta": math.nan}, "eta must be a number >= 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            table.build(solvers.solver(name, path), path, "flow_prediction", uniform(3), **options)
    third = replace(solvers.find("sde-dpm++2m"), order=3)
    with pytest.raises(ValueError, match="an SDE solver of order 3 has weak order 2 at best; use solver='sde-dpm"):
        table.build(third, path, "flow_prediction", uniform(3))
    with pytest.raises(ValueError, match="cannot start at infinite sigma"):
        table.build(solvers.solver("euler", paths.ve()), paths.ve(), "epsilon", uniform(3))
    with pytest.raises(ValueError, match="'epsilon' does not determine the sample at alpha = 0"):
        table.build(solvers.solver("dpm++2m", paths.cosine()), paths.cosine(), "epsilon", uniform(3))
    row = table.build(solvers.solver("euler", path), path, "flow_prediction", uniform(3), eta=1.0)[0]
    with pytest.raises(ValueError, match="adds noise"):
        table.step(row, torch.ones(1), torch.ones(1))

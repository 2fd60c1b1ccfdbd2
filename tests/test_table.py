"""Solvers against exact solutions: orders of convergence, moments of a Gaussian, and ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit import paths, solvers, table
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
    y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x: Tensor, time: float) -> Tensor:
        output: Tensor = model(x * path.input_scale(path.at_time(time)), time).sample
        return output

    end: Tensor = table.solve(rows, y / path.norm(levels[0]), network) * path.norm(levels[-1])
    return end


RK4 = Solver("rk4", "", gauge="flow", tableau=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))


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


@pytest.mark.parametrize(
    ("name", "path_name", "grid", "order"),
    [
        ("euler", "ve", karras, 1.0),
        ("heun", "ve", karras, 1.95),
        ("dpm++2m", "ve", karras, 1.97),
        ("unipc", "ve", karras, 2.97),
        ("euler", "vp", vp_times, 1.0),
        ("heun", "vp", vp_times, 1.97),
        ("dpm++2m", "vp", vp_times, 1.9),
        ("euler", "flow", inner, 1.0),
        ("heun", "flow", inner, 2.0),
        ("unipc", "flow", inner, 3.0),
    ],
)
def test_observed_order_of_convergence(
    name: str, path_name: str, grid: Callable[[int], list[float]], order: float
) -> None:
    assert slope(name, path_name, grid) == pytest.approx(order, abs=0.15)


def test_a_wrong_coefficient_loses_the_order() -> None:
    wrong = Solver("wrong", "", gauge="flow", tableau=((1.0,), (0.4, 0.6)))
    assert slope(wrong, "flow", inner) < 1.3
    held = replace(solvers.find("dpm++2m"), order=1)
    assert slope(held, "ve", karras) < 1.3


@pytest.mark.parametrize("gauge", ["eps", "x0", "flow"])
def test_first_order_is_one_row_in_every_gauge(gauge: solvers.Gauge) -> None:
    levels = uniform(6, 0.95, 0.05)
    reference = sample("euler", "flow", levels)
    assert (sample(Solver("g", "", gauge=gauge), "flow", levels) - reference).abs().max() < 1e-12


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


def _moments(
    method: Solver, path: Path, levels: Sequence[float], std: float, eta: float = 0.0, excess: float = 1.0
) -> float:
    """Variance at the end for data N(0, std^2): exact, since every row is then linear in what went before."""
    rows = table.build(method, path, "flow_prediction", levels, eta=eta)
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
            new[f"noise {i}"] = excess * row.c
        x = new
    return sum(v**2 for v in x.values())


@pytest.mark.parametrize(
    ("name", "eta", "order"), [("euler", 1.0, 0.98), ("euler", 0.5, 0.99), ("dpm++2m", 0.0, 2.02), ("heun", 0.0, 2.0)]
)
def test_weak_order_by_exact_moments(name: str, eta: float, order: float) -> None:
    std, end = 0.4, 0.01
    exact = ((1 - end) * std) ** 2 + end**2
    path = paths.flow()
    method = solvers.solver(name, path)
    few, many = (abs(_moments(method, path, uniform(n, 0.995, end), std, eta) - exact) for n in (320, 640))
    assert math.log2(few / many) == pytest.approx(order, abs=0.1)


def test_ancestral_noise_keeps_the_marginal_and_too_much_does_not() -> None:
    path, std, end = paths.vp(BETAS), 0.7, 0.2
    exact = path.alpha(end) ** 2 * std**2 + path.sigma(end) ** 2
    levels, method = uniform(500, path.start, end), solvers.solver("euler", path)
    for eta in (0.0, 1.0):
        assert _moments(method, path, levels, std, eta) == pytest.approx(exact, rel=1e-2)
    assert _moments(method, path, levels, std, eta=1.0, excess=1.1) > 1.05 * exact


def test_weights_are_exact_on_polynomials() -> None:
    """Exact weights integrate any polynomial of their degree in the clock."""
    s, t, nodes = 0.7, 0.55, [0.7, 0.8, 0.95]
    q = table.weights("flow", "u", "exact", s, t, nodes)
    for power in range(3):
        exact = (t ** (power + 1) - s ** (power + 1)) / (power + 1) / (t - s)
        assert q @ np.array(nodes) ** power == pytest.approx(exact, rel=1e-13)
    for gauge, tau, rule in (("x0", "lambda", "mid"), ("eps", "lambda", "exact"), ("x0", "lambda", "bh1")):
        assert table.weights(gauge, tau, rule, s, t, nodes[:2]).sum() == pytest.approx(1, rel=1e-13)  # type: ignore[arg-type]


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
    sizes = {"euler": (5, 0), "ddim": (5, 0), "heun": (9, 1), "dpm++2m": (5, 1), "unipc": (5, 2)}
    for name, (calls, stored) in sizes.items():
        rows = table.build(solvers.solver(name, path), path, "flow_prediction", uniform(5))
        assert len(rows) == calls
        assert max(row.keep for row in rows) == stored
        assert rows[-1].keep == 0
        assert f"stores {stored}" in solvers.find(name).facts or name == "ddim"


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
    with pytest.raises(ValueError, match="eta = 1 needs a first-order solver"):
        table.build(solvers.solver("heun", path), path, "flow_prediction", uniform(3), eta=1.0)
    with pytest.raises(ValueError, match="cannot start at infinite sigma"):
        table.build(solvers.solver("euler", paths.ve()), paths.ve(), "epsilon", uniform(3))
    with pytest.raises(ValueError, match="'epsilon' does not determine the sample at alpha = 0"):
        table.build(solvers.solver("dpm++2m", paths.cosine()), paths.cosine(), "epsilon", uniform(3))
    row = table.build(solvers.solver("euler", path), path, "flow_prediction", uniform(3), eta=1.0)[0]
    with pytest.raises(ValueError, match="adds noise"):
        table.step(row, torch.ones(1), torch.ones(1))

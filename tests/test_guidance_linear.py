"""LinearAG: where it is exact, what it fits, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowkit import ClassConditionalPipeline, MixtureDenoiser, Recorder, RectifiedFlowScheduler, attach, weights
from flowkit.guidance import least_squares
from flowkit.guidance.least_squares import Moments, default_pattern, greedy_pattern
from flowkit.guidance.linear import LinearAdaptiveGuidance
from flowkit.guidance.runs import recorded
from flowkit.hooks.parts import Evaluation

from .families import stock_of
from .tiny import build, run

Run = tuple[list[Tensor], list[Tensor]]


def guided(net: MixtureDenoiser, labels: Tensor, steps: int, scale: float = 3.0, seed: int = 0) -> Run:
    """Outputs of a run with full guidance, in float64."""
    scheduler = RectifiedFlowScheduler(solver="euler")
    scheduler.set_timesteps(steps)
    shape = net.means.shape[1:]
    x = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cond, uncond = [], []
    for t in scheduler.timesteps:
        c = net(x, t, class_labels=labels).sample
        u = net(x, t, class_labels=torch.full_like(labels, net.config["num_classes"])).sample
        cond.append(c)
        uncond.append(u)
        x = scheduler.step(u + scale * (c - u), t, x).prev_sample
    return cond, uncond


def gaussians(second: float, std: tuple[float, ...] = (0.4, 0.8, 1.2)) -> Run:
    """Conditional N(m1, S) and unconditional N(m0, second^2 S) outputs along a guided path."""
    deviation = torch.tensor(std, dtype=torch.float64).reshape(1, 3, 1, 1)
    c_net = MixtureDenoiser.of(torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).reshape(1, 3, 1, 1), deviation)
    u_net = MixtureDenoiser.of(
        torch.tensor([[-0.5, 0.0, 0.3]], dtype=torch.float64).reshape(1, 3, 1, 1), deviation * second
    )
    scheduler = RectifiedFlowScheduler(solver="euler")
    scheduler.set_timesteps(8)
    x = torch.randn(256, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond, uncond = [], []
    for t in scheduler.timesteps:
        cond.append(c_net(x, t).sample)
        uncond.append(u_net(x, t).sample)
        x = scheduler.step(uncond[-1] + 3 * (cond[-1] - uncond[-1]), t, x).prev_sample
    return cond, uncond


def replay(guidance: LinearAdaptiveGuidance, run: Run) -> list[Tensor]:
    """The unconditional outputs that guidance goes on with, on the conditional ones of a run."""
    state: dict[str, Any] = {}
    result = []
    for step, (c, u) in enumerate(zip(*run, strict=True)):
        true = guidance.plan(step, 0.5, state) == "both"
        (c_after, u_after), state = guidance.combine(c, u if true else None, step, 0.5, state)
        assert c_after is c
        result.append(u_after)
    return result


def worst(guidance: LinearAdaptiveGuidance, run: Run) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(replay(guidance, run), run[1], strict=True))


# ------------------------------------------------------------------------------------------------- affine and linear


def test_of_gaussians_of_one_covariance_the_difference_is_an_intercept() -> None:
    run, steps = gaussians(1.0), range(1, 8)
    # From the current conditional output alone: u - c depends on t, not on x, and is another number in each channel.
    assert worst(LinearAdaptiveGuidance.fit([run], steps, history=0, ridge=0), run) > 0.1
    for intercept in ("channel", "element"):
        affine = LinearAdaptiveGuidance.fit([run], steps, history=0, intercept=intercept, ridge=0)
        assert worst(affine, run) < 1e-12
        # It is the difference of the means, so b is 1 for the current conditional output and 0 elsewhere.
        for k, (of_c, of_u) in zip(affine.steps, affine.coefficients, strict=True):
            assert of_c[k].item() == pytest.approx(1.0, abs=1e-6)
            assert (of_c.abs().sum() + of_u.abs().sum()).item() == pytest.approx(1.0, abs=1e-6)
    # With one variance for all elements each difference is a multiple of the first, so history does without an intercept.
    run = gaussians(1.0, (0.8, 0.8, 0.8))
    assert worst(LinearAdaptiveGuidance.fit([run], steps, history=0, ridge=0), run) > 0.1
    assert worst(LinearAdaptiveGuidance.fit([run], steps, history=1, ridge=0), run) < 1e-12


def test_of_gaussians_of_two_covariances_no_estimate_is_exact() -> None:
    run = gaussians(0.5)
    for intercept in least_squares.INTERCEPTS[:2]:
        assert (
            worst(LinearAdaptiveGuidance.fit([run], range(1, 8), intercept=intercept, history=0, ridge=0), run) > 1e-3
        )
    # Nor the whole history, of Gaussians of more dimensions than it has outputs.
    std = torch.linspace(0.1, 2.0, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    means = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    means[0, 0, :4] = 1.0
    net = MixtureDenoiser.of(means, torch.cat([std, std.flip(-1, -2)]), labels=torch.tensor([0, 1]))
    wide = guided(net, torch.zeros(32, dtype=torch.int64), 8)
    assert worst(LinearAdaptiveGuidance.fit([wide], range(1, 8), ridge=0), wide) > 1e-3


@pytest.mark.parametrize("intercept", least_squares.INTERCEPTS)
def test_estimates_are_exact_where_the_outputs_are_linear(intercept: str | None) -> None:
    generator = torch.Generator().manual_seed(3)
    shift = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    if intercept == "channel":
        shift = shift[:, :1, :1].expand(2, 3, 3)
    cond = [torch.randn(16, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(5)]
    uncond = [torch.randn(16, 2, 3, 3, generator=generator, dtype=torch.float64)]
    for k in range(1, 5):  # each of the one before it, which is an estimate from the second on
        uncond.append(0.7 * uncond[-1] - 0.2 * cond[k - 1] + 0.4 * cond[k] + (shift if intercept else 0))
    fitted = LinearAdaptiveGuidance.fit([(cond, uncond)], [1, 2, 4], intercept=intercept, ridge=0)
    assert worst(fitted, (cond, uncond)) < 1e-12
    assert max(fitted.about["missed"]) < 1e-12
    b = LinearAdaptiveGuidance.fit([(cond, uncond)], [4], intercept=intercept, history=1, ridge=0).coefficients[0]
    assert b[0, 3:].tolist() == pytest.approx([-0.2, 0.4], abs=1e-9)
    assert b[1].tolist() == pytest.approx([0, 0, 0, 0.7, 0], abs=1e-9)


# --------------------------------------------------------------------------------------------------------- the fit


def mixture() -> MixtureDenoiser:
    generator = torch.Generator().manual_seed(5)
    means = 0.3 * torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    std = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    net: MixtureDenoiser = MixtureDenoiser.of(means, std, labels=torch.arange(12) // 2)
    return net


def test_the_fit_is_least_squares_on_what_it_will_use() -> None:
    run, steps = guided(mixture(), torch.arange(24) % 6, 6), [2, 3, 5]
    fitted = LinearAdaptiveGuidance.fit([run], steps, ridge=0)
    cond, used = run[0], replay(fitted, run)
    for row, k in enumerate(steps):
        features = torch.stack([*cond[: k + 1], *used[:k]]).flatten(1).T
        want = torch.linalg.lstsq(features, run[1][k].flatten()[:, None]).solution[:, 0]
        got = torch.cat([fitted.coefficients[row, 0, : k + 1], fitted.coefficients[row, 1, :k]])
        assert torch.allclose(features @ got, features @ want, atol=1e-9)
        missed = (features @ want - run[1][k].flatten()).square().mean() / (run[1][k] - cond[k]).square().mean()
        assert fitted.about["missed"][row] == pytest.approx(float(missed), rel=1e-6)


@pytest.mark.parametrize("intercept", least_squares.INTERCEPTS)
def test_runs_add_up_whatever_the_batches(intercept: str | None) -> None:
    run = guided(mixture(), torch.arange(12) % 6, 5)
    parts = [([c[i:j] for c in run[0]], [u[i:j] for u in run[1]]) for i, j in ((0, 1), (1, 8), (8, 12))]
    whole, cut = Moments(intercept), Moments(intercept)
    whole.add(*run)
    for cond, uncond in parts:
        cut.add(cond, uncond)
    assert (whole.samples, whole.evaluations) == (cut.samples, cut.evaluations) == (12, 5)
    assert torch.equal(whole.gram(), cut.gram())
    columns = torch.stack([*run[0], *(u - c for c, u in zip(*run, strict=True))])
    if intercept:
        axes = (1,) if intercept == "element" else (1, 3, 4)
        mean = columns.mean(axes, keepdim=True)
        assert torch.allclose(whole.means(), mean[:, 0], atol=1e-14)
        columns = columns - mean
    flat = columns.flatten(1)
    assert torch.allclose(whole.gram(), flat @ flat.T / flat.shape[1], atol=1e-14)


def test_patterns() -> None:
    assert default_pattern(8) == [1, 3, 4, 5, 6, 7]
    assert default_pattern(20) == [1, 3, 5, 7, 9, *range(10, 20)]
    assert default_pattern(1) == []


def test_the_greedy_pattern_keeps_what_the_rest_needs() -> None:
    generator = torch.Generator().manual_seed(1)
    cond = [torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    news = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    uncond = [c.clone() for c in cond]
    for k in (3, 4, 5):  # only evaluation 3 tells what is new from there on
        uncond[k] = cond[k] + news
    moments = Moments()
    moments.add(cond, uncond)
    assert greedy_pattern(moments, 4) == [1, 2, 4, 5]
    assert LinearAdaptiveGuidance.fit([(cond, uncond)], saving=0.33).steps == (1, 2, 4, 5)
    missed = least_squares.fit(moments, [1, 2, 3, 5]).residuals
    assert missed[2] > 0.3  # evaluation 3 cannot be estimated
    assert max(missed[:2]) < 1e-20


def test_chosen_evaluations_beat_even_ones_on_another_class() -> None:
    net = mixture()
    train, test = guided(net, torch.arange(40) % 5, 12), guided(net, torch.full((16,), 5), 12, seed=1)
    chosen = LinearAdaptiveGuidance.fit([train], saving=1 / 3)
    even = LinearAdaptiveGuidance.fit([train], [k for k in range(12) if k % 3])
    assert len(chosen.steps) == len(even.steps) == 8
    assert chosen.saving == even.saving == pytest.approx(1 / 3)

    def error(guidance: LinearAdaptiveGuidance) -> float:
        return sum(float((a - b).square().mean()) for a, b in zip(replay(guidance, test), test[1], strict=True))

    apart = sum(float((c - u).square().mean()) for c, u in zip(*test, strict=True))
    assert error(chosen) < 0.5 * error(even) < 0.1 * apart


def test_history_bounds_what_is_kept() -> None:
    run = guided(mixture(), torch.arange(12) % 6, 8)
    for history, most in ((1, 2), (3, 6), (None, 14)):
        guidance = LinearAdaptiveGuidance.fit([run], range(1, 8), history=history)
        state: dict[str, Any] = {}
        sizes = []
        for step, (c, u) in enumerate(zip(*run, strict=True)):
            _, state = guidance.combine(c, u if step == 0 else None, step, 0.5, state)
            sizes.append(len(state["linear"]))
        assert max(sizes) == most
        assert sizes[-1] == 0


# ------------------------------------------------------------------------------------------------------------- use


def test_combine_is_pure() -> None:
    run = guided(mixture(), torch.arange(6), 6)
    guidance = LinearAdaptiveGuidance.fit([run])
    state: dict[str, Any] = {"other": 1}
    for step, (c, u) in enumerate(zip(*run, strict=True)):
        given = u if guidance.plan(step, 0.5, state) == "both" else None
        before = {**state, "linear": dict(state.get("linear", {}))}
        copies = {key: value.clone() for key, value in before["linear"].items()}
        (_, first), after = guidance.combine(c, given, step, 0.5, state)
        (_, again), _ = guidance.combine(c, given, step, 0.5, state)
        assert torch.equal(first, again)
        assert state.get("linear", {}).keys() == copies.keys()
        assert all(torch.equal(value, copies[key]) for key, value in state.get("linear", {}).items())
        assert after["other"] == 1
        state = after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_estimates_come_in_the_networks_type(dtype: torch.dtype) -> None:
    run = guided(mixture(), torch.arange(6), 6)
    guidance = LinearAdaptiveGuidance.fit([run], intercept="channel")
    low = ([c.to(dtype) for c in run[0]], [u.to(dtype) for u in run[1]])
    estimates = replay(guidance, low)
    assert all(u.dtype == dtype for u in estimates)
    eps = torch.finfo(dtype).eps
    for got, want in zip(estimates, replay(guidance, run), strict=True):
        assert torch.allclose(got.double(), want, atol=40 * eps)


def in_run(steps: int) -> dict[str, Any]:
    return {"evaluation": Evaluation(torch.zeros(1, 1, 4, 4), None, 0, steps, {})}


IDENTITY: dict[str, Any] = {"pipeline": "P", "network": "MixtureDenoiser", "levels": [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]}


def fitted(**options: Any) -> LinearAdaptiveGuidance:
    run = guided(mixture(), torch.arange(6), 6)
    made = LinearAdaptiveGuidance.fit([run], **options)
    return LinearAdaptiveGuidance(
        made.coefficients, made.steps, intercept=made.intercept, identity=IDENTITY, about=made.about
    )


@pytest.mark.parametrize("intercept", least_squares.INTERCEPTS)
def test_files_bring_everything_back(intercept: str | None, tmp_path: Path) -> None:
    guidance = fitted(intercept=intercept)
    guidance.save(tmp_path / "a.safetensors")
    back = LinearAdaptiveGuidance.load(tmp_path / "a.safetensors")
    assert torch.equal(back.coefficients, guidance.coefficients)
    assert (back.steps, back.identity, back.about) == (guidance.steps, guidance.identity, guidance.about)
    assert (back.intercept is None) == (guidance.intercept is None) == (intercept is None)
    if back.intercept is not None and guidance.intercept is not None:
        assert torch.equal(back.intercept, guidance.intercept)
    run = guided(mixture(), torch.arange(6), 6)
    state: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for step, (c, u) in enumerate(zip(*run, strict=True)):
        (_, a), state = guidance.combine(c, u, step, IDENTITY["levels"][step], state)
        (_, b), other = back.combine(c, u, step, IDENTITY["levels"][step], other)
        assert torch.equal(a, b)
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        LinearAdaptiveGuidance.load(path)
    fitted().save(path)
    whole = path.read_bytes()
    for damage in (whole[:-8], whole[:20], b"", b"\x80\x04K\x01."):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="corrupt, cut short"):
            LinearAdaptiveGuidance.load(path)
    weights.write(path, {"weight": torch.zeros(2)}, {"format": "pt"})
    with pytest.raises(ValueError, match="holds no coefficients of LinearAdaptiveGuidance"):
        LinearAdaptiveGuidance.load(path)
    path.write_bytes(whole)
    tensors, metadata = weights.read(path)
    for changed, data in (
        (tensors, {**metadata, "identity": "{"}),
        (tensors, {**metadata, "identity": json.dumps({"levels": [1.0]})}),
        (tensors, {**metadata, "identity": json.dumps({"levels": [["a"]] * 6})}),
        ({**tensors, "steps": tensors["steps"] - 1}, metadata),
        ({**tensors, "coefficients": tensors["coefficients"][0]}, metadata),
        ({**tensors, "coefficients": tensors["coefficients"] * torch.nan}, metadata),
        ({**tensors, "coefficients": torch.tensor(1.0, dtype=torch.float64)}, metadata),
        ({**tensors, "coefficients": tensors["coefficients"].to(torch.complex64)}, metadata),
        ({**tensors, "steps": tensors["steps"] * torch.inf}, metadata),
        (tensors, {**metadata, "about": "[" * 100_000}),
        (tensors, {**metadata, "identity": "[" * 100_000}),
        (tensors, {**metadata, "identity": json.dumps({"levels": [10**400] * 6})}),
    ):
        weights.write(path, changed, data)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged .*calibrate anew"):
            LinearAdaptiveGuidance.load(path)


def test_runs_of_another_kind_are_refused() -> None:
    guidance = fitted()
    assert guidance.plan(0, 1.0, in_run(6)) == "both"
    c = torch.zeros(1, 1, 4, 4)
    for steps in (5, 7):
        with pytest.raises(
            ValueError, match=rf"is for runs of 6 evaluations, this one has {steps}; calibrate it again"
        ):
            guidance.plan(0, 1.0, in_run(steps))
    with pytest.raises(ValueError, match="this one has 7 at least"):
        guidance.combine(c, c, 6, 0.05, {})
    with pytest.raises(ValueError, match=r"was fitted at level 0\.8 of evaluation 1, this run has 0\.9; calibrate"):
        guidance.plan(1, 0.9, in_run(6))
    with pytest.raises(ValueError, match=r"level 0\.8"):
        guidance.combine(c, c, 1, 0.9, in_run(6))
    assert guidance.plan(1, 0.8 + 1e-7, in_run(6)) == "cond"  # float32
    assert guidance.plan(1, float("nan"), in_run(6)) == "cond"  # a scheduler that does not tell
    with pytest.raises(ValueError, match="fitted to MixtureDenoiser, the pipeline runs Linear; calibrate it again"):
        guidance.begin(SimpleNamespace(networks=[torch.nn.Linear(1, 1)]))
    guidance.begin(SimpleNamespace(networks=[torch.nn.ReLU(), mixture()]))


def test_an_intercept_is_for_samples_of_one_shape() -> None:
    c = torch.ones(2, 3, 4, 4)
    for shape, other in (((3, 1, 1), (2, 5, 4, 4)), ((3, 4, 4), (2, 3, 4, 8)), ((1, 3, 4, 4), (2, 3, 4, 4))):
        guidance = LinearAdaptiveGuidance(
            torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]), [1], intercept=torch.ones(1, *shape)
        )
        if len(shape) == 3:
            _, state = guidance.combine(c, c, 0, 1.0, {})
            (_, u), _ = guidance.combine(c, None, 1, 0.5, state)
            assert torch.equal(u, 3 * c)
        _, state = guidance.combine(torch.ones(other), torch.ones(other), 0, 1.0, {})
        with pytest.raises(
            ValueError, match=r"the intercept is for samples of shape .*, these have .*; calibrate it again"
        ):
            guidance.combine(torch.ones(other), None, 1, 0.5, state)


def test_missing_outputs_are_named() -> None:
    guidance = LinearAdaptiveGuidance(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]), [1])
    c = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="evaluation 0 is a true one and has no unconditional output"):
        guidance.combine(c, None, 0, 1.0, {})
    with pytest.raises(ValueError, match="needs the outputs of evaluation 0, which this run did not pass"):
        guidance.combine(c, None, 1, 0.5, {})


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        (torch.zeros(2, 4), [1], r"shape \(2, 4\) for 1 estimated"),
        (torch.zeros(1, 2, 4), [1, 2], "for 2 estimated"),
        (torch.zeros(1, 2, 4), [0], "must rise from 1 to 3 at most, got \\[0\\]"),
        (torch.zeros(1, 2, 4), [4], "got \\[4\\]"),
        (torch.zeros(2, 2, 4), [2, 1], "got \\[2, 1\\]"),
        (torch.full((1, 2, 4), torch.inf), [1], "NaN or infinity"),
        (torch.ones(1, 2, 4), [3], "evaluation 3 uses outputs that are not there yet"),
    ],
)
def test_coefficients_are_checked(coefficients: Tensor, steps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAdaptiveGuidance(coefficients, steps)


def test_intercepts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"the intercept has shape \(2, 1, 1, 1\) for 1 estimated"):
        LinearAdaptiveGuidance(torch.zeros(1, 2, 4), [1], intercept=torch.zeros(2, 1, 1, 1))


def test_fits_are_checked() -> None:
    run = guided(mixture(), torch.arange(6), 6)
    other = guided(mixture(), torch.arange(6), 5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"saving": 0.5}, r"saving must lie in \(0, 0\.5\), got 0\.5"),
        ({"saving": 0.4, "steps": [1]}, "give one of them"),
        ({"saving": 0.01}, "none of 6 evaluations is estimated"),
        ({"steps": [0, 1]}, "different evaluations from 1 to 5"),
        ({"steps": [1, 1]}, "different evaluations from 1 to 5"),
        ({"steps": []}, "different evaluations from 1 to 5"),
        ({"ridge": -1.0}, "ridge must not be negative"),
        ({"history": -1}, "history must not be negative"),
        ({"intercept": "pixel"}, "unknown intercept 'pixel'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            LinearAdaptiveGuidance.fit([run], **options)
    with pytest.raises(ValueError, match="there are no runs to fit"):
        LinearAdaptiveGuidance.fit([])
    with pytest.raises(ValueError, match=r"5 evaluations of shape .* 6 of shape"):
        LinearAdaptiveGuidance.fit([run, other])
    with pytest.raises(ValueError, match="none at evaluations \\[0\\]"):
        LinearAdaptiveGuidance.fit([([None, *run[0][1:]], run[1])])
    with pytest.raises(ValueError, match="6 conditional and 5 unconditional"):
        LinearAdaptiveGuidance.fit([(run[0], other[1])])
    with pytest.raises(TypeError, match="Trajectory or a pair of lists"):
        LinearAdaptiveGuidance.fit([torch.zeros(2)])
    broken = [c.clone() for c in run[0]]
    broken[2][3] = torch.nan
    with pytest.raises(ValueError, match="sample 3 holds NaN"):
        LinearAdaptiveGuidance.fit([(broken, run[1])])


# ------------------------------------------------------------------------------------------------------ in pipelines


def pipeline() -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(mixture(), RectifiedFlowScheduler(solver="euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: ClassConditionalPipeline, *parts: Any, **call: Any) -> tuple[Tensor, float]:
    """The samples of a class, and the part of the network rows that were not run."""
    with attach(pipe, *parts, Recorder("state")) as run:
        generator = torch.Generator().manual_seed(1)
        sample = pipe([5] * 8, generator=generator, output_type="latent", **{"num_inference_steps": 10, **call}).images
    return sample, run.saved


def test_a_calibrated_pipeline_saves_what_was_asked_for() -> None:
    pipe, labels = pipeline(), list(range(5))  # class 5 is not among them
    full, none = sampled(pipe, guidance_scale=3.0)[0], sampled(pipe)[0]
    apart, call = (none - full).square().mean(), {"guidance_scale": 3.0, "num_inference_steps": 10}
    missed = []
    for saving in (0.2, 0.3, 0.4):
        guidance = LinearAdaptiveGuidance.calibrate(
            pipe, labels, saving=saving, call=call, samples=20, progress=False, seed=3
        )
        sample, saved = sampled(pipe, guidance, guidance_scale=3.0)
        assert saved == pytest.approx(saving, abs=1e-12)
        assert guidance.saving == pytest.approx(saving, abs=1e-12)
        missed.append(float((sample - full).square().mean() / apart))
    assert missed == sorted(missed)
    assert missed[-1] < 0.05
    assert guidance.identity is not None
    assert guidance.identity["network"] == "MixtureDenoiser"
    assert len(guidance.identity["levels"]) == 10
    assert guidance.about["samples"] == 20
    # An estimate is used, and not the conditional output: that would be no guidance on those evaluations.
    zero = torch.zeros_like(guidance.coefficients)
    for row, k in enumerate(guidance.steps):
        zero[row, 0, k] = 1.0
    plain, saved = sampled(pipe, LinearAdaptiveGuidance(zero, guidance.steps), guidance_scale=3.0)
    assert saved == pytest.approx(0.4)
    assert float((plain - full).square().mean() / apart) > 4 * missed[-1]


def test_calibration_is_a_fit_to_what_was_recorded() -> None:
    pipe, call = pipeline(), {"guidance_scale": 3.0, "num_inference_steps": 6}
    options: dict[str, Any] = {"samples": 5, "call": call, "seed": 7}
    one = LinearAdaptiveGuidance.calibrate(pipe, [0, 1, 2], progress=False, batch_size=2, **options)
    runs = [run for run, _ in recorded(pipe, keep=("cond", "uncond"), inputs=[0, 1, 2], batch_size=2, **options)]
    assert [len(run.cond[0]) for run in runs if run.cond[0] is not None] == [2, 2, 1]
    two = LinearAdaptiveGuidance.fit(runs, saving=0.4)
    assert torch.equal(one.coefficients, two.coefficients)
    assert (one.steps, one.about) == (two.steps, two.about)
    assert one.identity == two.identity
    other = LinearAdaptiveGuidance.calibrate(pipe, [0, 1, 2], progress=False, batch_size=2, **{**options, "seed": 8})
    assert not torch.equal(one.coefficients, other.coefficients)
    runs[1].identity = {**runs[1].identity, "levels": [0.5] * 6}
    with pytest.raises(ValueError, match="cannot be fitted together"):
        LinearAdaptiveGuidance.fit(runs)


def test_a_pipeline_of_another_kind_is_refused_when_it_runs() -> None:
    pipe, call = pipeline(), {"guidance_scale": 3.0, "num_inference_steps": 6}
    guidance = LinearAdaptiveGuidance.calibrate(pipe, [0, 1], samples=2, call=call, progress=False)
    with pytest.raises(ValueError, match="is for runs of 6 evaluations, this one has 10; calibrate it again"):
        sampled(pipe, guidance, guidance_scale=3.0)
    levels = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]
    with pytest.raises(ValueError, match=r"fitted at level 0\.8\d* of evaluation 1, this run has 0\.9"):
        sampled(pipe, guidance, guidance_scale=3.0, sigmas=levels, num_inference_steps=None)
    guidance.identity = {**guidance.identity, "network": "SD3Transformer2DModel"} if guidance.identity else None
    with pytest.raises(ValueError, match="fitted to SD3Transformer2DModel, the pipeline runs MixtureDenoiser"):
        sampled(pipe, guidance, guidance_scale=3.0, num_inference_steps=6)
    with pytest.raises(ValueError, match="needs classifier-free guidance"):  # nor is there anything to calibrate to
        sampled(pipe, LinearAdaptiveGuidance(torch.zeros(1, 2, 10), [1]))


def test_a_pipeline_without_guidance_cannot_be_calibrated_to() -> None:
    with pytest.raises(ValueError, match=r"none at evaluations .* guidance_scale above 1"):
        LinearAdaptiveGuidance.calibrate(pipeline(), [0, 1], samples=2, progress=False, call={"num_inference_steps": 4})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_families_of_pipelines_are_calibrated(family: str) -> None:
    pipe = build(family, RectifiedFlowScheduler.from_config(stock_of(family), solver="euler"))
    guided: dict[str, Any] = {"true_cfg_scale": 4.0} if family == "flux" else {"guidance_scale": 4.0}

    def last(*parts: Any) -> tuple[Recorder, float]:
        recorder = Recorder("cond", "uncond", "state")
        with attach(pipe, recorder, *parts) as attached:
            run(pipe, 6, **guided)
        return recorder, attached.saved

    full, saved = last()
    assert saved == 0
    guidance = LinearAdaptiveGuidance.fit(full.trajectories, saving=0.4)
    zero = torch.zeros_like(guidance.coefficients)
    for row, k in enumerate(guidance.steps):
        zero[row, 0, k] = 1.0
    missed = []
    for part in (guidance, LinearAdaptiveGuidance(zero, guidance.steps)):
        recorder, saved = last(part)
        assert saved == pytest.approx(5 / 12)
        difference = recorder.trajectories[0].states[-1] - full.trajectories[0].states[-1]
        missed.append(float(difference.square().mean()))
    assert missed[0] < 0.2 * missed[1]

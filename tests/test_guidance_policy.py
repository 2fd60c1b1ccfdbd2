"""Searched policies: the table is the pipeline's own guidance, and the search finds what is known to be best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from flowkit import ClassConditionalPipeline, MixtureDenoiser, Recorder, RectifiedFlowScheduler, attach
from flowkit.guidance.dynamic import DynamicGuidance
from flowkit.guidance.policy import PolicyGuidance
from flowkit.guidance.policy_search import Rollout, Snapshot, descend, missed, refine, rows, within
from flowkit.guidance.runs import recorded
from flowkit.hooks.parts import Evaluation

from .families import stock_of
from .tiny import build, run

LABELS = [0, 1, 2, 3]


def mixture(scheduler: Any = None, **options: Any) -> ClassConditionalPipeline:
    generator = torch.Generator().manual_seed(5)
    means = 0.5 * torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    std = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    net = MixtureDenoiser.of(means, std, labels=torch.arange(12) // 2, **options)
    pipe = ClassConditionalPipeline(net, scheduler or RectifiedFlowScheduler(solver="euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: ClassConditionalPipeline, *parts: Any, scale: float = 3.0, steps: int = 4) -> tuple[Tensor, int]:
    """The samples of a call, and the network rows that it took."""
    with attach(pipe, *parts, Recorder("state")) as run:
        call: dict[str, Any] = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "latent"}
        sample = pipe(LABELS, generator=torch.Generator().manual_seed(1), **call).images
    return sample, run.rows


class Early(ModelMixin, ConfigMixin):
    """A network whose label has no effect in the second half of the run."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.register_to_config(in_channels=1, sample_size=2, num_classes=2)
        self.shift = torch.nn.Parameter(torch.tensor([[1.0, -0.5], [-1.0, 2.0], [0.0, 0.0]], dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> UNet2DOutput:
        shift = self.shift[class_labels, None, :, None] * (float(timestep) > 500)
        return UNet2DOutput(sample=torch.tanh(sample + shift) + 0.3 * sample)


def early() -> ClassConditionalPipeline:
    return ClassConditionalPipeline(Early(), RectifiedFlowScheduler(solver="euler"))


def rollouts(pipe: ClassConditionalPipeline, scale: float = 3.0, steps: int = 4, samples: int = 4) -> list[Rollout]:
    snapshot, call = Snapshot(), {"guidance_scale": 2.0, "num_inference_steps": steps}
    runs = recorded(
        pipe,
        DynamicGuidance((), [scale]),
        snapshot,
        keep=("state",),
        samples=samples,
        inputs=LABELS,
        call=call,
        batch_size=2,
    )
    return [Rollout.of(run, snapshot, scale) for run, _ in runs]


# --------------------------------------------------------------------------------------------------------- the table


def test_a_policy_of_the_pipelines_scale_is_the_pipeline() -> None:
    pipe = mixture()
    own, rows = drawn(pipe)
    assert rows == 32
    for scale in (3.0, 1.7):
        sample, rows = drawn(pipe, PolicyGuidance([3.0] * 4), scale=scale)
        assert torch.equal(sample, own)
        assert rows == 32
    other, _ = drawn(pipe, PolicyGuidance([3.0, 3.0, 3.0, 3.5]))
    assert not torch.equal(other, own)


@pytest.mark.parametrize("option", ["cond", "uncond", 1, 0.0])
def test_one_row_options_are_plain_runs(option: Any) -> None:
    pipe = mixture()
    sample, rows = drawn(pipe, PolicyGuidance([option] * 4))
    labels = LABELS if option in ("cond", 1) else [6] * 4
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    assert torch.equal(sample, pipe(labels, generator=torch.Generator().manual_seed(1), **call).images)
    assert rows == 16


def test_options_are_taken_in_order() -> None:
    pipe = mixture()
    options: list[str | float] = ["cond", 5.0, "uncond", 2.0]
    sample, rows = drawn(pipe, policy := PolicyGuidance(options))
    assert (rows, policy.rows, policy.evaluations) == (4 * 6, 6, 4)
    scheduler, net = pipe.scheduler, pipe.unet
    recorder = Recorder("state")
    with attach(pipe, recorder, PolicyGuidance(options)):
        pipe(LABELS, guidance_scale=2.0, num_inference_steps=4, generator=torch.Generator().manual_seed(1))
    x = recorder.trajectories[0].states[0]
    scheduler.set_timesteps(4)
    for t, option in zip(scheduler.timesteps, options, strict=True):
        c = net(x, t, class_labels=torch.tensor(LABELS)).sample
        u = net(x, t, class_labels=torch.full((4,), 6)).sample
        d = {"cond": c, "uncond": u}[option] if isinstance(option, str) else u + option * (c - u)
        x = scheduler.step(d, t, x).prev_sample
    assert torch.allclose(x, sample, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combine_is_pure_and_rounds_as_pipelines_do(dtype: torch.dtype) -> None:
    c, u = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    policy, state = PolicyGuidance(["cond", 7.5, "uncond"]), {"other": 1}
    for step, want in enumerate((c, u + 7.5 * (c - u), u)):
        first, after = policy.combine(c, u, step, 0.5, state)
        again, _ = policy.combine(c, u, step, 0.5, state)
        assert torch.equal(first, want)
        assert torch.equal(again, want)
        assert state == {"other": 1}
        assert after == {"other": 1, "report": {"scale": (1.0, 7.5, 0.0)[step]}}
    assert [policy.plan(step, 0.5, state) for step in range(3)] == ["cond", "both", "uncond"]
    assert torch.equal(policy.combine(c, None, 0, 0.5, {})[0], c)
    for step in (1, 2):
        with pytest.raises(ValueError, match=f"evaluation {step} is .* and has no unconditional output"):
            policy.combine(c, None, step, 0.5, {})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ([], ValueError, "there are no options"),
        ("cond", TypeError, "options are one string, 'cond'"),
        (["cond", "both"], ValueError, "unknown option 'both'"),
        ([math.nan], ValueError, "must be finite, got nan"),
        ([True], TypeError, "got True"),
        ([None], TypeError, "got None"),
    ],
)
def test_options_are_checked(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PolicyGuidance(options)


# --------------------------------------------------------------------------------------------------------- files, refusals

IDENTITY: dict[str, Any] = {"pipeline": "P", "network": "MixtureDenoiser", "levels": [math.inf, 0.7, math.nan]}


def test_files_bring_everything_back(tmp_path: Path) -> None:
    policy = PolicyGuidance(["cond", 7.5, 0.1 + 0.2], identity=IDENTITY, about={"distance": 0.25, "scales": [7.5]})
    policy.save(tmp_path / "p.json")
    back = PolicyGuidance.load(tmp_path / "p.json")
    assert (back.options, back.about) == (policy.options, policy.about)
    assert repr(back.identity) == repr(policy.identity)
    json.loads((tmp_path / "p.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    PolicyGuidance([2.0]).save(tmp_path / "q.json")
    assert PolicyGuidance.load(tmp_path / "q.json").identity is None


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(FileNotFoundError, match=r"p\.json"):
        PolicyGuidance.load(path)
    PolicyGuidance(["cond", 7.5, 2.0], identity=IDENTITY).save(path)
    good = json.loads(path.read_text())
    for content in (path.read_bytes()[:-30], b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"p\.json is not JSON"):
            PolicyGuidance.load(path)
    others: list[Any] = [[], {"format": "flowkit.grid/1"}]
    for other in others:
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"p\.json holds no policy"):
            PolicyGuidance.load(path)
    changes: list[dict[str, Any]] = [
        {"options": None},
        {"options": ["cond", "other", 2.0]},
        {"options": ["cond", 2.0]},
        {"options": ["cond", [], 2.0]},
        {"options": ["cond", 10**400, 2.0]},
        {"identity": 3},
        {"identity": {"levels": [1.0, True, None]}},
        {"about": []},
    ]
    for change in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=r"p\.json is damaged .*search anew"):
            PolicyGuidance.load(path)


def test_runs_of_another_kind_are_refused() -> None:
    policy = PolicyGuidance(["cond", 7.5, 2.0], identity=IDENTITY)
    c = torch.zeros(1, 2)
    state = {"evaluation": Evaluation(c, None, 0, 4, {})}
    for step in (0, 3):
        with pytest.raises(ValueError, match="is for runs of 3 evaluations, this one has 4; search again"):
            policy.plan(step, 0.5, state)
    with pytest.raises(ValueError, match=r"fitted at level 0\.7 of evaluation 1, this run has 0\.6; search again"):
        policy.combine(c, c, 1, 0.6, {})
    assert policy.plan(0, math.inf, {}) == "cond"
    assert policy.plan(2, 0.3, {}) == "both"  # a level that was not known
    with pytest.raises(ValueError, match="fitted to MixtureDenoiser, the pipeline runs Linear; search again"):
        policy.begin(SimpleNamespace(networks=[torch.nn.Linear(1, 1)]))


def test_a_pipeline_of_other_steps_is_refused_and_left_as_it_was() -> None:
    pipe = mixture()
    own, _ = drawn(pipe)
    with pytest.raises(ValueError, match="is for runs of 5 evaluations, this one has 4"):
        drawn(pipe, PolicyGuidance([3.0] * 5))
    assert torch.equal(drawn(pipe)[0], own)


# --------------------------------------------------------------------------------------------------------- the search


def test_where_guidance_does_nothing_it_is_not_paid_for() -> None:
    for penalty in (1e-3, 1e-2):
        policy = PolicyGuidance.search(
            early(), [0, 1], scale=3.0, scales=[3.0], penalty=penalty, samples=2, iterations=40, progress=False,
            call={"num_inference_steps": 4},
        )  # fmt: skip
        assert policy.options == (3.0, 3.0, "cond", "cond")
        assert policy.about["rows"] == policy.rows == 6
        assert policy.about["distance"] < 1e-20


def test_rows_that_cost_nothing_are_full_guidance() -> None:
    policy = PolicyGuidance.search(
        mixture(), LABELS, scale=3.0, penalty=0.0, samples=2, iterations=40, progress=False, call={"num_inference_steps": 4}
    )  # fmt: skip
    assert policy.options == (3.0,) * 4
    assert policy.about["distance"] < 1e-12
    assert policy.identity is not None
    assert policy.identity["network"] == "MixtureDenoiser"
    assert len(policy.identity["levels"]) == 4
    # And rows that cost far more than they are worth leave none.
    policy = PolicyGuidance.search(
        mixture(), LABELS, scale=3.0, penalty=30.0, samples=2, iterations=20, progress=False, call={"num_inference_steps": 4}
    )  # fmt: skip
    assert policy.rows == 4


def test_a_policy_beats_guidance_that_is_cut_off() -> None:
    runs = rollouts(mixture(), steps=6, samples=2)
    found, penalty = within(runs, ["cond", "uncond", 1.5, 3.0, 4.5, 6.0], 8, 25)
    assert 0 < penalty < math.inf
    cut: list[str | float] = [3.0, 3.0, "cond", "cond", "cond", "cond"]
    assert missed(runs, found) < 0.5 * missed(runs, cut)
    assert missed(runs, [3.0] * 6) < 1e-12
    assert missed(runs, ["cond"] * 6) == pytest.approx(1.0)


def test_refined_policies_are_not_worse() -> None:
    runs = rollouts(mixture(), steps=4, samples=2)
    options: list[str | float] = ["cond", "uncond", 1.5, 3.0, 6.0]
    assert refine(runs, options, [3.0, 3.0, 1.5, 3.0], 0.0) == [3.0] * 4
    bad: list[str | float] = ["uncond", 6.0, "cond", 1.5]
    for penalty in (0.05, 0.5):
        found = refine(runs, options, bad, penalty)
        assert missed(runs, found) + penalty * rows(found) / 8 < missed(runs, bad) + penalty * rows(bad) / 8
        # Nor than full guidance that is cut off anywhere.
        for k in range(5):
            cut: list[str | float] = [*[3.0] * k, *["cond"] * (4 - k)]
            assert missed(runs, found) + penalty * rows(found) / 8 <= missed(runs, cut) + penalty * rows(cut) / 8
    assert rows(refine(runs, options, bad, 100.0)) == 4


def test_gradients_are_those_of_the_run() -> None:
    run = rollouts(mixture(), steps=3)[0]
    scales = torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: run.distance(list(w)), [scales])
    assert float(run.distance([2.0, 0.5, 1.5])) == pytest.approx(float(run.distance(list(scales.detach()))), rel=1e-12)


def test_the_network_stays_as_it_is() -> None:
    pipe = early()
    before = pipe.unet.shift.detach().clone()
    found = descend(rollouts_of_early(pipe), ["cond", "uncond", 3.0], 0.01, 3)
    assert len(found) == 4
    assert torch.equal(pipe.unet.shift, before)
    assert pipe.unet.shift.grad is None
    assert pipe.unet.shift.requires_grad


def rollouts_of_early(pipe: ClassConditionalPipeline) -> list[Rollout]:
    snapshot = Snapshot()
    runs = recorded(pipe, DynamicGuidance((), [3.0]), snapshot, keep=("state",), samples=2, inputs=[0, 1],
                    call={"guidance_scale": 2.0, "num_inference_steps": 4})  # fmt: skip
    return [Rollout.of(run, snapshot, 3.0) for run, _ in runs]


BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("scheduler", "path"),
    [
        (RectifiedFlowScheduler(solver="unipc"), "flow"),
        (RectifiedFlowScheduler(solver="heun"), "flow"),
        (RectifiedFlowScheduler(path="edm", solver="heun"), "edm"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
        (diffusers.DDIMScheduler(**BETAS, clip_sample=False), "vp"),
        (diffusers.EulerDiscreteScheduler(**BETAS), "vp"),
        (diffusers.DPMSolverMultistepScheduler(**BETAS), "vp"),
        (diffusers.EDMEulerScheduler(), "edm"),
    ],
    ids=["unipc", "heun", "edm heun", "flow euler", "ddim", "euler", "dpm++", "edm euler"],
)
def test_runs_repeat_under_any_deterministic_scheduler(scheduler: Any, path: str) -> None:
    pipe = mixture(scheduler, path=path)
    runs = rollouts(pipe, samples=2)
    scales = torch.tensor([2.0, 1.5] * 4, requires_grad=True)[: len(runs[0].timesteps)]
    (gradient,) = torch.autograd.grad(runs[0].distance(list(scales)), [scales])
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert missed(runs, [3.0] * len(scales)) < 1e-8


def test_runs_that_do_not_repeat_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not end where it did .* deterministic solver"):
        rollouts(mixture(RectifiedFlowScheduler(solver="euler", eta=1.0)))
    pipe = early()
    with torch.no_grad():
        pipe.unet.shift.zero_()
    with pytest.raises(ValueError, match=r"guidance at scale 3\.0 changes nothing"):
        rollouts_of_early(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1.0}, r"not 1, which is no guidance, got 1\.0"),
        ({"scale": -2.0}, r"got -2\.0"),
        ({"scales": [math.inf]}, "must be finite"),
        ({"penalty": -0.1}, r"penalty must not be negative, got -0\.1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"rows": 3}, "rows must lie between 4 and 8 for 4 evaluations, got 3"),
        ({"rows": 9}, "got 9"),
        ({"samples": 0}, "got count=0"),
    ],
)
def test_searches_are_checked(options: dict[str, Any], message: str) -> None:
    call = {"num_inference_steps": 4}
    with pytest.raises(ValueError, match=message):
        PolicyGuidance.search(mixture(), LABELS, **{"samples": 2, "call": call, "progress": False, **options})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "pixart-sigma"])
def test_runs_of_families_of_pipelines_repeat(family: str) -> None:
    pipe = build(family, stock_of(family))
    guided: dict[str, Any] = {"true_cfg_scale": 2.0} if family == "flux" else {"guidance_scale": 2.0}
    recorder, snapshot = Recorder("state"), Snapshot()
    with attach(pipe, recorder, snapshot, DynamicGuidance((), [40.0])):  # random networks listen little
        run(pipe, 3, **guided)
    rollout = Rollout.of(recorder.trajectories[0], snapshot, 40.0)
    count = len(rollout.timesteps)
    assert missed([rollout], [40.0] * count) < 1e-6
    scales = torch.full((count,), 30.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(rollout.distance(list(scales)), [scales])
    # A scale nearer to that of the run is nearer at the end.
    assert float(gradient.sum()) < 0
    policy = PolicyGuidance([40.0, "cond", *["uncond"] * (count - 2)])
    again = Recorder("state")
    with attach(pipe, again, policy):
        run(pipe, 3, **guided)
    with torch.no_grad():
        want = rollout(policy.options)
    assert torch.allclose(again.trajectories[0].states[-1], want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))

"""Guidance with a scale chosen at every step: against static guidance, closed forms and brute force."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowkit import MixtureDenoiser, paths, weights
from flowkit.guidance.dynamic import DynamicGuidance
from flowkit.guidance.evaluators import DecodedReward, Quadratic, vae_decoder
from flowkit.guidance.latent_evaluators import LatentClassifier, LatentDiscriminator
from flowkit.hooks.parts import Evaluation, Level

SCALES = (1.0, 2.5, 5.0, 7.5, 10.0, 15.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_mixture(batch: int, s: float = 0.6, path: str = "flow") -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Outputs of an exact network of two classes at a noise level, and the state that goes with them."""
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.3], [0.2, 1.4]], dtype=torch.float64)
    model = MixtureDenoiser.of(means, 0.3, labels=torch.tensor([0, 1, 1]), path=path)
    x, labels = normal(batch, 2, seed=1), torch.arange(batch) % 2
    time = model.path.time(s)
    cond, uncond = model(x, time, labels).sample, model(x, time).sample
    level = Level(model.path, s, model.prediction)
    return cond, uncond, {"evaluation": Evaluation(x, level, 3, 16, {"timestep": time, "index": torch.arange(batch)})}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.1, 7.5])
def test_one_candidate_is_static_guidance_to_the_bit(dtype: torch.dtype, scale: float) -> None:
    cond, uncond = normal(3, 4, 8, 8, dtype=dtype), normal(3, 4, 8, 8, seed=1, dtype=dtype)
    for guidance in (DynamicGuidance(Quadratic(cond[0]), scales=[scale]), DynamicGuidance((), scales=[scale])):
        got, state = guidance.combine(cond, uncond, 0, 0.5, {"kept": 1})
        assert torch.equal(got, uncond + scale * (cond - uncond))
        assert got.dtype == dtype
        assert state["kept"] == 1
        assert state["report"]["scale"].tolist() == pytest.approx([scale] * 3, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chosen_candidate_has_the_bits_of_static_guidance(dtype: torch.dtype) -> None:
    cond, uncond = normal(6, 4, dtype=dtype), normal(6, 4, seed=1, dtype=dtype)
    guidance = DynamicGuidance(Quadratic(normal(6, 4, seed=2) * 4), scales=(1.0, 1.1, 2.3, 3.7))
    got, state = guidance.combine(cond, uncond, 0, 0.5, {})
    scales = state["report"]["scale"].tolist()
    assert len(set(scales)) > 1
    for i, scale in enumerate(scales):
        static = uncond + min((1.0, 1.1, 2.3, 3.7), key=lambda s: abs(s - scale)) * (cond - uncond)
        assert torch.equal(got[i], static[i])


@pytest.mark.parametrize("path", ["flow", "vp", "ve"])
def test_the_choice_is_the_closed_form_on_the_grid(path: str) -> None:
    """A parabola's best candidate is the one nearest to its peak; the predictions of x0 are those of an exact network."""
    cond, uncond, state = of_mixture(200, path=path)
    target = normal(200, 2, seed=5) * 6
    evaluation = state["evaluation"]
    x0u, x0c = evaluation.to(uncond, "x0"), evaluation.to(cond, "x0")
    peak = ((target - x0u) * (x0c - x0u)).sum(1) / (x0c - x0u).square().sum(1)
    nearest = torch.tensor(SCALES)[(peak[:, None] - torch.tensor(SCALES)).abs().argmin(1)]
    _, after = DynamicGuidance(Quadratic(target), SCALES).combine(cond, uncond, 3, 0.6, state)
    chosen = after["report"]["scale"]
    assert torch.equal(chosen, nearest.double())
    assert len(chosen.unique()) == len(SCALES)


def test_the_line_search_finds_the_peak() -> None:
    cond, uncond, state = of_mixture(50)
    evaluation, target = state["evaluation"], normal(50, 2, seed=5) * 3
    quadratic = Quadratic(target)
    got, after = DynamicGuidance(quadratic, None, bounds=(-20.0, 20.0)).combine(cond, uncond, 3, 0.6, state)
    scale = after["report"]["scale"]
    inside = scale.abs() < 20
    assert inside.sum() > 25
    best = quadratic(evaluation.to(got, "x0"), 0.6, {})
    for step in (-1e-3, 1e-3):  # brute force on either side of it
        near = uncond + (scale + step)[:, None] * (cond - uncond)
        assert (quadratic(evaluation.to(near, "x0"), 0.6, {}) < best)[inside].all()
    clamped = DynamicGuidance(quadratic, None, bounds=(1.0, 2.0)).combine(cond, uncond, 3, 0.6, state)[1]["report"]
    assert torch.equal(clamped["scale"], scale.clamp(1.0, 2.0))
    same, after = DynamicGuidance(quadratic, None).combine(cond, cond, 3, 0.6, state)
    assert torch.equal(same, cond)


def test_the_order_of_candidates_does_not_matter() -> None:
    cond, uncond, state = of_mixture(64)
    evaluators: list[Any] = [Quadratic(normal(64, 2, seed=5) * 6), lambda x0, sigma, conditioning: x0[:, 0].round()]
    want = DynamicGuidance(evaluators, SCALES, default=5.0).combine(cond, uncond, 3, 0.6, state)
    for order in ((5, 0, 3, 1, 4, 2), (2, 4, 1, 3, 0, 5)):
        got = DynamicGuidance(evaluators, [SCALES[i] for i in order], default=5.0).combine(cond, uncond, 3, 0.6, state)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1]["report"]["scale"], want[1]["report"]["scale"])


def test_ties_go_to_the_default() -> None:
    cond, uncond = normal(5, 3), normal(5, 3, seed=1)
    for default in SCALES:
        constant = DynamicGuidance(lambda x0, sigma, conditioning: x0.new_ones(len(x0)), SCALES, default)
        got, state = constant.combine(cond, uncond, 0, 0.5, {})
        assert (state["report"]["scale"] == default).all()
        assert torch.equal(got, uncond + default * (cond - uncond))
    # Two equal bests beside the default: the nearer one. Differences within rounding are none.
    two = DynamicGuidance(lambda x0, sigma, conditioning: (x0[:, 0] != 3).double(), (1, 3, 4, 10), 3)
    one = torch.ones(2, 1, dtype=torch.float64)
    assert (two.combine(one, 0 * one, 0, 0.5, {})[1]["report"]["scale"] == 4).all()
    hair = DynamicGuidance(lambda x0, sigma, conditioning: 1000 + 1e-14 * x0[:, 0], SCALES, 5.0)
    assert (hair.combine(cond, uncond, 0, 0.5, {})[1]["report"]["scale"] == 5).all()


@pytest.mark.parametrize("rows", [1, 14, 256])
def test_samples_are_independent(rows: int) -> None:
    """A batch gives what its samples give alone, whatever fits into one call of the evaluator."""
    cond, uncond, state = of_mixture(7)
    targets = normal(7, 2, seed=5) * 6
    evaluation, sizes = state["evaluation"], []

    def evaluator(x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        sizes.append(len(x0))
        return Quadratic(targets[conditioning["index"]])(x0, sigma, conditioning)

    guidance = DynamicGuidance(evaluator, SCALES, rows=rows)
    together, after = guidance.combine(cond, uncond, 3, 0.6, state)
    assert max(sizes) == {1: 7, 14: 14, 256: 42}[rows]
    assert sum(sizes) == 42
    assert len(after["report"]["scale"].unique()) > 1
    for i in range(7):
        one = slice(i, i + 1)
        own = {"timestep": 600.0, "index": torch.arange(7)[one]}
        alone = {"evaluation": Evaluation(evaluation.x[one], evaluation.level, 3, 16, own)}
        assert torch.equal(guidance.combine(cond[one], uncond[one], 3, 0.6, alone)[0], together[one])


def test_conditioning_comes_with_a_row_for_each_candidate() -> None:
    cond, uncond, state = of_mixture(3)
    evaluation, seen = state["evaluation"], []
    given = {
        "labels": torch.arange(3),
        "nested": {"mask": [torch.arange(6).reshape(3, 2), "text"]},
        "table": torch.ones(5),
    }
    state = {"evaluation": Evaluation(evaluation.x, evaluation.level, 3, 16, given)}

    def evaluator(x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        seen.append((sigma, conditioning))
        return x0[:, 0]

    DynamicGuidance(evaluator, (1.0, 2.0)).combine(cond, uncond, 3, 0.6, state)
    ((sigma, got),) = seen
    assert sigma == 0.6
    assert got["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert got["nested"]["mask"][0].tolist() == [[0, 1], [2, 3], [4, 5]] * 2
    assert got["nested"]["mask"][1] == "text"
    assert got["table"].shape == (5,)
    DynamicGuidance(evaluator, (1.0, 2.0)).combine(cond, uncond, 3, 0.6, {})
    assert seen[-1][1] == {}


def test_weights_mix_normalised_scores() -> None:
    """Against three lines of plain arithmetic, for fixed weights and for those of the evaluators."""

    class Judge:
        def __init__(self, values: list[float], reliability: float) -> None:
            self.values, self.worth = torch.tensor(values, dtype=torch.float64), reliability

        def __call__(self, x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
            return self.values[x0[:, 0].round().long()]

        def reliability(self, sigma: float) -> float:
            return self.worth * sigma

    table = [[0.0, 3.0, 1.0, -2.0], [1e6, 0.0, 2e6, 4e6]]  # wildly different units
    cond, uncond = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for mixed in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.1], [1.0, 0.3], [0.0, 0.0]):
        z = [
            [(v - sum(row) / 4) / torch.tensor(row, dtype=torch.float64).std(correction=0).item() for v in row]
            for row in table
        ]
        total = [sum(a * zj[k] for a, zj in zip(mixed, z, strict=True)) for k in range(4)]
        want = max(range(4), key=lambda k: (total[k], k == 2))
        judges = [Judge(row, a) for row, a in zip(table, mixed, strict=True)]
        for chosen in (mixed, "adaptive"):
            guidance = DynamicGuidance(judges, range(4), default=2.0, weights=chosen)
            assert guidance.combine(cond, uncond, 0, 0.5, {})[1]["report"]["scale"].item() == want


def test_outside_the_interval_the_scale_is_the_default() -> None:
    cond, uncond = normal(2, 3), normal(2, 3, seed=1)
    guidance = DynamicGuidance(Quadratic(cond[0]), (1.0, 4.0, 9.0), interval=(0.2, 0.5))
    assert guidance.default == 4.0
    for sigma in (0.1, 0.6):
        assert torch.equal(guidance.combine(cond, uncond, 0, sigma, {})[0], uncond + 4.0 * (cond - uncond))
        assert guidance.plan(0, sigma, {}) == "both"
    assert guidance.combine(cond, uncond, 0, 0.3, {})[1]["report"]["scale"][0] == 1
    with pytest.raises(ValueError, match="needs the scheduler's noise levels, which are not known"):
        guidance.plan(0, float("nan"), {})
    plain = DynamicGuidance(Quadratic(cond[0]), (1.0, 4.0), default=1, interval=(0.2, 0.5))
    assert [plain.plan(0, sigma, {}) for sigma in (0.1, 0.2, 0.5, 0.6)] == ["cond", "both", "both", "cond"]
    got, state = plain.combine(cond, None, 0, 0.6, {"kept": 1})
    assert got is cond
    assert state == {"kept": 1, "report": {"scale": 1.0}}


def test_nothing_given_is_changed() -> None:
    cond, uncond, state = of_mixture(4)
    before = cond.clone(), uncond.clone(), dict(state)
    guidance = DynamicGuidance(Quadratic(torch.zeros(2)), SCALES)
    first, after = guidance.combine(cond, uncond, 3, 0.6, state)
    assert torch.equal(cond, before[0])
    assert torch.equal(uncond, before[1])
    assert state == before[2]
    assert after["evaluation"] is state["evaluation"]
    assert torch.equal(guidance.combine(cond, uncond, 3, 0.6, state)[0], first)


def test_bad_scores_are_refused_with_the_evaluator_and_the_step() -> None:
    cond, uncond = normal(2, 3), normal(2, 3, seed=1)

    def broken(x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        return x0[:, 0] / 0

    def whole(x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        return x0

    quadratic = Quadratic(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"evaluator 1 \(broken\) at step 7, sigma = 0.5: scores hold NaN or infinity; keep"
    ):
        DynamicGuidance([quadratic, broken], (1.0, 2.0)).combine(cond, uncond, 7, 0.5, {})
    with pytest.raises(
        ValueError, match=r"evaluator 0 \(whole\) at step 7, .* shape \(4,\), got shape \(4, 3\); return one"
    ):
        DynamicGuidance(whole, (1.0, 2.0)).combine(cond, uncond, 7, 0.5, {})
    with pytest.raises(ValueError, match=r"\(<lambda>\) .* got float; return one"):
        DynamicGuidance(lambda x0, sigma, conditioning: 1.0, (1.0, 2.0)).combine(cond, uncond, 7, 0.5, {})  # type: ignore[arg-type]
    unsure = LatentDiscriminator((3,), measured=[(0.5, float("nan"))])
    with pytest.raises(ValueError, match=r"evaluator 0 \(LatentDiscriminator\) at step 7, .* reliability is nan"):
        DynamicGuidance(unsure, (1.0, 2.0)).combine(cond, uncond, 7, 0.5, {})
    with pytest.raises(ValueError, match=r"Quadratic\) at step 7, .* NaN"):
        DynamicGuidance(quadratic, None).combine(cond * torch.nan, uncond, 7, 0.5, {})
    with pytest.raises(ValueError, match=r"target has shape \(5,\), the predictions \(4, 3\)"):
        DynamicGuidance(Quadratic(torch.zeros(5)), (1.0, 2.0)).combine(cond, uncond, 7, 0.5, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": []}, "scales must be finite and all different"),
        ({"scales": [1, 1.0]}, "scales must be finite and all different"),
        ({"scales": [1, float("inf")]}, "scales must be finite"),
        ({"default": 3.0}, "default=3.0 is not one of the scales"),
        ({"weights": "fixed"}, "weights='fixed' for 1 evaluators; give 'adaptive'"),
        ({"weights": [1, 2]}, "for 1 evaluators"),
        ({"weights": [-1]}, "weights must be finite and at least 0"),
        ({"interval": (0.5, 0.2)}, "interval must be .*low, high.*; swap"),
        ({"interval": (0.5,)}, "interval must be"),
        ({"bounds": (2, 1)}, "bounds must be"),
        ({"scales": None, "default": 20.0}, "lies outside bounds"),
        (
            {"scales": None, "evaluators": LatentDiscriminator((2,))},
            "takes one evaluator with best.*got LatentDiscriminator",
        ),
        ({"evaluators": ()}, "6 scales and no evaluator"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicGuidance(**{"evaluators": Quadratic(torch.zeros(2)), **arguments})


def test_an_evaluator_must_be_callable() -> None:
    with pytest.raises(TypeError, match="evaluator 0 is 'clip'; give a function"):
        DynamicGuidance(["clip"])  # type: ignore[list-item]


def test_decoded_rewards_see_images() -> None:
    class Vae:
        dtype = torch.float32

        def __init__(self, **config: Any) -> None:
            self.config = SimpleNamespace(**config)

        def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (z.repeat_interleave(2, -1),)

    z = torch.full((2, 1, 2, 2), 0.5)
    # The pipelines encode as (z - shift) * factor, and as (z - mean) * factor / std.
    assert vae_decoder(Vae(scaling_factor=2.0))(z * 2)[0, 0, 0].tolist() == [0.75] * 4
    assert vae_decoder(Vae(scaling_factor=2.0, shift_factor=0.1))((z - 0.1) * 2)[0, 0, 0].tolist() == pytest.approx(
        [0.75] * 4
    )
    moments = Vae(scaling_factor=2.0, latents_mean=[0.3], latents_std=[0.7])
    assert vae_decoder(moments)((z - 0.3) * 2 / 0.7)[0, 0, 0].tolist() == pytest.approx([0.75] * 4)
    assert vae_decoder(Vae(scaling_factor=1.0))(100 * z).max() == 1
    with pytest.raises(ValueError, match="Vae has scaling_factor None; write decode"):
        vae_decoder(Vae())
    reward = DecodedReward(vae_decoder(Vae(scaling_factor=1.0)), lambda images, conditioning: -images.mean((1, 2, 3)))
    cond, uncond = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert (
        DynamicGuidance(reward, (-0.5, 0.3, 0.9)).combine(cond, uncond, 0, 0.5, {})[1]["report"]["scale"] == -0.5
    ).all()


@pytest.mark.parametrize("shape", [(5,), (3, 8, 8), (2, 4, 6, 6), (7, 3)])
def test_evaluators_come_back_from_disk(shape: tuple[int, ...], tmp_path: Path) -> None:
    x0, sigma, labels = normal(4, *shape, dtype=torch.float32), 0.4, torch.tensor([0, 2, 3, -1])
    made: list[tuple[LatentDiscriminator | LatentClassifier, str]] = [
        (LatentDiscriminator(shape, 4, "vp", [(0.1, 0.9), (1.0, 0.0)]), "discriminator.safetensors"),
        (LatentClassifier(shape, 3, "labels", 4), "classifier.safetensors"),
    ]
    for network, name in made:
        network.save(tmp_path / name)
        again = type(network).load(tmp_path / name)
        want = network(x0, sigma, {"labels": labels})
        assert torch.equal(again(x0, sigma, {"labels": labels}), want)
        assert want.shape == (4,)
        assert again.sizes() == network.sizes()
        assert not again.training
        # One sample's score does not depend on its batch, nor is it the same at every level.
        assert torch.allclose(network(x0[:1], sigma, {"labels": labels[:1]}), want[:1], atol=1e-6)
        assert not torch.equal(network(x0, 2.0 * sigma, {"labels": labels}), want)
    assert want[2:].tolist() == [0, 0]  # no class
    assert (want[:2] < 0).all()
    with pytest.raises(ValueError, match=r"is not a LatentClassifier \(it holds a LatentDiscriminator\)"):
        LatentClassifier.load(tmp_path / "discriminator.safetensors")
    tensors, metadata = weights.read(tmp_path / "discriminator.safetensors")
    sizes = json.loads(metadata["sizes"])
    for wrong in (
        "{",
        "[" * 100_000,
        "[]",
        *(json.dumps({**sizes, "width": w}) for w in (5, 10**9, 10**30, "a", None)),
    ):
        weights.write(tmp_path / "wrong", tensors, {**metadata, "sizes": wrong})
        with pytest.raises(ValueError, match=r"is not a LatentDiscriminator \(.*train_evaluators makes one"):
            LatentDiscriminator.load(tmp_path / "wrong")
    weights.write(tmp_path / "half", {name: tensor.half() for name, tensor in tensors.items()}, metadata)
    assert {w.dtype for w in LatentDiscriminator.load(tmp_path / "half").parameters()} == {torch.float32}


def test_reliability_is_linear_in_flow_time() -> None:
    flow = LatentDiscriminator((2,), measured=[(0.8, 0.2), (0.2, 0.8)])
    assert [flow.reliability(s) for s in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([0.8, 0.8, 0.5, 0.2, 0.2])
    vp = LatentDiscriminator((2,), path="vp", measured=[(0.8, 0.2), (0.2, 0.8)])
    assert vp.reliability(paths.rho(0.5)) == pytest.approx(0.5)
    assert LatentDiscriminator((2,)).reliability(0.3) == 1


def test_bad_evaluators_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        LatentClassifier((2,), 1)
    with pytest.raises(ValueError, match="unknown path 'line'"):
        LatentDiscriminator((2,), path="line")
    network = LatentClassifier((2,), 3)
    with pytest.raises(ValueError, match=r"predictions of shape \(4, 3\); this LatentClassifier takes \(B, 2,\)"):
        network(torch.zeros(4, 3), 0.5, {"class_labels": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(
        ValueError, match="'class_labels' holds no label for each of 4 rows, got None; it takes y: set key="
    ):
        network(torch.zeros(4, 2), 0.5, {"y": torch.zeros(4)})

"""The training loop: what it finds, and that stops and parts change nothing."""

from __future__ import annotations

import copy
import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from flowkit import weights
from flowkit.distill import Training, trainer
from flowkit.distill.averages import synthesize
from flowkit.distill.draw import Draw
from flowkit.distill.trainer import train

from .tiny import build


class Affine(nn.Module):
    """``w x + b``, a velocity at s = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


def gaussian(model: nn.Module, draw: Draw) -> tuple[Tensor, Tensor]:
    """Reflow of N(0.7, 0.25^2) at s = 1."""
    noise = draw.normal(1)
    return (model(noise) - (noise - (0.7 + 0.25 * noise))).square().flatten(1).mean(1), torch.ones(len(noise))


HOW = Training(steps=120, batch_size=32, learning_rate=0.1, ema=0.9)


def test_the_trainer_finds_the_straight_flow(tmp_path: Path) -> None:
    found = train(Affine(), gaussian, HOW, tmp_path)
    weight, bias = found.network.parameters()
    assert float(weight.detach()) == pytest.approx(0.75, abs=0.01)
    assert float(bias.detach()) == pytest.approx(-0.7, abs=0.01)
    assert len(found.history) == 120
    assert found.history[-1]["loss"] < 1e-3 * found.history[0]["loss"]
    assert found.history[-1]["bands"][-1] == [1.0, 1.0, found.history[-1]["loss"]]
    assert all(mean is None for _, _, mean in found.history[-1]["bands"][:-1])


def test_it_is_plain_adamw_with_an_average(tmp_path: Path) -> None:
    network = Affine()
    optimizer = torch.optim.AdamW(network.parameters(), 0.1, (0.9, 0.99), weight_decay=0.01)
    average = EMAModel(network.parameters(), HOW.ema)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = HOW.rate(step)
        gaussian(network, Draw(3, step, 32))[0].mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
    how = Training(**{**HOW.plain(), "betas": (0.9, 0.99)})

    def stop(done: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    trained = Affine()
    with pytest.raises(KeyboardInterrupt):
        train(trained, gaussian, how, tmp_path, seed=3, on_step=stop)
    assert torch.allclose(trained.weight, network.weight, atol=1e-6)
    assert torch.allclose(trained.bias, network.bias, atol=1e-6)
    assert not torch.allclose(network.bias, average.shadow_params[1], atol=1e-6)


def test_a_stopped_training_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(trainer, "_SAVE_SHARE", 0)
    how = Training(**{**HOW.plain(), "betas": (0.9, 0.99), "profiles": (0.05, 0.1), "snapshots": 8})
    whole = train(Affine(), gaussian, how, tmp_path / "whole")
    part = tmp_path / "part"
    for end in (1, 7, 60, 119):

        def stop(done: int, end: int = end) -> None:
            if done == end:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(Affine(), gaussian, how, part, on_step=stop)
        assert trainer.steps_done(part) == end
    resumed = train(Affine(), gaussian, how, part)
    for got, wanted in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(got, wanted)
    assert resumed.history == whole.history
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert file.read_bytes() == (part / file.relative_to(tmp_path / "whole")).read_bytes()
    assert len([*(part / trainer.SNAPSHOTS).iterdir()]) == 8
    assert synthesize(part / trainer.SNAPSHOTS, 0.07)["weight"] == pytest.approx(0.75, abs=0.05)


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(trainer, "_SAVE_SHARE", 0)
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if weights.read_metadata(source)["step"] == "6":
            raise KeyboardInterrupt  # the new file is complete, and has not taken its name
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(Affine(), gaussian, HOW, tmp_path)
    monkeypatch.setattr(os, "replace", real)
    assert trainer.steps_done(tmp_path) == 5
    weights.check(tmp_path / trainer.CHECKPOINT)


def test_parts_of_a_batch_make_the_same_update(tmp_path: Path) -> None:
    whole = train(Affine(), gaussian, HOW, tmp_path / "1")
    parts = train(
        Affine(), gaussian, Training(**{**HOW.plain(), "betas": (0.9, 0.99), "accumulate": 4}), tmp_path / "4"
    )
    for got, wanted in zip(parts.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_rows_of_a_draw_do_not_depend_on_how_it_is_cut() -> None:
    whole = Draw(1, 5, 8)
    values = (
        whole.indices(100),
        whole.times(lambda n, g: torch.rand(n, generator=g)),
        whole.normal(2, 3),
        whole.normal(2),
    )
    for rows in (range(0, 4), range(4, 8), range(3, 5)):
        part = Draw(1, 5, 8, rows)
        found = (
            part.indices(100),
            part.times(lambda n, g: torch.rand(n, generator=g)),
            part.normal(2, 3),
            part.normal(2),
        )
        for got, wanted in zip(found, values, strict=True):
            assert torch.equal(got, wanted[rows.start : rows.stop])
    assert not torch.equal(Draw(1, 6, 8).indices(100), values[0])
    assert not torch.equal(Draw(2, 5, 8).indices(100), values[0])
    assert not torch.equal(values[2][:, 0, :2], values[3])
    assert torch.equal(whole.whole().indices(100), values[0])
    assert float(torch.cat([Draw(0, k, 64).normal(16).flatten() for k in range(40)]).std()) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(trainer, "_SAVE_SHARE", 0)

    def loss(model: nn.Module, draw: Draw) -> tuple[Tensor, Tensor]:
        value, s = gaussian(model, draw)
        if draw.step < 5:
            return value, s
        # The root of zero is finite, its slope is not.
        return (value * math.nan if broken == "loss" else value + (model(torch.zeros(())) * 0).sqrt()), s

    with pytest.raises(ValueError, match=r"at step 5 of 120 \(.*checkpoint\.safetensors is kept\)"):
        train(Affine(), loss, HOW, tmp_path)
    assert trainer.steps_done(tmp_path) == 5
    tensors = weights.read(tmp_path / trainer.CHECKPOINT)[0]
    assert all(bool(t.isfinite().all()) for name, t in tensors.items() if not name.startswith("history"))


def test_the_rate_rises_and_falls() -> None:
    how = Training(steps=400, learning_rate=2.0, warmup=0.05, final=0.1)
    rates = [how.rate(step) for step in range(400)]
    assert rates[:19] == sorted(rates[:19])
    assert rates[0] == pytest.approx(2.0 / 20)
    assert max(rates) == pytest.approx(2.0, rel=0.01)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert Training(steps=1).rate(0) > 0
    flat = Training(steps=100, learning_rate=2.0, warmup=0.0, final=1.0)
    assert {flat.rate(step) for step in range(100)} == {2.0}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0), ("steps", True), ("batch_size", -1), ("accumulate", 1.5), ("every", -1), ("learning_rate", 0.0),
        ("learning_rate", math.nan), ("ema", 1.0), ("clip", 0), ("warmup", 1.1), ("betas", (0.9, 1.0)), ("profiles", (0.3,)),
        ("precision", "fp8"), ("betas", (0.9,)), ("profiles", 0.1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_quoted(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{setting}.*{value if not isinstance(value, tuple) else value[-1]}"):
        Training(**{"steps": 5, setting: value})


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter of the network requires a gradient"):
        train(Affine().requires_grad_(False), gaussian, HOW, tmp_path)
    with pytest.raises(ValueError, match="a batch of 32 rows cannot be cut into 3 even parts"):
        train(Affine(), gaussian, Training(steps=5, batch_size=32, accumulate=3), tmp_path)
    with pytest.raises(ValueError, match="Affine cannot recompute its activations"):
        train(Affine(), gaussian, Training(steps=5, checkpointing=True), tmp_path)
    with pytest.raises(ValueError, match="fp16 on accelerators alone"):
        train(Affine(), gaussian, Training(steps=5, precision="fp16"), tmp_path)
    with pytest.raises(ValueError, match="unknown tracker 'paper'"):
        train(Affine(), gaussian, Training(steps=5, tracker="paper"), tmp_path)
    train(Affine(), gaussian, Training(steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"holds nothing for 0\.weight"):
        train(nn.Sequential(nn.Linear(1, 1)), gaussian, Training(steps=3), tmp_path)


def test_updates_that_overflow_in_float16_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer._accelerator

    def scaling(*given: Any) -> Any:  # as on a GPU
        made = real(*given)
        made.scaler, made.native_amp, made.state._mixed_precision = torch.amp.GradScaler("cpu"), True, "fp16"
        return made

    monkeypatch.setattr(trainer, "_accelerator", scaling)

    def loss(model: nn.Module, draw: Draw) -> tuple[Tensor, None]:
        return model(draw.normal(4)).square().flatten(1).mean(1) * 1e4, None

    network = nn.Linear(4, 4)
    before = network.weight.detach().clone()
    how = Training(steps=30, batch_size=8, learning_rate=0.01)
    found = train(network, loss, how, tmp_path)
    assert len(found.history) < 30  # no row for what was not made
    assert all(math.isfinite(row["gradient_norm"]) for row in found.history)
    assert not torch.equal(network.weight, before)


def test_a_stopped_training_leaves_an_ordinary_network(tmp_path: Path) -> None:
    network = build("sd15", None).unet.requires_grad_(True)

    def loss(model: nn.Module, draw: Draw) -> tuple[Tensor, None]:
        x, text = draw.normal(4, 8, 8), draw.normal(4, network.config["cross_attention_dim"])
        return model(x, torch.full((len(x),), 500.0), text).sample.flatten(1).mean(1) * math.nan, None

    with pytest.raises(ValueError, match="the loss is nan"):
        train(network, loss, Training(steps=3, batch_size=2, precision="bf16", checkpointing=True), tmp_path)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    assert all(p.grad is None for p in network.parameters())
    seen = []
    handle = network.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.no_grad():
        network(torch.zeros(1, 4, 8, 8), 500.0, torch.zeros(1, 1, network.config["cross_attention_dim"]))
    handle.remove()
    assert seen == [torch.float32]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(trainer, "_SAVE_SHARE", 0)
    real = os.fsync

    def full(handle: int) -> None:
        if trainer.steps_done(tmp_path) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"checkpoint\.safetensors could not be written .*No space.*the one before is kept"
    ):
        train(Affine(), gaussian, HOW, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [trainer.CHECKPOINT]
    assert trainer.steps_done(tmp_path) == 5


@pytest.mark.parametrize(("steps", "wanted"), [(7, [3, 5, 7]), (2, [1, 2]), (3, [1, 2, 3])])
def test_snapshots_are_as_many_as_wanted_and_one_is_the_last(steps: int, wanted: list[int], tmp_path: Path) -> None:
    train(Affine(), gaussian, Training(steps=steps, batch_size=4, profiles=(0.1,), snapshots=3), tmp_path)
    assert sorted(int(file.stem) for file in (tmp_path / trainer.SNAPSHOTS).iterdir()) == wanted


def test_a_tracker_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    watched: list[int] = []

    def watch(step: int, network: nn.Module) -> dict[str, float]:
        watched.append(step)
        assert network.weight.requires_grad
        return {"fd": 1.5}

    how = Training(steps=10, tracker="tensorboard", every=4)
    train(Affine(), gaussian, how, tmp_path, watch=watch)
    assert watched == [4, 8, 10]
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = min((file.parent for file in tmp_path.rglob("events.*")), key=lambda folder: len(folder.parts))
    log = EventAccumulator(str(events)).Reload()
    assert [(e.step, e.value) for e in log.Scalars("fd")] == [(4, 1.5), (8, 1.5), (10, 1.5)]
    assert len(log.Scalars("loss")) == 10


def test_the_network_holds_the_average_while_it_is_watched(tmp_path: Path) -> None:
    seen: dict[int, float] = {}

    def watch(step: int, network: Any) -> dict[str, float]:
        seen[step] = network.weight.item()
        return {}

    found = train(Affine(), gaussian, Training(steps=10, learning_rate=0.1, every=5, ema=0.9), tmp_path, watch=watch)
    assert seen[10] == next(found.network.parameters()).item()
    unwatched = train(Affine(), gaussian, Training(steps=10, learning_rate=0.1, ema=0.9), tmp_path / "un")
    for one, other in zip(found.network.parameters(), unwatched.network.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_real_network_trains_in_less_memory(precision: str, tmp_path: Path) -> None:
    # Recomputed activations give the same gradients; in bfloat16 the weights stay float32.
    network = build("sd15", None).unet

    def loss(model: nn.Module, draw: Draw) -> tuple[Tensor, None]:
        x, text = draw.normal(4, 8, 8), draw.normal(4, network.config["cross_attention_dim"])
        found = model(x, torch.full((len(x),), 500.0), text).sample
        assert found.dtype == torch.float32
        return (found - 1).square().flatten(1).mean(1), None

    results = []
    for number, checkpointing in enumerate((False, True)):
        own = copy.deepcopy(network).requires_grad_(True)
        how = Training(steps=3, batch_size=2, precision=precision, checkpointing=checkpointing)
        results.append(train(own, loss, how, tmp_path / str(number)))
    for got, wanted in zip(*(found.network.parameters() for found in results), strict=True):
        assert got.dtype == torch.float32
        assert torch.allclose(got, wanted, atol=1e-6)
    assert all(mean is None for row in results[0].history for _, _, mean in row["bands"])

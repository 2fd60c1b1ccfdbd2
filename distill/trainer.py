"""The training loop, once for every method: AdamW with warm-up and cosine decay, clipping, EMA, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from flowkit import weights

SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        steps: number of updates, >= 1.
        learning_rate: highest rate of AdamW.
        warmup: share of the steps in which the rate rises from 0, in [0, 1].
        final: share of the highest rate that the cosine ends at.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights, the result; ``min(ema, (1 + n) / (10 + n))`` after n steps.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, which depends on nothing else."""
        rise = min(1.0, (step + 1) / max(self.warmup * self.steps, 1.0))
        decay = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * rise * (self.final + (1 - self.final) * decay)


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    how: Training,
    checkpoint: Path,
    on_step: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """Trains a network in place, or goes on where a checkpoint stands.

    A step depends on the state before it and its number alone, and the checkpoint holds that state exactly: a run that was
    killed and called again ends with the same bits as one that was not (on one machine, with deterministic kernels).

    Args:
        model: float32, in inference mode: dropout would not be reproduced.
        loss: (model, step) -> scalar; draws its batch from the step's number.
        how: the settings.
        checkpoint: .safetensors file of weights, EMA and optimiser, replaced as a whole every `SAVE_SECONDS` and at the end.
        on_step: called with the number of steps done: once at the start, then after each.

    Returns:
        The model, holding the averaged weights, on accelerate's device.

    Raises:
        ValueError: for more than one process, and as soon as loss or gradient is not finite; the last checkpoint then stays.
    """
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes would each train the whole student; start one process")
    optimizer = torch.optim.AdamW(
        model.parameters(), how.learning_rate, (0.9, 0.99), weight_decay=how.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), how.ema, foreach=True)
    first = _restore(checkpoint, model, ema, optimizer)
    saved = time.monotonic()
    on_step(first)
    for step in range(first, how.steps):
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        value = loss(model, step)
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(model.parameters(), how.clip)
        value = value.detach()
        if not torch.isfinite(value + norm):
            kept = f"{checkpoint} is kept" if checkpoint.exists() else "nothing was saved yet"
            raise ValueError(
                f"the loss is {float(value):g} and its gradient {float(norm):g} at step {step} of {how.steps} ({kept}); look at "
                "the teacher's samples, then start anew with another seed"
            )
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        if step + 1 == how.steps or time.monotonic() - saved >= SAVE_SECONDS:
            _save(checkpoint, step + 1, model, ema, optimizer)
            saved = time.monotonic()
        on_step(step + 1)
    ema.copy_to(model.parameters())
    result: nn.Module = accelerator.unwrap_model(model)
    return result


def steps_done(checkpoint: Path) -> int:
    """Returns the number of steps behind a checkpoint; 0 where there is none."""
    return int(weights.read(checkpoint)[1]["step"]) if checkpoint.exists() else 0


def _save(checkpoint: Path, step: int, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> None:
    tensors: dict[str, Tensor] = {}
    for (name, parameter), average in zip(model.named_parameters(), ema.shadow_params, strict=True):
        tensors |= {f"model.{name}": parameter, f"ema.{name}": average}
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    weights.write(checkpoint, tensors, {"step": str(step)})


@torch.no_grad()
def _restore(checkpoint: Path, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps done."""
    if not checkpoint.exists():
        return 0
    tensors, metadata = weights.read(checkpoint)
    for (name, parameter), average in zip(model.named_parameters(), ema.shadow_params, strict=True):
        parameter.copy_(tensors[f"model.{name}"])
        average.copy_(tensors[f"ema.{name}"])
        state = f"optimizer.{name}."
        optimizer.state[parameter] = {
            key.removeprefix(state): value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith(state)
        }
    done = ema.optimization_step = int(metadata["step"])
    return done

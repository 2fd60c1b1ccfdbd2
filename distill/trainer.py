"""The training loop, once for every method: AdamW, mixed precision, averages, checkpoints, exact resume, on accelerate.

An update depends on the state before it and its number alone (see `flowkit.distill.draw`), and the checkpoint holds that state
exactly, so a training that was killed and started again ends with the same bits as one that was not: on one machine, with
deterministic kernels. Processes started by ``accelerate launch`` share each batch: data parallel, or sharded (FSDP 2).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowkit import weights
from flowkit.distill.averages import Averages, spread, whole
from flowkit.distill.draw import Draw
from flowkit.distill.history import History
from flowkit.distill.settings import Training
from flowkit.eval.processes import Processes

CHECKPOINT, SNAPSHOTS = "checkpoint.safetensors", "averages"
SAVE_SECONDS = 30.0
# A checkpoint is written when this many times its own duration have passed.
_SAVE_SHARE = 20.0
# Below this scale of the loss float16 has no room left: what overflows is the loss itself.
_LEAST_SCALE = 1e-3

Loss = Callable[[nn.Module, Draw], tuple[Tensor, Tensor | None]]
Watcher = Callable[[int, nn.Module], Mapping[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What a training returns.

    Attributes:
        network: the one that was given, holding the averaged weights.
        history: its course, see `flowkit.distill.history.History.rows`.
    """

    network: nn.Module
    history: list[dict[str, Any]]


def train(
    network: nn.Module,
    loss: Loss,
    how: Training,
    folder: Path,
    *,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda done: None,
    watch: Watcher | None = None,
) -> Trained:
    """Trains those parameters of a network that require a gradient, in place, or goes on where a checkpoint stands.

    Args:
        network: in inference mode: dropout would not be reproduced. Trainable parameters in float32.
        loss: (network, draw) -> loss of each row of the draw (b,), and its flow time (b,), or None where there is no such thing.
        how: the settings.
        folder: of the checkpoint, a single file that is replaced as a whole, and of the snapshots of averages.
        seed: of the draws.
        on_step: called with the number of updates done: once at the start, then after each.
        watch: called as (updates done, network) every ``how.every`` updates and at the end, in all processes, while the network
            holds the averaged weights; what it returns is tracked.

    Returns:
        The network, holding the averaged weights, on accelerate's device, and the history.

    Raises:
        ImportError: for a tracker that is not installed.
        ValueError: for a batch that cannot be shared evenly, nothing to train, a checkpoint of another network, and as soon as
            loss or gradient is not finite; the last checkpoint then stays.
    """
    state = _State(network, how, folder, seed)
    try:
        return _loop(state, loss, on_step, watch)
    finally:
        state.release()


def _loop(state: _State, loss: Loss, on_step: Callable[[int], None], watch: Watcher | None) -> Trained:
    how = state.how
    state.restore()
    saved, cost = time.monotonic(), 0.0
    on_step(state.step)
    while state.step < how.steps:
        state.update(loss)
        last = state.step == how.steps
        watched = {}
        if watch is not None and (last or (how.every and state.step % how.every == 0)):
            with state.averages.applied():
                watched = dict(watch(state.step, state.bare))
        state.note(watched)
        if last or state.agreed(time.monotonic() - saved >= max(SAVE_SECONDS, _SAVE_SHARE * cost)):
            began = time.monotonic()
            state.save()
            saved = time.monotonic()
            cost = saved - began
        on_step(state.step)
    return state.finish()


def check(network: nn.Module, how: Training, processes: int = 1) -> None:
    """Refuses settings that cannot work, before anything else is done for a training.

    Args:
        network: to be trained, or one like it.
        how: the settings.
        processes: that share it.

    Raises:
        ImportError: for a tracker that is not installed.
        ValueError: for an unknown one, a batch that cannot be shared evenly, a network that cannot recompute its activations, and
            fp16 on a CPU.
    """
    how.check_parts(processes)
    if how.tracker is not None:
        how.check_tracker()
    if how.checkpointing and not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(network).__name__} cannot recompute its activations; leave out checkpointing")
    if how.precision == "fp16" and next(network.parameters()).device.type == "cpu":
        raise ValueError("accelerate computes in fp16 on accelerators alone; choose bf16, or no")


def steps_done(folder: Path) -> int:
    """Returns the number of updates behind the checkpoint in a folder; 0 where there is none."""
    file = folder / CHECKPOINT
    return int(weights.read_metadata(file)["step"]) if file.exists() else 0


def averages(folder: Path) -> dict[str, Tensor]:
    """Returns the averaged weights of the checkpoint in a folder, whole, by the names of the trained parameters."""
    tensors, _ = weights.read(folder / CHECKPOINT)
    start = "average.ema."
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


class _State:
    """All that changes from one update to the next."""

    def __init__(self, network: nn.Module, how: Training, folder: Path, seed: int) -> None:
        self.how, self.folder, self.seed, self.step = how, folder, seed, 0
        trained = [p for p in network.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the network requires a gradient; there is nothing to train")
        device = next(network.parameters()).device
        check(network, how, Processes.join(device).count)
        self.accelerator = accelerator = _accelerator(how, device, folder)
        if how.checkpointing:
            _call(network, "enable_gradient_checkpointing")
        self.fused = accelerator.device.type in ("cpu", "cuda") and not getattr(accelerator, "is_fsdp2", False)
        made = torch.optim.AdamW(trained, how.learning_rate, how.betas, weight_decay=how.weight_decay, fused=self.fused)
        self.network, self.optimizer = accelerator.prepare(network, made)
        self.bare: nn.Module = accelerator.unwrap_model(self.network)
        if any(type(p).__name__ == "FlatParameter" for p in self.bare.parameters()):
            raise ValueError("FSDP 1 keeps parameters in a form that cannot be averaged by name; set fsdp_version: 2 in "
                             "accelerate's configuration")  # fmt: skip
        self.named = {k: p for k, p in self.bare.named_parameters() if p.requires_grad}
        self.averages = Averages(self.named.items(), how.ema, how.profiles)
        self.history = History(how.steps)

    def update(self, loss: Loss) -> None:
        """One update.

        Raises:
            ValueError: where loss or gradient is not finite.
        """
        how, accelerator = self.how, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = how.rate(self.step)
        total = torch.zeros((), device=accelerator.device)
        parts = how.parts(accelerator.num_processes, accelerator.process_index)
        for rows in parts:
            with contextlib.nullcontext() if rows is parts[-1] else accelerator.no_sync(self.network):
                losses, s = loss(self.network, Draw(self.seed, self.step, how.batch_size, rows))
                accelerator.backward(losses.float().mean() / how.accumulate)
            total += losses.detach().float().mean() / how.accumulate
            self.history.add(losses.detach(), s)
        accelerator.unscale_gradients()
        norm = nn.utils.clip_grad_norm_(self.named.values(), how.clip)
        norm = whole(torch.as_tensor(norm))
        self._check(float(total), float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.averages.update(self.step)
        if math.isfinite(norm):  # float16 passed over the others
            self.history.gradient(float(norm))
        if how.profiles and self.step * how.snapshots // how.steps > (self.step - 1) * how.snapshots // how.steps:
            self.averages.snapshot(self.folder / SNAPSHOTS)

    def _check(self, value: float, norm: float) -> None:
        scaler = self.accelerator.scaler
        # An update of float16 whose gradient overflows is passed over, and the scale of the loss halved.
        tolerable = scaler is not None and math.isfinite(value) and scaler.get_scale() > _LEAST_SCALE
        if (math.isfinite(value) and math.isfinite(norm)) or tolerable:
            return
        file = self.folder / CHECKPOINT
        kept = f"{file} is kept" if file.exists() else "nothing was saved yet"
        raise ValueError(f"the loss is {value:g} and its gradient {norm:g} at step {self.step} of {self.how.steps} ({kept}); look "
                         "at the data, then start anew with a lower learning rate, in bf16 or float32, or with another "
                         "seed")  # fmt: skip

    def note(self, watched: Mapping[str, Any]) -> None:
        """Closes a row of the history where it is time, and tracks it."""
        row = self.history.close(self.step, self.how.rate(self.step - 1), self.accelerator)
        figures = {k: v for k, v in {**(row or {}), **watched}.items() if isinstance(v, (int, float))}
        if self.how.tracker is not None and figures:
            self.accelerator.log(figures, step=self.step)

    def agreed(self, wanted: bool) -> bool:
        """Returns what the main process wants."""
        if self.accelerator.num_processes == 1:
            return wanted
        vote = torch.tensor(float(wanted and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(vote, "sum") > 0)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {f"network.{k}": p for k, p in self.named.items()}
        tensors |= {f"average.{k}": v for k, v in self.averages.state().items()}
        for name, parameter in self.named.items():
            found = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": value for key, value in found.items()}
        tensors |= {f"history.{k}": v for k, v in self.history.state(self.accelerator).items()}
        main = self.accelerator.is_main_process
        for key, value in tensors.items():  # all processes take part in putting together what is sharded
            if isinstance(value, DTensor):
                full = whole(value).detach()
                tensors[key] = full.cpu() if main else torch.empty(0)
        Processes.join(self.accelerator.device).agree(lambda: self._write(tensors) if main else None)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        scaler, file = self.accelerator.scaler, self.folder / CHECKPOINT
        facts = {"step": str(self.step), "rows": json.dumps(self.history.rows)}
        facts["scaler"] = json.dumps(scaler.state_dict() if scaler is not None else {})
        try:
            weights.write(file, tensors, facts)
        except OSError as error:
            kept = "the one before is kept" if file.exists() else "there is none before it"
            raise OSError(
                f"{file} could not be written ({error}), and {kept}; make room, and call again to go on"
            ) from error

    @torch.no_grad()
    def restore(self) -> None:
        """Reads the checkpoint, if there is one.

        Raises:
            ValueError: for one of another network.
        """
        file = self.folder / CHECKPOINT
        if not file.exists():
            return
        tensors, facts = weights.read(file)
        for name, parameter in self.named.items():
            found = tensors.get(f"network.{name}")
            if found is None or found.shape != parameter.shape:
                shape = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
                raise ValueError(f"{file} holds {shape} for {name}, the network {tuple(parameter.shape)}; it belongs to another "
                                 "training: choose another folder")  # fmt: skip
            parameter.copy_(spread(found, parameter))
            start = f"optimizer.{name}."
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            if own:  # the count of updates is a number, which AdamW keeps on the CPU unless it is fused
                self.optimizer.state[parameter] = {
                    k: spread(v, parameter) if v.ndim or self.fused else v for k, v in own.items()
                }
        averages = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
        self.averages.restore(averages, int(facts["step"]))
        sums = {k: tensors[f"history.{k}"] for k in self.history.totals}
        self.history.restore(sums, json.loads(facts["rows"]), self.accelerator.is_main_process)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(json.loads(facts["scaler"]))
        self.step = int(facts["step"])

    def finish(self) -> Trained:
        """Puts the averaged weights into the network."""
        with torch.no_grad():
            for parameter, average in zip(self.named.values(), self.averages.tensors, strict=True):
                parameter.copy_(average)
        return Trained(self.bare, self.history.rows)

    def release(self) -> None:
        """Leaves the network as an ordinary one, after an error too: it may be the teacher's own, with adapters."""
        if self.how.checkpointing:
            _call(self.bare, "disable_gradient_checkpointing")
        self.bare.zero_grad(set_to_none=True)
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _call(network: Any, method: str) -> None:  # noqa: ANN401
    """Calls a method of models of diffusers, which other modules have not."""
    getattr(network, method)()


def _accelerator(how: Training, device: torch.device, folder: Path) -> Any:  # noqa: ANN401
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=how.precision,
        log_with=how.tracker,
        project_dir=str(folder),
        kwargs_handlers=[unused],
    )
    if how.tracker is not None:
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in how.plain().items()}
        accelerator.init_trackers("flowkit", plain)
    return accelerator

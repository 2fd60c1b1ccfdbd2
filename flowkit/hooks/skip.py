"""Leaving layers of a transformer out, other ones in each evaluation (AutoDiffusion; Li et al. 2023, arXiv 2309.10438).

A residual block ``x + f(x)`` that is left out is ``x``: the blocks around it still fit, and its cost is saved. Other layers have no
such stand-in, so only networks whose stacks consist of residual transformer blocks are taken; diffusers knows which blocks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.hooks import layout
from flowkit.hooks.parts import Evaluation, Part
from flowkit.hooks.standins import NetworkCall


class SkippedLayers(Part):
    """Leaves layers out, for all samples alike, conditional and unconditional rows too.

    Args:
        table: for each of N evaluations of a run the layers that it leaves out, numbers below that of `layers`.

    Raises:
        TypeError: for what is no whole number.
        ValueError: for no evaluations, or a negative number; while the pipeline runs, for another number of evaluations, a layer
            that there is not, and a network without such layers.
    """

    def __init__(self, table: Sequence[Iterable[int]]) -> None:
        self.table = tuple(tuple(sorted(set(row))) for row in table)
        for layer in (layer for row in self.table for layer in row):
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise TypeError(f"layers are whole numbers from 0, got {layer!r:.60}")
            if layer < 0:
                raise ValueError(f"layers are whole numbers from 0, got {layer}")
        if not self.table:
            raise ValueError("there are no evaluations; give the layers that each leaves out, such as [[], [3], []]")
        self._calls: list[NetworkCall] = []
        self._step = 0

    def begin(self, run: Any) -> None:  # noqa: ANN401
        """Puts itself in the place of the layers, and refuses a network that has too few."""
        self._step = 0
        if self._calls:
            return
        found, most = layers(run.pipe), max((layer for row in self.table for layer in row), default=-1)
        if most >= len(found):
            raise ValueError(f"layer {most} is to be left out, and {type(run.pipe).__name__} has {len(found)}, counted from 0; "
                             "leave out others")  # fmt: skip
        for number in {layer for row in self.table for layer in row}:
            self._calls.append(NetworkCall(found[number], self._instead(number)))

    def edit(self, evaluation: Evaluation, cond: Tensor) -> None:
        """Refuses a run of another number of evaluations."""
        if evaluation.steps != len(self.table):
            raise ValueError(f"layers are left out in runs of {len(self.table)} evaluations, this one has {evaluation.steps}; call "
                             "it with the grid that they were chosen for")  # fmt: skip

    def after_step(self, run: Any, sample: Tensor) -> None:  # noqa: ANN401
        """Goes on to the next evaluation."""
        self._step += 1

    def end(self) -> None:
        """Puts the layers back."""
        for call in self._calls:
            call.remove()
        self._calls = []

    def _instead(self, number: int) -> Any:  # noqa: ANN401
        def call(layer: NetworkCall, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self._step < len(self.table) and number in self.table[self._step]:
                return _unchanged(layer.network, args, kwargs)
            return layer.run(*args, **kwargs)

        return call


def layers(pipe: Any) -> list[nn.Module]:  # noqa: ANN401
    """Returns the layers of a pipeline's network that can be left out, in order.

    Raises:
        ValueError: for a pipeline with two networks that take turns, a network that was compiled, or one without stacks of
            residual transformer blocks, such as a U-Net.
    """
    name, networks = type(pipe).__name__, layout.networks(pipe)
    if len(networks) != 1:
        raise ValueError(
            f"{name} has {len(networks)} networks that take turns, so its layers cannot be left out; skip none"
        )
    (network,) = networks
    if hasattr(network, "_orig_mod"):
        raise ValueError(f"the network of {name} was compiled, so its layers cannot be left out; compile it afterwards")
    found = [
        block
        for stack in network.children()
        if isinstance(stack, nn.ModuleList) and all(_kind(block) is not None for block in stack)
        for block in stack
    ]
    if not found:
        raise ValueError(f"{type(network).__name__} has no stack of residual transformer blocks, so none of its layers can be left "
                         "out; skip none")  # fmt: skip
    return found


def _kind(block: nn.Module) -> Any:  # noqa: ANN401
    """What diffusers knows of a block's arguments and results; None for one that is no residual transformer block."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def _unchanged(block: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """What a block would return that changes nothing."""
    kind = _kind(block)
    x = kind._get_parameter_from_args_kwargs(kind.hidden_states_argument_name, args, kwargs)
    if kind.return_encoder_hidden_states_index is None:
        return x
    context = kind._get_parameter_from_args_kwargs(kind.encoder_hidden_states_argument_name, args, kwargs)
    return (x, context) if kind.return_hidden_states_index == 0 else (context, x)

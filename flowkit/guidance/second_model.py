"""Guidance by a second network: autoguidance, and networks trained to be avoided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from flowkit.guidance.checks import finite
from flowkit.hooks.parts import Guidance, Plan, State, reported


class SecondModelGuidance(Guidance):
    """Guidance away from what a second network predicts.

    With the output c of the pipeline's network for the condition and u of the second one,

        D = u + w (c - u).

    ``condition="same"`` is autoguidance (Karras et al. 2024, arXiv 2406.02507): the second network is a smaller or less trained
    one, and sees the same condition. ``condition="negative"`` is Diffusion-NPO (Wang et al. 2025, arXiv 2505.11245): it is
    trained on reversed preferences, and sees the negative prompt. Both are computed one after the other.

    Args:
        scale: guidance scale w; at 1 the second network is never called. Scales are not those of plain guidance.
        model: the second network, for the same inputs as the pipeline's, on the same device; None with ``adapter``.
        adapter: name of a LoRA loaded into the pipeline's network, which is active for the second call alone; None with ``model``.
            Adapters that are active anyway, a style say, stay so in both. Load it with
            ``pipe.load_lora_weights(..., adapter_name="npo")``, then leave it out: ``pipe.set_adapters("style")``, or
            ``pipe.disable_lora()`` where it is the only one.
        condition: "same" or "negative"; only the latter needs a pipeline that runs classifier-free guidance.

    Raises:
        TypeError: for a scale or a model of the wrong type.
        ValueError: for a scale that is not finite, an unknown condition, or not exactly one of ``model`` and ``adapter``.
    """

    combines = True

    def __init__(
        self,
        scale: float,
        model: torch.nn.Module | None = None,
        adapter: str | None = None,
        condition: Literal["same", "negative"] = "same",
    ) -> None:
        self.scale = finite("scale", scale, "give a guidance scale such as 2")
        if (model is None) == (adapter is None):
            given = "neither" if model is None else "both"
            raise ValueError(f"SecondModelGuidance got {given} of model and adapter; give one of them")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; pass the network, such as pipe.unet"
            )
        if adapter is not None and not isinstance(adapter, str):
            raise TypeError(f"adapter must be a name, got {adapter!r}; pass the adapter_name it was loaded with")
        if condition not in ("same", "negative"):
            raise ValueError(f"unknown condition {condition!r}; choose same or negative")
        self.model, self.adapter, self.condition = model, adapter, condition
        self.second = "cond" if condition == "same" else "uncond"
        self.needs_guidance = condition == "negative"

    def plan(self, step: int, sigma: float, state: State) -> Plan:
        """Returns "both", or "cond" where ``scale`` is 1."""
        return "cond" if self.scale == 1 else "both"

    def uncond(self, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the second network, or the pipeline's with the adapter.

        Args:
            network: the pipeline's; its adapters are the same before and after, whether the call succeeds or not.
            *args: its arguments, for the rows of ``condition``.
            **kwargs: likewise.

        Returns:
            What the network returns.

        Raises:
            ValueError: for a model with other input channels, or an adapter that is not loaded, is active in the pipeline's own
                passes as well, or cannot act because adapters are fused into the weights.
        """
        if self.adapter is not None:
            with activated(network, self.adapter):
                return network(*args, **kwargs)
        second: Any = self.model
        mine, own = (getattr(getattr(net, "config", None), "in_channels", None) for net in (second, network))
        if mine is not None and own is not None and mine != own:
            raise ValueError(
                f"the second model has in_channels={mine} and the pipeline's {own}; give one for the same latents"
            )
        return second(*args, **kwargs)

    def combine(
        self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns D, in the network's dtype and with the pipelines' own order of operations; c where u is None."""
        if uncond is None:
            return cond, reported(state, scale=1.0)
        return uncond + self.scale * (cond - uncond), reported(state, scale=self.scale)


@contextmanager
def activated(network: Any, adapter: str) -> Iterator[None]:  # noqa: ANN401
    """Adds an adapter of PEFT to the active ones, and afterwards puts everything back as it was.

    Args:
        network: a network with adapters of PEFT in its layers.
        adapter: its name.

    Yields:
        Nothing.

    Raises:
        ValueError: for an adapter that is not loaded, is active already, or cannot act because adapters are fused into weights.
    """
    loaded = list(getattr(network, "peft_config", None) or {})
    if adapter not in loaded:
        raise ValueError(f"no adapter {adapter!r} in the network, which has {loaded}; load it with "
                         f"pipe.load_lora_weights(..., adapter_name={adapter!r})")  # fmt: skip
    from peft.tuners.tuners_utils import BaseTunerLayer  # only a network with adapters needs PEFT

    # Layer by layer, since an adapter may be in some only, and without a detour by what the model says of all of them.
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    active = [[] if layer.disable_adapters else list(layer.active_adapters) for layer in layers]
    if any(adapter in names for names in active):
        raise ValueError(f"the adapter {adapter!r} is active in the pipeline's own passes, too, so there is nothing to guide with; "
                         "leave it out of pipe.set_adapters, or call pipe.disable_lora() where it is the only one")  # fmt: skip
    if any(layer.merged for layer in layers):
        raise ValueError(f"adapters are fused into the weights, and the adapter {adapter!r} has no effect then; call "
                         "pipe.unfuse_lora() first")  # fmt: skip
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    # What set_adapter and enable_adapters set, without their walk over all parameters: they also turn gradients on and off, which
    # would have to be undone and takes longer than a fast network's pass.
    try:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter, layer._disable_adapters = [*names, adapter], False
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = state

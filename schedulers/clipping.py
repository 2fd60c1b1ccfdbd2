"""Limits on x0_hat: the one thing that splits the linear pass of a row, since it needs x0_hat itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowkit import predictions
from flowkit.paths import Path
from flowkit.schedulers import stock_classes

Limit = Callable[[Tensor], Tensor]
# These have the keys, clip_sample on by default, but their step does not read them.
_IGNORED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "TCDScheduler")


def limiter(config: Mapping[str, Any]) -> Limit | None:
    """Returns what a configuration does to x0_hat, or None.

    ``thresholding`` is the dynamic one of Saharia et al. 2022 (section 2.3), ``clip_sample`` a plain clamp. Only keys that the
    imitated class knows count: left-overs of another class in its file have no effect there either.
    """
    known = stock_classes.own(config) if config.get("stock") and config["stock"] not in _IGNORED else {}
    if known.get("thresholding"):
        return partial(_threshold, ratio=known["dynamic_thresholding_ratio"], most=known["sample_max_value"])
    if known.get("clip_sample"):
        bound = float(known.get("clip_sample_range", 1.0))
        return partial(torch.clamp, min=-bound, max=bound)
    return None


def _threshold(x0: Tensor, ratio: float, most: float) -> Tensor:
    """Divides each sample by the given quantile of its absolute values, where that lies in [1, most]."""
    flat = x0.flatten(1)  # quantile knows float32 and float64 only, which is what `apply` works in
    bound = torch.quantile(flat.abs(), ratio, dim=1).clamp(1.0, most)[:, None]
    return (flat.clamp(-bound, bound) / bound).reshape(x0.shape)


def apply(
    limit: Limit, path: Path, prediction: str, s: float, x: Tensor, raw: Tensor, *, keep_eps: bool
) -> tuple[Tensor, Tensor]:
    """Returns the sample and network output that a linear row must see so that x0_hat is limited.

    Args:
        limit: from `limiter`.
        path: the sample's path.
        prediction: type of ``raw``.
        s: flow time of the call.
        x: the sample.
        raw: the network's output.
        keep_eps: hold eps_hat and move the sample with x0_hat (DDIM), or hold the sample and take eps_hat anew (the others).
    """
    alpha, sigma, data = path.alpha(s), path.sigma(s), path.sigma_data
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, raw = x.to(dtype), raw.to(dtype)
    x0 = predictions.convert(raw, x, alpha, sigma, prediction, "sample", data)
    change = limit(x0) - x0
    a, b = predictions.pair(prediction, alpha, sigma, data)
    if keep_eps:
        return x + alpha * change, raw + a * change
    return x, raw + (a - b * alpha / sigma) * change

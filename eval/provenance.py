"""What a figure was measured with, as plain values that JSON can hold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit.hooks import Part, Recorder, attached_to

_PACKAGES = ("flowkit-diffusion", "torch", "diffusers", "torch-fidelity", "numpy")


def describe(value: Any) -> Any:  # noqa: ANN401
    """Returns a value in JSON's terms: tensors, arrays and images by shape and hash, other objects by their class."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Tensor):
        # numpy has no bfloat16; float64 holds every float exactly.
        value = value.detach().cpu().to(torch.float64 if value.is_floating_point() else value.dtype).numpy()
    if isinstance(value, np.generic):
        return describe(value.item())
    if hasattr(value, "__array_interface__"):
        array = np.ascontiguousarray(value)
        return f"array {array.shape} {array.dtype} sha256 {hashlib.sha256(array.tobytes()).hexdigest()}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def hash_inputs(own: Callable[[int], Mapping[str, Any]], count: int) -> str:
    """Returns the hash of the arguments of samples 0 ... count - 1."""
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(json.dumps(describe(own(index)), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def describe_pipeline(pipe: Any) -> dict[str, Any]:  # noqa: ANN401
    """Returns class, origin, dtype, device, scheduler and attached parts of a pipeline; after a run, with the levels it visited."""
    attached = [part for part in attached_to(pipe) if not isinstance(part, Recorder)]
    scheduler = getattr(pipe, "scheduler", None)
    levels = {name: getattr(scheduler, name, None) for name in ("timesteps", "sigmas")}
    # Which values are defaults diffusers lists in the order of a set, another one in every process.
    config = {k: v for k, v in getattr(scheduler, "config", {}).items() if k != "_use_default_values"}
    return {
        "class": type(pipe).__qualname__,
        "source": describe(getattr(pipe, "name_or_path", None)),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "scheduler": {
            "class": type(scheduler).__qualname__,
            "config": describe(config),
            **{name: describe(np.asarray(v).tolist()) for name, v in levels.items() if v is not None},
        },
        **({"attached": [_settings(part) for part in attached]} if attached else {}),
    }


def _settings(part: Part) -> dict[str, Any]:
    """Class and arguments of what is attached."""
    return {
        "class": type(part).__qualname__,
        **describe({k: v for k, v in vars(part).items() if not k.startswith("_")}),
    }


def first_difference(old: Any, new: Any, place: str = "") -> tuple[str, Any, Any] | None:  # noqa: ANN401
    """Returns where two values of JSON differ first, and the two values there; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if found := first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((found for i, pair in pairs if (found := first_difference(*pair, f"{place}[{i}]"))), None)
    return None if old == new else (place, old, new)


def fingerprint(pipe: Any, skipped: Sequence[torch.nn.Module] = ()) -> str:  # noqa: ANN401
    """Returns a hash that tells pipelines of other weights apart, LoRA and other adapters included.

    It covers names, shapes, dtypes and up to 1024 evenly spaced numbers of every tensor: training moves every weight.

    Args:
        pipe: the pipeline.
        skipped: components that do not count.
    """
    digest = hashlib.sha256()
    components = getattr(pipe, "components", {})
    modules = {name: value for name, value in components.items() if isinstance(value, torch.nn.Module)}
    for part in sorted(name for name, value in modules.items() if not any(value is other for other in skipped)):
        for name, tensor in components[part].state_dict().items():
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            if tensor.is_meta or not tensor.numel():  # offloaded weights are on no device
                continue
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, len(flat) // 1024)].cpu()
            digest.update(sample.to(torch.float64 if sample.is_floating_point() else torch.int64).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of flowkit and of the libraries that touch the figures."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found

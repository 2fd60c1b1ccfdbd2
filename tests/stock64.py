"""Scheduler classes of diffusers in float64: their own source with float32 replaced, for parity to the last digits."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.schedulers
import torch

# An optional package of diffusers, for step only: without these lines set_timesteps works.
_NEEDS_TORCHSDE = ("import torchsde", "from .scheduling_dpmsolver_sde import BrownianTreeNoiseSampler")


@functools.cache
def source(class_name: str) -> tuple[str, str]:
    """Returns the full name and the text of the module of a stock class, also where diffusers has only a stand-in for it."""
    root = Path(diffusers.schedulers.__file__).parent
    for file in sorted(root.rglob("scheduling_*.py")):
        text = file.read_text(encoding="utf-8")
        if f"\nclass {class_name}(" in text:
            return ".".join(("diffusers.schedulers", *file.relative_to(root).with_suffix("").parts)), text
    raise LookupError(class_name)


@functools.cache
def stock64(class_name: str) -> type[Any]:
    """Returns the stock class with every float32 of its module made float64, and float64 as torch's default inside it."""
    name, text = source(class_name)
    module = types.ModuleType(f"{name}_float64")
    module.__package__ = name.rpartition(".")[0]
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for line in _NEEDS_TORCHSDE:
        text = text.replace(f"\n{line}\n", "\n")
    text = text.replace("float32", "float64")
    exec(compile(text, module.__name__, "exec"), vars(module))
    cls: type[Any] = vars(module)[class_name]
    for key, function in list(vars(cls).items()):
        if isinstance(function, types.FunctionType):
            setattr(cls, key, _in_double(function))
    return cls


def _in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return call

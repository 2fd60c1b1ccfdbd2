"""flowkit: samplers, step optimisation, few-step distillation and trustworthy FID for diffusers pipelines.

Names are imported when they are first used, so ``import flowkit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as DiffusionPipeline
    from diffusers import ModelMixin as ModelMixin
    from diffusers import SchedulerMixin as SchedulerMixin

    from flowkit.analytic import MixtureDenoiser as MixtureDenoiser
    from flowkit.distill import optimize_steps as optimize_steps
    from flowkit.grids import Grid as Grid
    from flowkit.guidance import AdaptiveGuidance as AdaptiveGuidance
    from flowkit.guidance import DynamicGuidance as DynamicGuidance
    from flowkit.guidance import GradientGuidance as GradientGuidance
    from flowkit.guidance import IntervalGuidance as IntervalGuidance
    from flowkit.guidance import LinearAdaptiveGuidance as LinearAdaptiveGuidance
    from flowkit.guidance import PolicyGuidance as PolicyGuidance
    from flowkit.guidance import ProjectedGuidance as ProjectedGuidance
    from flowkit.guidance import SecondModelGuidance as SecondModelGuidance
    from flowkit.guidance import ZeroStarGuidance as ZeroStarGuidance
    from flowkit.hooks import Recorder as Recorder
    from flowkit.hooks import attach as attach
    from flowkit.pipelines import ClassConditionalPipeline as ClassConditionalPipeline
    from flowkit.pipelines import load_demo as load_demo
    from flowkit.schedulers import RectifiedFlowScheduler as RectifiedFlowScheduler
    from flowkit.schedulers import save_pretrained as save_pretrained

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveGuidance": "flowkit.guidance",
    "ClassConditionalPipeline": "flowkit.pipelines",
    "DynamicGuidance": "flowkit.guidance",
    "GradientGuidance": "flowkit.guidance",
    "Grid": "flowkit.grids",
    "IntervalGuidance": "flowkit.guidance",
    "LinearAdaptiveGuidance": "flowkit.guidance",
    "MixtureDenoiser": "flowkit.analytic",
    "PolicyGuidance": "flowkit.guidance",
    "ProjectedGuidance": "flowkit.guidance",
    "Recorder": "flowkit.hooks",
    "RectifiedFlowScheduler": "flowkit.schedulers",
    "SecondModelGuidance": "flowkit.guidance",
    "ZeroStarGuidance": "flowkit.guidance",
    "attach": "flowkit.hooks",
    "load_demo": "flowkit.pipelines",
    "optimize_steps": "flowkit.distill",
    "save_pretrained": "flowkit.schedulers",
    # What diffusers looks for in the module of a class that it loads.
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}
_FOLDERS = ("distill", "eval", "guidance", "hooks", "pipelines", "schedulers")
__all__ = sorted((*_HOMES, *_FOLDERS))


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _FOLDERS:
        return importlib.import_module(f"flowkit.{name}")
    raise AttributeError(f"module 'flowkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

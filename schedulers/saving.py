"""Saving pipelines so that they load with and without flowkit."""

from __future__ import annotations

import inspect
import os
from typing import Any

import diffusers

from flowkit.schedulers import stock as imitation
from flowkit.schedulers import stock_classes
from flowkit.schedulers.rectified_flow import RectifiedFlowScheduler


def stock_config(scheduler: RectifiedFlowScheduler) -> tuple[str, dict[str, Any]]:
    """Returns a stock class and a configuration that it loads, with ours in the one hidden key ``flowkit``.

    Raises:
        ValueError: where no stock class walks this path with this prediction type.
    """
    config = scheduler.config
    makers = {"flow": "FlowMatchEulerDiscreteScheduler", "vp": "DDIMScheduler", "edm": "EDMEulerScheduler"}
    name = config["stock"] or makers.get(config["path"])
    if name is None:
        raise ValueError(f"no diffusers scheduler walks the path {config['path']!r} with {config['prediction_type']!r}; save with "
                         "pipe.save_pretrained, which needs flowkit to load")  # fmt: skip
    theirs = stock_classes.defaults(name)
    values = {k: v for k, v in config.items() if k in theirs and (v is not None or theirs[k] is None)}
    if not config["stock"]:
        # A class of another prediction type would take the network's output for something else; and DDIM clips by default.
        values |= {"clip_sample": False, "timestep_spacing": "trailing"} if name == "DDIMScheduler" else {}
        try:
            imitation.translate({"_class_name": name, **values, "prediction_type": config["prediction_type"]})
        except ValueError as error:
            raise ValueError(f"no diffusers scheduler walks the path {config['path']!r} with {config['prediction_type']!r} "
                             f"({error}); save with pipe.save_pretrained, which needs flowkit to load") from error  # fmt: skip
    own = inspect.signature(type(scheduler).__init__).parameters
    return name, {**values, "flowkit": {k: config[k] for k in own if k in config and k not in values}}


def stand_in(scheduler: RectifiedFlowScheduler) -> Any:  # noqa: ANN401
    """Returns a stock scheduler that carries ours in one hidden key of its configuration.

    Raises:
        ValueError: where no stock class walks our scheduler's path.
    """
    name, config = stock_config(scheduler)
    hidden = config.pop("flowkit")
    made = getattr(diffusers, name)(**config)
    made.register_to_config(flowkit=hidden)
    return made


def save_pretrained(pipe: diffusers.DiffusionPipeline, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # noqa: ANN401
    """Saves a pipeline with a stock scheduler in our scheduler's place, which carries ours in one hidden key.

    The folder loads in plain diffusers; there ``RectifiedFlowScheduler.from_config(pipe.scheduler.config)`` gives our scheduler
    back, with its solver and grid.

    Args:
        pipe: any diffusers pipeline.
        save_directory: the folder.
        **kwargs: for ``pipe.save_pretrained``.

    Raises:
        ValueError: where no stock class walks our scheduler's path.
    """
    ours = pipe.scheduler
    if not isinstance(ours, RectifiedFlowScheduler):
        pipe.save_pretrained(save_directory, **kwargs)
        return
    pipe.scheduler = stand_in(ours)
    try:
        pipe.save_pretrained(save_directory, **kwargs)
    finally:
        pipe.scheduler = ours

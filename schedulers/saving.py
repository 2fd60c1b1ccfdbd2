"""Saving pipelines so that they load with and without flowkit."""

from __future__ import annotations

import os
from typing import Any

import diffusers

from flowkit.schedulers.rectified_flow import RectifiedFlowScheduler


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
    name, config = ours.stock_config()
    hidden = config.pop("flowkit")
    stand_in = getattr(diffusers, name)(**config)
    stand_in.register_to_config(flowkit=hidden)
    pipe.scheduler = stand_in
    try:
        pipe.save_pretrained(save_directory, **kwargs)
    finally:
        pipe.scheduler = ours

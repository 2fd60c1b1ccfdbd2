"""Schedulers for diffusers pipelines."""

from flowkit.schedulers.rectified_flow import RectifiedFlowScheduler as RectifiedFlowScheduler
from flowkit.schedulers.saving import save_pretrained as save_pretrained

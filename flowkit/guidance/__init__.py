"""Guidance methods for `flowkit.attach`, one a file."""

from flowkit.guidance.adaptive import AdaptiveGuidance as AdaptiveGuidance
from flowkit.guidance.interval import IntervalGuidance as IntervalGuidance
from flowkit.guidance.projected import ProjectedGuidance as ProjectedGuidance
from flowkit.guidance.zero_star import ZeroStarGuidance as ZeroStarGuidance

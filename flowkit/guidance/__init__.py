"""Guidance methods for `flowkit.attach`, one a file."""

from flowkit.guidance.adaptive import AdaptiveGuidance as AdaptiveGuidance
from flowkit.guidance.gradient import ByLevel as ByLevel
from flowkit.guidance.gradient import GradientGuidance as GradientGuidance
from flowkit.guidance.interval import IntervalGuidance as IntervalGuidance
from flowkit.guidance.linear import LinearAdaptiveGuidance as LinearAdaptiveGuidance
from flowkit.guidance.policy import PolicyGuidance as PolicyGuidance
from flowkit.guidance.projected import ProjectedGuidance as ProjectedGuidance
from flowkit.guidance.second_model import SecondModelGuidance as SecondModelGuidance
from flowkit.guidance.zero_star import ZeroStarGuidance as ZeroStarGuidance

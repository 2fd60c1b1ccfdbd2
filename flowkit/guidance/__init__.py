"""Guidance methods for `flowkit.attach`, one a file."""

from flowkit.guidance.adaptive import AdaptiveGuidance as AdaptiveGuidance
from flowkit.guidance.dynamic import DynamicGuidance as DynamicGuidance
from flowkit.guidance.evaluator_training import train_evaluators as train_evaluators
from flowkit.guidance.evaluators import DecodedReward as DecodedReward
from flowkit.guidance.evaluators import Evaluator as Evaluator
from flowkit.guidance.evaluators import Quadratic as Quadratic
from flowkit.guidance.evaluators import vae_decoder as vae_decoder
from flowkit.guidance.gradient import ByLevel as ByLevel
from flowkit.guidance.gradient import GradientGuidance as GradientGuidance
from flowkit.guidance.interval import IntervalGuidance as IntervalGuidance
from flowkit.guidance.latent_evaluators import LatentClassifier as LatentClassifier
from flowkit.guidance.latent_evaluators import LatentDiscriminator as LatentDiscriminator
from flowkit.guidance.linear import LinearAdaptiveGuidance as LinearAdaptiveGuidance
from flowkit.guidance.policy import PolicyGuidance as PolicyGuidance
from flowkit.guidance.projected import ProjectedGuidance as ProjectedGuidance
from flowkit.guidance.second_model import SecondModelGuidance as SecondModelGuidance
from flowkit.guidance.zero_star import ZeroStarGuidance as ZeroStarGuidance

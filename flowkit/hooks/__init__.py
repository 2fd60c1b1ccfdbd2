"""Extending a pipeline from outside, at two points: the network's call and ``scheduler.step``."""

from flowkit.hooks.attachment import Attachment as Attachment
from flowkit.hooks.attachment import attach as attach
from flowkit.hooks.attachment import attached_to as attached_to
from flowkit.hooks.denoiser import DenoiserCall as DenoiserCall
from flowkit.hooks.parts import Evaluation as Evaluation
from flowkit.hooks.parts import Guidance as Guidance
from flowkit.hooks.parts import Level as Level
from flowkit.hooks.parts import Part as Part
from flowkit.hooks.record import Recorder as Recorder
from flowkit.hooks.record import Trajectory as Trajectory
from flowkit.hooks.skip import SkippedLayers as SkippedLayers

"""Pipelines for what existing ones cannot host, and the one way to draw images from any pipeline."""

from flowkit.pipelines.class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
from flowkit.pipelines.class_conditional import load_demo as load_demo

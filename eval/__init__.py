"""Evaluation: statistics of features, distances between them, and reports that people can check."""

from flowkit.eval.clip import ClipExtractor as ClipExtractor
from flowkit.eval.comparison import compare as compare
from flowkit.eval.comparison import summarize as summarize
from flowkit.eval.dino import DinoExtractor as DinoExtractor
from flowkit.eval.features import ClassifierExtractor as ClassifierExtractor
from flowkit.eval.features import FeatureExtractor as FeatureExtractor
from flowkit.eval.features import PixelExtractor as PixelExtractor
from flowkit.eval.frechet import frechet_distance as frechet_distance
from flowkit.eval.harness import evaluate as evaluate
from flowkit.eval.harness import make_statistics as make_statistics
from flowkit.eval.images import Images as Images
from flowkit.eval.inception import InceptionExtractor as InceptionExtractor
from flowkit.eval.networks import ModuleExtractor as ModuleExtractor
from flowkit.eval.report import write_report as write_report
from flowkit.eval.results import Result as Result
from flowkit.eval.statistics import FeatureStats as FeatureStats
from flowkit.eval.sweep import run_sweep as run_sweep

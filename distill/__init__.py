"""Few-step generation: step search and distillation, one method a file."""

from flowkit.distill.bellman import optimize_steps as optimize_steps
from flowkit.distill.runs import run as run

"""Few-step generation: step search and distillation, one method a file, on trajectories recorded from any pipeline."""

from flowkit.distill.attached import parts as parts
from flowkit.distill.bellman import optimize_steps as optimize_steps
from flowkit.distill.runs import run as run
from flowkit.distill.shards import Trajectories as Trajectories
from flowkit.distill.straighten import Chords as Chords
from flowkit.distill.trajectories import record as record

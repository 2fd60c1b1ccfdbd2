"""Few-step generation: step search and distillation, one method a file, on trajectories recorded from any pipeline."""

from flowkit.distill.attached import parts as parts
from flowkit.distill.bellman import optimize_steps as optimize_steps
from flowkit.distill.boss import Boss as Boss
from flowkit.distill.flow_runs import train_flow as train_flow
from flowkit.distill.invert import invert as invert
from flowkit.distill.onestep import OneStep as OneStep
from flowkit.distill.rectified import RectifiedDiffusion as RectifiedDiffusion
from flowkit.distill.reflow import Reflow as Reflow
from flowkit.distill.reverse import Reverse as Reverse
from flowkit.distill.runs import run as run
from flowkit.distill.settings import Training as Training
from flowkit.distill.shards import Trajectories as Trajectories
from flowkit.distill.straighten import Chords as Chords
from flowkit.distill.student import LoRA as LoRA
from flowkit.distill.trajectories import record as record

"""Programs on several processes of this machine, data parallel or in shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# accelerate shards on accelerators alone, torch on CPUs too; so accelerate is told that these are some.
_BEFORE = """
import os
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType
PartialState(cpu=True)
if "ACCELERATE_USE_FSDP" in os.environ:
    def made(self, *args, fsdp_plugin=None, real=AcceleratorState.__init__, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
    AcceleratorState.__init__ = made
"""
_AFTER = """
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def launched(
    program: str, processes: int, *arguments: str, fsdp: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program in several processes.

    Args:
        program: its lines; its first argument is a path, beside which it is written.
        processes: how many.
        arguments: of the program.
        fsdp: class of the modules that are cut into shards; None for data parallel.
    """
    script = Path(arguments[0]).with_suffix(".py")
    script.write_text(_BEFORE + program + _AFTER)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if fsdp is not None:
        environment |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": fsdp,
        }
    return subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=240
    )

"""What a scheduler step costs on the CPU, ours beside the diffusers class that it imitates.

    python benchmarks/step.py            # a minute or two; prints a table and writes benchmarks/step.json

Both run in one process and one thread, interleaved, timed in per-thread CPU time, which other processes hardly move; the figure
is the median over rounds, and over passes, between which the allocator settles anew. Model outputs are fixed tensors: a network
costs far more than any step, so on a CPU a faster step shows only beside very small networks.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import diffusers
import torch
from rich.progress import track

from flowkit import RectifiedFlowScheduler
from flowkit.weights import write_bytes

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
STOCK: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", FLOW),
]
SHAPES, DTYPES = ((1, 4, 64, 64), (1, 16, 128, 128)), (torch.float32, torch.bfloat16)
STEPS, ROUNDS, PASSES = 20, 9, 3


def run(scheduler: diffusers.SchedulerMixin, x: torch.Tensor, output: torch.Tensor) -> float:
    """Microseconds of CPU time a step, over one run; `set_timesteps` is not counted, input scaling is."""
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times, scales = list(scheduler.timesteps), hasattr(scheduler, "scale_model_input")
    start = time.thread_time()
    for t in times:
        if scales:
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return 1e6 * (time.thread_time() - start) / len(times)


def measure(name: str, config: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Medians of stock and ours, and their ratio."""
    stock = getattr(diffusers, name)(**config)
    ours = RectifiedFlowScheduler.from_config(stock)
    x, output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    rounds = [(run(stock, x, output), run(ours, x, output)) for _ in range(ROUNDS + 2)][2:]
    theirs, own = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "class": name,
        "config": config,
        "shape": list(shape),
        "dtype": str(dtype)[6:],
        "stock_us": theirs,
        "ours_us": own,
    }


def middle(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians over the passes of one cell."""
    stock, ours = (statistics.median(p[key] for p in passes) for key in ("stock_us", "ours_us"))
    return {**passes[0], "stock_us": round(stock, 1), "ours_us": round(ours, 1), "ratio": round(stock / ours, 2)}


def main() -> None:
    """Measures every class, prints the ratios and writes the JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    cells = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    cases = [(name, config, *cell) for name, config in STOCK for cell in cells]
    passes = [[measure(*case) for case in track(cases, f"pass {i + 1}/{PASSES}")] for i in range(PASSES)]
    found = [middle(cell) for cell in zip(*passes, strict=True)]
    heads = [f"{'x'.join(map(str, shape[1:]))} {str(dtype)[6:]}" for shape, dtype in cells]
    print(f"| stock time / our time, a step | {' | '.join(heads)} |\n| --- |{' ---: |' * len(cells)}")
    for i, (name, config) in enumerate(STOCK):
        label = name.removesuffix("Scheduler") + "".join(f" {v}" for k, v in config.items() if k == "algorithm_type")
        label += " on the flow" if "use_flow_sigmas" in config else ""
        row = found[i * len(cells) : (i + 1) * len(cells)]
        print(f"| {label} | {' | '.join(format(r['ratio'], '.1f') for r in row)} |")
    machine = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "threads": 1,
    }
    write_bytes(
        Path(__file__).with_suffix(".json"), (json.dumps({"made_on": machine, "rows": found}, indent=1) + "\n").encode()
    )


if __name__ == "__main__":
    main()

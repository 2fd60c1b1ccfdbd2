"""The noise that samples come from: the probability-flow ODE from data to noise (Song et al. 2021, arXiv 2011.13456, section 4.3).

In flow coordinates ``y = n(s) x`` (see `flowkit.paths`) the ODE of every path is ``dy/ds = eps_hat - x0_hat``, finite at both ends.
It is followed from s = 0 up to the flow time where the sampler starts, the levels of the sampler's grid in reverse. A discrete
diffusion knows no level below that of its first time; there the samples count as states at that level, which is where DDIM of
Stable Diffusion ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkit import solvers, table
from flowkit.distill.conditions import Conditions
from flowkit.distill.fine import Runs
from flowkit.distill.pairs import check_start
from flowkit.grids import Grid
from flowkit.pipelines.sampling import Inputs
from flowkit.progress import bar


@torch.no_grad()
def invert(
    pipe: Any,  # noqa: ANN401
    samples: Tensor,
    inputs: Inputs = None,
    *,
    steps: int | Grid = 50,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Returns the states x_1 from which a deterministic sampler of the pipeline makes the given samples.

    Args:
        pipe: any diffusers pipeline that `flowkit.attach` takes, or a student of `flowkit.distill.Reverse`; it is left as it was.
        samples: what the sampler would end with, in the path's coordinates: images in [-1, 1] of a pipeline without an autoencoder,
            otherwise latents as ``scheduler.step`` sees them, (N, ...).
        inputs: arguments of each sample, see `flowkit.pipelines.sampling.as_inputs`.
        steps: number of steps, even in model time (Karras spacing on VE and EDM), or a grid. A step of Heun takes two network
            evaluations; a single step is Euler's, one evaluation, which is for students of `Reverse`.
        call: arguments shared by all samples, without guidance.
        batch_size: samples at a time.
        progress: show a bar with the time left.

    Returns:
        Shape of ``samples``, in float32 at least. Pipelines that scale the ``latents`` that they are given want them divided by
        the scheduler's ``init_noise_sigma``.

    Raises:
        TypeError: for arguments that the pipeline does not take.
        ValueError: for samples of another shape, steps out of range, a grid of another path, classifier-free guidance, a network
            that predicts the sample, and results that are not finite.
    """
    if not len(samples):
        raise ValueError("there are no samples to invert; give one at least")
    predict = Conditions(pipe, inputs, len(samples), call=call, batch_size=batch_size)
    if predict.guided:
        raise ValueError(
            "classifier-free guidance bends the paths to noise out of shape; invert with guidance_scale=1 in call"
        )
    if tuple(samples.shape[1:]) != predict.shape:
        raise ValueError(f"the pipeline's samples have shape {predict.shape} and those given {tuple(samples.shape[1:])}; encode "
                         "and pack them as the pipeline does")  # fmt: skip
    check_start(predict)
    check_noise(predict)
    grid = steps if isinstance(steps, Grid) else Runs(pipe, "heun", inputs=inputs, call=call).anchors(steps)
    rows, found = upwards(predict, grid), []
    with bar(progress) as display:
        task = display.add_task("inversion", total=len(rows) * len(samples))
        for first in range(0, len(samples), batch_size):
            x = samples[first : first + batch_size].to(pipe.device)
            numbers = range(first, first + len(x))
            x = walk(predict, predict.network, rows, x, numbers, lambda count: display.advance(task, count))
            found.append(x.to(samples.device))
    states = torch.cat(found)
    if bad := int((~states.isfinite().flatten(1).all(1)).sum()):
        raise ValueError(f"{bad} of {len(states)} samples end in NaN or infinity; try float32, or more steps")
    return states


def upwards(predict: Conditions, grid: Grid) -> list[table.Row]:
    """Returns the rows of the way from samples to noise: Heun's, and Euler's where the grid has one step.

    Args:
        predict: of the model.
        grid: levels of the sampler, which are walked in reverse.

    Raises:
        ValueError: for a grid of another path.
    """
    path = predict.path
    if grid.path != path.name:
        raise ValueError(
            f"the grid belongs to the path {grid.path!r}, the pipeline walks {path.name!r}; make one for it"
        )
    method = solvers.solver("euler" if len(grid) == 1 else "heun", path, "flow")
    levels = [path.at_level(level) for level in reversed(grid.sigmas)]
    if path.rhos and len(grid) > 1:
        levels[0] = path.at_level(path.rhos[0])
    return table.build(method, path, predict.prediction, levels)


@torch.no_grad()
def walk(
    predict: Conditions,
    network: nn.Module,
    rows: Sequence[table.Row],
    x: Tensor,
    numbers: Sequence[int],
    on_rows: Callable[[int], None],
) -> Tensor:
    """Returns where some rows lead.

    Args:
        predict: conditioning.
        network: that is called.
        rows: see `upwards`.
        x: samples, (B, ...), on the network's device.
        numbers: of the samples, whose conditioning they get.
        on_rows: called with B after each evaluation.
    """
    x, history = x.to(torch.promote_types(x.dtype, torch.float32)), tuple[Tensor, ...]()
    for row in rows:
        s = torch.full((len(x),), row.s, dtype=torch.float64)
        x, history = table.step(row, x, predict(network, x, s, numbers), history)
        on_rows(len(x))
    return x


def check_noise(predict: Conditions) -> None:
    """Refuses a model whose output does not tell the noise of a sample at flow time 0.

    Raises:
        ValueError: for one that predicts the sample.
    """
    if predict.prediction == "sample":
        raise ValueError("a network that predicts the sample says nothing of the noise of one without noise; use a model that "
                         "predicts epsilon, v or flow velocity")  # fmt: skip

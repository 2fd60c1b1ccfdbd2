"""What a grid from an evolutionary search is to be run with: guidance scales and skipped layers of its own."""

from __future__ import annotations

from flowkit.grids import Grid
from flowkit.guidance import PolicyGuidance
from flowkit.hooks import Part, SkippedLayers


def parts(grid: Grid) -> list[Part]:
    """Returns what to attach to a pipeline that runs on a grid.

        pipe.scheduler.set_grid(grid)
        with flowkit.attach(pipe, *flowkit.distill.parts(grid)):
            images = pipe(prompt, num_inference_steps=len(grid), guidance_scale=5.0).images

    Guidance scales take the place of the pipeline's own, which only has to be above 1.

    Args:
        grid: from ``flowkit.optimize_steps(method="evolve")``, or read from its file. Its ``about`` holds "scales", one for each
            network evaluation, and "skipped", the layers that each leaves out, where these were searched.

    Returns:
        A `PolicyGuidance` and a `SkippedLayers`, where the grid has them; nothing for any other grid. They refuse runs of another
        number of evaluations, and the guidance another network or other levels.
    """
    found: list[Part] = []
    if scales := grid.about.get("scales"):
        levels = list(grid.sigmas[:-1]) if len(scales) == len(grid) else []  # a step of several evaluations has others
        found.append(PolicyGuidance(scales, identity={"network": grid.about.get("network"), "levels": levels}))
    if skipped := grid.about.get("skipped"):
        found.append(SkippedLayers(skipped))
    return found

"""Edits of the sample between steps: a mask at every step, and a change at one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from flowkit import RectifiedFlowScheduler
from flowkit.solvers import SOLVERS

from .swaps import difference, stock, swapped
from .tiny import build, run
from .tiny_parts import DDIM, DPM, EULER, FLOW, HEUN, MATCH, MATCH_HEUN, SD, UNIPC, V

pytestmark = [
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

Callback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]
SCALED = {**SD, **V}


# A mask at every step.


@pytest.mark.parametrize("family", ["sd15-inpaint", "sdxl-inpaint"])
@pytest.mark.parametrize("name", [DDIM, EULER, HEUN, DPM, UNIPC])
def test_a_mask_at_every_step_gives_the_stock_images(family: str, name: str) -> None:
    """Stock UniPC too: it forgets the mask, but all that it forgets lies where the next mask puts the image again."""
    for strength in (0.5, 1.0):
        pipe = build(family, stock(name, **SCALED))
        theirs = run(pipe, 8, strength=strength)
        assert difference(run(swapped(pipe), 8, strength=strength), theirs) < 1e-5


# A change at one step.


def edit(at: int) -> Callback:
    """Halves the sample after the call of a number; a factor means the same in the coordinates of every class."""

    def callback(_pipe: Any, step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": 0.5 * values["latents"]} if step == at else {}

    return callback


CASES = [
    *(("sd15", name, SCALED) for name in (DDIM, EULER, HEUN, DPM)),
    *(("sd3", name, {"shift": 3.0}) for name in (MATCH, MATCH_HEUN)),
    ("sd3", DPM, FLOW),
    ("wan", DPM, FLOW),
]


@pytest.mark.parametrize(("family", "name", "config"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_change_at_one_step_is_kept(family: str, name: str, config: dict[str, Any]) -> None:
    pipe = build(family, stock(name, **config))
    theirs, without = run(pipe, 6, callback_on_step_end=edit(3)), run(pipe, 6)
    assert difference(theirs, without) > 1e-2
    assert difference(run(swapped(pipe), 6, callback_on_step_end=edit(3)), theirs) < 1e-5


class _Told(type(stock(UNIPC))):  # type: ignore[misc]
    """Stock UniPC, which notices that the sample is not the one that it returned, and moves its own copy along.

    The corrector starts again from the copy x of the sample one level up, ``(sigma' / sigma) x + ...``; so an edit by d of the
    sample at sigma' is one by ``(sigma / sigma') d`` of the copy.
    """

    _returned: Tensor | None = None
    last_sample: Tensor | None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        if self._returned is not None and self.last_sample is not None:
            index = self.step_index
            before, now = (self._sigma_to_alpha_sigma_t(s)[1] for s in self.sigmas[index - 1 : index + 1])
            self.last_sample = self.last_sample + (before / now) * (sample - self._returned)
        result = super().step(model_output, timestep, sample, return_dict=False)[0]
        self._returned = result
        return (result,)

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> None:
        super().set_timesteps(num_inference_steps, device, **kwargs)
        self._returned = None


@pytest.mark.parametrize(("family", "config"), [("sd15", SCALED), ("sd3", FLOW), ("wan", FLOW)])
def test_stock_unipc_forgets_a_change_at_one_step(family: str, config: dict[str, Any]) -> None:
    pipe = build(family, stock(UNIPC, **config))
    theirs, without = run(pipe, 6, callback_on_step_end=edit(3)), run(pipe, 6)
    told = run(build(family, _Told(**config)), 6, callback_on_step_end=edit(3))
    swapped(pipe)
    assert difference(run(pipe, 6), without) < 1e-5
    assert difference(run(pipe, 6, callback_on_step_end=edit(3)), told) < 1e-5
    assert difference(theirs, told) > 1e-2


MEAN, WIDTH = 1.0, 0.5


def _denoised(x: Tensor, ratio: float) -> Tensor:
    """The mean of normal data (MEAN, WIDTH) given a sample where sigma / alpha is ``ratio``."""
    alpha = 1 / math.hypot(1, ratio)
    return MEAN + alpha * WIDTH**2 * (x - alpha * MEAN) / (alpha**2 * (WIDTH**2 + ratio**2))


def _flow(x: Tensor, ratio: float) -> Tensor:
    """Where the probability flow takes a sample from there to the data."""
    alpha = 1 / math.hypot(1, ratio)
    return MEAN + WIDTH * (x / alpha - MEAN) / math.hypot(WIDTH, ratio)


def _edited(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The end of a run whose sample is turned about in the middle, and where that sample should end."""
    scheduler.set_timesteps(200)
    x = torch.randn(1, 1, 4, 4, generator=Generator().manual_seed(0), dtype=torch.float64)
    ratios, target = scheduler.sigmas.tolist(), x
    middle = len(scheduler.timesteps) // (2 * scheduler.order) * scheduler.order
    for i, t in enumerate(scheduler.timesteps):
        if i == middle:
            x = 1 - x
            target = _flow(x, ratios[i])
        x = scheduler.step(_denoised(x, ratios[i]), t, x, return_dict=False)[0]
    return x, target


@pytest.mark.parametrize("solver", [name for name, method in SOLVERS.items() if not method.noise])
def test_every_solver_goes_on_from_the_changed_sample(solver: str) -> None:
    ours = RectifiedFlowScheduler.from_config(stock(EULER, **SD, prediction_type="sample"), solver=solver)
    assert difference(*_edited(ours)) < 0.02


def test_stock_unipc_does_not_go_on_from_the_changed_sample() -> None:
    scheduler = stock(UNIPC, **SD, prediction_type="sample")
    assert difference(*_edited(scheduler)) > 0.2

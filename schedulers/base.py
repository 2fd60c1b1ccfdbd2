"""The diffusers side of a table: what is common to all our schedulers."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from flowkit import rng, spacing, table
from flowkit.grids import Grid
from flowkit.paths import Path
from flowkit.schedulers import clipping, variances
from flowkit.schedulers.plans import Plan
from flowkit.solvers import Solver
from flowkit.table import Row

Generators = Generator | list[Generator] | None


class TableScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler whose every step is one row of a table; subclasses say which, in `plan`."""

    # Without those for which diffusers has only a stand-in, for want of a package.
    _compatibles = [e.name for e in KarrasDiffusionSchedulers if not hasattr(getattr(diffusers, e.name), "_backends")]  # noqa: RUF012

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._rows: list[Row] = []
        self._begin_index: int | None = None
        self._restart()
        self.num_inference_steps: int | None = None
        self.timesteps, self.sigmas = torch.zeros(0), torch.zeros(0)

    @property
    @abstractmethod
    def path(self) -> Path:
        """The path of the sample."""

    @property
    @abstractmethod
    def method(self) -> Solver:
        """The solver."""

    @abstractmethod
    def plan(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
    ) -> Plan:
        """What a run of these steps needs; arguments as in `set_timesteps`."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Fills the table for a run.

        Args:
            num_inference_steps: number of steps N >= 1; None where a grid or a list gives it.
            device: where ``timesteps`` go; None means the CPU. ``sigmas`` stay there, so that reading one never waits.
            timesteps: N model times, falling, as the imitated class means them.
            sigmas: N levels, falling, as the imitated class means them (on the flow path before the shift); a terminal 0 is
                appended unless it is there.
            mu: amount of dynamic shift, for configurations with ``use_dynamic_shifting``; otherwise ignored, as in stock, since
                some pipelines always pass it.

        Raises:
            ValueError: for anything that does not make a falling grid of N steps.
        """
        plan = self.plan(num_inference_steps, timesteps, sigmas, mu)
        rows = plan.rows()
        times = torch.tensor([row.time for row in rows], dtype=torch.float32, device=device)
        levels = [plan.path.level(row.s) for row in rows] + [plan.levels[-1]]
        # From here on nothing fails: a refused call leaves the run before it as it was.
        self.timesteps, self.sigmas = times, torch.tensor(levels, dtype=torch.float32)
        self._plan, self._rows, self._begin_index = plan, rows, None
        self.num_inference_steps = num_inference_steps or len(plan.times)
        self._restart()

    def _train_grid(self) -> None:
        """Exports the training times and their levels, as training scripts look them up before any `set_timesteps`."""
        path = self.path
        total = len(path.rhos) or len(self)  # trained betas may be of another number
        shift = 1.0 if path.name != "flow" or self.config.get("use_dynamic_shifting") else self.config.get("shift", 1.0)
        if path.name in ("ve", "edm"):
            levels = list(Grid.karras(total, path=path.name).sigmas[:-1])
        else:
            top = path.num_train_timesteps / total
            times = [float(i) for i in range(total)] if path.name == "vp" else [top * (i + 1) for i in range(total)]
            levels = [path.level(path.at_time(t)) for t in reversed(times)]
        if shift != 1:
            levels = spacing.shift(np.array(levels), shift).tolist()
        self.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)
        self.timesteps = torch.tensor([path.time(path.at_level(v)) for v in levels], dtype=torch.float32)

    @property
    def order(self) -> int:
        """Network calls of a full step, by which pipelines slice ``timesteps``."""
        return self.method.stages

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at the discrete times of the VP path, float32 on the CPU, for code that looks them up; no attribute elsewhere."""
        rhos = torch.tensor(self.path.rhos, dtype=torch.float64)
        if not len(rhos):
            raise AttributeError(f"the path {self.path.name!r} has no alphas_cumprod")
        return (1.0 / (1.0 + rhos.square())).float()

    @property
    def betas(self) -> Tensor:
        """The training betas of the VP path, float32 on the CPU; no attribute elsewhere."""
        bar = self.alphas_cumprod.double()
        return (1.0 - torch.cat([bar[:1], bar[1:] / bar[:-1]])).float()

    @property
    def init_noise_sigma(self) -> float:
        """What pure noise is multiplied with: 1 on VP and flow paths, up to the quirks of an imitated class."""
        if self._plan:
            return self._plan.start
        top = self.path.sigma(self.path.start)
        return top if math.isfinite(top) and self.path.name in ("ve", "edm") else 1.0

    @property
    def step_index(self) -> int | None:
        """Number of the next row; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first row to execute; None means that the first timestep tells."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the run in the middle, as image-to-image does.

        Args:
            begin_index: position in ``timesteps`` of the first call.
        """
        self._begin_index = begin_index

    def __len__(self) -> int:
        """Number of training times."""
        return int(self.config["num_train_timesteps"])

    def fork(self) -> TableScheduler:
        """Returns an independent scheduler with the same configuration and timesteps, at the start of a run: one a thread."""
        other = copy.copy(self)
        for name in ("set_timesteps", "step"):  # what `flowkit.attach` put in their place works on this scheduler
            other.__dict__.pop(name, None)
        other._restart()
        other._begin_index = None
        if other._plan:
            other._rows = other._plan.rows()
        return other

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._history: tuple[Tensor, ...] = ()
        self._eta = 0.0

    def _start(self, timestep: float | Tensor, eta: float) -> int:
        """Finds the first row; rebuilds the table where it is not the first, or eta puts noise into it."""
        if self._plan is None:
            raise ValueError(
                "step was called before set_timesteps; call scheduler.set_timesteps(num_inference_steps) first"
            )
        first = self._step_index if self._step_index is not None else self._begin_index
        first = first if first is not None else self.index_for_timestep(timestep)
        if not 0 <= first < len(self._rows):
            raise ValueError(
                f"step {first} lies outside the {len(self._rows)} timesteps; call set_timesteps for another run"
            )
        if first and self._rows[first].step == self._rows[first - 1].step:
            raise ValueError(
                f"step {first} lies inside a step of {self.order} calls; begin at a multiple of {self.order}"
            )
        if first or eta != self._eta:
            self._rows = self._rows[:first] + self._plan.rows(self._rows[first].step, eta)
        self._eta, self._history = eta, ()
        return first

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Returns the position of a timestep, the second one where it is there twice, as in diffusers.

        Raises:
            ValueError: for a timestep that is not one of ``timesteps``.
        """
        wanted = float(torch.as_tensor(timestep, dtype=torch.float32))
        found = [i for i, t in enumerate(self.timesteps.tolist()) if t == wanted]
        if not found:
            raise ValueError(f"timestep {wanted:g} is not one of scheduler.timesteps; pass one of them")
        return found[min(1, len(found) - 1)]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Returns the network's input: the sample, times c_in of Karras et al. 2022 on the EDM path.

        Args:
            sample: any shape.
            timestep: the current one; None means the first.
        """
        if self._plan is None or self._plan.path.name != "edm":
            return sample
        at = self._step_index if self._step_index is not None else self._begin_index
        known = at is not None or timestep is None
        s = self._rows[at or 0].s if known else self._level(float(torch.as_tensor(timestep, dtype=torch.float32)))
        return sample * self._plan.path.input_scale(s)

    def _level(self, time: float) -> float:
        """Flow time of the call at a timestep of the run, or of any model time."""
        grid = self.timesteps.tolist() if self._rows else []
        if time not in grid:
            return self._plan.path.at_time(time) if self._plan else self.path.at_time(time)
        at = self._step_index if self._step_index is not None else self._begin_index
        if at is not None and at < len(grid) and grid[at] == time:  # whole times may be there several times
            return self._rows[at].s
        return self._rows[self.index_for_timestep(time)].s

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        per_token_timesteps: Tensor | None = None,
        s_churn: float = 0.0,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Applies the next row of the table.

        Args:
            model_output: the network's output, shape (B, C, ...), or (B, 2C, ...) with learned variance, which is dropped unless
                ancestral steps take it (``variance_type``).
            timestep: the current one; read at the first step only.
            sample: shape (B, C, ...). Edits of it between steps are kept.
            eta: noise of a one-step solver in [0, 1], 1 being ancestral (DDIM's eta); 0 means the solver's own, which is none but
                for stochastic ones.
            generator: for the noise.
            variance_noise: the noise itself, instead of drawing it.
            per_token_timesteps: model time of every token, shape (B, tokens), for samples of shape (B, tokens, channels): each
                token moves on to the next lower level of the grid. As in diffusers' flow-match Euler, the output is then taken as
                x0 - eps. Deterministic first-order solvers on the flow path only.
            s_churn: refused unless 0: churn changes the levels of the calls, so it belongs to the constructor.
            return_dict: whether to return an output object or a tuple.

        Returns:
            The next sample, in the output's dtype, as ``prev_sample`` or the tuple's one element.

        Raises:
            ValueError: before `set_timesteps`, after the last step, for shapes that differ, for eta or per-token times with a
                solver that has no such step, and with ``debug`` for a result that is not finite.
        """
        if s_churn:
            raise ValueError(f"step(s_churn={s_churn:g}) comes too late, it raises the levels of the calls before they are made; "
                             "set it at construction, with solver='edm'")  # fmt: skip
        index = self._step_index
        if index is None or eta != self._eta:
            index = self._start(timestep, eta)
        plan = self._plan
        if plan is None or index >= len(self._rows):
            raise ValueError(f"all {len(self._rows)} steps are done; call set_timesteps for another run")
        row, x, (raw, variance) = self._rows[index], sample, variances.split(model_output, sample)
        if per_token_timesteps is not None:
            result = self._per_token(plan, row, raw, x, per_token_timesteps)
        else:
            if plan.limit:
                # DDIM keeps eps; what interpolates x0 takes eps anew from the sample.
                keep = plan.method.first_order and plan.method.gauge != "x0"
                x, raw = clipping.apply(plan.limit, plan.path, plan.prediction, row.s, x, raw, keep_eps=keep)
            noise = self._noise(plan, raw, index, generator, variance_noise) if row.c else None
            if noise is not None and plan.variance:
                noise = plan.s_noise * variances.scaled(plan.variance, plan.path, row, noise, variance)
            result, self._history = table.step(row, x, raw, self._history, noise)
        result = result.to(model_output.dtype)
        self._step_index = index + 1
        if plan.debug and not torch.isfinite(result).all():
            blame = "the model output is not" if torch.isfinite(sample).all() else "the sample was not before it"
            raise ValueError(
                f"step {index} of {len(self._rows)}, sigma {float(self.sigmas[index]):g} to {float(self.sigmas[index + 1]):g}, "
                f"gave NaN or inf ({blame}); try float32, another solver or a grid that starts or ends less far out"
            )
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _noise(self, plan: Plan, raw: Tensor, index: int, generator: Generators, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        if plan.keyed:
            seeds, ids = rng.keys(generator, len(raw), plan.seed)
            return rng.normal(raw.shape[1:], seeds, ids, step=index, device=raw.device, dtype=raw.dtype)
        drawn: Tensor = randn_tensor(raw.shape, generator=generator, device=raw.device, dtype=raw.dtype)
        return drawn

    def _per_token(self, plan: Plan, row: Row, raw: Tensor, sample: Tensor, times: Tensor) -> Tensor:
        """Euler with a level for each token."""
        if plan.path.name != "flow" or not plan.method.first_order or row.c:
            raise ValueError(
                f"per_token_timesteps need a first-order solver without noise on the flow path, this is "
                f"{plan.method.name!r} on {plan.path.name!r}; use solver='euler'"
            )
        now = (times / len(self)).unsqueeze(-1)
        levels = self.sigmas.to(now.device).view(-1, *[1] * now.ndim)
        lower = torch.where(levels < now - 1e-6, levels, 0.0).amax(0)
        return sample.float() + (now - lower) * raw.float()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns ``alpha x0 + sigma eps`` at the levels of the timesteps.

        Args:
            original_samples: data x0, shape (B, ...).
            noise: eps, same shape.
            timesteps: shape (B,) or (1,); of the current grid, or any training time.

        Returns:
            Noisy samples, shape and dtype of ``original_samples``.
        """
        path = self._plan.path if self._plan else self.path
        levels = [self._level(t) for t in torch.as_tensor(timesteps, dtype=torch.float32).flatten().tolist()]
        dtype = torch.promote_types(original_samples.dtype, torch.float32)

        def column(values: list[float]) -> Tensor:
            wide = torch.tensor(values, device=original_samples.device, dtype=dtype)
            return wide.view(-1, *[1] * (original_samples.ndim - 1))

        alpha, sigma = column([path.alpha(s) for s in levels]), column([path.sigma(s) for s in levels])
        return (alpha * original_samples.to(dtype) + sigma * noise.to(dtype)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """The same as `add_noise`, in the argument order of flow-matching pipelines.

        Args:
            sample: data x0, shape (B, ...).
            timestep: shape (B,) or (1,).
            noise: eps, same shape as the sample; None draws it.
        """
        return self.add_noise(sample, torch.randn_like(sample) if noise is None else noise, timestep)

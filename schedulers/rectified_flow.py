"""The scheduler that goes into any diffusers pipeline: a table of rows behind diffusers' contract."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from flowkit import predictions, solvers, table
from flowkit.grids import GRIDS, Grid
from flowkit.paths import Path
from flowkit.schedulers import clipping, own_grids, plans, stock_classes, variances
from flowkit.schedulers import stock as imitation
from flowkit.schedulers.base import TableScheduler
from flowkit.schedulers.checks import check_kinds, check_knobs
from flowkit.schedulers.plans import Plan
from flowkit.schedulers.stock_flow import FLOW
from flowkit.schedulers.stock_spacing import CONVERSIONS
from flowkit.solvers import Solver

_NATURAL = {"flow": "flow_prediction", "cosine": "v_prediction"}
_EDM = {"epsilon": "edm", "v_prediction": "edm_v"}  # on the EDM path these name the sign of c_out
_OF_SOLVER = {"gauge", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise"}  # given for one solver, and not for another


class RectifiedFlowScheduler(TableScheduler):
    """A scheduler for any path, checkpoint and solver, with diffusers' interface.

    `from_config` takes over from the scheduler of an existing pipeline: same path, and its very solver and grid unless
    ``solver`` or ``grid`` say otherwise. A fresh one uses our defaults: on the flow path a uniform grid that ends at 0 without a
    wasted call, and UniPC in flow time. The sample lives in the path's own coordinates, so on VP and flow paths
    ``scale_model_input`` is the identity.

    Args:
        num_train_timesteps: model time of pure noise on the continuous clocks, number of discrete times on "vp".
        path: "flow", "vp", "cosine", "ve" or "edm" (see `flowkit.paths`).
        prediction_type: what the network returns, in diffusers' words: "flow_prediction", "epsilon", "sample" or
            "v_prediction"; on "edm" "epsilon" and "v_prediction" mean the preconditioned network. None means flow_prediction on
            the flow path, v_prediction on "cosine", which starts where epsilon says nothing, and epsilon elsewhere.
        solver: one of `flowkit.solvers.SOLVERS`. None means that of the imitated class; on a fresh scheduler "unipc" on the flow
            path and "dpm++2m" elsewhere.
        gauge: what ``solver`` holds or interpolates, where it leaves that open (see `flowkit.solvers.solver`); None means its form
            for the path. "flow" on another path straightens it.
        grid: one of `flowkit.grids.GRIDS` or a `Grid` (also as its dict), which wins over what pipelines pass. None means that of
            the imitated class; on a fresh scheduler "uniform", and "karras" on VE and EDM.
        shift: static shift of the flow grid towards noise, > 0; 1 means none.
        use_dynamic_shifting: shift by ``mu`` of `set_timesteps`, which pipelines compute from the image size, in place of shift.
        time_shift_type: how mu shifts, "exponential" or "linear" (see `Grid.with_shift`).
        shift_terminal: last level before 0 that the flow grid is stretched to; None means no stretching.
        beta_start: first training beta of "vp".
        beta_end: last training beta of "vp".
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" or "sigmoid".
        trained_betas: the training betas themselves; None means the schedule.
        sigma_min: last level of the "karras", "exponential" and "beta" grids before 0; None means .002 on VE and EDM, the model's
            own elsewhere.
        sigma_max: first level of these grids; None means 80 on VE and EDM, the model's own elsewhere.
        sigma_data: standard deviation of the data on "edm".
        eta: level of the noise: in [0, 1] for ancestral steps, which a deterministic one-step solver then makes (Song et al. 2021,
            equation 16); any for the SDE solvers, 1 being the reverse of the forward SDE. None means 1 for a stochastic solver,
            0 for others.
        s_churn: noise added before each step (Karras et al. 2022, algorithm 2), for one-step solvers, usually "edm"; 0 means none.
            The levels of the calls, and so ``timesteps``, are the raised ones, up to the noisiest that the model knows.
        s_tmin: lowest sigma/alpha with churn.
        s_tmax: highest sigma/alpha with churn; None means no limit.
        s_noise: factor on all noise that steps add.
        variance_type: variance of ancestral steps on "vp", see `flowkit.schedulers.variances`; None means that of a fixed small
            one. Other solvers drop a learned variance.
        noise: where the noise of stochastic steps comes from: "diffusers" (``randn_tensor``, equal to stock) or "keyed" (a
            function of seed, sample and step alone; see `flowkit.rng`).
        seed: of keyed noise in pipelines that hand no generator to ``step`` (SD3, Flux, Wan and most of flow models); None draws
            one. A generator that comes wins.
        debug: look for NaN after every step, which waits for the device, and name the step.
        stock: name of the diffusers class whose configuration this is; `from_config` sets it.

    Raises:
        ValueError: for an unknown path, prediction type, solver, grid or noise, or a stock class whose solver is not here and no
            ``solver`` given.
    """

    __module__ = "flowkit"  # what diffusers writes into a pipeline's index

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "flow",
        prediction_type: str | None = None,
        solver: str | None = None,
        gauge: str | None = None,
        grid: str | Mapping[str, Any] | Grid | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float = 0.5,
        eta: float | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        variance_type: str | None = None,
        noise: str = "diffusers",
        seed: int | None = None,
        debug: bool = False,
        stock: str | None = None,
    ) -> None:
        super().__init__()
        defaults = {k: p.default for k, p in inspect.signature(type(self).__init__).parameters.items()}
        check_kinds({k: v for k, v in self.config.items() if k in defaults}, defaults, type(self).__name__)
        if stock is not None and stock not in stock_classes.CLASSES:
            raise ValueError(f"unknown stock class {stock!r:.60}; make the scheduler with from_config, which names it")
        prediction_type = prediction_type or _NATURAL.get(path, "epsilon")
        predictions.pair(prediction_type, 1.0, 0.0)  # refuses an unknown type
        if noise not in ("diffusers", "keyed"):
            raise ValueError(f"unknown noise {noise!r}; choose 'diffusers' or 'keyed'")
        if seed is not None and noise != "keyed":
            raise ValueError(f"seed={seed} is that of keyed noise; set noise='keyed', or call torch.manual_seed")
        if isinstance(grid, Mapping):
            grid = Grid.from_dict(grid)
        if isinstance(grid, str) and grid not in GRIDS:
            raise ValueError(f"unknown grid {grid!r}; choose one of {', '.join(GRIDS)}, or pass a Grid")
        if not shift > 0:
            raise ValueError(f"shift must be a positive number, got {shift}; 1 means none")
        if path != "flow" and not stock and (shift != 1 or use_dynamic_shifting or shift_terminal):
            raise ValueError(
                f"shift={shift}, use_dynamic_shifting={use_dynamic_shifting} and shift_terminal={shift_terminal} move flow "
                f"levels, but the path is {path!r}; leave them out"
            )
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"unknown time_shift_type {time_shift_type!r}; choose 'exponential' or 'linear'")
        known = {"path": path, "prediction_type": prediction_type}
        self._register(**known, grid=grid.to_dict() if isinstance(grid, Grid) else grid)
        if solver is not None:
            solvers.find(solver)
        elif gauge is not None and stock:
            raise ValueError(
                f"gauge={gauge!r} needs a solver, the imitated class has its own; pass solver='unipc' or another"
            )
        self._grid = grid if isinstance(grid, Grid) else None
        if not s_churn >= 0 or not s_noise > 0 or not 0 <= s_tmin <= (math.inf if s_tmax is None else s_tmax):
            raise ValueError(f"got s_churn={s_churn}, s_tmin={s_tmin}, s_tmax={s_tmax}, s_noise={s_noise}; churn must not be "
                             "negative, the factor be positive, and the limits in order")  # fmt: skip
        if not stock:
            self._check_grid(self._grid, self.path)
            self._check_noise()
            if self._grid is None:  # refuses a grid that cannot be, before a pipeline asks for it
                own_grids.lay(self.config, self.path, 2, None, None, 0.5)
            self._train_grid()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | SchedulerMixin,
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Takes over from any diffusers scheduler.

        Gauge, eta, churn and the factor on the noise belong to the solver that they were given for: with another ``solver`` they
        are what is given with it, or the defaults.

        Args:
            config: a scheduler's configuration, ours or stock, or the scheduler itself.
            return_unused_kwargs: also return a dict of what was not used, which is always empty.
            **kwargs: knobs of this class (``solver="heun"``) or of the imitated one (``timestep_spacing="trailing"``).

        Returns:
            The scheduler.

        Raises:
            ValueError: for a configuration of an unknown or unsupported class, a knob that neither class has, or a class whose
                solver is not here and no ``solver`` given.
        """
        if isinstance(config, SchedulerMixin):
            config = {**config.config, "_class_name": type(config).__name__}
        if not isinstance(config, Mapping):
            raise ValueError(
                f"expected a scheduler or its configuration, got {config!r:.80}; pass pipe.scheduler.config"
            )
        own = set(inspect.signature(cls.__init__).parameters) - {"self"}
        if config.get("_class_name") == cls.__name__ or own <= set(config):
            values = {k: v for k, v in config.items() if not k.startswith("_")}
            if config.get("_class_name") == cls.__name__:  # what a file says of its origin stays
                values |= {k: config[k] for k in ("_class_name", "_diffusers_version") if k in config}
        elif "path" in config and not config.get("stock"):
            # One of our own, not an imitation, that a stock class took over.
            values = {k: config[k] for k in own & set(config) - set(config.get("_use_default_values", ()))}
        else:
            values = imitation.translate({**config, **{k: v for k, v in kwargs.items() if k not in own}})
            if not kwargs.get("solver"):
                stock_classes.check_told(config)
            hidden = values.pop("flowkit", {})
            if not isinstance(hidden, Mapping):
                raise ValueError(
                    f"the hidden key 'flowkit' holds {hidden!r:.60}, not our settings; remove it from the file"
                )
            if hidden.get("stock", values["stock"]) and hidden.get("path", values["path"]) != values["path"]:
                raise ValueError(
                    f"the hidden key 'flowkit' says path={hidden['path']!r}, the class {values['stock']} is one of "
                    f"{values['path']!r}; remove the key from the file"
                )
            values |= hidden
        if kwargs.get("solver", values.get("solver")) != values.get("solver"):
            values = {k: v for k, v in values.items() if k not in _OF_SOLVER}
        stock = values.get("stock")
        if stock and any(kwargs.get(k, values[k]) != values[k] for k in ("path", "stock")):
            raise ValueError(
                f"the configuration is of {stock} on the path {values['path']!r}, got {kwargs}; leave out path and stock"
            )
        theirs = stock_classes.defaults(stock) if isinstance(stock, str) and stock in stock_classes.CLASSES else {}
        check_knobs(kwargs, own, stock, theirs)
        values |= kwargs
        scheduler = cls(**{k: v for k, v in values.items() if k in own})
        scheduler.register_to_config(**{k: v for k, v in values.items() if k not in own})
        scheduler._check_grid(scheduler._grid, scheduler.path)
        scheduler._check_noise()  # refuses a class whose solver is not here
        scheduler._train_grid()
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def _register(self, **values: Any) -> None:  # noqa: ANN401
        """Puts values into the configuration that stay there when a stock class takes it over, which drops defaults."""
        if defaults := sorted(set(self.config.get("_use_default_values", ())) - set(values)):
            values["_use_default_values"] = defaults
        self.register_to_config(**values)

    @property
    def path(self) -> Path:
        """The path of the sample."""
        return imitation.make_path(self.config)

    @property
    def prediction(self) -> str:
        """What the network returns, one of `flowkit.predictions.PREDICTIONS`."""
        kind = str(self.config["prediction_type"])
        return _EDM.get(kind, kind) if self.config["path"] == "edm" else kind

    @property
    def method(self) -> Solver:
        """The solver: the one asked for, the imitated class's own, or our default for the path.

        Raises:
            ValueError: where the imitated class's own is not here.
        """
        name = self.config["solver"]
        if name is None and self.config["stock"]:
            if found := imitation.own_solver(self.config):
                return found
            raise ValueError(
                f"the solver of {self.config['stock']} with this configuration is not in flowkit; "
                f"pass solver= one of {', '.join(solvers.SOLVERS)}"
            )
        name = name or ("unipc" if self.config["path"] == "flow" else "dpm++2m")
        return solvers.solver(name, self.path, self.config["gauge"])

    @property
    def _variance(self) -> str | None:
        """The variance of the solver's noise, None for its own."""
        kind = self.config["variance_type"]
        if kind is None or self.method.noise != "ancestral" or not self.method.first_order:
            return None
        if kind not in variances.VARIANCES or self.config["path"] != "vp":
            raise ValueError(f"variance_type={kind!r} on the path {self.config['path']!r} is none; choose "
                             f"{', '.join(variances.VARIANCES)} on 'vp', or None")  # fmt: skip
        return str(kind)

    def _check_noise(self) -> None:
        config, method = self.config, self.method
        table.check_noise(method, config["eta"] or 0.0, config["s_churn"])
        if not config["s_churn"] and (config["s_tmin"] or config["s_tmax"] is not None):
            raise ValueError(f"s_tmin={config['s_tmin']} and s_tmax={config['s_tmax']} bound churn, but s_churn is 0; set it, or "
                             "leave them out")  # fmt: skip
        noisy = method.noise or config["eta"] or config["s_churn"]
        if config["s_noise"] != 1 and not noisy:
            raise ValueError(f"s_noise={config['s_noise']} has no effect on {method.name!r}, which adds no noise; set eta or "
                             "s_churn, or choose a stochastic solver")  # fmt: skip
        _ = self._variance

    @property
    def grid(self) -> Grid | None:
        """The grid fixed with `set_grid`."""
        return self._grid

    def set_grid(self, grid: Grid | None) -> None:
        """Fixes the levels of every later run, over what a pipeline passes by default; None clears them.

        Args:
            grid: of this scheduler's path; ``num_inference_steps`` must then equal its length.

        Raises:
            ValueError: for a grid of another path, or one that was optimised for another prediction type.
        """
        self._check_grid(grid, self.path)
        self._grid = grid
        self._register(grid=None if grid is None else grid.to_dict())

    def _check_grid(self, grid: Grid | None, path: Path) -> None:
        if grid is None:
            return
        if not isinstance(grid, Grid):
            raise TypeError(f"expected a Grid or None, got {grid!r:.80}; read a file with Grid.load")
        if grid.path != path.name:
            raise ValueError(
                f"the grid belongs to the path {grid.path!r}, this scheduler walks {path.name!r}; make one for it"
            )
        made_for, own = grid.about.get("prediction_type"), self.config["prediction_type"]
        if made_for not in (None, own):
            raise ValueError(f"the grid was optimised for a network that predicts {made_for!r}, this one predicts {own!r}; search "
                             "one for it with flowkit.optimize_steps")  # fmt: skip
        if grid.solver and grid.solver != self.method.name:
            warnings.warn(f"the grid was made for solver {grid.solver!r}, this is {self.method.name!r}", stacklevel=3)
        if grid.sigmas[-1] > 0:
            warnings.warn(f"the grid ends at sigma {grid.sigmas[-1]:.4g}: samples keep noise; end it with 0 unless that is meant",
                          stacklevel=3)  # fmt: skip

    def plan(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
    ) -> Plan:
        """What a run of these steps needs, by the configuration as it is now: pipelines edit it after construction."""
        config, path = self.config, self.path
        levels, times, ends = self._grid_for(path, num_inference_steps, timesteps, sigmas, mu)
        method = self.method
        plan = Plan(
            path=path,
            prediction=self.prediction,
            method=method,
            levels=levels,
            times=times,
            ends=ends,
            eta=config["eta"],
            s_noise=config["s_noise"],
            variance=self._variance,
            start=imitation.start_scale(config, levels),
            finish=imitation.end_scale(config, levels),
            limit=clipping.limiter(config),
            keyed=config["noise"] == "keyed",
            seed=config["seed"],
            debug=config["debug"],
        )
        if config["stock"] and config["solver"] is None:
            plan = replace(
                plan, orders=imitation.orders(config, len(times)), uncorrected=config.get("disable_corrector") or ()
            )
            if method.name == "plms" and len(times) > 1:
                plan = plans.repeated(plan)
        return plans.churned(plan, config) if config["s_churn"] else plan

    def _grid_for(
        self,
        path: Path,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
    ) -> tuple[Sequence[float], Sequence[float], Sequence[float] | None]:
        """Exported levels (N + 1), model times (N), and where the steps end (N) if not at the next level."""
        config, given = self.config, sigmas if sigmas is not None else timesteps
        if self._grid is not None:
            asked = len(self._grid) if steps is None and given is None else own_grids.count(steps, given)
            if asked != len(self._grid):
                raise ValueError(
                    f"{asked} steps asked for, but the grid has {len(self._grid)}; "
                    f"pass num_inference_steps={len(self._grid)}, or clear it with set_grid(None)"
                )
            return self._laid(self._grid)
        if not config["stock"]:
            return self._laid(own_grids.lay(config, path, steps, timesteps, sigmas, mu))
        if config["grid"] is None:
            levels, times, ends = imitation.grid(config, steps, timesteps=timesteps, sigmas=sigmas, mu=mu)
            return levels, times, ends if self.method.first_order else None
        grid = own_grids.by_name(config, path, own_grids.count(steps, given))
        if path.name != "flow" or FLOW[config["stock"]].exact:
            return self._laid(grid)
        # The class's own shift, which may depend on mu; its respacing is what the grid stands in place of.
        plain = {**config, **dict.fromkeys(CONVERSIONS, False)}
        levels, _ = imitation.levels(plain, sigmas=grid.sigmas[:-1], mu=mu)
        return levels, [path.time(v) for v in levels[:-1]], None

    def _laid(self, grid: Grid) -> tuple[Sequence[float], Sequence[float], None]:
        path = self.path
        return grid.sigmas, grid.timesteps or [path.time(path.at_level(v)) for v in grid.sigmas[:-1]], None

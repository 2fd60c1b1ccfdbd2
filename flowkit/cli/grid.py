"""``flowkit grid``: shows, compares, converts and exports grids, and prints the table that a solver makes of one."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import diffusers
import numpy as np

from flowkit import paths, solvers, table
from flowkit.grids import GRIDS, Grid, named
from flowkit.paths import Path, log_snr
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.schedulers.stock_classes import CLASSES, REFUSED, defaults
from flowkit.weights import write_bytes

WIDTH = 80
DEFAULT_STEPS = 10

_HOME = {"ays-sd15": "vp", "ays-sdxl": "vp", "ays-svd": "edm"}  # where a name belongs if no path is asked for
# What a network returns has no part in the columns shown, but must determine the sample where the grid starts.
_PREDICTION = {"flow": "flow_prediction", "vp": "v_prediction", "cosine": "v_prediction", "ve": "epsilon", "edm": "edm"}
_STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Shown:
    """One grid as asked for: its label, the grid, and the path whose clock tells the model times."""

    label: str
    grid: Grid
    path: Path

    @property
    def times(self) -> list[float]:
        """N model times."""
        return list(self.grid.timesteps or (self.path.time(self.path.at_level(v)) for v in self.grid.sigmas[:-1]))


@dataclass(frozen=True)
class _Export:
    """The call that puts one stock scheduler on one grid."""

    source: str
    scheduler: str
    given: Mapping[str, Any]
    extra: Mapping[str, float]

    @classmethod
    def of(cls, wanted: str, item: Shown, model: FilePath | None, mu: float | None) -> _Export:
        """Exports to a saved scheduler, or to a class with the model's configuration or its own on the grid's path."""
        folder = FilePath(wanted) if FilePath(wanted).is_dir() else None
        origin = folder or model
        config = _config(origin) if origin else {}
        name = config["_class_name"] if folder else wanted
        if name not in (*CLASSES, *REFUSED) or not hasattr(diffusers, name):
            raise ValueError(
                f"{name!r:.80} is no scheduler class of diffusers, nor a folder; name one such as EulerDiscreteScheduler"
            )
        known = defaults(name) if name in CLASSES else {}
        added: dict[str, Any] = {}
        if not folder and item.path.name == "flow" and "use_flow_sigmas" in known:
            added = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        elif not origin and item.path.name == "vp":
            added = {k: v for k, v in _STABLE_DIFFUSION.items() if k in known}
        words = [*(["pipe.scheduler.config"] if origin else []), *(f"{k}={v!r}" for k, v in added.items())]
        made = f"{name} of {folder.name}" if folder else f"{name}{'.from_config' if origin else ''}({', '.join(words)})"
        scheduler = getattr(diffusers, name).from_config(config, **added)
        extra = {"mu": mu} if mu is not None and scheduler.config.get("use_dynamic_shifting") else {}
        return cls(item.label, made, item.grid.for_stock(scheduler, mu), extra)

    @property
    def lists(self) -> dict[str, list[float]]:
        """The argument in plain numbers."""
        return {k: [v if isinstance(v, int) else float(v) for v in values] for k, values in self.given.items()}

    def text(self) -> Iterator[str]:
        """The call, as Python."""
        parts = []
        for key, values in self.lists.items():
            kind = {np.ndarray: "np.array({})", list: "{}"}.get(
                type(self.given[key]), "torch.tensor({}, dtype=torch.float64)"
            )
            parts.append(f"{key}={kind.format(values)}")
        call = f"scheduler.set_timesteps({', '.join([*parts, *(f'{k}={v!r}' for k, v in self.extra.items())])})"
        yield textwrap.fill(f"{self.source} for {self.scheduler}", WIDTH, initial_indent="# ", subsequent_indent="#   ")
        yield textwrap.fill(call, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def run(
    sources: Sequence[str],
    *,
    steps: int | None = None,
    path: str | None = None,
    model: FilePath | None = None,
    shift: float | None = None,
    mu: float | None = None,
    terminal: float | None = None,
    whole_times: bool = False,
    show: bool = False,
    solver: str | None = None,
    for_stock: str | None = None,
    stock_mu: float | None = None,
    comfyui: bool = False,
    save: FilePath | None = None,
    plot: FilePath | None = None,
    as_json: bool = False,
) -> None:
    """Builds the grids, changes them in the order of the arguments, and prints what is asked for.

    Args:
        sources: files, names of `GRIDS`, or lists of levels; none with ``show`` or ``solver``, for the facts alone.
        steps: N of the names, and what files and lists are resampled to; None means as they are, and for names the N of the first
            file or list, or 10.
        path: name of the path to build on and to convert to; None means a file's own, flow for lists and most names.
        model: folder of a pipeline or a scheduler, whose path is taken.
        shift: static shift k.
        mu: amount of the exponential dynamic shift.
        terminal: last positive level.
        whole_times: move every level to a whole model time.
        show: print the table of every solver.
        solver: print the table of this one.
        for_stock: class or folder of a stock scheduler to print the call for.
        stock_mu: mu of that scheduler's dynamic shift.
        comfyui: print plain numbers.
        save: file for the one grid.
        plot: picture of the levels.
        as_json: print JSON instead of text.

    Raises:
        ValueError: for sources that are no grids, or options that contradict each other.
        FileNotFoundError: for a file or a model that is not there.
        ImportError: for a picture without matplotlib, or "beta" without SciPy.
    """
    if path and model:
        raise ValueError(f"both --path {path} and --model {model} say where the grid lives; give one of them")
    if stock_mu is not None and for_stock is None:
        raise ValueError(
            f"--stock-mu {stock_mu:g} is for the scheduler of --for-stock; to shift the grid itself use --mu"
        )
    if solver:
        solvers.find(solver)
    wanted_solvers = [solver] if solver else list(solvers.SOLVERS) if show else []
    if not sources:
        _print_facts(wanted_solvers, as_json)
        return
    if save and len(sources) > 1:
        raise ValueError(f"--save writes one grid, got {len(sources)} sources; name one of them")
    wanted = _model_path(model) if model else paths.named(path) if path else None
    grids = []
    for label, grid, its_path in _build(sources, steps, wanted):
        if shift is not None or mu is not None:
            grid = grid.with_shift(shift, mu=mu)
        grid = grid if terminal is None else grid.stretched(terminal)
        grids.append(Shown(label, grid.at_whole_times(its_path) if whole_times else grid, its_path))
    stock = [_Export.of(for_stock, item, model, stock_mu) for item in grids] if for_stock else []
    found: dict[str, Any] = {
        "grids": [_described(item) for item in grids],
        "runs": [_run_of(name, item, strict=bool(solver)) for item in grids for name in wanted_solvers],
        "stock": [{"source": e.source, "scheduler": e.scheduler, **e.lists, **e.extra} for e in stock],
        "comfyui": [_plain(item) for item in grids] if comfyui else [],
    }
    if save:
        grids[0].grid.save(save)
    if plot:
        from flowkit.cli.grid_plot import draw

        write_bytes(plot, draw([(i.label, i.grid.sigmas, i.path) for i in grids], plot))
    if as_json:
        print(json.dumps(_finite({k: v for k, v in found.items() if v}), indent=1))
        return
    if not (stock or comfyui):
        print("\n".join(_compared(grids)))
    for text in (*_run_text(found["runs"]), *(line for e in stock for line in e.text()), *found["comfyui"]):
        print(text)
    for file in filter(None, (save, plot)):
        print(f"written: {file}")


def _print_facts(names: Sequence[str], as_json: bool) -> None:
    """What each solver is, in one line, or two where it is long."""
    facts = {name: solvers.SOLVERS[name].facts for name in names}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for name, line in facts.items():
        print(textwrap.fill(f"{name:15} {line}", WIDTH, subsequent_indent=" " * 16))


def _build(sources: Sequence[str], steps: int | None, wanted: Path | None) -> Iterator[tuple[str, Grid, Path]]:
    """Label, grid and path of each source."""
    given = {source: _read(source, wanted) for source in sources if source not in GRIDS}
    count = steps or next((len(grid) for grid in given.values()), DEFAULT_STEPS)
    for source in sources:
        if source in given:
            grid, label = given[source], _cell(FilePath(source).name) if FilePath(source).is_file() else "list"
            grid = grid.resampled(steps) if steps else grid
            grid = grid.on(wanted.name) if wanted else grid
        else:
            label, home = source, wanted or paths.named(_HOME.get(source, "flow"))
            grid = named(source, count, home)
        yield label, grid, wanted or paths.named(grid.path)


def _read(source: str, wanted: Path | None) -> Grid:
    """A file's grid, or a list on the wanted path."""
    if not FilePath(source).is_file():
        if re.fullmatch(r"[\s\[(]*(inf|[-+.\d])[-+.,\deEinf\s\])]*", source):
            return Grid.parse(source, wanted.name if wanted else "flow")
        raise FileNotFoundError(
            f"no grid {source!r:.100}: no such file, no list as 1.0,0.5,0.0, and not one of the names {', '.join(GRIDS)}"
        )
    return Grid.load(source)


def _model_path(folder: FilePath) -> Path:
    path: Path = RectifiedFlowScheduler.from_config(_config(folder), solver="euler").path
    return path


def _config(folder: FilePath) -> dict[str, Any]:
    """The scheduler's configuration in a scheduler's or a pipeline's folder."""
    files = [folder / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"no scheduler_config.json in {folder} or {folder / 'scheduler'}; name a saved pipeline"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); save the pipeline again") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{file} does not name a scheduler class in '_class_name'; save the pipeline again")
    return config


def _described(item: Shown) -> dict[str, Any]:
    times = [*item.times, None]
    rows = [
        {"step": i, "sigma": v, "time": t, "log_snr": log_snr(item.path.at_level(v))}
        for i, (v, t) in enumerate(zip(item.grid.sigmas, times, strict=True))
    ]
    return {"source": item.label, "grid": item.grid.to_dict(), "levels": rows}


def _run_of(name: str, item: Shown, *, strict: bool) -> dict[str, Any]:
    """The table that a solver makes of a grid; with ``strict`` a solver that cannot walk it is an error, not a remark."""
    path, facts = item.path, {"source": item.label, "solver": name, "facts": solvers.SOLVERS[name].facts}
    levels = [path.at_level(v) for v in item.grid.sigmas]
    try:
        rows = table.build(solvers.solver(name, path), path, _PREDICTION[path.name], levels, times=item.times)
    except ValueError as error:
        if strict:
            raise
        return {**facts, "error": str(error)}
    calls = [
        {"step": r.step, "call": i, "sigma": path.level(r.s), "time": r.time, "result": path.level(r.t), "a": r.a, "b": list(r.b),
         "c": r.c}
        for i, r in enumerate(rows)
    ]  # fmt: skip
    return {**facts, "rows": calls}


def _compared(grids: Sequence[Shown]) -> Iterator[str]:
    """The levels side by side, three grids at a time."""
    for at in range(0, len(grids), 3):
        block = [_described(item)["levels"] for item in grids[at : at + 3]]
        heads = [f"{item.label:.14} ({item.path.name})" for item in grids[at : at + 3]]
        yield "    " + "".join(f"{head:>25}" for head in heads)
        yield "step" + "".join(f"{'sigma':>9}{'time':>8}{'log-SNR':>8}" for _ in block)
        for i in range(max(map(len, block))):
            cells = [
                f"{_cell(rows[i]['sigma']):>9}{_cell(rows[i]['time']):>8}{_cell(rows[i]['log_snr']):>8}"
                if i < len(rows)
                else " " * 25
                for rows in block
            ]
            yield f"{i:4}{''.join(cells)}".rstrip()
        yield ""
    for item in grids:
        made = f", made for solver {_cell(item.grid.solver)}" if item.grid.solver else ""
        yield f"{item.label}: {len(item.grid)} steps on the path {item.grid.path}{made}"
        about = ", ".join(
            f"{_cell(k)} {_cell(v)}" for k, v in item.grid.about.items() if isinstance(v, str | int | float)
        )
        yield from textwrap.wrap(about, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _run_text(runs: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The tables of the runs: x' = a x + b0 M0 + b1 M1 + ... + c z."""
    for run in runs:
        yield ""
        yield from textwrap.wrap(f"{run['solver']} on {run['source']}: {run['facts']}", WIDTH, subsequent_indent="  ")
        if "error" in run:
            yield from textwrap.wrap(run["error"], WIDTH, initial_indent="  ", subsequent_indent="  ")
            continue
        rows = run["rows"]
        wide, noisy = max(len(r["b"]) for r in rows), any(r["c"] for r in rows)
        heads = ["sigma", "time", "result", "a", *(f"b{k}" for k in range(wide)), *(["c"] if noisy else [])]
        size = 9 if len(heads) <= 7 else 8 if len(heads) == 8 else 7
        yield "step call" + "".join(f"{head:>{size}}" for head in heads)
        for r in rows:
            b = [*r["b"], *[None] * (wide - len(r["b"]))]
            cells = [r["sigma"], r["time"], r["result"], r["a"], *b, *([r["c"]] if noisy else [])]
            line = "".join(f"{_cell(v, min(size - 1, 7)):>{size}}" for v in cells)
            yield f"{r['step']:4}{r['call']:5}{line}".rstrip()
    if runs:
        yield "\nx' = a x + b0 M0 + b1 M1 + ... + c z"
        yield "M0: the prediction of this call, M1: of the call before, z: noise"


def _plain(item: Shown) -> str:
    """Numbers without exponents, which ComfyUI's ManualSigmas node reads."""
    if math.isinf(item.grid.sigmas[0]):
        raise ValueError(
            f"{item.label} starts at an infinite level, which ComfyUI cannot read; build it with --path flow"
        )
    return ", ".join(np.format_float_positional(v, trim="0") for v in item.grid.sigmas)


def _cell(value: object, room: int = 7) -> str:
    """A value of a table: a number in as many digits as there is room for, text without what would steer a terminal."""
    if value is None:
        return ""
    if not isinstance(value, int | float):
        return "".join(c if c.isprintable() else " " for c in str(value)[:200])
    texts = (f"{value:.{digits}g}" for digits in (5, 4, 3, 2))
    return next((text for text in texts if len(text) <= room), f"{value:.1g}")


def _finite(value: Any) -> Any:  # noqa: ANN401
    """JSON values without infinities, which are written "inf" and "-inf"."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

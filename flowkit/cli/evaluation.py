"""What ``flowkit fid`` does: options to arguments of `flowkit.eval`, figures to lines."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console

from flowkit import assets
from flowkit import eval as evaluation
from flowkit.cli import USER_ERRORS
from flowkit.cli.options import Options
from flowkit.cli.sample import agreed, join, open_model
from flowkit.eval import runs, weight_files
from flowkit.eval.images import images
from flowkit.eval.intervals import Figure
from flowkit.eval.processes import PeerError
from flowkit.eval.references import Extractor
from flowkit.pipelines import loading
from flowkit.weights import check_writable


@dataclass(frozen=True)
class Sampling:
    """Options of the images to measure, see `flowkit.cli.fid`; None means not given."""

    source: str
    num_images: int | None
    labels: str | None
    prompts: Path | None
    steps: int | None
    guidance: float | None
    scheduler: str
    solver: str | None
    grid: str | None
    arguments: Sequence[str]
    seed: int | None
    channels: int
    size: int | None
    alpha: str
    batch_size: int
    exact: bool
    dtype: str
    device: str

    def is_model(self) -> bool:
        """Tells models from images: by name, by their index file, or as what can only be on the hub."""
        path = Path(self.source)
        if self.source in assets.NAMES or (path / loading.INDEX).is_file():
            return True
        return not path.exists() and not path.suffix and loading.REPOSITORY.fullmatch(self.source) is not None

    def open(self, state: PartialState) -> dict[str, Any]:
        """Returns the source and its arguments for `flowkit.eval.evaluate`."""
        shared = {"num_images": self.num_images, "batch_size": self.batch_size, "exact": self.exact}
        if not self.is_model():
            given = {
                "--labels": self.labels,
                "--prompts": self.prompts,
                "--steps": self.steps,
                "--guidance": self.guidance,
                "--solver": self.solver,
                "--grid": self.grid,
                "--arg": self.arguments or None,
                "--seed": self.seed,
            }
            if wrong := [name for name, value in given.items() if value is not None]:
                raise ValueError(
                    f"{', '.join(wrong)} say how a model is sampled, and {self.source} holds images; leave them out"
                )
            return {"source": images(self.source, channels=self.channels, size=self.size, alpha=self.alpha), **shared}
        if (self.channels, self.size, self.alpha) != (3, None, "refuse"):
            raise ValueError(
                f"--channels, --size and --alpha are for image files, and {self.source} is a model; leave them out"
            )
        options = Options(
            model=self.source, output=Path(), prompts_file=self.prompts, labels=self.labels, seed=self.seed or 0,
            batch_size=self.batch_size, scheduler=self.scheduler, solver=self.solver, grid=self.grid, steps=self.steps,
            guidance=self.guidance, arguments=self.arguments, dtype=self.dtype, device=self.device,
        )  # fmt: skip
        console = Console(stderr=True, quiet=not state.is_main_process)
        if state.num_processes > 1:  # one downloads, the others find it there
            agreed(state, lambda: loading.find(self.source) if state.is_main_process else None)
        pipe, request, _, _ = agreed(state, lambda: open_model(options, state.device, console))
        inputs = request.inputs() if request.rows != [{}] else None
        return {"source": pipe, "seed": self.seed or 0, "inputs": inputs, "call": request.call, **shared}


def evaluate(
    sampling: Sampling,
    reference: str | None,
    metrics: Sequence[str],
    extractor: str | None,
    output: Path | None,
    record: Path | None,
) -> None:
    """Carries out ``flowkit fid SOURCE``."""
    state = join(sampling.device)
    with _one_voice(state):
        for path in (output, record):
            if path is not None:
                check_writable(path if path is output else path.parent)
        arguments = sampling.open(state)
        source = arguments.pop("source")
        extractors: list[Extractor] | None = None if extractor is None else list(extractor.split(","))
        result = evaluation.evaluate(
            source, _reference(reference, sampling), metrics=[m.strip() for m in metrics], extractor=extractors, output=output,
            **arguments,
        )  # fmt: skip
        if not state.is_main_process:
            return
        result.spec["command"] = shlex.join(["flowkit", *sys.argv[1:]])
        if output is not None:
            result.save(output / runs.RESULT)
        if record is not None:
            result.save(record)
        for key in result:
            typer.echo(_line(key, result.figure(key)))
        places = [str(p) for p in (output and output / runs.RESULT, record) if p is not None]
        count, wall = result.spec["samples"]["count"], result.spec["wall_seconds"]
        typer.echo(f"{count:,} images in {wall:.1f} s" + (f"; record: {' and '.join(places)}" if places else ""))


def stats(sampling: Sampling, extractor: str | None, like: str | None, output: Path) -> None:
    """Carries out ``flowkit fid stats``."""
    state = join(sampling.device)
    with _one_voice(state):
        if output.suffix not in (".safetensors", ".npz"):
            raise ValueError(f"--output {output} must end with .safetensors or .npz; rename it")
        check_writable(output.parent)
        made = evaluation.make_statistics(extractor=extractor, like=like, **sampling.open(state))
        if state.is_main_process:
            (made.to_npz if output.suffix == ".npz" else made.save)(output)
            name = (made.identity or {})["name"]
            typer.echo(f"statistics of {made.count:,} images, {made.dim:,} features of {name}: {output}")


def weights(file: Path, output: Path | None) -> None:
    """Carries out ``flowkit fid weights``."""
    target = (output or weight_files.weight_folders()[0]) / f"{file.stem}.safetensors"
    check_writable(target.parent)
    digest = weight_files.convert_weights(file, target)
    typer.echo(f"{target} (weights {digest[:16]}...)")


def compare(one: Path, other: Path, level: float) -> None:
    """Carries out ``flowkit fid compare``."""
    for key, figure in evaluation.compare(one, other, level).items():
        typer.echo(f"{_line(key, figure)}, {_interval(figure)}")


def summarize(results: Sequence[Path], level: float) -> None:
    """Carries out ``flowkit fid summarize``."""
    for key, figure in evaluation.summarize(results, level).items():
        details = figure.details
        typer.echo(
            f"{_line(key, figure)}, {_interval(figure)}, spread {details['spread']:.3g}, smallest {details['smallest']:.5g}"
        )


def _line(key: str, figure: Figure) -> str:
    return f"{key} {figure.value:.5g}" + (f" ± {figure.se:.2g}" if figure.se == figure.se else "")


def _interval(figure: Figure) -> str:
    low, high = figure.details["interval"]
    return f"{100 * figure.details['level']:g} % from {low:.5g} to {high:.5g}"


def _reference(reference: str | None, sampling: Sampling) -> Any:  # noqa: ANN401
    """Images of the reference are read as those of the source are."""
    if (
        reference is not None
        and not sampling.is_model()
        and (Path(reference).is_dir() or Path(reference).suffix in (".zip", ".tar"))
    ):
        return images(reference, channels=sampling.channels, size=sampling.size, alpha=sampling.alpha)
    return reference


@contextmanager
def _one_voice(state: PartialState) -> Iterator[None]:
    """Lets the main process alone say what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {message}", err=True)
            yield
    except (*USER_ERRORS, PeerError) as error:
        if not state.is_main_process:
            raise typer.Exit(2) from None
        if isinstance(error, PeerError):
            raise ValueError(str(error)) from error
        raise
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()

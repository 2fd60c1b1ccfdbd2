"""``flowkit.attach``: guidance, gradients, recorders and correctors for a pipeline, from outside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from flowkit.hooks import layout
from flowkit.hooks.engine import Engine, engine_of
from flowkit.hooks.parts import Guidance, Part
from flowkit.hooks.report import Report, plot, report
from flowkit.hooks.steps import Step


def attach(pipe: Any, *parts: Part) -> Attachment:  # noqa: ANN401
    """Attaches parts to a pipeline, until `Attachment.detach` or the end of a ``with``.

    The pipeline is called as before. Guidance needs it to ask for an unconditional output, so its own guidance scale must be above
    1; *selecting* methods leave that scale in charge, *combining* ones have their own, and any value above 1 will do.

    Args:
        pipe: a diffusers pipeline, modular ones too.
        *parts: at most one `Guidance`, and any number of others. None leave the pipeline as it is, to the bit.

    Returns:
        What was attached, with its report; a context manager.

    Raises:
        TypeError: for what is not a part, or a pipeline without scheduler.
        ValueError: for a pipeline without a network that is called at every step, a second guidance method, a part that is
            attached already, or networks or a scheduler that are attached to through another pipeline; and while the pipeline
            runs, for one that this cannot be done to, which is left as it was.
    """
    for part in parts:
        if not isinstance(part, Part):
            raise TypeError(
                f"attach takes guidance, recorders and the like, got {part!r:.80}; pass e.g. flowkit.AdaptiveGuidance()"
            )
    name = type(pipe).__name__
    networks = layout.networks(pipe)
    if not networks:
        raise ValueError(f"{name} has no network that is called at every step, none of {', '.join(layout.DENOISERS)}; attach to "
                         "the pipeline that denoises")  # fmt: skip
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise TypeError(f"{name} has no scheduler to attach to; pass a diffusers pipeline")
    engines = {engine for net in networks if (engine := engine_of(net)) is not None}
    if any(engine.pipe is not pipe for engine in engines):
        other = next(type(engine.pipe).__name__ for engine in engines if engine.pipe is not pipe)
        raise ValueError(f"the networks of {name} are attached to through {other}, which has them too; detach that")
    engine = engines.pop() if engines else Engine(pipe, networks)
    everything = (*engine.parts, *engine.late, *parts)
    if twice := [part for i, part in enumerate(everything) if any(part is other for other in everything[:i])]:
        raise ValueError(f"this {type(twice[0]).__name__} is attached already; make another one")
    methods = [part for part in everything if isinstance(part, Guidance)]
    if len(methods) > 1:
        both = " and ".join(type(method).__name__ for method in methods)
        raise ValueError(f"{both} would each combine the network's outputs; attach one of them")
    return Attachment(engine, parts)


def attached_to(pipe: Any) -> list[Part]:  # noqa: ANN401
    """Returns the parts that are attached to a pipeline."""
    engines = {engine for net in layout.networks(pipe) if (engine := engine_of(net)) is not None}
    return [part for engine in engines if engine.pipe is pipe for part in engine.parts]


class Attachment:
    """What `attach` returns.

    Attributes:
        parts: what was attached.
        steps: one `flowkit.hooks.steps.Step` an evaluation of the latest call of the pipeline.
        rows: network rows run since `attach`.
        asked: network rows that the pipeline asked for since then.
    """

    def __init__(self, engine: Engine, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.steps: list[Step] = []
        self.rows = self.asked = 0
        self._engine: Engine | None = engine
        if not engine.installed:
            engine.install()
        engine.add(parts)
        engine.on_step.append(self._noted)
        engine.attached.append(self)

    def _noted(self, step: Step) -> None:
        if step.evaluation.step == 0:
            self.steps = []
        self.steps.append(step.without_tensors())
        self.rows, self.asked = self.rows + step.rows, self.asked + step.asked

    def detach(self) -> None:
        """Takes the parts away again and leaves no trace; a second time does nothing.

        Raises:
            ValueError: where the last result holds NaN or infinity.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        engine.drop(self.parts)
        engine.on_step.remove(self._noted)
        engine.attached.remove(self)
        last = engine.last
        if not engine.attached:
            engine.remove()
        if last is not None and not bool(torch.isfinite(last).all()):
            raise ValueError("the last sample holds NaN or infinity; a scheduler made with debug=True names the step")

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._engine is not None:
            self._engine.last = None  # the error that is under way is the one to see
        self.detach()

    def report(self) -> Report:
        """Returns, as a table, what was run in each step of the latest call: level, network rows, figures of the method."""
        return report(self.steps, self.rows, self.asked)

    def plot(self, file: str | os.PathLike[str] | None = None) -> Any:  # noqa: ANN401
        """Draws the same.

        Args:
            file: where to save the picture, its folder is made if missing; its ending says the format. None: nowhere.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: before the pipeline was called, or for an ending of no picture.
            ImportError: without matplotlib.
        """
        return plot(self.steps, file)

    @property
    def saved(self) -> float:
        """Share of the network rows asked for that were not run; below 0 where a second network runs rows of its own."""
        return 1.0 - self.rows / self.asked if self.asked else 0.0

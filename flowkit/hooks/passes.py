"""Guidance at the network: which rows are run, and what the pipeline sees in their place.

Guidance is made the identity in the pipeline: where a method combines, both halves hold the finished prediction D, and
``u + w (c - u) = D`` for any w, since c = u = D. Rows that it does not need are not run, and stand for their sample's other ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowkit.hooks import layout
from flowkit.hooks.arguments import Arguments, take
from flowkit.hooks.standins import NetworkCall
from flowkit.hooks.steps import Step

if TYPE_CHECKING:
    from flowkit.hooks.engine import Engine


def batched(engine: Engine, call: NetworkCall, given: Arguments, step: Step, where: dict[str, list[int]]) -> Any:  # noqa: ANN401
    """One call for conditional, unconditional and perhaps other rows.

    Args:
        engine: the hooks.
        call: the network's.
        given: the arguments for all rows.
        step: the new step, with its plan.
        where: the rows of each role, in the batch's order.

    Returns:
        What the network is to return.
    """
    guidance, size, plan = engine.guidance, step.size, step.plan
    step.extra = not where.keys() <= {"cond", "uncond"}
    apart = guidance.second if guidance is not None else None  # a second network takes the other rows
    whole = "perturbed" in where  # its attention splits the batch into equal parts itself
    needed = list(plan) if isinstance(plan, list) else [plan != "cond" and not apart] * size
    kept = {role: rows if whole or role == "cond" else [row for row, use in zip(rows, needed, strict=True) if use]
            for role, rows in where.items()}  # fmt: skip
    if plan == "uncond" and not whole and not apart:
        kept = {role: rows if role == "uncond" else [] for role, rows in where.items()}
    run = [row for rows in kept.values() for row in rows]
    everything = len(run) == step.asked
    output = engine.run(call, given if everything else given.cut(step.asked, run))
    step.rows += len(run)

    # Where the rows that the pipeline asked for are among those that were run; others stand in for the ones that were not.
    place = {row: at for at, row in enumerate(run)}
    spare = kept["cond"] or kept["uncond"]
    index = {
        role: [place[row] if row in place else place[spare[k]] for k, row in enumerate(rows)]
        for role, rows in where.items()
    }
    value, variance = layout.split(layout.read(output), step.evaluation.x)
    halves = {role: take(value, at) for role, at in index.items()}
    cond, uncond = halves["cond"], halves.get("uncond")
    engine.fit(step, cond)
    if apart and plan != "cond":
        halves["uncond"] = uncond = second(engine, call, step, apart)
    step.cond = cond.detach() if kept["cond"] else None
    step.uncond = uncond.detach() if uncond is not None and plan != "cond" and not isinstance(plan, list) else None
    edited(engine, step, cond)
    cond, uncond = cond.detach(), None if uncond is None else uncond.detach()
    new_cond, new_uncond = combined(engine, step, cond, uncond if plan != "cond" else None)
    step.seen = new_cond, new_uncond
    if (
        everything
        and new_cond is cond
        and new_uncond is (cond if uncond is None else uncond)
        and not value.requires_grad
    ):
        return output
    step.shift = (new_cond - cond).detach()
    new = {"cond": new_cond, "uncond": new_uncond}
    if "perturbed" in where:  # keeps its own term, the difference to the conditional output
        new["perturbed"] = halves["perturbed"] + step.shift
    if "image" in where:
        natural = halves["image"] if step.edit is None else halves["image"] + step.edit
        cut = torch.tensor([not use for use in needed], device=natural.device).view(-1, *[1] * (natural.ndim - 1))
        new["image"] = new_cond if guidance is not None and guidance.combines else torch.where(cut, new_cond, natural)
    joined = torch.cat([new[role] for role in where]).detach()
    rows = [at for places in index.values() for at in places]
    if variance is not None:
        joined = torch.cat([joined, take(variance, rows).detach()], 1)
    return layout.write(output, joined, rows)


def first(engine: Engine, call: NetworkCall, given: Arguments, step: Step) -> Any:  # noqa: ANN401
    """The conditional call of two, or the only one.

    Args:
        engine: the hooks.
        call: the network's.
        given: its arguments.
        step: the new step, with its plan.

    Returns:
        What the network is to return; `following` writes into its memory.
    """
    guidance = engine.guidance
    output = engine.run(call, given)
    step.rows += step.asked
    value = layout.read(output)
    if value.requires_grad:
        step.first = layout.write(output, value.detach())
        shown = layout.split(value.detach(), step.evaluation.x)[0]
    else:
        step.first, shown = output, layout.split(value, step.evaluation.x)[0]
    cond = layout.split(value, step.evaluation.x)[0]
    engine.fit(step, cond)
    step.cond = shown.clone()  # what is shown is written over
    edited(engine, step, cond)
    new_cond = step.cond if step.edit is None else step.cond + step.edit
    if guidance is not None and (step.plan == "cond" or guidance.second == "cond"):
        uncond = second(engine, call, step, "cond") if step.plan != "cond" else None
        new_cond, step.finished = combined(engine, step, step.cond, uncond)
    show(step, shown, new_cond)
    return step.first


def following(engine: Engine, call: NetworkCall, given: Arguments, step: Step) -> Any:  # noqa: ANN401
    """The unconditional call of two, or a further one, such as with layers left out.

    Args:
        engine: the hooks.
        call: the network's.
        given: its arguments.
        step: the current step.

    Returns:
        What the network is to return.
    """
    if not _same_time(step.time, given.time):
        raise engine.refuse(f"the network was called at another time before the scheduler of {type(engine.pipe).__name__} stepped, "
                            "so another pipeline or loop runs it: detach first, or attach to that")  # fmt: skip
    rows = len(given.latents)
    step.passes, step.asked = step.passes + 1, step.asked + rows
    if step.passes > 2 or step.first is None or engine.context not in (None, "uncond") or rows != step.size:
        output = engine.run(call, given)
        step.rows, step.extra = step.rows + rows, True
        value, shift = layout.read(output).detach(), step.shift
        # It keeps its own term, the difference to the conditional output.
        return output if shift is None or shift.shape != value.shape else layout.write(output, value + shift)
    step.calls["uncond"], engine.guided = given, True
    shown, natural = step.seen[0] if step.seen else None, step.cond
    assert shown is not None
    assert natural is not None
    if step.finished is not None:
        step.seen = shown, step.finished
        return layout.write(step.first, _within(step, step.finished))
    guidance = engine.guidance
    if guidance is not None and guidance.second == "uncond":
        uncond, output = second(engine, call, step, "uncond"), step.first
    elif isinstance(step.plan, list):
        picked = [i for i, use in enumerate(step.plan) if use]
        found = layout.split(layout.read(engine.run(call, given.cut(rows, picked))), step.evaluation.x)[0]
        step.rows += len(picked)
        uncond, output = natural.clone(), step.first
        uncond[torch.as_tensor(picked, device=uncond.device)] = found.detach()
    else:
        output = engine.run(call, given)
        step.rows += rows
        uncond = layout.split(layout.read(output).detach(), step.evaluation.x)[0]
        step.uncond = uncond.clone() if step.edit is not None else uncond
    new_cond, new_uncond = combined(engine, step, natural, uncond)
    if new_cond is not natural:
        show(step, shown, new_cond)
    step.seen = shown, new_uncond
    return output if new_uncond is step.uncond else layout.write(output, _within(step, new_uncond, output))


def second(engine: Engine, call: NetworkCall, step: Step, role: str) -> Tensor:
    """Returns the output of a method's own network.

    Args:
        engine: the hooks.
        call: the pipeline's network.
        step: the current step.
        role: whose arguments it is given, "cond" or "uncond".
    """
    guidance = engine.guidance
    assert guidance is not None
    if role not in step.calls:
        raise engine.refuse(f"{type(guidance).__name__} wants the rows of the negative prompt, and this call of "
                            f"{type(engine.pipe).__name__} has none; pass a guidance_scale above 1")  # fmt: skip
    given = step.calls[role]
    output = engine.ask(guidance.uncond, call.network, *given.args, **given.kwargs)
    step.rows += step.size
    return layout.split(layout.read(output).detach(), step.evaluation.x)[0]


def edited(engine: Engine, step: Step, cond: Tensor) -> None:
    """Asks the parts for their changes."""
    asked = (engine.ask(part.edit, step.evaluation, cond) for part in engine.parts)
    changes = [change for change in asked if change is not None]
    if changes:
        step.edit = torch.stack([change.detach().to(cond.dtype) for change in changes]).sum(0)
    if step.evaluation.x.requires_grad:  # what follows needs no gradient
        step.evaluation = replace(step.evaluation, x=step.evaluation.x.detach())


def combined(engine: Engine, step: Step, cond: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the two halves that the pipeline is to see: the very tensors where nothing changes."""
    guidance = engine.guidance
    new_cond, new_uncond = cond, cond if uncond is None else uncond
    if guidance is not None:
        state = {**engine.state, "evaluation": step.evaluation}
        result, after = engine.ask(guidance.combine, cond, uncond, step.evaluation.step, step.sigma, state)
        new_cond, new_uncond = (result, result) if guidance.combines else result
        if new_cond.shape != cond.shape or new_uncond.shape != cond.shape:
            raise engine.refuse(f"{type(guidance).__name__}.combine returned shape {tuple(new_cond.shape)} for outputs of "
                                f"{tuple(cond.shape)}; return the same shape")  # fmt: skip
        engine.state = {key: value for key, value in after.items() if key not in ("evaluation", "report")}
        step.report = dict(after.get("report", {}))
    if step.edit is not None:
        new_cond, new_uncond = new_cond + step.edit, new_uncond + step.edit
    return new_cond.to(cond.dtype), new_uncond.to(cond.dtype)


def show(step: Step, shown: Tensor, new: Tensor) -> None:
    """Writes a conditional output into the memory that the pipeline was given."""
    natural = step.cond
    assert natural is not None
    step.seen = shown, None
    if new is not natural:
        step.shift = (new - natural).detach()
        shown.copy_(new)


def _same_time(a: Any, b: Any) -> bool:  # noqa: ANN401
    # Mostly the very tensor. Frames that are given have time 0, and calls for other rows another length.
    if a is b or a is None or b is None:
        return a is b
    first, second = (torch.as_tensor(time).detach().abs().max().double().cpu() for time in (a, b))
    return bool(first == second)


def _within(step: Step, value: Tensor, output: Any = None) -> Tensor:  # noqa: ANN401
    """A prediction with the learned variance of what the network returned beside it."""
    variance = layout.split(layout.read(step.first if output is None else output), step.evaluation.x)[1]
    return value if variance is None else torch.cat([value, variance.detach()], 1)

"""The two hook points of a pipeline, a network's call and ``scheduler.step``, and the run that it is in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowkit.hooks import layout, passes
from flowkit.hooks.arguments import Arguments, take
from flowkit.hooks.levels import Clock, clock, position
from flowkit.hooks.parts import Evaluation, Guidance, Level, Part
from flowkit.hooks.selftest import learned
from flowkit.hooks.standins import Method, Named, NetworkCall
from flowkit.hooks.steps import Step

_STEPPED = ("model_output", "timestep", "sample")  # what ``scheduler.step`` must take


class Engine:
    """What is hooked into one pipeline.

    Attributes:
        pipe: the pipeline.
        networks: those of its networks that it calls at every step, or takes turns with.
        parts: what is attached.
        late: what was attached in the middle of a run, and waits for the next.
        attached: the attachments that these belong to.
        on_step: called with every finished step.
        last: the last sample.
        sign: -1 where the pipeline negates the network's output, otherwise 1.
        clock: timesteps and levels of the run; None before its first call, as are the following.
        state: the guidance method's.
        step: the current step; None between steps.
        guided: whether the pipeline asked for an unconditional output in this run.
        context: the name that the pipeline gives to its current call.
    """

    def __init__(self, pipe: Any, networks: Sequence[torch.nn.Module]) -> None:  # noqa: ANN401
        self.pipe, self.networks = pipe, list(networks)
        self.parts: list[Part] = []
        self.late: list[Part] = []
        self.attached: list[Any] = []
        self.on_step: list[Callable[[Step], None]] = []
        self.last: Tensor | None = None
        self.sign = layout.sign(pipe)
        self.context: str | None = None
        self._calls: list[NetworkCall] = []
        self._methods: list[Method] = []
        self._scheduler: Any = None
        self._busy = False
        self._fresh()

    def _fresh(self) -> None:
        """Before the first call of a run."""
        self.parts, self.late = [*self.parts, *self.late], []
        self.clock: Clock | None = None
        self.state: dict[str, Any] = {}
        self.step: Step | None = None
        self.guided = self._checked = False
        self._count = self._index = self._first = 0
        self._roles: tuple[Any, layout.Roles] = (None, ())

    @property
    def guidance(self) -> Guidance | None:
        """The guidance method among the parts."""
        return next((part for part in self.parts if isinstance(part, Guidance)), None)

    @property
    def _through(self) -> bool:
        """Whether a part takes a gradient through the network."""
        return any(part.through_network for part in self.parts)

    @staticmethod
    def _scale(level: Level | None) -> float:
        """What the path's coordinates are multiplied by for the network."""
        return 1.0 if level is None or level.path.name != "edm" else level.path.input_scale(level.s)

    @property
    def installed(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._calls)

    def install(self) -> None:
        """Hooks scheduler and networks.

        Raises:
            TypeError: for a scheduler that is not stepped with a model output, a timestep and a sample.
            ValueError: for one that another pipeline is attached to through.
        """
        self._follow()
        for network in self.networks:
            self._calls.append(NetworkCall(network, self.called))
            if hasattr(network, "cache_context"):
                self._methods.append(Method(network, "cache_context", self._named))

    def remove(self) -> None:
        """Takes everything out again."""
        hooks: list[NetworkCall | Method] = [*self._calls, *reversed(self._methods)]
        for hook in hooks:
            hook.remove()
        self._calls, self._methods, self._scheduler = [], [], None
        self._fresh()

    def add(self, parts: Sequence[Part]) -> None:
        """Attaches parts, in the middle of a run from the next one on."""
        (self.parts if self.clock is None else self.late).extend(parts)

    def drop(self, parts: Sequence[Part]) -> None:
        """Takes parts away."""
        for kept in (self.parts, self.late):
            kept[:] = [part for part in kept if not any(part is own for own in parts)]
        for part in parts:
            part.end()

    def _follow(self) -> None:
        """Hooks the pipeline's scheduler, which may have been swapped since."""
        scheduler = self.pipe.scheduler
        if scheduler is self._scheduler:
            return
        names, kind = list(inspect.signature(scheduler.step).parameters), type(scheduler).__name__
        if missing := [name for name in _STEPPED if name not in names]:
            raise TypeError(f"{kind}.step takes no {missing[0]}, so it cannot be attached to; use another scheduler")
        if isinstance(vars(scheduler).get("step"), Method):
            raise ValueError(f"the {kind} of {type(self.pipe).__name__} is attached to through another pipeline; detach that, or "
                             "give each pipeline a scheduler of its own")  # fmt: skip
        for method in [method for method in self._methods if method.owner is self._scheduler]:
            method.remove()
            self._methods.remove(method)
        self._places = [(name, names.index(name)) for name in _STEPPED]
        self._methods += [Method(scheduler, "set_timesteps", self._started), Method(scheduler, "step", self.stepped)]
        self._scheduler = scheduler
        self._fresh()

    def _named(self, inner: Callable[..., Any], name: str, **kwargs: Any) -> Named:  # noqa: ANN401
        def tell(name: str | None) -> None:
            self.context = name

        return Named(inner(name, **kwargs), name.removeprefix("pred_"), tell)  # guiders say "pred_cond"

    def _started(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if layout.networks(self.pipe) != self.networks:
            raise self.refuse(f"a network of {type(self.pipe).__name__} was replaced or compiled since it was attached to; attach "
                              "again")  # fmt: skip
        result = inner(*args, **kwargs)
        self._fresh()
        return result

    def refuse(self, reason: str) -> ValueError:
        """Leaves the pipeline as it was, and returns the error to raise."""
        self._leave()
        return ValueError(reason)

    def ask(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Calls a method of a part; where it refuses what it is given, the pipeline is left as it was."""
        try:
            return method(*args, **kwargs)
        except (TypeError, ValueError):
            self._leave()
            raise

    def _leave(self) -> None:
        self.last = None
        for attachment in list(self.attached):
            attachment.detach()

    def called(self, call: NetworkCall, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs a call of a network for the rows that are needed, and returns what the pipeline is to see."""
        if self._busy or not self.parts:
            return call.run(*args, **kwargs)
        self._busy = True
        try:
            self._follow()
            given = Arguments(args, kwargs, _parameters(call.network))
            if self.step is not None:
                return passes.following(self, call, given, self.step)
            with torch.set_grad_enabled(torch.is_grad_enabled() or self._through):
                return self._evaluated(call, given)
        finally:
            self._busy = False

    def _evaluated(self, call: NetworkCall, given: Arguments) -> Any:  # noqa: ANN401
        """The first call of a step."""
        latents, roles = given.latents, self._roles_of(given.latents)
        rows = len(latents)
        if self.clock is None:
            self._begin(given)
        size = rows // len(roles)
        where = {role: list(range(k * size, (k + 1) * size)) for k, role in enumerate(roles)}
        calls = {
            role: given.cut(rows, where[role]) if len(roles) > 1 else given
            for role in roles
            if role in ("cond", "uncond")
        }
        x = (
            take(latents, where["cond"])
            if isinstance(latents, Tensor)
            else torch.stack([latents[i] for i in where["cond"]])
        )
        if self._through and not isinstance(latents, Tensor):
            raise self.refuse(f"{type(self.pipe).__name__} gives its network a list of samples, through which no gradient is "
                              "taken; use through_network=False")  # fmt: skip
        self.step = step = self._new_step(x, calls, call.network, given.time, rows)
        if self._through:  # the sample that parts are told of is the one that the network is given
            x = step.evaluation.x * self._scale(step.evaluation.level)
            others = {role: take(latents, own) for role, own in where.items() if role != "cond"}
            given = given.replaced(torch.cat([x if role == "cond" else others[role] for role in roles]))
        step.plan = self._plan(step)
        if len(roles) == 1:
            return passes.first(self, call, given, step)
        self.guided |= "uncond" in roles
        return passes.batched(self, call, given, step, where)

    def _begin(self, given: Arguments) -> None:
        self.clock = clock(self.pipe.scheduler)
        begin = getattr(self.pipe.scheduler, "begin_index", None)
        known = begin is not None or given.time is None
        self._index = self._first = (begin or 0) if known else position(self.clock, given.time, 0)
        for part in self.parts:
            self.ask(part.begin, self)

    def _roles_of(self, latents: Any) -> layout.Roles:  # noqa: ANN401
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        key = (len(latents), latents[0].shape, self.context, guided)
        if self._roles[0] != key:  # comparing the halves once a run is enough
            self._roles = key, layout.roles(self.pipe, latents, self.context)
        return self._roles[1]

    def _new_step(self, x: Tensor, calls: dict[str, Arguments], network: Any, time: Any, asked: int) -> Step:  # noqa: ANN401
        now = self.clock
        assert now is not None
        level = now.level(self._index, self.sign)
        x = x.detach() if self._scale(level) == 1 else x.detach() / self._scale(level)
        evaluation = Evaluation(
            x=x.requires_grad_(self._through),
            level=level,
            step=self._count,
            steps=len(now.timesteps) - self._first,
            conditioning=calls["cond"].named(),
        )
        return Step(evaluation, now.sigma(self._index), network, time, calls, asked=asked, passes=1)

    def _plan(self, step: Step) -> str | list[bool]:
        guidance = self.guidance
        if guidance is None:
            return "both"
        plan = self.ask(guidance.plan, self._count, step.sigma, {**self.state, "evaluation": step.evaluation})
        if isinstance(plan, str) and plan in ("both", "cond", "uncond"):
            return plan
        if not isinstance(plan, Tensor) or plan.shape != (step.size,):
            raise self.refuse(f"{type(guidance).__name__}.plan returned {plan!r:.80} for {step.size} samples; return 'both', "
                              "'cond', 'uncond', or a bool tensor of one entry a sample")  # fmt: skip
        needed = [bool(use) for use in plan.tolist()]
        return "both" if all(needed) else needed if any(needed) else "cond"

    def run(self, call: NetworkCall, given: Arguments) -> Any:  # noqa: ANN401
        """Runs a network as it was before."""
        return call.run(*given.args, **given.kwargs)

    def fit(self, step: Step, cond: Tensor) -> None:
        """Brings the noisy sample of a step to the shape of the network's output."""
        x, level = layout.first_like(step.evaluation.x, cond.shape), step.evaluation.level
        if x is None:
            x, level = step.evaluation.x, None
        if self._through and x is not step.evaluation.x:
            raise self.refuse(f"{type(self.pipe).__name__} gives its network images beside the sample, through which no gradient "
                              "is taken; use through_network=False")  # fmt: skip
        step.evaluation = replace(step.evaluation, x=x, level=level)

    def stepped(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Ends a step."""
        if self._busy or not self.parts:
            return inner(*args, **kwargs)
        output, time, sample = (kwargs[name] if name in kwargs else args[place] for name, place in self._places)
        step = self.step
        if step is None and not self._count:
            raise self.refuse(f"{type(self.pipe).__name__} came to scheduler.step without a call of the network that was attached "
                              "to; attach again if that was compiled since")  # fmt: skip
        if step is not None and not self._checked:
            self._check(step, output, sample)
        for part in self.parts:
            self.ask(part.before_step, self, output, time, sample)
        result = inner(*args, **kwargs)
        self.last = result[0] if isinstance(result, tuple) else result.prev_sample
        for part in self.parts:
            moved = self.ask(part.after_step, self, self.last)
            if moved is not None:
                self.last = moved
                result = _moved(result, moved)
        if step is not None:
            for tell in self.on_step:
                tell(step)
            self._count, self._index, self.step = self._count + 1, self._index + 1, None
        return result

    def _check(self, step: Step, output: Tensor, sample: Tensor) -> None:
        """On the first step of a run, whether the pipeline does with the halves what is thought; refuses where not."""
        self._checked, name = True, type(self.pipe).__name__
        needing = [type(part).__name__ for part in self.parts if part.needs_guidance]
        if needing and not self.guided:
            embedded = step.evaluation.conditioning.get("guidance") is not None
            built_in = " (its network has guidance built in, with the scale as an input)" if embedded else ""
            raise self.refuse(f"{needing[0]} needs classifier-free guidance, which is off in this call of {name}{built_in}: pass a "
                              "guidance_scale, or a true_cfg_scale and a negative prompt, above 1")  # fmt: skip
        if len(sample) != step.size and not layout.doubled(self.pipe, step.calls.get("uncond")):
            raise self.refuse(f"the network was called for {step.asked} rows, taken to be {step.size} samples, but {name} steps "
                              f"{len(sample)}: give each sample noise of its own, so that a guided batch can be told")  # fmt: skip
        if step.extra:
            return
        assert step.seen is not None
        if not bool(torch.isfinite(output).all()):
            if all(bool(torch.isfinite(half).all()) for half in step.seen if half is not None):
                raise self.refuse(f"{name} makes NaN or infinity of finite predictions, so it may divide by their norms, which "
                                  "ZeroStarGuidance sets to 0: pass zero_init=0")  # fmt: skip
            return  # `Attachment.detach` says so
        use = learned(output, *step.seen)
        if use is None:
            raise self.refuse(f"{name} changes the network's prediction before scheduler.step in a way that is not known, and so "
                              "would change what is done to it from outside")  # fmt: skip
        if use.scale is not None and use.scale < 0:
            raise self.refuse(f"{name} seems to have conditional rows where unconditional ones are expected: its output is "
                              f"u + w (c - u) with w = {use.scale:.3g}")  # fmt: skip
        if use.sign not in (None, self.sign):
            layout.learn(self.pipe, use.sign)
            raise self.refuse(
                f"{name} negates the network's output, which was not known; now it is: attach and call it again"
            )


def engine_of(network: torch.nn.Module) -> Engine | None:
    """Returns what is hooked into a network, or None."""
    call = vars(network).get(NetworkCall.SLOT)
    return getattr(call.call, "__self__", None) if isinstance(call, NetworkCall) else None


def _moved(result: Any, sample: Tensor) -> Any:  # noqa: ANN401
    """What ``scheduler.step`` returned, with another sample."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def _parameters(network: torch.nn.Module) -> tuple[str, ...]:
    """Names of a network's arguments, in order."""
    kind: Any = type(getattr(network, "_orig_mod", network))
    return _names(kind.forward)


@functools.lru_cache(maxsize=64)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]

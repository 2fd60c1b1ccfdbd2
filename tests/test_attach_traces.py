"""Attach beside what else is done to a pipeline: no trace is left, several compose; copies, LoRA, compilers, offload go on."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import Tensor

from flowkit import RectifiedFlowScheduler
from flowkit.hooks import Attachment, Part, Recorder, attach
from flowkit.hooks.layout import networks

from .families import built, stock_of
from .guided import Cut, Fixed, Idle, counted, reference, scaled, trace
from .tiny import PIPELINES, build, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

STEPS = 4
HOW = ("sd15", "flux")  # one call for both halves, and two calls


def _own(family: str) -> Any:
    """A pipeline whose networks nobody else has."""
    pipe = build(family, stock_of(family))
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    run(pipe, STEPS)
    return pipe


@contextmanager
def _failing(pipe: Any, call: int, error: type[BaseException]) -> Iterator[None]:
    """The network raises at its n-th call."""
    left = [call]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    handle = networks(pipe)[0].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


# Traces.


@pytest.mark.parametrize("family", HOW)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_error_in_the_middle_of_a_call(family: str, error: type[BaseException], call: int) -> None:
    """Also between the two calls of a step: the next call of the pipeline begins anew, attached or not."""
    pipe = _own(family)
    before, plain, strong = trace(pipe), reference(family), reference(family, 7.0)
    with pytest.raises(error), attach(pipe, Fixed(7.0), Recorder()), _failing(pipe, call, error):
        run(pipe, STEPS)
    assert trace(pipe) == before
    assert torch.equal(run(pipe, STEPS), plain)
    attached = attach(pipe, Fixed(7.0), recorder := Recorder())
    with pytest.raises(error), _failing(pipe, call, error):
        run(pipe, STEPS)
    assert torch.equal(run(pipe, STEPS), strong)
    assert [step.evaluation.step for step in attached.steps] == list(range(STEPS))
    assert len(recorder.trajectories[-1].outputs) == STEPS
    attached.detach()
    assert trace(pipe) == before
    assert torch.equal(run(pipe, STEPS), plain)


@pytest.mark.parametrize("family", HOW)
def test_an_error_in_a_method(family: str) -> None:
    class Failing(Fixed):
        def combine(self, cond: Tensor, uncond: Tensor | None, step: int, sigma: float, state: Any) -> tuple[Any, Any]:
            if step == 2:
                raise RuntimeError("mine")
            return super().combine(cond, uncond, step, sigma, state)

    pipe = _own(family)
    before = trace(pipe)
    with pytest.raises(RuntimeError, match=r"^mine$"), attach(pipe, Failing(3.0)):
        run(pipe, STEPS)
    assert trace(pipe) == before
    assert torch.equal(run(pipe, STEPS), reference(family))


def test_detaching_in_the_middle_of_a_call() -> None:
    pipe = _own("sd15")
    before, attached = trace(pipe), attach(pipe, Cut(0))

    def end(pipe: Any, step: int, time: Any, values: Any) -> Any:
        if step == 1:
            attached.detach()
        return values

    with counted(pipe) as rows:
        run(pipe, STEPS, callback_on_step_end=end)
    assert rows == [1, 1, 2, 2]
    assert trace(pipe) == before


def test_what_is_never_detached_is_not_kept_alive() -> None:
    pipe = _own("sd15")
    attach(pipe, Cut(0))
    run(pipe, STEPS)
    network = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert network() is None


@pytest.mark.parametrize("family", HOW)
def test_files_hold_nothing_of_what_is_attached(family: str) -> None:
    pipe = _own(family)
    things = [pipe.scheduler, *networks(pipe)]
    plain = [len(pickle.dumps(thing)) for thing in things]
    with attach(pipe, Cut(0)):
        contents = [pickle.dumps(thing) for thing in things]
    for content, size in zip(contents, plain, strict=True):
        assert len(content) < size + 500
        assert b"Engine" not in content
    scheduler = pickle.loads(contents[0])
    assert scheduler.step.__func__ is type(scheduler).step
    assert scheduler.step.__self__ is scheduler


@pytest.mark.parametrize("family", HOW)
@pytest.mark.parametrize("calls", [0, 1])
def test_another_pipeline_that_has_the_network(family: str, calls: int) -> None:
    """With a scheduler of its own, it would be guided by halves."""
    pipe, other = build(family, stock_of(family)), build(family, stock_of(family))
    plain, strong, before = reference(family), reference(family, 7.0), trace(pipe)
    attach(pipe, Fixed(7.0))
    for _ in range(calls):
        assert torch.equal(run(pipe, STEPS), strong)
    with pytest.raises(
        ValueError, match=r"another time before the scheduler of .* stepped, so another pipeline or loop runs"
    ):
        run(other, STEPS)
    assert trace(pipe) == before
    assert torch.equal(run(other, STEPS), plain)


def test_detaching_twice_does_nothing() -> None:
    pipe = _own("sd15")
    before, attached = trace(pipe), attach(pipe, Fixed(7.0))
    attached.detach()
    attached.detach()
    assert trace(pipe) == before


# Several.


@pytest.mark.parametrize("family", HOW)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_attachments(family: str, order: tuple[int, int]) -> None:
    pipe = _own(family)
    before, strong = trace(pipe), reference(family, 7.0)
    recorder = Recorder("output")
    with attach(pipe, Fixed(7.0), recorder):
        assert torch.equal(run(pipe, STEPS), strong)
    together = recorder.trajectories.pop()
    attached: list[Attachment] = [attach(pipe, Fixed(7.0)), attach(pipe, recorder)]
    assert torch.equal(run(pipe, STEPS), strong)
    assert attached[0].rows == attached[1].rows == 2 * STEPS
    assert all(torch.equal(a, b) for a, b in zip(recorder.trajectories[0].outputs, together.outputs, strict=True))
    first, second = order
    attached[first].detach()
    assert torch.equal(run(pipe, STEPS), reference(family) if first == 0 else strong)
    assert len(recorder.trajectories) == (2 if first == 0 else 1)
    attached[second].detach()
    assert trace(pipe) == before
    assert torch.equal(run(pipe, STEPS), reference(family))


def test_one_part_twice() -> None:
    pipe, recorder = _own("sd15"), Recorder()
    before = trace(pipe)
    with pytest.raises(ValueError, match="this Recorder is attached already; make another one"):
        attach(pipe, recorder, recorder)
    with attach(pipe, recorder):
        with pytest.raises(ValueError, match="this Recorder is attached already; make another one"):
            attach(pipe, Idle(), recorder)
        run(pipe, STEPS)
    assert len(recorder.trajectories) == 1
    assert trace(pipe) == before


def test_one_network_under_two_names() -> None:
    pipe = build("wan2.2", stock_of("wan2.2"))
    pipe.transformer_2 = pipe.transformer
    expected = run(pipe, STEPS)
    before = trace(pipe)
    with attach(pipe, Idle()) as attached:
        assert torch.equal(run(pipe, STEPS), expected)
    assert attached.rows == 2 * STEPS
    assert trace(pipe) == before


# Copies.


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_copies_of_a_scheduler_drive_their_own_steps(family: str) -> None:
    pipe = _own(family)
    pipe.scheduler = RectifiedFlowScheduler.from_config(pipe.scheduler, solver="euler")
    Watching.calls = 0
    with attach(pipe, Fixed(7.0), Watching()) as attached:
        run(pipe, STEPS)
        steps = len(attached.steps)
        others = [copy.deepcopy(pipe.scheduler), pipe.scheduler.fork()]
        x = torch.randn(1, 4, 8, 8)
        for other in others:
            other.set_timesteps(7)
            other.step(x, other.timesteps[0], x)
            assert other._step_index == 1
            assert len(pipe.scheduler.timesteps) == STEPS
        assert len(attached.steps) == steps == STEPS
        assert Watching.calls == STEPS


class Watching(Part):
    """Counts steps."""

    calls = 0

    def before_step(self, run: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:
        Watching.calls += 1


def test_copied_entries_of_a_scheduler() -> None:
    """Some pipelines put a scheduler's entries aside and back."""
    pipe = _own("sd15")
    before = trace(pipe)
    with attach(pipe, Fixed(7.0)):
        vars(pipe.scheduler).update(copy.deepcopy(vars(pipe.scheduler)))
        assert torch.equal(run(pipe, STEPS), reference("sd15", 7.0))
    assert trace(pipe) == before


@pytest.mark.parametrize("family", HOW)
def test_a_copy_of_a_network_is_not_attached_to(family: str) -> None:
    pipe = _own(family)
    plain = trace(pipe)
    with attach(pipe, Fixed(7.0)) as attached:
        network = copy.deepcopy(networks(pipe)[0])
        assert vars(network).get("_compiled_call_impl") is None
        other = build(family, stock_of(family))
        setattr(other, "unet" if family == "sd15" else "transformer", network)
        assert torch.equal(run(other, STEPS), reference(family))
        assert attached.rows == 0
        assert torch.equal(run(pipe, STEPS), reference(family, 7.0))
    assert trace(pipe) == plain


@pytest.mark.parametrize("family", HOW)
def test_swapping_the_scheduler_while_attached(family: str) -> None:
    pipe = _own(family)
    first = pipe.scheduler
    untouched = trace(pipe)
    other = built(family, "heun")
    expected = run(other, STEPS, **scaled(family, 7.0))
    with attach(pipe, Fixed(7.0)) as attached:
        run(pipe, STEPS)
        pipe.scheduler = other.scheduler
        assert torch.equal(run(pipe, STEPS), expected)
        assert len(attached.steps) == len(pipe.scheduler.timesteps) > STEPS
        assert not {"step", "set_timesteps"} & {*vars(first)}
    assert not {"step", "set_timesteps"} & {*vars(other.scheduler)}
    pipe.scheduler = first
    assert trace(pipe) == untouched


# LoRA, compilers.


def _lora(pipe: Any, family: str) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v"])
    network = networks(pipe)[0]
    network.add_adapter(config)  # type: ignore[operator]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weights in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=1.0)
    network.requires_grad_(False)


@pytest.mark.parametrize("family", HOW)
def test_lora(family: str) -> None:
    pipe = _own(family)
    with attach(pipe, Fixed(7.0)):
        _lora(pipe, family)
        after = run(pipe, STEPS)
    assert (after - reference(family, 7.0)).abs().max() > 1e-3
    expected = run(pipe, STEPS, **scaled(family, 7.0))
    assert torch.equal(after, expected)
    with attach(pipe, Fixed(7.0)):
        assert torch.equal(run(pipe, STEPS), expected)
        networks(pipe)[0].disable_adapters()  # type: ignore[operator]
        assert torch.equal(run(pipe, STEPS), reference(family, 7.0))


def test_weights_of_a_lora_while_attached() -> None:
    pipe, source = _own("sd15"), _own("sd15")
    _lora(source, "sd15")
    from peft.utils import get_peft_model_state_dict

    state = {f"unet.{name}": weights for name, weights in get_peft_model_state_dict(source.unet).items()}
    with attach(pipe, Fixed(7.0)):
        pipe.load_lora_weights(state, adapter_name="tiny")
        assert torch.equal(run(pipe, STEPS), run(source, STEPS, guidance_scale=7.0))
        pipe.unload_lora_weights()
        assert torch.equal(run(pipe, STEPS), reference("sd15", 7.0))


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.slow), "flux"])
@pytest.mark.parametrize("place", ["around", "within"])
def test_compiled_before(family: str, place: str) -> None:
    pipe = _own(family)
    name = "unet" if family == "sd15" else "transformer"
    network = getattr(pipe, name)
    if place == "around":
        setattr(pipe, name, torch.compile(network, backend="eager"))
    else:
        network.compile(backend="eager")
    plain = run(pipe, STEPS)
    before, impl = trace(pipe), vars(network).get("_compiled_call_impl")
    with attach(pipe, Fixed(7.0)) as attached, counted(pipe):
        assert torch.allclose(run(pipe, STEPS), reference(family, 7.0), rtol=0, atol=1e-5)
    assert attached.rows == 2 * STEPS
    with attach(pipe, Cut(0)) as attached:
        assert torch.allclose(run(pipe, STEPS), reference(family, 1.0), rtol=0, atol=1e-5)
    assert attached.rows == STEPS
    assert trace(pipe) == before
    assert vars(network).get("_compiled_call_impl") is impl
    assert torch.equal(run(pipe, STEPS), plain)


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.slow), "flux"])
@pytest.mark.parametrize("place", ["around", "within"])
def test_compiled_while_attached(family: str, place: str) -> None:
    """Refused, for it would run without, or the compiler would see what is attached."""
    pipe = _own(family)
    name = "unet" if family == "sd15" else "transformer"
    network = getattr(pipe, name)
    with attach(pipe, Fixed(7.0)):
        if place == "around":
            setattr(pipe, name, torch.compile(network, backend="eager"))
        else:
            network.compile(backend="eager")
        with pytest.raises(ValueError, match="compiled since"):
            run(pipe, STEPS)
    assert not {"step", "set_timesteps"} & {*vars(pipe.scheduler)}
    if place == "within":
        assert vars(network)["_compiled_call_impl"] is not None


def test_a_network_that_was_replaced() -> None:
    pipe = _own("sd15")
    with attach(pipe, Fixed(7.0)):
        pipe.unet = copy.deepcopy(pipe.unet)
        with pytest.raises(
            ValueError, match=r"a network of .* was replaced or compiled since it was attached to; attach again"
        ):
            run(pipe, STEPS)
    assert torch.equal(run(pipe, STEPS), reference("sd15"))
    assert not {"step", "set_timesteps"} & {*vars(pipe.scheduler)}


# Offload: hooks of accelerate and diffusers on the forward, which are taken off and put on again after every call of a pipeline.


def _model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu:0")


def _sequential_offload(pipe: Any) -> None:
    cpu_offload(networks(pipe)[0], torch.device("cpu"), offload_buffers=True)


def _group_offload(pipe: Any) -> None:
    apply_group_offloading(networks(pipe)[0], torch.device("cpu"), offload_type="leaf_level")


def _casting(pipe: Any) -> None:
    apply_layerwise_casting(networks(pipe)[0], storage_dtype=torch.float32, compute_dtype=torch.float32)


@pytest.mark.parametrize("family", HOW)
@pytest.mark.parametrize(
    "offload", [_model_offload, pytest.param(_sequential_offload, marks=pytest.mark.slow), _casting, _group_offload]
)
@pytest.mark.parametrize("first", ["offload", "attach"])
def test_offload(family: str, offload: Callable[[Any], None], first: str) -> None:
    pipe = _own(family)
    if first == "offload":
        offload(pipe)
    attached = attach(pipe, Fixed(7.0))
    if first == "attach":
        offload(pipe)
    for call in (1, 2):  # what one call of the pipeline takes off, the next would miss
        assert torch.equal(run(pipe, STEPS), reference(family, 7.0))
        assert attached.rows == call * 2 * STEPS
    attached.detach()
    slots = vars(networks(pipe)[0])
    assert slots.get("_compiled_call_impl") is None
    assert not {"step", "set_timesteps"} & {*vars(pipe.scheduler)}
    for _ in range(2):
        assert torch.equal(run(pipe, STEPS), reference(family))
    if offload is _model_offload:
        assert "_hf_hook" in slots
        pipe.remove_all_hooks()
        assert "_hf_hook" not in vars(networks(pipe)[0])


def test_removing_hooks_while_attached() -> None:
    pipe = _own("flux")
    _model_offload(pipe)
    with attach(pipe, Fixed(7.0)):
        pipe.remove_all_hooks()
        assert torch.equal(run(pipe, STEPS), reference("flux", 7.0))
    assert torch.equal(run(pipe, STEPS), reference("flux"))


def test_sound_has_a_scheduler_of_its_own() -> None:
    """LTX-2 copies the scheduler within a call; the copy is not attached to."""
    pipe = build("ltx2", stock_of("ltx2"))
    Watching.calls = 0
    expected = run(pipe, STEPS)
    with attach(pipe, Watching(), Idle()) as attached:
        assert torch.equal(run(pipe, STEPS), expected)
    assert len(attached.steps) == Watching.calls == STEPS


def test_families_here_guide_in_both_ways() -> None:
    assert [PIPELINES[family].calls for family in HOW] == [1, 2]
    assert issubclass(PIPELINES["sd15"].pipeline, diffusers.DiffusionPipeline)

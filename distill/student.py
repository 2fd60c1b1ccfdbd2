"""The network that learns: a copy of the teacher's, or adapters in the teacher's own; put into a pipeline, saved and loaded.

A pipeline around a student shares everything else with the teacher: text encoders, decoders, tokenizers.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from flowkit import weights
from flowkit.hooks import layout
from flowkit.schedulers import RectifiedFlowScheduler, save_pretrained
from flowkit.schedulers.saving import stand_in

LORA_FILE = "pytorch_lora_weights.safetensors"
# Projections of attention and of the layers between, as diffusers' transformers and UNets name them.
_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("to_query", "to_key", "to_value"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
_ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Training of low-rank adapters instead of the whole network (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: of the update of each layer.
        alpha: the update is scaled by ``alpha / rank``. None means the rank.
        targets: last parts of the names of the layers that get an adapter, such as "to_q" or "attn.to_out.0". None means the
            linear projections of attention and of the feed-forward layers.
    """

    rank: int = 16
    alpha: float | None = None
    targets: Sequence[str] | None = None


How = Literal["full"] | LoRA


def denoiser_name(pipe: Any) -> str:  # noqa: ANN401
    """Returns the name of the one component that a pipeline calls at every step, such as "unet".

    Raises:
        ValueError: where there is none, or several that take turns.
    """
    names = [name for name in layout.DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
    if len({id(getattr(pipe, name)) for name in names}) != 1:
        raise ValueError(f"a student takes the place of one network, and a {type(pipe).__name__} calls {len(names)} at its steps "
                         f"({', '.join(names) or 'of those we know'}); distil a pipeline with one")  # fmt: skip
    return names[0]


def check(pipe: Any, how: How) -> None:  # noqa: ANN401
    """Refuses, before any work, what cannot be prepared or saved.

    Raises:
        ImportError: for LoRA without peft.
        TypeError: for another ``how``.
        ValueError: for a pipeline without one network or with adapters in it, and for LoRA: a pipeline that loads none, layers
            that are not there, or numbers out of range.
    """
    name = denoiser_name(pipe)
    network = getattr(pipe, name)
    if how != "full" and not isinstance(how, LoRA):
        raise TypeError(f"a student is trained 'full' or as a LoRA(...), got {how!r}")
    if getattr(network, "peft_config", None):
        raise ValueError(f"the {name} has adapters already ({', '.join(network.peft_config)}); merge them first, with "
                         "pipe.fuse_lora() and pipe.unload_lora_weights(), or remove them")  # fmt: skip
    if how == "full":
        return
    _peft()
    alpha = how.rank if how.alpha is None else how.alpha
    if not isinstance(how.rank, int) or isinstance(how.rank, bool) or how.rank < 1 or not alpha > 0:
        raise ValueError(
            f"a LoRA has a whole rank of at least 1 and an alpha above 0, got rank {how.rank!r}, alpha {alpha!r}"
        )
    saves = getattr(pipe, "save_lora_weights", None)
    if saves is None or f"{name}_lora_layers" not in inspect.signature(saves).parameters:
        raise ValueError(f"diffusers loads no LoRA into the {name} of a {type(pipe).__name__}; train it full")
    _layers(network, how.targets)


@contextmanager
def prepared(pipe: Any, how: How, seed: int = 0) -> Iterator[nn.Module]:  # noqa: ANN401
    """Makes the student of a pipeline, in inference mode; what is to be trained requires a gradient, in float32.

    Args:
        pipe: the teacher.
        how: "full", a copy of the network in float32; or a `LoRA`: the pipeline's own network with adapters, which change nothing
            at the start. The pipeline then samples with the student, but for `as_teacher`.
        seed: of the adapters' weights.

    Yields:
        The student. Adapters are removed at the end, and the teacher is what it was, bit for bit.

    Raises:
        ImportError, TypeError, ValueError: see `check`.
    """
    check(pipe, how)
    teacher = getattr(pipe, denoiser_name(pipe))
    if how == "full":
        yield copy.deepcopy(teacher).float().eval().requires_grad_(True)
        return
    assert isinstance(how, LoRA)
    alpha = how.rank if how.alpha is None else how.alpha
    config = _peft().LoraConfig(r=how.rank, lora_alpha=alpha, target_modules=_layers(teacher, how.targets))
    before = [(module, module.training) for module in teacher.modules()]
    trained = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    try:
        teacher.eval().requires_grad_(False)
        with torch.random.fork_rng(_devices(teacher)):
            torch.manual_seed(seed)
            teacher.add_adapter(config, _ADAPTER)
        cast_training_params(teacher)
        yield teacher
    finally:
        teacher.unload_lora()
        for module, training in before:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def as_teacher(pipe: Any) -> Iterator[None]:  # noqa: ANN401
    """Takes adapters out of the computation, so that a network with a student's adapters answers as the teacher.

    Args:
        pipe: the teacher; nothing happens where the student is a copy.
    """
    network = getattr(pipe, denoiser_name(pipe))
    adapted = bool(getattr(network, "peft_config", None))
    if adapted:
        network.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            network.enable_adapters()


@contextmanager
def sampling(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lets a pipeline of another dtype call a network: what it is given is cast to its own, what it returns back.

    Args:
        network: a student in float32, say.
        dtype: of the pipeline that samples with it.
    """
    own = next(p.dtype for p in network.parameters() if p.is_floating_point())
    changed = False

    def cast(value: Any, of: torch.dtype, to: torch.dtype) -> Any:  # noqa: ANN401
        nonlocal changed
        if isinstance(value, torch.Tensor) and value.dtype == of:
            changed = True
            return value.to(to)
        if isinstance(value, dict):
            for key in value:  # in place: outputs of diffusers are dictionaries with attributes
                value[key] = cast(value[key], of, to)
            return value
        return type(value)(cast(item, of, to) for item in value) if type(value) in (list, tuple) else value

    def given(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401
        nonlocal changed
        changed = False
        return cast(args, dtype, own), cast(dict(kwargs), dtype, own)

    def returned(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ANN401
        if own == dtype:  # mixed precision returns float32, which training wants and a pipeline does not
            return output if torch.is_grad_enabled() else cast(output, torch.float32, dtype)
        return cast(output, own, dtype) if changed else output  # training gives it its own dtype, and gets that

    hooks = (network.register_forward_pre_hook(given, with_kwargs=True), network.register_forward_hook(returned))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def around(pipe: Any, network: nn.Module, scheduler: RectifiedFlowScheduler) -> Any:  # noqa: ANN401
    """Returns a pipeline of the teacher's class with a student's network and scheduler, sharing all the rest.

    Args:
        pipe: the teacher, which is not changed.
        network: the student.
        scheduler: its own, with its grid.
    """
    student = copy.copy(pipe)
    setattr(student, denoiser_name(pipe), network)
    student.scheduler = scheduler
    return student


def save(
    pipe: Any,  # noqa: ANN401
    network: Any,  # noqa: ANN401
    scheduler: RectifiedFlowScheduler,
    folder: str | os.PathLike[str],
) -> None:
    """Saves a student so that plain diffusers loads it; our scheduler and its grid go into one hidden key, as ever.

    A copy becomes a whole pipeline, in the teacher's dtypes, for ``DiffusionPipeline.from_pretrained``. Adapters become a file
    for ``pipe.load_lora_weights``, with the scheduler in a folder beside it.

    Args:
        pipe: the teacher.
        network: the student, of `prepared`, within it.
        scheduler: its own.
        folder: where to.

    Raises:
        ValueError: where no stock class walks the scheduler's path.
    """
    name = denoiser_name(pipe)
    if network is not getattr(pipe, name):
        finished = copy.deepcopy(getattr(pipe, name))
        finished.load_state_dict(network.state_dict())
        save_pretrained(around(pipe, finished, scheduler), folder)
        return
    stock = stand_in(scheduler)
    layers = {
        key: value.contiguous()
        for key, value in _peft().get_peft_model_state_dict(network, adapter_name=_ADAPTER).items()
    }
    metadata = network.peft_config[_ADAPTER].to_dict()
    pipe.save_lora_weights(
        folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}, weight_name=LORA_FILE
    )
    stock.save_pretrained(Path(folder) / "scheduler")


def load(folder: str | os.PathLike[str], pipe: Any) -> Any:  # noqa: ANN401
    """Returns the pipeline of a student that `save` wrote, with our scheduler, sharing all but the network with the teacher.

    Args:
        folder: of the student.
        pipe: the teacher, which is not changed.

    Raises:
        FileNotFoundError: where the folder holds no student.
        ValueError: for weights that are broken.
    """
    folder, name = Path(folder), denoiser_name(pipe)
    own, adapters = getattr(pipe, name), folder / LORA_FILE
    if not adapters.exists() and not (folder / name / "config.json").exists():
        raise FileNotFoundError(f"no student in {folder}: neither {LORA_FILE} nor {name}/config.json; check the path")
    config = RectifiedFlowScheduler.load_config(folder, subfolder="scheduler")
    scheduler = RectifiedFlowScheduler.from_config(config)
    if adapters.exists():
        weights.check(adapters)
        student = around(pipe, copy.deepcopy(own), scheduler)
        student.load_lora_weights(folder, weight_name=LORA_FILE)
        return student
    for file in (folder / name).glob("*.safetensors"):
        weights.check(file)
    network = type(own).from_pretrained(folder, subfolder=name, torch_dtype=own.dtype, use_safetensors=True)
    return around(pipe, network.to(own.device).eval(), scheduler)


def _layers(network: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises:
        ValueError: where one of the targets names none, or there are none of the usual ones.
    """
    kinds: tuple[type[nn.Module], ...] = (
        (nn.Linear,) if targets is None else (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    layers = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    found = {target: [n for n in layers if f".{n}".endswith(f".{target}")] for target in targets or _TARGETS}
    lost = [target for target, names in found.items() if not names]
    if not any(found.values()) or (targets is not None and lost):
        there = Counter(
            name.rpartition(".")[2] if not name[-1].isdigit() else ".".join(name.split(".")[-2:]) for name in layers
        )
        kinds_there = ", ".join(f"{name} ({count})" for name, count in there.most_common(20))
        raise ValueError(f"a {type(network).__name__} has no layers named {', '.join(lost)} for a LoRA; it has {kinds_there}: pass "
                         "some of these as targets, or train it full")  # fmt: skip
    return sorted({name for names in found.values() for name in names})


def _devices(network: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in network.parameters() if p.device.type == "cuda"}, key=str)


def _peft() -> Any:  # noqa: ANN401
    try:
        return import_module("peft")
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft; pip install 'flowkit-diffusion[text]', or train the student full"
        ) from error

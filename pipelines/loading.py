"""From a name to a pipeline: an embedded model, a diffusers folder, or a repository of the Hugging Face hub.

Weights are read from safetensors alone, and no code of a model's folder is run. Where the folder was saved with our scheduler,
also behind a stock one (`flowkit.save_pretrained`), ours comes back with its solver and grid.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError
from safetensors import safe_open

from flowkit import assets, weights
from flowkit.pipelines.class_conditional import ClassConditionalPipeline
from flowkit.schedulers import RectifiedFlowScheduler

INDEX, STUDENT = "model_index.json", "distill.json"
REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_OURS = {"ClassConditionalPipeline": ClassConditionalPipeline}
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_SAVED = {"F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: what the user called it.
        folder: where it lies.
        index: its ``model_index.json``.
        fingerprint: of its weight files, see `flowkit.weights.fingerprint`.
        revision: commit of a hub repository; None for others.
    """

    name: str
    folder: Path
    index: Mapping[str, Any]
    fingerprint: str
    revision: str | None = None

    @property
    def pipeline(self) -> str:
        """Name of the pipeline's class."""
        return str(self.index["_class_name"])


def find(name: str, variant: str | None = None) -> Source:
    """Finds a model, downloads it where it is on the hub and not yet in the cache, and checks its weight files.

    Args:
        name: "digits" or "shapes", a folder, or ``owner/name`` of a hub repository.
        variant: of the weights of a hub repository, such as "fp16"; None means the plain ones.

    Raises:
        FileNotFoundError: where there is no such model, or no way to get it.
        ValueError: for a folder that holds no pipeline, one of unknown class, or pickled, corrupt or truncated weights.
    """
    folder, revision = _folder(name, variant)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{name} has no {INDEX}, so it is no pipeline of diffusers; pass a folder that save_pretrained "
                                "wrote, or convert a single checkpoint with from_single_file first")  # fmt: skip
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{INDEX} of {name} is not JSON ({error}); copy or save the model again") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str) or not (kind in _OURS or hasattr(diffusers, kind)):
        raise ValueError(f"{name} is a {kind!r}, which diffusers {diffusers.__version__} does not have, and flowkit runs no code "
                         "of a model's folder; update diffusers, or load it in Python")  # fmt: skip
    return Source(name, folder, index, weights.fingerprint(weights.check_folder(folder)), revision)


def check_name(name: str, path: Path) -> None:
    """Refuses a name that can be no model, without a look at the hub.

    Args:
        name: what `find` takes.
        path: of the folder, should it be one.

    Raises:
        ValueError: for a name that is neither an embedded model, nor a pipeline's folder, nor ``owner/name``.
    """
    if name in assets.NAMES or (path / INDEX).is_file():
        return
    if path.exists():
        raise ValueError(f"{name} has no {INDEX}, so it is no pipeline; give a folder that save_pretrained wrote")
    if not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"there is no model {name!r}; choose {', '.join(assets.NAMES)}, a folder, or owner/name of the hub"
        )


def load(source: Source, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:  # noqa: ANN401
    """Loads a pipeline on the CPU, its own bar off.

    Args:
        source: from `find`.
        dtype: of the networks; None means that of the weights, and float32 for an embedded model, as in `load_demo`.
        variant: of the weights, such as "fp16"; None means the plain ones.

    Raises:
        ValueError: for components that do not load.
        OSError: for files that are missing, such as those of a variant.
    """
    parts: dict[str, Any] = {}
    if source.name in assets.NAMES:
        parts["scheduler"], dtype = RectifiedFlowScheduler(), dtype or torch.float32
    elif "flowkit" in (scheduler_config(source) or {}):  # the stock class would warn about the key that carries ours
        parts["scheduler"] = RectifiedFlowScheduler.from_pretrained(source.folder / "scheduler")
    loader = _OURS.get(source.pipeline, diffusers.DiffusionPipeline)
    options: dict[str, Any] = {"variant": variant} if variant else {}
    if loader is diffusers.DiffusionPipeline:
        options["use_safetensors"] = True
    with _quietly():
        pipe: Any = loader.from_pretrained(
            source.folder, dtype=dtype or saved_dtype(source.folder, variant), **options, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_config(source: Source) -> Mapping[str, Any] | None:
    """Returns the configuration of a model's scheduler; None for a model without one."""
    folder = source.folder / "scheduler"
    config: Mapping[str, Any] | None = None
    if (folder / "scheduler_config.json").is_file():
        config = RectifiedFlowScheduler.load_config(folder)
    return config


def load_lora(pipe: Any, lora: str | Path) -> None:  # noqa: ANN401
    """Loads adapters into a pipeline.

    Args:
        pipe: the pipeline.
        lora: a file, a folder, or ``owner/name`` of a hub repository.

    Raises:
        TypeError: for a pipeline that takes none.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"{type(pipe).__name__} takes no LoRA; leave out lora {str(lora)!r}")
    pipe.load_lora_weights(str(lora), use_safetensors=True)


def lora_files(lora: Path) -> list[Path]:
    """Returns the checked weight files of adapters.

    Args:
        lora: a file or a folder.

    Raises:
        FileNotFoundError: for a folder that holds none.
        ValueError: for one that is broken.
    """
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    if not files:
        raise FileNotFoundError(f"no .safetensors in {lora}; give the folder or file of a LoRA")
    return [weights.check(file) for file in files]


def own_scheduler(folder: Path) -> RectifiedFlowScheduler | None:
    """Returns the scheduler that lies beside the adapters of a distilled student; None where there is none."""
    if not (folder / "scheduler").is_dir():
        return None
    scheduler: RectifiedFlowScheduler = RectifiedFlowScheduler.from_pretrained(folder / "scheduler")
    return scheduler


def student_call(folder: Path) -> dict[str, Any]:
    """Returns the arguments that a distilled student is called with: its number of steps, no guidance where it has learnt it.

    Args:
        folder: of a pipeline or a LoRA; for one that `flowkit.distill.run` did not write nothing is returned.

    Raises:
        ValueError: for a file that is not JSON, or that holds something else.
    """
    file = folder / STUDENT
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the student again") from error
    match found:
        case {"student": {"steps": int() | None as steps, "call": dict() as call}}:
            return call if steps is None else {**call, "num_inference_steps": steps}
        case dict() if "student" not in found:  # trained from data
            return {}
    raise ValueError(f"{file} does not say how its student is called; copy the student again")


def saved_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Returns the type that most of the largest component's weights are saved in: float16, bfloat16, or else float32.

    Args:
        folder: of a pipeline.
        variant: of the weights, such as "fp16"; None means the plain ones.
    """
    sizes: dict[Path, int] = {}
    files = [
        f
        for f in folder.glob("*/*.safetensors")
        if (f".{variant}." in f.name or f".{variant}-" in f.name) == bool(variant)
    ]
    for file in files:
        sizes[file.parent] = sizes.get(file.parent, 0) + file.stat().st_size
    if not sizes:
        return torch.float32
    largest = max(sorted(sizes), key=lambda part: sizes[part])
    counts: dict[str, int] = {}
    for file in files:
        if file.parent == largest:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    kind = opened.get_slice(name).get_dtype()
                    counts[kind] = counts.get(kind, 0) + 1
    return _SAVED.get(max(sorted(counts), key=lambda kind: counts[kind]), torch.float32)


def _folder(name: str, variant: str | None) -> tuple[Path, str | None]:
    """The folder of a model, and the commit of a hub repository."""
    if name in assets.NAMES:
        return assets.folder(name), None
    if Path(name).is_dir():
        return Path(name), None
    if Path(name).exists():
        raise ValueError(
            f"{name} is a file, not a folder of diffusers; convert it with from_single_file and save_pretrained first"
        )
    if not REPOSITORY.fullmatch(name):
        raise FileNotFoundError(f"no model {name!r}: no folder of that name is here; pass {', '.join(assets.NAMES)}, a folder of "
                                "diffusers, or owner/name of a hub repository")  # fmt: skip
    folder = _snapshot(name, variant)
    return folder, folder.name


def _snapshot(name: str, variant: str | None) -> Path:
    """The cached copy of a hub repository, fetched where it is missing."""
    try:
        with _quietly():
            index = json.loads(Path(hf_hub_download(name, INDEX)).read_text(encoding="utf-8"))
            if index.get("_class_name") in _OURS or "flowkit" in {
                v[0] for v in index.values() if isinstance(v, list) and v
            }:
                return Path(
                    snapshot_download(name, allow_patterns=_FILES)
                )  # diffusers knows no components of ours there
            return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True, variant=variant))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"the hub model {name} is gated; accept its licence on its page and log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a hub repository ({error}); pass owner/name") from error
    except OSError as error:  # as are all that the hub raises: no such repository, no network, offline and not cached
        reason = (
            "the hub is switched off here (HF_HUB_OFFLINE)"
            if constants.HF_HUB_OFFLINE
            else f"{type(error).__name__}: {error}"
        )
        raise FileNotFoundError(f"the model {name} is neither a folder here nor in the cache, and was not fetched: "
                                f"{reason:.300}; check the name, go online, or pass a folder")  from error  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps warnings of the libraries, and their bars for loading, off the screen: what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub", "transformers")]
    levels, bars = [logger.level for logger in loggers], diffusers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            diffusers_logging.enable_progress_bar()


def choose_device(name: str, here: torch.device) -> torch.device:
    """Returns the device asked for.

    Args:
        name: of torch's; "auto" means ``here`` where that is a GPU, and else the CPU.
        here: the device of this process, also taken for "cuda".

    Raises:
        ValueError: for an unknown one, or "cuda" where there is none.
    """
    if name == "auto":
        return here if here.type == "cuda" else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, or another of torch's") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no CUDA device here; use cpu")
    return here if name == "cuda" and here.type == "cuda" else device


def choose_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Returns the type of a pipeline's networks: of "auto" float32 on the CPU, and elsewhere None, as the weights are saved.

    Raises:
        ValueError: for an unknown one.
    """
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose auto, {', '.join(DTYPES)}")
    return DTYPES.get(name) or (torch.float32 if device.type == "cpu" else None)

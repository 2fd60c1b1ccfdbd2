"""The arguments of a network's call: finding sample and time among them, and cutting the rows of their batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

_LATENTS = ("hidden_states", "sample", "latent_model_input", "noisy_latents", "latents", "x")
_TIMES = ("timestep", "timesteps", "t", "timestep_ratio")
# Arguments about the shape of a sample, not about the samples of a batch, however long they are.
_SHARED = frozenset({
    *("image_rotary_emb", "rotary_embedding", "freqs_cis", "visual_rope_pos", "text_rope_pos", "rope_interpolation_scale"),
    *("scale_factor", "sparse_params", "skip_layers", "control_hidden_states_scale"),
})  # fmt: skip
# Likewise, but for those of three axes, or lists of lists, which have an entry a row.
_PLACES = frozenset({"img_ids", "txt_ids", "img_shapes"})
# Lists with an entry a row, however long the entries are.
_ENTRIES = frozenset({*_LATENTS, "cap_feats"})
# Arguments whose samples lie along their second axis.
_SECOND_AXIS = frozenset({"encoder_hidden_states_llama3"})

Lie = Literal["shared", "rows", "second", "entries", "inside"]


@dataclass(frozen=True)
class Arguments:
    """What a network is called with.

    Attributes:
        args: by position.
        kwargs: by name.
        names: of the network's parameters, in order, as far as they are known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...] = ()

    @property
    def latents(self) -> Any:  # noqa: ANN401
        """The noisy sample, (rows, ...) or a list of as many: the first argument by position, or the one of a usual name.

        Raises:
            ValueError: where there is none.
        """
        if self.args:
            return self.args[0]
        for name in _LATENTS:
            if name in self.kwargs:
                return self.kwargs[name]
        raise ValueError(f"the network is called with {', '.join(self.kwargs)}, none of which is known to hold the sample; call it "
                         f"{_LATENTS[0]} or {_LATENTS[1]}")  # fmt: skip

    @property
    def time(self) -> Any:  # noqa: ANN401
        """The model's time, or None."""
        for name in _TIMES:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[1] if len(self.args) > 1 else None

    def named(self) -> dict[str, Any]:
        """Returns all of them by name, as far as names are known."""
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}

    def cut(self, rows: int, picked: Sequence[int]) -> Arguments:
        """Returns the arguments for some rows of the batch.

        Args:
            rows: size of the batch.
            picked: rows to keep, in order.
        """
        names = (*self.names, *[""] * len(self.args))
        args = tuple(select(value, rows, picked, name) for value, name in zip(self.args, names, strict=False))
        kwargs = {name: select(value, rows, picked, name) for name, value in self.kwargs.items()}
        return Arguments(args, kwargs, self.names)

    def replaced(self, latents: Any, time: Any = None) -> Arguments:  # noqa: ANN401
        """Returns the arguments with another sample and, unless it is None, another time."""
        new = {id(self.latents): latents}
        if time is not None:
            new[id(self.time)] = time
        args = tuple(new.get(id(value), value) for value in self.args)
        kwargs = {name: new.get(id(value), value) for name, value in self.kwargs.items()}
        return Arguments(args, kwargs, self.names)


def select(value: Any, rows: int, picked: Sequence[int], name: str = "") -> Any:  # noqa: ANN401
    """Returns an argument of a network's call for some rows of its batch.

    Args:
        value: the argument: what has the batch's size along its first axis is cut, in dicts, lists and tuples too; what is a
            multiple of it holds several entries a row. Everything else stays.
        rows: size of the batch.
        picked: rows to keep, in order.
        name: of the argument; some are known not to be of a batch, or to have it along another axis.
    """
    match lie(value, rows, name):
        case "second":
            return take(value.transpose(0, 1), picked).transpose(0, 1)
        case "rows":
            if len(value) == rows:
                return take(value, picked)
            return take(value.unflatten(0, (rows, -1)), picked).flatten(0, 1)
        case "entries":
            return type(value)(value[i] for i in picked)
        case "inside" if isinstance(value, dict):
            return {key: select(item, rows, picked, str(key)) for key, item in value.items()}
        case "inside":
            return type(value)(select(item, rows, picked, name) for item in value)
    return value


def lie(value: Any, rows: int, name: str = "") -> Lie:  # noqa: ANN401
    """Returns where the rows of a batch lie in an argument.

    Args:
        value: the argument.
        rows: size of the batch.
        name: of the argument.

    Returns:
        "rows", along the first axis of a tensor, one or several entries a row; "second", along its second axis; "entries", in a
        list or tuple, an entry a row; "inside", in what a dict, list or tuple holds; "shared", nowhere.
    """
    if name in _SHARED:
        return "shared"
    if isinstance(value, Tensor):
        if name in _SECOND_AXIS:
            return "second"
        if not value.ndim or not len(value) or len(value) % rows or (name in _PLACES and value.ndim < 3):
            return "shared"
        return "rows"
    if isinstance(value, dict):
        return "inside"
    if isinstance(value, (list, tuple)):
        of_rows = all(isinstance(item, Tensor) and item.ndim and len(item) == rows for item in value)
        if len(value) == rows and (name in _ENTRIES or not of_rows):
            return "entries"  # rather than batches
        return "shared" if name in _PLACES else "inside"
    return "shared"


def size(value: Any) -> int:  # noqa: ANN401
    """Returns the bytes of the tensors in an argument, in dicts, lists and tuples too."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(size(item) for item in items)


def take(x: Tensor, picked: Sequence[int]) -> Tensor:
    """Returns rows of a tensor: a view where they are neighbours."""
    first = picked[0]
    if list(picked) == list(range(first, first + len(picked))):
        return x[first : first + len(picked)]
    return x[torch.as_tensor(picked, device=x.device)]


def changes(before: Arguments, after: Arguments) -> set[str]:
    """Returns the names of the arguments, beside sample and time, that differ between two calls."""
    skipped = {id(value) for call in (before, after) for value in (call.latents, call.time)}
    names = [*(f"argument {i}" for i in range(len(before.args))), *before.kwargs]
    old, new = ((*call.args, *call.kwargs.values()) for call in (before, after))
    return {name for name, a, b in zip(names, old, new, strict=False) if id(a) not in skipped and not _same(a, b)}


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)

"""Taking a network's arguments apart into those of each sample, and joining those of any samples to a batch again.

What a sample brings are tensors. All else, the *frame*, is the same for all samples of a call: how the arguments are nested, where
the samples' tensors lie in them, values that are about no sample, and the shapes that must agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowkit import weights
from flowkit.hooks.arguments import Arguments, lie, select


@dataclass(frozen=True)
class Frame:
    """What the samples of a call have in common.

    Attributes:
        tree: the arguments by name, as values for JSON: ``{"rows": name, "axis", "shape", "dtype"}`` where tensors of the samples
            are concatenated; ``{"blank": shape, "dtype"}`` for one that is filled in later; ``{"entries": tree, "kind"}`` for a
            list with an entry a sample, and ``{"own": name}`` for a tensor in such an entry; ``{"shared": name, ...}`` for a
            tensor of the frame, with its hash; ``{"dict"}``, ``{"list"}``, ``{"tuple"}`` and, for plain values, ``{"value"}``.
        shared: tensors of the frame, by name.
    """

    tree: Mapping[str, Any]
    shared: Mapping[str, Tensor]

    @cached_property
    def key(self) -> str:
        """A hash: samples of equal ones can be joined."""
        return hashlib.sha256(json.dumps(self.tree, sort_keys=True).encode()).hexdigest()

    def to(self, device: torch.device) -> Frame:
        """Returns the frame with its tensors on a device."""
        return Frame(self.tree, {name: tensor.to(device) for name, tensor in self.shared.items()})

    def join(self, rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> Arguments:
        """Returns the arguments of a call for some samples.

        Args:
            rows: tensors of each sample, of this frame, in order.
            device: of the result; `shared` must be there.
        """
        return Arguments((), {name: self._filled(node, rows, device) for name, node in self.tree.items()})

    def _filled(self, node: Mapping[str, Any], rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> Any:  # noqa: ANN401
        match node:
            case {"value": value}:
                return value
            case {"shared": name}:
                return self.shared[name]
            case {"own": name}:
                (row,) = rows
                return row[name].to(device)
            case {"blank": shape, "dtype": dtype}:
                return torch.empty((len(rows) * shape[0], *shape[1:]), dtype=getattr(torch, dtype), device=device)
            case {"rows": name, "axis": axis}:
                return torch.cat([row[name] for row in rows], axis).to(device)
            case {"entries": inner, "kind": kind}:
                entries = [self._filled(inner, [row], device) for row in rows]
                return tuple(entries) if kind == "tuple" else entries
            case {"dict": items}:
                return {key: self._filled(item, rows, device) for key, item in items.items()}
            case {"list": items}:
                return [self._filled(item, rows, device) for item in items]
            case {"tuple": items}:
                return tuple(self._filled(item, rows, device) for item in items)
        raise AssertionError(node)


def apart(arguments: Mapping[str, Any], rows: int) -> list[tuple[Frame, dict[str, Tensor]]]:
    """Takes the arguments of a call apart; `Frame.join` puts them together again.

    Args:
        arguments: of the network by name; tensors on the meta device stand for any of their shape.
        rows: size of the batch, at least 2: of a single row it cannot be told what belongs to it.

    Returns:
        The frame of each row, the same object for those that can be joined, and its tensors, views.

    Raises:
        TypeError: for an argument that is neither tensor nor plain value, nor a dict, list or tuple of these.
    """
    digests: dict[int, str] = {}
    frames: dict[str, Frame] = {}
    found = []
    for number in range(rows):
        row = _Row(rows, number, digests)
        frame = Frame({name: row.node(value, name) for name, value in arguments.items()}, row.shared)
        found.append((frames.setdefault(frame.key, frame), row.tensors))
    return found


class _Row:
    """What one row of a batch brings."""

    def __init__(self, rows: int, row: int, digests: dict[int, str]) -> None:
        self._rows, self._picked, self._digests = rows, [row], digests
        self.shared: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}

    def node(self, value: Any, name: str, place: str = "") -> dict[str, Any]:  # noqa: ANN401
        """The place of the row in an argument."""
        place = place or name
        where = lie(value, self._rows, name)
        if where in ("rows", "second"):
            own = select(value, self._rows, self._picked, name)
            if own.is_meta:
                return {"blank": list(own.shape), "dtype": _name(own)}
            self.tensors[place] = own
            return {"rows": place, "axis": int(where == "second"), "shape": list(own.shape), "dtype": _name(own)}
        if where == "entries":
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {"entries": self._whole(value[self._picked[0]], place, own=True), "kind": kind}
        if where == "shared":
            return self._whole(value, place, own=False)
        if isinstance(value, dict):
            return {"dict": {str(key): self.node(item, str(key), f"{place}.{key}") for key, item in value.items()}}
        items = [self.node(item, name, f"{place}.{i}") for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}

    def _whole(self, value: Any, place: str, own: bool) -> dict[str, Any]:  # noqa: ANN401
        """A value that is not cut: of all samples, or a sample's own."""
        if isinstance(value, Tensor):
            if value.is_meta:
                return {"blank": list(value.shape), "dtype": _name(value)}
            if own:
                self.tensors[place] = value
                return {"own": place}
            self.shared[place] = value
            if id(value) not in self._digests:
                self._digests[id(value)] = weights.digest(value)
            return {
                "shared": place,
                "shape": list(value.shape),
                "dtype": _name(value),
                "sha256": self._digests[id(value)],
            }
        if isinstance(value, dict):
            return {"dict": {str(key): self._whole(item, f"{place}.{key}", own) for key, item in value.items()}}
        if isinstance(value, (list, tuple)):
            items = [self._whole(item, f"{place}.{i}", own) for i, item in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise TypeError(f"the network's argument {place} holds a {type(value).__name__}, which is not a tensor or a plain value, "
                        "so it cannot be kept for each sample")  # fmt: skip


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

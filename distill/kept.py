"""Captured arguments of a network, by number of the input: in memory, or in a folder.

    conditions.json            what the capture depends on; another one is refused by the name of what differs
    frame-*.safetensors        what the samples of a call have in common, see `flowkit.hooks.joining`
    shard-000000.safetensors   the tensors of a batch of inputs, and the frame of each: there whole or not at all

A shard is written after its frames, so that a capture that is killed goes on with the shards that are missing.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from flowkit import weights
from flowkit.distill.shards import run_id, shard_file
from flowkit.eval.processes import Processes
from flowkit.eval.runs import Kind, open_run
from flowkit.hooks.joining import Frame

CONDITIONS = Kind(
    "captured conditioning",
    "conditions.json",
    "flowkit.conditions/1",
    re.compile(r"\.(conditions|frame-\w+|shard-\d+)\.(json|safetensors)\.\w+"),
)
_OPEN = 256  # files that are mapped at a time

Captured = tuple[Frame, dict[str, Tensor]]
Capture = Callable[[range], list[Captured]]


class Kept(Protocol):
    """Captured arguments.

    Attributes:
        keys: of the frame of each input.
        frames: by key.
    """

    keys: list[str]
    frames: dict[str, Frame]

    def row(self, number: int) -> Mapping[str, Tensor]:
        """Returns the tensors of an input, on the CPU."""


class InMemory:
    """Captured arguments in memory; see `Kept`."""

    def __init__(self, cut: Sequence[range], capture: Capture, on_input: Callable[[int], None]) -> None:
        self.keys: list[str] = []
        self.frames: dict[str, Frame] = {}
        self._rows: list[dict[str, Tensor]] = []
        for block in cut:
            for frame, row in capture(block):
                self.frames.setdefault(frame.key, frame)
                self.keys.append(frame.key)
                self._rows.append(row)
            on_input(len(block))

    def row(self, number: int) -> Mapping[str, Tensor]:
        """Returns the tensors of an input."""
        return self._rows[number]


class InFolder:
    """Captured arguments in a folder, where a capture that was killed goes on; see `Kept`.

    Args:
        folder: made if missing; processes that were started together must all see it, and share the work.
        settings: what the capture depends on, values of JSON.
        cut: the batches.
        capture: returns frame and tensors of each input of a batch.
        on_input: called with the number of inputs of each batch that is there.
        device: where this process computes.

    Raises:
        FileNotFoundError: for a frame that is missing.
        ValueError: for a folder of something else or of other settings, and for damaged files.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        cut: Sequence[range],
        capture: Capture,
        on_input: Callable[[int], None],
        device: torch.device,
    ) -> None:
        self._folder, self._run = folder, run_id(settings)
        self._firsts = [block.start for block in cut]
        self._maps: dict[int, tuple[Any, dict[str, dict[str, str]]]] = {}
        self.keys, self.frames = [], dict[str, Frame]()
        processes = Processes.join(device)
        processes.agree(lambda: open_run(folder, settings, True, CONDITIONS) if processes.main else None)
        processes.wait()
        missing = [i for i in range(len(cut)) if not shard_file(folder, i).is_file()]
        processes.wait()  # nobody writes before everybody has looked
        on_input(sum(len(cut[i]) for i in range(len(cut)) if i not in set(missing)))
        mine = missing[processes.rank :: processes.count]
        processes.agree(lambda: self._write({i: cut[i] for i in mine}, capture, on_input))
        processes.wait()
        for number, block in enumerate(cut):
            self.keys += self._read_keys(number, len(block))
        for key in dict.fromkeys(self.keys):
            tensors, metadata = weights.read(self._frame_file(key))
            self.frames[key] = Frame(json.loads(metadata["tree"]), tensors)

    def _frame_file(self, key: str) -> Path:
        return self._folder / f"frame-{key[:16]}.safetensors"

    def _write(self, blocks: Mapping[int, range], capture: Capture, on_input: Callable[[int], None]) -> None:
        """Captures batches and writes them, the frames first."""
        for number, block in blocks.items():
            captured = capture(block)
            for key, frame in {frame.key: frame for frame, _ in captured}.items():
                if not self._frame_file(key).is_file():
                    weights.write(self._frame_file(key), frame.shared, {"tree": json.dumps(frame.tree)})
            tensors = {f"{i} {name}": tensor for i, (_, row) in enumerate(captured) for name, tensor in row.items()}
            keys = json.dumps([frame.key for frame, _ in captured])
            weights.write(shard_file(self._folder, number), tensors, {"run": self._run, "keys": keys})
            on_input(len(block))

    def _read_keys(self, number: int, count: int) -> list[str]:
        path = weights.check(shard_file(self._folder, number))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        keys: list[str] = json.loads(metadata.get("keys", "[]"))
        if metadata.get("run") != self._run or len(keys) != count:
            raise ValueError(f"{path} belongs to another capture than {self._folder / CONDITIONS.settings}; delete it, then it "
                             "alone is captured anew")  # fmt: skip
        return keys

    def row(self, number: int) -> Mapping[str, Tensor]:
        """Returns the tensors of an input, mapped into memory.

        Raises:
            FileNotFoundError: where its file was taken away.
        """
        shard = bisect.bisect_right(self._firsts, number) - 1
        if shard not in self._maps:
            if len(self._maps) >= _OPEN:
                self._maps.pop(next(iter(self._maps)))
            file: Any = safe_open(shard_file(self._folder, shard), framework="pt")
            places: dict[str, dict[str, str]] = {}
            for key in file.keys():  # noqa: SIM118
                row, _, name = key.partition(" ")
                places.setdefault(row, {})[name] = key
            self._maps[shard] = file, places
        opened, names = self._maps[shard]
        own = names.get(str(number - self._firsts[shard]), {})
        return {name: opened.get_tensor(key) for name, key in own.items()}

"""Recorded trajectories on disk: safetensors shards of fixed blocks of sample indices, and the data set that reads them.

    trajectories.json          what the recording depends on; another one is refused by the name of what differs
    shard-000000.safetensors   states and outputs of a block of samples, with their checksum: there whole or not at all
    index.json                 the shards, written last: the recording is complete

The noise that a sample begins with is a function of its seed, so it is not stored where it can be made again to the bit.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from flowkit import rng, weights
from flowkit.eval.runs import Kind
from flowkit.grids import Grid
from flowkit.schedulers import RectifiedFlowScheduler
from flowkit.weights import digest

INDEX = "index.json"
RECORDING = Kind(
    "recorded trajectories",
    "trajectories.json",
    "flowkit.trajectories/1",
    re.compile(r"\.(trajectories|index|shard-\d+)\.(json|safetensors)\.\w+"),
)
_OPEN = 64
_AGAIN = "delete it and record again, then it alone is drawn anew"


def initial(kind: str, shape: Sequence[int], dtype: torch.dtype, seeds: Sequence[int], scale: float) -> Tensor:
    """Makes the noise again that a pipeline begins with.

    Args:
        kind: "keyed", `flowkit.rng.normal`; or "generator", ``torch.randn`` on the CPU with a generator for each sample, which is
            what the pipelines of diffusers draw.
        shape: of one sample.
        dtype: of the pipeline.
        seeds: of each sample.
        scale: the scheduler's ``init_noise_sigma``.

    Returns:
        (len(seeds), *shape).
    """
    if kind == "keyed":
        noise = rng.normal(shape, seeds, tag=rng.INITIAL, dtype=dtype)
    else:
        draws = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(s), dtype=dtype) for s in seeds]
        noise = torch.cat(draws)
    return noise * scale


@dataclass(frozen=True)
class Shard:
    """One file of a recording.

    Attributes:
        states: at the stored anchors, (n, P, ...); memory-mapped, as is the other.
        outputs: of the network, (n, Q, ...).
        noise: how the first state is made, see `initial`; "stored" where it is among the states, "none" where it is not kept.
        scale: of that noise.
        inputs: arguments of each sample.
        noise_sha256: of the noise that is made again.
        sha256: of all that is above and the number of the shard, see `checksum`; empty before it is written.
    """

    states: Tensor
    outputs: Tensor
    noise: str
    scale: float
    inputs: Sequence[Mapping[str, Any]]
    noise_sha256: str
    sha256: str = ""


def shard_file(folder: Path, number: int) -> Path:
    """Returns the file of a shard."""
    return folder / f"shard-{number:06d}.safetensors"


def checksum(number: int, shard: Shard) -> str:
    """Returns the SHA-256 of what a shard says: its number, its tensors, the arguments of its samples, how its noise is made."""
    facts = json.dumps([number, shard.noise, repr(shard.scale), list(shard.inputs), shard.noise_sha256])
    return hashlib.sha256((facts + digest(shard.states, shard.outputs)).encode()).hexdigest()


def run_id(settings: Mapping[str, Any]) -> str:
    """Returns the hash of a recording's settings, which its shards carry."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_shard(folder: Path, number: int, run: str, shard: Shard) -> None:
    """Writes a shard, whole or not at all.

    Raises:
        OSError: where the disk is full; shards that are there stay.
    """
    metadata = {
        "format": RECORDING.format,
        "run": run,
        "noise": shard.noise,
        "noise_sha256": shard.noise_sha256,
        "scale": repr(shard.scale),
        "inputs": json.dumps(shard.inputs),
        "sha256": checksum(number, shard),
    }
    path = shard_file(folder, number)
    try:
        weights.write(path, {"states": shard.states, "outputs": shard.outputs}, metadata)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); make room and record again: the shards before it are kept"
        ) from error


def read_shard(folder: Path, number: int, run: str, verify: bool = True) -> Shard:
    """Maps a shard into memory.

    Args:
        folder: of the recording.
        number: of the shard.
        run: hash of the recording's settings.
        verify: compare the checksum, which reads the file through.

    Raises:
        FileNotFoundError: where it is missing.
        ValueError: for a file of another recording, a corrupt one, or one whose checksum differs.
    """
    path = weights.check(shard_file(folder, number))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("run") != run:
            raise ValueError(f"{path} belongs to another recording than {folder / RECORDING.settings}; move it away")
        try:
            shard = Shard(
                file.get_tensor("states"),
                file.get_tensor("outputs"),
                metadata["noise"],
                float(metadata["scale"]),
                json.loads(metadata["inputs"]),
                metadata["noise_sha256"],
                metadata["sha256"],
            )
        except (KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
    if verify and checksum(number, shard) != shard.sha256:
        raise ValueError(f"the checksum of {path} is not the one it was written with: the file is damaged; {_AGAIN}")
    return shard


def _read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); record again into the same folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; record again into the same folder")
    return found


def _firsts(path: Path, index: Mapping[str, Any], count: int) -> list[int]:
    """The first sample of each shard, from an index that covers all samples in order."""
    first, firsts = 0, list[int]()
    try:
        for entry in index["shards"]:
            firsts.append(first)
            if entry["first"] != first or entry["count"] < 1:
                break
            first += entry["count"]
        else:
            if first == index["count"] == count:
                return firsts
    except (KeyError, TypeError):
        pass
    raise ValueError(
        f"{path} does not list shards of {count} samples in order; record again, which draws nothing that is there"
    )


class Trajectories(Dataset[dict[str, Any]]):
    """Recorded trajectories by sample; files are mapped into memory, so that what is not looked at is not loaded.

    Item i is a dict: "index", i; "inputs", the arguments of the sample in JSON's terms (tensors by their hash); "states",
    (len(at), ...), and "outputs", (len(outputs_at), ...), where they were kept.

    Args:
        folder: of a complete recording, see `flowkit.distill.trajectories.record`.
        verify: compare the checksum of each shard when it is first opened, and of the noise made again.

    Attributes:
        settings: what the recording depends on.
        grid: the levels that were walked, N + 1, with the solver.
        at: numbers of the kept states, among 0 ... N; empty where none were kept.
        outputs_at: numbers of the kept outputs, among 0 ... N - 1; empty where none were kept.
        shape: of one state.

    Raises:
        FileNotFoundError: where there is no complete recording.
        ValueError: for a folder of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True) -> None:
        self.folder = Path(folder)
        index, settings = self.folder / INDEX, self.folder / RECORDING.settings
        if not settings.is_file() or not index.is_file():
            raise FileNotFoundError(f"no complete recording in {folder}; record it, or go on with one that was stopped, with "
                                    "flowkit.distill.record")  # fmt: skip
        self.settings, found = _read(settings), _read(index)
        if self.settings.get("format") != RECORDING.format:
            raise ValueError(f"{settings} is of the format {self.settings.get('format')!r}; record again")
        self.run = run_id(self.settings)
        self.grid = Grid.from_dict(self.settings["grid"])
        at, keep = self.settings["at"], self.settings["keep"]
        self.at = list(at) if "state" in keep else []
        self.outputs_at = [i for i in at if i < len(self.grid)] if "output" in keep else []
        self.shape, self.dtype = tuple(self.settings["shape"]), getattr(torch, self.settings["dtype"])
        self._count, self._seed = self.settings["samples"]["count"], self.settings["own_seed"]
        self.firsts = _firsts(index, found, self._count)
        self._verify, self._verified = verify, set[int]()
        self._maps: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Returns the number of samples."""
        return int(self._count)

    def scheduler(self) -> RectifiedFlowScheduler:
        """Returns a scheduler as the one that walked."""
        config = {**self.settings["scheduler"], "_class_name": RectifiedFlowScheduler.__name__}
        scheduler: RectifiedFlowScheduler = RectifiedFlowScheduler.from_config(config)
        return scheduler

    def check_deterministic(self) -> None:
        """Refuses trajectories whose steps drew noise, so that no step leads from one state to the next.

        Raises:
            ValueError: for a stochastic solver, or eta.
        """
        scheduler = self.scheduler()
        scheduler.set_grid(self.grid)
        rows = scheduler.plan(len(self.grid), None, None, None).rows()
        if self.settings["samples"]["call"].get("eta") or any(row.c for row in rows):
            raise ValueError(f"the trajectories in {self.folder} drew noise at every step (solver {self.grid.solver!r}); record "
                             "some with solver='euler' and no eta")  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: not the mapped files."""
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one sample.

        Raises:
            IndexError: for an index beyond the samples.
            ValueError: for a shard that is damaged, and for noise that is no longer what it was.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not one of {len(self)}")
        number = bisect.bisect_right(self.firsts, index) - 1
        shard, row = self._shard(number), index - self.firsts[number]
        item: dict[str, Any] = {"index": index, "inputs": shard.inputs[row]}
        if self.at:
            states = shard.states[row].clone()
            if shard.noise not in ("stored", "none"):
                seeds = [rng.sample_seed(self._seed, index)]
                states = torch.cat([initial(shard.noise, self.shape, self.dtype, seeds, shard.scale), states])
            item["states"] = states
        if self.outputs_at:
            item["outputs"] = shard.outputs[row].clone()
        return item

    def states(self, samples: Sequence[int], at: Sequence[int] | None = None) -> Tensor:
        """Returns kept states of several samples; errors as of one.

        Args:
            samples: their numbers, B of them.
            at: positions among the kept states; None means all.

        Returns:
            (B, len(at), ...).
        """
        wanted = [range(len(self.at))[i] for i in (range(len(self.at)) if at is None else at)]
        found = torch.empty(len(samples), len(wanted), *self.shape, dtype=self.dtype)
        again = dict[tuple[str, float], list[int]]()
        for place, index in enumerate(samples):
            number = bisect.bisect_right(self.firsts, index) - 1
            shard = self._shard(number)
            own, drawn = shard.states[index - self.firsts[number]], shard.noise not in ("stored", "none")
            for column, position in enumerate(wanted):
                if not drawn or position:
                    found[place, column] = own[position - drawn]
            if drawn and 0 in wanted:
                again.setdefault((shard.noise, shard.scale), []).append(place)
        for (kind, scale), places in again.items():
            seeds = [rng.sample_seed(self._seed, samples[place]) for place in places]
            found[places, wanted.index(0)] = initial(kind, self.shape, self.dtype, seeds, scale)
        return found

    def _shard(self, number: int) -> Shard:
        if number not in self._maps:
            if len(self._maps) >= _OPEN:
                self._maps.pop(next(iter(self._maps)))
            fresh = self._verify and number not in self._verified
            shard = read_shard(self.folder, number, self.run, fresh)
            if fresh:
                self._check_noise(number, shard)
                self._verified.add(number)
            self._maps[number] = shard
        return self._maps[number]

    def _check_noise(self, number: int, shard: Shard) -> None:
        if shard.noise in ("stored", "none"):
            return
        first = self.firsts[number]
        seeds = [rng.sample_seed(self._seed, i) for i in range(first, first + len(shard.inputs))]
        if digest(initial(shard.noise, self.shape, self.dtype, seeds, shard.scale)) != shard.noise_sha256:
            raise ValueError(f"the noise of {shard_file(self.folder, number)} comes out otherwise than when it was recorded: this "
                             "torch draws other numbers; record again with it")  # fmt: skip

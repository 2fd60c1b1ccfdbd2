"""Real images among the pairs: each beside the noise that it comes from (Lee, Lin & Fanti 2024, arXiv 2405.20320, section 4).

A student that sees samples of its teacher alone also learns where those are wrong. Real images, with the noise to which the
teacher's own probability-flow ODE leads them, belong to the same coupling, and draw the student towards the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkit import rng
from flowkit.distill import flow_data, shards
from flowkit.distill.conditions import Conditions
from flowkit.distill.encode import Encoder
from flowkit.distill.invert import check_noise, upwards, walk
from flowkit.distill.shards import RECORDING, Shard, Trajectories
from flowkit.distill.trajectories import batches_of_shard
from flowkit.eval.processes import Processes
from flowkit.eval.runs import open_run, write_json
from flowkit.grids import Grid
from flowkit.pipelines.sampling import Arguments


class Real:
    """The real images of a distillation.

    Args:
        pipe: the teacher; pixels or latents of square images.
        data: images, with labels or captions where the teacher takes them, see `flowkit.distill.data.open_examples`.
        call: arguments of the teacher that all images share.
        seed: of the noise of an encoder that gives a distribution.

    Attributes:
        description: what a distillation depends on.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as of `flowkit.distill.flow_data.prepare`.
    """

    def __init__(self, pipe: Any, data: Any, call: Mapping[str, Any], seed: int) -> None:  # noqa: ANN401
        size = call.get("height")
        if call.get("width", size) != size:
            raise ValueError(
                f"real images are square, and call asks for {size} x {call['width']} pixels; leave out real, or height and width"
            )
        self._pipe, self._call, self._seed = pipe, dict(call), seed
        self._material = flow_data.prepare(pipe, data, size=size, alpha="refuse", call=call)
        self.description = {"data": self._material.examples.description, "decoding": asdict(self._material.decoding)}

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._material.examples)

    def inputs(self, index: int) -> Arguments:
        """Returns the pipeline's arguments of an image."""
        return self._material.inputs[int(self._material.numbers[index])]

    def check(self, predict: Conditions) -> None:
        """Refuses images that cannot be read, and a teacher that does not lead them to noise.

        Args:
            predict: of the teacher.

        Raises:
            ValueError: for a broken file, images of another size, guidance, and a network that does not tell the noise.
        """
        if predict.guided:
            raise ValueError("real images are led to noise without guidance, which guided samples are not made by; leave out real, "
                             "or guide with guidance_scale=1 in call")  # fmt: skip
        check_noise(predict)
        self._material.examples.check(self._material.decoding)
        Encoder(self._pipe, predict.shape).check(self._material.examples[0], self.inputs, self._call)

    def evaluations(self, predict: Conditions, grid: Grid) -> int:
        """Returns how many evaluations of the network the noise of all images takes, on the levels of a sampler."""
        return len(self) * len(upwards(predict, grid))

    def record(
        self,
        predict: Conditions,
        network: nn.Module,
        pairs: Trajectories,
        folder: Path,
        first: int,
        batch_size: int,
        processes: Processes,
        on_rows: Callable[[int, int], None],
    ) -> Trajectories:
        """Records each image and its noise, on the levels of the teacher's pairs; goes on where a killed call stopped.

        Args:
            predict: conditioning, of the images too.
            network: that is followed.
            pairs: of the same teacher.
            folder: of the recording.
            first: number of the first image in ``predict``.
            batch_size: images at a time.
            processes: that share the work.
            on_rows: called with the number of evaluations that were made, and of all that this process makes.

        Raises:
            OSError: where the disk fills up.
            ValueError: for a broken image, and noise that is not finite.
        """
        size = math.prod(pairs.shape) * pairs.dtype.itemsize * 2
        step = batch_size * batches_of_shard(size, batch_size)
        blocks = [range(low, min(low + step, len(self))) for low in range(0, len(self), step)]
        settings = {
            **{name: pairs.settings[name] for name in ("format", "grid", "scheduler", "shape", "dtype")},
            "keep": ["state"],
            "at": [0, len(pairs.grid)],
            "samples": {"count": len(self), **self.description},
            "own_seed": self._seed,
        }
        settings = json.loads(json.dumps(settings))
        processes.agree(lambda: open_run(folder, settings, True, RECORDING) if processes.main else None)
        rows, encode = upwards(predict, pairs.grid), Encoder(self._pipe, predict.shape)

        def told(count: int) -> None:
            on_rows(count, total)

        def drawn(part: range) -> Tensor:
            x = self._encoded(encode, part)
            noise = walk(predict, network, rows, x, range(first + part.start, first + part.stop), told)
            if not noise.isfinite().all():
                raise ValueError(
                    f"the noise of the real images {part.start} to {part.stop - 1} is not finite; try float32, or more evaluations"
                )
            return torch.stack([noise, x], 1).to("cpu", pairs.dtype)

        def draw(numbers: Sequence[int]) -> None:
            for k in numbers:
                states = torch.cat(
                    [drawn(blocks[k][low : low + batch_size]) for low in range(0, len(blocks[k]), batch_size)]
                )
                none = states.new_empty(len(states), 0, *pairs.shape)
                shard = Shard(states, none, "stored", 1.0, [{}] * len(states), "")
                shards.write_shard(folder, k, shards.run_id(settings), shard)

        absent = [k for k in range(len(blocks)) if not shards.shard_file(folder, k).is_file()]
        missing = processes.share(absent)
        mine = missing[processes.rank :: processes.count]
        total = len(rows) * sum(len(blocks[k]) for k in mine)
        processes.agree(lambda: draw(mine))
        index = {"count": len(self), "shards": [{"first": block.start, "count": len(block)} for block in blocks]}
        processes.agree(lambda: write_json(folder / shards.INDEX, index) if processes.main else None)
        processes.wait()
        return Trajectories(folder)

    def _encoded(self, encode: Encoder, part: Sequence[int]) -> Tensor:
        """Some of the images as samples."""
        images = torch.stack([self._material.examples[i] for i in part])
        return encode(images, lambda *shape: rng.normal(shape, self._seed, part, tag=rng.DATA))


class Beside(Trajectories):
    """Pairs of a teacher, and after them those of real images.

    Args:
        pairs: of the teacher.
        real: see `Real.record`.
        first: number of the first image; samples of ``pairs`` from there on are not used.
    """

    def __init__(self, pairs: Trajectories, real: Trajectories, first: int) -> None:
        super().__init__(pairs.folder)
        self._real, self._first = real, first

    def states(self, samples: Sequence[int], at: Sequence[int] | None = None) -> Tensor:
        """Returns kept states of several samples, those of images at the first level and the last alone."""
        wanted = [range(len(self.at))[i] for i in (range(len(self.at)) if at is None else at)]
        drawn = [place for place, number in enumerate(samples) if number < self._first]
        taken = [place for place, number in enumerate(samples) if number >= self._first]
        found = torch.empty(len(samples), len(wanted), *self.shape, dtype=self.dtype)
        found[drawn] = super().states([samples[place] for place in drawn], wanted)
        if taken:
            own = [self._real.at.index(self.at[i]) for i in wanted]
            found[taken] = self._real.states([samples[place] - self._first for place in taken], own)
        return found

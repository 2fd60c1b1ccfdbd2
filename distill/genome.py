"""What evolution varies: the anchors of a grid, a guidance scale for each step, and the layers that each step leaves out.

A genome is canonical: two that would run alike are equal. Anchors and skipped layers are sets, kept in order, of a fixed size, so
every child is a grid of K steps that begins at the noisiest level (AutoDiffusion's own search, Li et al. 2023, arXiv 2309.10438,
keeps lists, whose repeats run as fewer steps and whose first step may drift from pure noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from flowkit.distill.shortest import Nodes

Draw = np.random.Generator
_FAR, _RUN = 0.3, 0.3  # probability that an anchor goes anywhere; that its neighbour moves along where it goes near


class Genome(NamedTuple):
    """A way to sample.

    Attributes:
        nodes: K + 1 anchors, the first and the last among them.
        scales: guidance scale of each step; empty where scales are not searched.
        skipped: what is left out, ``step L + layer`` of L layers, in order.
    """

    nodes: Nodes
    scales: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join("-".join(f"{v:g}" for v in part) for part in self)


@dataclass(frozen=True)
class Space:
    """All genomes of one number of steps.

    Attributes:
        anchors: fine steps A.
        steps: K.
        forbidden: inner anchors that none visits.
        forced: inner anchors that all visit.
        scales: guidance scales to choose from, rising; empty: none is chosen.
        layers: of the network, L.
        skips: how many of the K L layers of a run are left out.
    """

    anchors: int
    steps: int
    forbidden: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    layers: int = 0
    skips: int = 0

    @cached_property
    def free(self) -> list[int]:
        """Inner anchors that may be chosen or not."""
        return [node for node in range(1, self.anchors) if node not in self.forbidden and node not in self.forced]

    @property
    def chosen(self) -> int:
        """How many of them a genome has."""
        return self.steps - 1 - len(self.forced)

    @property
    def size(self) -> int:
        """Number of genomes."""
        grids = math.comb(len(self.free), self.chosen)
        scales = int(max(1, len(self.scales)) ** self.steps)
        return grids * scales * math.comb(self.steps * self.layers, self.skips)

    def plain(self, nodes: Nodes, scale: float | None = None) -> Genome:
        """Returns a grid with one scale at all steps, and skipped layers spread evenly."""
        cells = self.steps * self.layers
        skipped = tuple((2 * i + 1) * cells // (2 * self.skips) for i in range(self.skips))
        return Genome(nodes, () if scale is None else (scale,) * self.steps, skipped)

    def random(self, draw: Draw) -> Genome:
        """Returns any genome."""
        cells = range(self.steps * self.layers)
        scales = tuple(self.scales[i] for i in draw.integers(len(self.scales), size=self.steps)) if self.scales else ()
        return Genome(self._path(_some(draw, self.free, self.chosen)), scales, _some(draw, cells, self.skips))

    def crossed(self, draw: Draw, one: Genome, other: Genome) -> Genome:
        """Returns a child: sets of what either parent has, and each step's scale from one of them."""
        nodes = sorted((set(one.nodes) | set(other.nodes)) & set(self.free))
        scales = tuple(pair[draw.integers(2)] for pair in zip(one.scales, other.scales, strict=True))
        skipped = sorted({*one.skipped, *other.skipped})
        return Genome(self._path(_some(draw, nodes, self.chosen)), scales, _some(draw, skipped, self.skips))

    def mutated(self, draw: Draw, genome: Genome) -> Genome:
        """Returns a genome with one thing changed: an anchor or a run of them moved, a scale, or a skipped layer."""
        kinds: list[Callable[[Draw, Genome], Genome]] = []
        if self.chosen and len(self.free) > self.chosen:
            kinds.append(self._moved)
        if len(self.scales) > 1:
            kinds.append(self._rescaled)
        if self.skips and self.skips < self.steps * self.layers:
            kinds.append(self._swapped)
        return kinds[draw.integers(len(kinds))](draw, genome) if kinds else genome

    def _moved(self, draw: Draw, genome: Genome) -> Genome:
        """An anchor goes anywhere, or by a power of two, with neighbours that keep their distance from it."""
        nodes, own = genome.nodes, [i for i, node in enumerate(genome.nodes) if node in self.free]
        first = own[draw.integers(len(own))]
        if draw.random() < _FAR:
            others = [node for node in self.free if node not in nodes]
            moved = (*nodes[:first], others[draw.integers(len(others))], *nodes[first + 1 :])
            return genome._replace(nodes=tuple(sorted(moved)))
        stop = first + 1
        while stop in own and draw.random() < _RUN:
            stop += 1
        stride = 2 ** int(draw.integers(max(1, self.anchors // (2 * self.steps)).bit_length()))
        low, high = nodes[first - 1] + 1 - nodes[first], nodes[stop] - 1 - nodes[stop - 1]
        step = min(max(stride * (1 if draw.random() < 0.5 else -1), low), high)
        run = tuple(node + step for node in nodes[first:stop])
        return genome._replace(nodes=(*nodes[:first], *run, *nodes[stop:])) if {*run} <= {*self.free} else genome

    def _rescaled(self, draw: Draw, genome: Genome) -> Genome:
        """The scale of a step becomes the next smaller or larger one."""
        step = int(draw.integers(self.steps))
        near = self.scales.index(genome.scales[step]) + (1 if draw.random() < 0.5 else -1)
        scale = self.scales[min(max(near, 0), len(self.scales) - 1)]
        return genome._replace(scales=(*genome.scales[:step], scale, *genome.scales[step + 1 :]))

    def _swapped(self, draw: Draw, genome: Genome) -> Genome:
        """A skipped layer is run, and one that was run skipped."""
        run = [cell for cell in range(self.steps * self.layers) if cell not in genome.skipped]
        out = genome.skipped[draw.integers(self.skips)]
        swapped = {*genome.skipped} - {out} | {run[draw.integers(len(run))]}
        return genome._replace(skipped=tuple(sorted(swapped)))

    def _path(self, chosen: Iterable[int]) -> Nodes:
        return (0, *sorted({*chosen, *self.forced}), self.anchors)

    def parameters(self, genome: Genome) -> dict[str, Any]:
        """Returns a genome as parameters of a study, by name."""
        return {
            **{f"anchor {i}": node for i, node in enumerate(genome.nodes[1:-1], 1)},
            **{f"scale {i}": scale for i, scale in enumerate(genome.scales)},
            **{f"skipped {i}": cell for i, cell in enumerate(genome.skipped)},
        }

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What each parameter may be, by name."""
        cells = self.steps * self.layers
        return {
            **{f"anchor {i}": IntDistribution(1, self.anchors - 1) for i in range(1, self.steps)},
            **{f"scale {i}": CategoricalDistribution(self.scales) for i in range(self.steps) if self.scales},
            **{f"skipped {i}": IntDistribution(0, cells - 1) for i in range(self.skips)},
        }

    def genome(self, parameters: Mapping[str, Any]) -> Genome | None:
        """Returns the genome of such parameters; None where some are missing."""
        if not self.distributions.keys() <= parameters.keys():
            return None
        inner, scales = self.steps - 1, self.steps if self.scales else 0
        values = [parameters[name] for name in self.distributions]
        nodes, rest = (0, *values[:inner], self.anchors), values[inner:]
        return Genome(nodes, tuple(rest[:scales]), tuple(rest[scales:]))


def _some(draw: Draw, among: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of them, in order."""
    return tuple(among[i] for i in sorted(draw.choice(len(among), count, replace=False))) if count else ()

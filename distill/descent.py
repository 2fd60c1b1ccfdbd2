"""Coordinate descent over anchors: the levels of a grid moved, alone and with their neighbours, while an error falls."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from flowkit.distill.shortest import Nodes


class Descent:
    """A search of limited length; no path is measured twice.

    Args:
        error: of a path; the same path must give the same number.
        trials: number of paths that may be measured.
        forbidden: nodes that no path may visit.
        forced: nodes that every path must visit.

    Attributes:
        found: error of each path measured so far.
    """

    def __init__(
        self,
        error: Callable[[Nodes], float],
        trials: int,
        forbidden: Container[int] = (),
        forced: Sequence[int] = (),
    ) -> None:
        self._error, self._trials, self._forbidden, self._forced = error, trials, forbidden, forced
        self.found: dict[Nodes, float] = {}

    def best(self, starts: Sequence[Nodes]) -> Nodes:
        """Returns the best path found from any of the starts, none of them better.

        Every start is measured first. Each then has an equal share of the trials that are left, the best start first, and what one
        does not need goes to the next.

        Args:
            starts: paths of the same number of edges, allowed ones.
        """
        self._limit = self._trials
        starts = sorted(dict.fromkeys(starts), key=self._value)
        for i, start in enumerate(starts):
            self._limit = len(self.found) + (self._trials - len(self.found)) // (len(starts) - i)
            self._descend(start)
        return min(self.found, key=lambda path: (self.found[path], path))

    def _value(self, path: Nodes) -> float:
        """The error of a path; infinity where the trials are used up."""
        if path not in self.found:
            if len(self.found) >= self._limit:
                return float("inf")
            self.found[path] = self._error(path)
        return self.found[path]

    def _descend(self, path: Nodes) -> None:
        """Moves one node at a time, by strides that halve when no move helps; then neighbours together, by one anchor.

        Nodes that are near to each other bar one another's way: on an additive objective with one valley the second round doubles
        the share of searches that end at its bottom.
        """
        last = len(path) - 1
        path = self._walk(path, [(i, i + 1) for i in range(1, last)], max(1, path[-1] // (2 * len(path))))
        self._walk(path, [(i, i + size) for size in range(1, last) for i in range(1, last + 1 - size)], 1)

    def _walk(self, path: Nodes, runs: Sequence[tuple[int, int]], stride: int) -> Nodes:
        """Moves runs of nodes, from the first to before the second of each pair, while that helps."""
        value = self._value(path)
        while stride:
            moved = False
            for first, stop in runs:
                for step in (stride, -stride):
                    while (other := self._shifted(path, first, stop, step)) and (new := self._value(other)) < value:
                        path, value, moved = other, new, True
            if not moved:
                stride //= 2
        return path

    def _shifted(self, path: Nodes, first: int, stop: int, step: int) -> Nodes | None:
        """The path with a run of nodes moved, as far as the neighbours let it; None where it does not move or must not."""
        run = path[first:stop]
        step = min(max(step, path[first - 1] - run[0] + 1), path[stop] - run[-1] - 1)
        moved = tuple(node + step for node in run)
        if not step or any(node in self._forced for node in run) or any(node in self._forbidden for node in moved):
            return None
        return (*path[:first], *moved, *path[stop:])

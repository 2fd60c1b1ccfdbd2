"""Coordinate descent over anchors: the levels of a grid moved one by one while an error falls."""

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
        """Moves one node at a time, by strides that halve when no move helps."""
        value, stride = self._value(path), max(1, path[-1] // (2 * len(path)))
        while stride:
            moved = False
            for i in range(1, len(path) - 1):
                for step in (stride, -stride):
                    while (other := self._shifted(path, i, step)) and (new := self._value(other)) < value:
                        path, value, moved = other, new, True
            if not moved:
                stride //= 2

    def _shifted(self, path: Nodes, i: int, step: int) -> Nodes | None:
        """The path with one node moved, as far as its neighbours let it; None where that is no other path or not allowed."""
        node = min(max(path[i] + step, path[i - 1] + 1), path[i + 1] - 1)
        if node == path[i] or node in self._forbidden or path[i] in self._forced:
            return None
        return (*path[:i], node, *path[i + 1 :])

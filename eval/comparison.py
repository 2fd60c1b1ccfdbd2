"""Two evaluations with the same seeds, and several with other seeds: differences and spreads with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from flowkit.eval.intervals import Figure, paired, repeated
from flowkit.eval.provenance import first_difference
from flowkit.eval.results import Result

Evaluation = Result | str | PathLike[str]
# What makes two sets of samples pairs: sample i of both began from the same noise and was asked for the same.
_PAIRED = ("count", "seed", "inputs_sha256")


def compare(one: Evaluation, other: Evaluation, level: float = 0.95) -> dict[str, Figure]:
    """Returns the differences ``one - other`` of two evaluations with the same seeds, inputs and reference.

    Samples of one noise err alike, so the difference has a much smaller standard error than either figure, see
    `flowkit.eval.intervals.paired`.

    Args:
        one: a result, or the folder or result.json of one.
        other: likewise.
        level: of the intervals, between 0 and 1.

    Returns:
        A figure for each key that both have with its delete-one values ("fid"); its details hold the "interval".

    Raises:
        FileNotFoundError: where there is no result.
        ValueError: for results that do not pair; names what differs.
    """
    a, b = _loaded(one), _loaded(other)
    for name in _PAIRED:
        values = [r.spec["samples"].get(name) for r in (a, b)]
        if values[0] != values[1]:
            raise ValueError(
                f"the samples do not pair: their {name} is {values[0]!r} and {values[1]!r}; draw both alike"
            )
    if a.spec["pipeline"] is None or b.spec["pipeline"] is None:
        raise ValueError("images that no pipeline drew have no seeds, so they do not pair; evaluate the pipelines")
    keys = [key for key in a if key in b and all("left_out" in r.spec["features"][key] for r in (a, b))]
    if not keys:
        raise ValueError(
            f"no figure of both has a jackknife (found: {', '.join(a)}, and {', '.join(b)}); measure 'fid' in both"
        )
    for key in keys:
        _check_same_measure(key, a, b)
    return {key: paired(a.figure(key), b.figure(key), level) for key in keys}


def summarize(results: Sequence[Evaluation], level: float = 0.95) -> dict[str, Figure]:
    """Returns means over evaluations that differ in nothing but their seeds, such as three blocks of 50,000.

    Args:
        results: at least two, as results, folders or result.json files.
        level: of the intervals, between 0 and 1.

    Returns:
        The mean of each figure that all have; the standard error is from its spread, and the details hold "values", "spread",
        "smallest" and "interval", see `flowkit.eval.intervals.repeated`.

    Raises:
        FileNotFoundError: where there is no result.
        ValueError: for fewer than two, for equal seeds, or for results that differ in more than the seed; names what differs.
    """
    loaded = [_loaded(r) for r in results]
    if len(loaded) < 2:
        raise ValueError(f"a spread needs at least 2 evaluations, got {len(loaded)}; evaluate with another seed")
    seeds = [r.spec["samples"].get("seed") for r in loaded]
    if len(set(seeds)) < len(seeds) or None in seeds:
        raise ValueError(f"the evaluations must have different seeds, got {seeds}; draw another block of seeds")
    for other in loaded[1:]:
        if found := first_difference(_but_seed(loaded[0]), _but_seed(other)):
            place, here, there = found
            raise ValueError(
                f"the evaluations differ in {place}, {here!r:.60} and {there!r:.60}; change nothing but the seed"
            )
    keys = [key for key in loaded[0] if all(key in r for r in loaded)]
    for key in keys:
        for other in loaded[1:]:
            _check_same_measure(key, loaded[0], other)
    return {key: repeated([r[key] for r in loaded], level) for key in keys}


def _loaded(evaluation: Evaluation) -> Result:
    return evaluation if isinstance(evaluation, Result) else Result.load(evaluation)


def _check_same_measure(key: str, one: Result, other: Result) -> None:
    """Refuses figures of other features, or against another reference."""
    measures = [{p: r.spec["features"][key][p] for p in ("extractor", "reference")} for r in (one, other)]
    for measure in measures:
        measure["reference"] = {k: v for k, v in measure["reference"].items() if k != "origin"}
    if found := first_difference(measures[0], measures[1]):
        place, here, there = found
        raise ValueError(f"{key!r} was measured with {place} {here!r:.60} and {there!r:.60}; measure both alike")


def _but_seed(result: Result) -> Mapping[str, Any]:
    samples = {k: v for k, v in result.spec["samples"].items() if k not in ("seed", "sha256")}
    pipeline = {k: v for k, v in (result.spec["pipeline"] or {}).items() if k != "device"}
    return {"samples": samples, "pipeline": pipeline}

"""Figures with their standard errors and the record of how they came about."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.eval import runs
from flowkit.eval.intervals import Figure

_FORMAT = "flowkit.result/1"


class Result(Mapping[str, float]):
    """Figures by key: "fid" of the first extractor, "fid/NAME" of another.

    Attributes:
        se: standard errors under the same keys: the noise of drawing the samples, for the reference as it is; NaN where it is
            not known.
        spec: what was measured and how, ready for JSON: everything needed to repeat it.
        images: the first ``keep`` samples, uint8 (keep, C, H, W).
    """

    def __init__(
        self,
        figures: Mapping[str, float],
        se: Mapping[str, float],
        spec: Mapping[str, Any],
        images: Tensor | None = None,
    ) -> None:
        self._figures, self.se, self.spec = dict(figures), dict(se), dict(spec)
        self.images = torch.empty(0, dtype=torch.uint8) if images is None else images

    def __getitem__(self, key: str) -> float:
        """Returns the figure of a metric."""
        return self._figures[key]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the keys."""
        return iter(self._figures)

    def __len__(self) -> int:
        """Returns the number of figures."""
        return len(self._figures)

    def __repr__(self) -> str:
        """Shows figures, standard errors and the number of images."""
        figures = ", ".join(f"{key}={value:.4g}±{self.se[key]:.2g}" for key, value in self.items())
        return f"Result({figures}, num_images={self.spec['samples']['count']})"

    def figure(self, key: str) -> Figure:
        """Returns a figure with its standard error and details, for `flowkit.eval.intervals`."""
        return Figure(self[key], self.se[key], self.spec["features"][key])

    def to_json(self) -> dict[str, Any]:
        """Returns figures, errors (null where unknown) and record as values of JSON; numbers come back to the last bit."""
        figures = {
            k: {"value": v if math.isfinite(v) else None, "se": self.se[k] if math.isfinite(self.se[k]) else None}
            for k, v in self.items()
        }
        return {"format": _FORMAT, "figures": figures, "spec": self.spec}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes `to_json`, whole or not at all; the images are not in it."""
        runs.write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Result:
        """Reads what `save` wrote, or the result in the folder of an evaluation.

        Raises:
            FileNotFoundError: where there is none, or the evaluation is not finished.
            ValueError: for a file of something else.
        """
        path = Path(path)
        file = path / runs.RESULT if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no result at {file}; check the path, or finish the evaluation: run it again")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); run the evaluation again") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{file} is no result of an evaluation; pass its result.json or its folder")
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """Returns the result that `to_json` made, without its images."""
        figures = content["figures"].items()
        known = {(k, part): math.nan if f[part] is None else f[part] for k, f in figures for part in ("value", "se")}
        return cls({k: known[k, "value"] for k, _ in figures}, {k: known[k, "se"] for k, _ in figures}, content["spec"])

"""Small networks that judge predictions of x0 in the pipeline's own space, without decoding; trained by `train_evaluators`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit import weights
from flowkit.paths import Path

_FEATURES = 8


class LatentNetwork(nn.Module):
    """A small network of a prediction of x0 and its noise level; `LatentDiscriminator` and `LatentClassifier` build on it.

    Three convolutions, pooling to two cells along each side and two linear layers for samples of shape (C, H, W) or (C, F, H, W),
    three linear layers for any other shape. The noise level enters as flow time s in [0, 1], a monotone function of the log-SNR,
    through ``cos(pi k s)``, which scale and shift the first two layers. There is no normalisation and no dropout, so a score does
    not depend on the batch.

    Args:
        shape: shape of one sample.
        outputs: number of outputs.
        width: channels of the first layer; the others have twice as many.
        path: name of the model's path, which says what ``sigma`` is: "flow" (flow time) or any other (sigma/alpha).
        measured: pairs (s, reliability), s in [0, 1]; none means a reliability of 1.
    """

    def __init__(
        self, shape: Sequence[int], outputs: int, width: int, path: str, measured: Sequence[Sequence[float]]
    ) -> None:
        super().__init__()
        self.shape, self.width, self.path = tuple(shape), width, path
        self.measured = tuple((float(s), float(r)) for s, r in measured)
        if path not in ("flow", "vp", "cosine", "ve", "edm"):
            raise ValueError(f"unknown path {path!r}; choose flow, vp, cosine, ve or edm")
        wide = 2 * width
        if len(self.shape) in (3, 4):
            conv: Any = nn.Conv2d if len(self.shape) == 3 else nn.Conv3d
            pool: Any = nn.AdaptiveAvgPool2d(2) if len(self.shape) == 3 else nn.AdaptiveAvgPool3d(2)
            self.first = conv(self.shape[0], width, 3, padding=1)
            self.second = conv(width, wide, 3, padding=1, stride=2)
            cells = 2 ** (len(self.shape) - 1)
            self.rest = nn.Sequential(
                conv(wide, wide, 3, padding=1), nn.SiLU(), pool, nn.Flatten(), nn.Linear(cells * wide, wide), nn.SiLU()
            )
        else:
            self.first = nn.Linear(math.prod(self.shape), width)
            self.second = nn.Linear(width, wide)
            self.rest = nn.Sequential(nn.Linear(wide, wide), nn.SiLU())
        self.level = nn.Linear(_FEATURES, 2 * (width + wide))
        self.head = nn.Linear(wide, outputs)

    def logits(self, x0: Tensor, s: Tensor) -> Tensor:
        """Returns the outputs, (B, outputs).

        Args:
            x0: predictions, (B, *shape).
            s: flow time of their noise levels, (B,).

        Raises:
            ValueError: for predictions of another shape.
        """
        if x0.shape[1:] != self.shape:
            raise ValueError(
                f"got predictions of shape {tuple(x0.shape)}; this {type(self).__name__} takes (B, {str(self.shape)[1:]}"
            )
        weight = self.head.weight
        features = torch.cos(math.pi * s[:, None] * torch.arange(1, _FEATURES + 1, device=s.device))
        sizes = [self.width, self.width, 2 * self.width, 2 * self.width]
        scale1, shift1, scale2, shift2 = self.level(features.to(weight.device, weight.dtype)).split(sizes, dim=1)
        h = x0.to(weight.device, weight.dtype)
        h = h if len(self.shape) in (3, 4) else h.flatten(1)
        h = F.silu(_modulated(self.first(h), scale1, shift1))
        h = F.silu(_modulated(self.second(h), scale2, shift2))
        outputs: Tensor = self.head(self.rest(h))
        return outputs

    def at(self, x0: Tensor, sigma: float) -> Tensor:
        """Returns the outputs, (B, outputs), at one noise level in diffusers' ``sigmas``."""
        return self.logits(x0, torch.full((len(x0),), self.flow_time(sigma), device=x0.device))

    def flow_time(self, sigma: float) -> float:
        """Returns the flow time s of a noise level in diffusers' ``sigmas``."""
        return Path(self.path).at_level(sigma)  # type: ignore[arg-type]  # checked at construction

    def reliability(self, sigma: float) -> float:
        """Returns the measured power to discriminate, in [0, 1]: linear in flow time between what was measured, constant beyond."""
        if not self.measured:
            return 1.0
        s, values = zip(*sorted(self.measured), strict=True)
        return float(np.interp(self.flow_time(sigma), s, values))

    def sizes(self) -> dict[str, Any]:
        """Returns the arguments that build the network again."""
        return {"shape": self.shape, "width": self.width, "path": self.path, "measured": self.measured}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the sizes and the reliability in its metadata."""
        weights.write(path, self.state_dict(), {"kind": type(self).__name__, "sizes": json.dumps(self.sizes())})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote, in float32 and in inference mode.

        Raises:
            FileNotFoundError: where there is no file.
            ValueError: where the file holds something else.
        """
        tensors, metadata = weights.read(path)
        try:
            if metadata["kind"] != cls.__name__:
                raise ValueError(f"it holds a {metadata['kind']}")
            with torch.device("meta"):  # sizes that are not those of the tensors take no memory
                network = cls(**json.loads(metadata["sizes"]))
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a {cls.__name__} ({reason}); train_evaluators makes one") from error
        return network.eval().requires_grad_(False)


class LatentDiscriminator(LatentNetwork):
    """Fidelity: the log-odds that a prediction of x0 was made from noised data and not while sampling.

    Args:
        shape: shape of one sample.
        width: channels of the first layer.
        path: name of the model's path.
        measured: pairs (s, 2 AUC - 1) on held-out samples.

    Raises:
        ValueError: for an unknown path.
    """

    def __init__(
        self, shape: Sequence[int], width: int = 24, path: str = "flow", measured: Sequence[Sequence[float]] = ()
    ) -> None:
        super().__init__(shape, 1, width, path, measured)

    def forward(self, x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        """Returns the log-odds, (B,), of predictions, (B, *shape); the conditioning is not read."""
        return self.at(x0, sigma)[:, 0]


class LatentClassifier(LatentNetwork):
    """Alignment with a class: ``log p(label | x0_hat, sigma)``; labels come from the network's arguments.

    Args:
        shape: shape of one sample.
        classes: number of classes; a label outside [0, classes), "no class", scores 0.
        key: name of the network's argument with the labels, (B,) or one for all.
        width: channels of the first layer.
        path: name of the model's path.
        measured: pairs (s, (accuracy - 1/classes) / (1 - 1/classes)) on held-out samples.

    Raises:
        ValueError: for fewer than two classes or an unknown path.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        key: str = "class_labels",
        width: int = 24,
        path: str = "flow",
        measured: Sequence[Sequence[float]] = (),
    ) -> None:
        if classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {classes}; leave it out")
        super().__init__(shape, classes, width, path, measured)
        self.classes, self.key = classes, key

    def sizes(self) -> dict[str, Any]:
        """Returns the arguments that build the network again."""
        return {**super().sizes(), "classes": self.classes, "key": self.key}

    def forward(self, x0: Tensor, sigma: float, conditioning: Mapping[str, Any]) -> Tensor:
        """Returns ``log p``, (B,), of predictions, (B, *shape).

        Raises:
            ValueError: where the conditioning has no such labels.
        """
        labels = conditioning.get(self.key)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() not in (1, len(x0)):
            raise ValueError(f"the network's argument {self.key!r} holds no label for each of {len(x0)} rows, got {labels!r:.60}; "
                             f"it takes {', '.join(conditioning) or 'no arguments'}: set key=")  # fmt: skip
        log_p = self.at(x0, sigma).log_softmax(dim=1)
        labels = labels.reshape(-1).to(log_p.device).expand(len(x0))
        known = (labels >= 0) & (labels < self.classes)
        return torch.where(known, log_p.gather(1, labels.where(known, 0)[:, None])[:, 0], 0.0)


def _modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    extra = [1] * (h.ndim - 2)
    return h * (1 + scale.reshape(*scale.shape, *extra)) + shift.reshape(*shift.shape, *extra)

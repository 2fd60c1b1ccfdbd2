"""CLIP score: how well images fit the texts they were made from (Hessel et al. 2021, equation 1)."""

from __future__ import annotations

import math

import torch

from flowkit.eval.intervals import Figure
from flowkit.eval.mmd import blocks, check_pair
from flowkit.eval.spool import Rows

WEIGHT = 100.0


def clip_score(images: Rows, texts: Rows, weight: float = WEIGHT) -> Figure:
    """Returns the mean of ``weight max(cos(image, text), 0)`` over pairs.

    Args:
        images: embeddings (n, d), n >= 2, of any length.
        texts: embeddings of the texts (n, d), row by row those of the images.
        weight: 100 as most tools print it, 2.5 in the paper.

    Returns:
        The mean, and its standard error from the spread over pairs.

    Raises:
        ValueError: for shapes that differ, embeddings of length 0, or numbers that are not finite.
    """
    check_pair(images, texts)
    if len(images) != len(texts):
        raise ValueError(f"got {len(images)} images and {len(texts)} texts; give one text for each image")
    scores = []
    for (span, image), (_, text) in zip(blocks(images, 4096), blocks(texts, 4096), strict=True):
        a, b = image.double(), text.double().to(image.device)
        length = a.norm(dim=1) * b.norm(dim=1)
        if not length.all():
            row = span.start + int((length == 0).nonzero()[0])
            raise ValueError(f"the embedding of image or text {row} has length 0; embed it again")
        scores.append(((a * b).sum(dim=1) / length).clamp_min(0) * weight)
    values = torch.cat(scores)
    return Figure(float(values.mean()), float(values.std()) / math.sqrt(len(values)))

"""Inception score: ``exp E KL(p(y | x) || p(y))``, the mean over splits of the samples (Salimans et al. 2016, section 4)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from flowkit.eval.intervals import Figure
from flowkit.eval.spool import Rows

SPLITS, SEED, ADM_BLOCK = 10, 2020, 5000
_READ = 4096


def inception_score(logits: Rows, splits: int = SPLITS, seed: int | None = SEED) -> Figure:
    """Returns the score as torch-fidelity computes it: samples shuffled, cut into equal splits, the mean of their scores.

    Args:
        logits: (n, classes), n >= splits. TF-Inception's are those without the bias of the last layer.
        splits: how many; the score of small splits is biased downwards.
        seed: of the shuffle, torch-fidelity's for the same number; None keeps the order.

    Returns:
        The mean, and its standard error over splits; the details hold "scores", "std" (what torch-fidelity prints behind the sign
        +-, the spread without Bessel's correction) and "protocol".

    Raises:
        ValueError: for fewer samples than splits, or logits that are not finite.
    """
    n = len(logits)
    if splits < 1 or n < splits:
        raise ValueError(f"got {n} samples for splits={splits}; each split needs a sample")
    order = torch.arange(n) if seed is None else torch.from_numpy(np.random.RandomState(seed).permutation(n))
    bounds = [k * n // splits for k in range(splits + 1)]
    parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
    return _score(logits, parts, f"{splits} splits, " + ("in order" if seed is None else f"shuffled with seed {seed}"))


def inception_score_adm(logits: Rows, block: int = ADM_BLOCK) -> Figure:
    """Returns the score as ADM's evaluator computes it: contiguous blocks of 5000, not shuffled, a shorter one at the end.

    Files sorted by class give another score than shuffled ones.

    Args:
        logits: (n, classes), n >= 1.
        block: samples in a block.

    Returns:
        As `inception_score`.

    Raises:
        ValueError: for no samples, a block below 1, or logits that are not finite.
    """
    if block < 1 or not len(logits):
        raise ValueError(f"got {len(logits)} samples and block={block}; both must be at least 1")
    return _score(logits, list(torch.arange(len(logits)).split(block)), f"contiguous blocks of {block}")


def _score(logits: Rows, parts: list[Tensor], protocol: str) -> Figure:
    """With q the mean of p, the mean of KL(p || q) is that of ``sum p log p`` less ``sum q log q``: one pass, no p kept."""
    scores = []
    for part in parts:
        total, entropy = torch.zeros(logits.shape[1], dtype=torch.float64), 0.0
        for indices in part.split(_READ):
            logarithms = logits[indices].double().log_softmax(dim=1)
            if (broken := ~logarithms.isfinite().all(dim=1)).any():
                raise ValueError(f"the logits of sample {int(indices[broken.cpu()][0])} hold NaN or infinity; look at that "
                                 "image first")  # fmt: skip
            p = logarithms.exp()
            total += p.sum(dim=0).cpu()
            entropy += float((p * logarithms).sum())
        q = total / len(part)
        scores.append(math.exp(entropy / len(part) - float(torch.special.xlogy(q, q).sum())))
    se = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    details = {"scores": scores, "std": float(np.std(scores)), "protocol": protocol}
    return Figure(math.fsum(scores) / len(scores), se, details)

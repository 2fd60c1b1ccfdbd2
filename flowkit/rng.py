"""Keyed noise: the noise of sample i at step k is a pure function of (seed, i, k).

Philox4x32-10 (Salmon et al. 2011) with key = 64-bit seed and counter = (element // 4, tag, step, sample id). For one key it is
a bijection of the counter, so no two draws can collide and there is no state: batch size, number of devices, resume point and
memory format change nothing. Words become normals by Box-Muller with polynomials whose every operation is one rounded float32
operation in a fixed order, so that any device that follows IEEE 754 gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Generator, Tensor

# Tags keep the uses of one (seed, sample, step) apart.
STEP, CHURN, INITIAL, RESAMPLE, SEED, DATA = 1, 2, 3, 4, 5, 6

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
Word = TypeVar("Word", int, Tensor)
Words = tuple[Word, Word, Word, Word]
_default: ContextVar[list[int] | None] = ContextVar("_default", default=None)


def philox(counter: Words[Word], key: tuple[Word, Word]) -> Words[Word]:
    """Returns the four 32-bit words of Philox4x32-10.

    Args:
        counter: four words, Python ints or int64 tensors that broadcast.
        key: two words of the same kind.

    Returns:
        Four words in [0, 2**32), ints or int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps all 64 bits that are wanted.
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """Horner with one rounding an operation; never addcmul or lerp, which may fuse."""
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def _log(word: Tensor) -> Tensor:
    """log u of ``u = (word + 1) / 2^32`` in (0, 1], by ``u = 2^e (1 + f)`` with 1 + f in [2/3, 4/3)."""
    u = (word.to(torch.float32) + 1.0) * 2.0**-32
    shifted = u.view(torch.int32) - 0x3F2AAAAB
    exponent = (shifted >> 23).to(torch.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F2AAAAB).view(torch.float32) - 1.0
    # Near u = 1 the float32 u has lost the low bits of the word; f = u - 1 has room for them.
    f = torch.where(exponent == 0, (word - _MASK).to(torch.float32) * 2.0**-32, f)
    tail = _polynomial(f, -0.5000000036232775, 0.3333327140711886, -0.24999838706530425, 0.20007322080706375,
                       -0.1667809407325594, 0.14054218264230778, -0.12219617465540011, 0.13756538820699468,
                       -0.1273415209814931)  # fmt: skip
    return exponent * math.log(2.0) + (f * f * tail + f)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals from two words; the tail reaches 6.66 standard deviations."""
    radius = torch.sqrt(_log(radius_word) * -2.0)
    signed = angle_word - ((angle_word >> 31) << 32)
    quadrant = (signed + 2**29) >> 30
    y = (signed - quadrant * 2**30).to(torch.float32) * (math.pi / 2**31)
    z = y * y
    sin = y + y * (z * _polynomial(z, -0.16666664665041642, 0.008332748629335156, -0.00019587949187975376))
    cos = 1.0 + z * _polynomial(
        z, -0.4999999996924622, 0.04166665066682015, -0.0013887589992346585, 2.4463872821353058e-05
    )
    swap, negative = (quadrant & 1) == 1, (quadrant & 2) == 2
    first, second = torch.where(swap, -sin, cos), torch.where(swap, cos, sin)
    return radius * torch.where(negative, -first, first), radius * torch.where(negative, -second, second)


def normal(
    shape: Sequence[int],
    seeds: int | Sequence[int],
    ids: Sequence[int] | None = None,
    *,
    step: int = 0,
    tag: int = STEP,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws standard normal noise, keyed by (seed, sample id, step, tag) and the element's position in C order.

    Args:
        shape: shape of one sample.
        seeds: one seed for all samples, or one for each; any integer, taken modulo 2**64.
        ids: number of each sample within the run, >= 0; None means 0, 1, ... under one seed, and 0 for all where each sample
            has a seed of its own (so that a batch equals its samples drawn alone).
        step: index of the solver step, in [0, 2**32).
        tag: what the noise is for, one of STEP, CHURN, INITIAL, RESAMPLE, SEED, DATA.
        device: where to compute; None means CPU.
        dtype: type of the result; drawn in float32, then cast.

    Returns:
        Noise of shape (B, *shape), B = number of seeds or ids (one if both are single).

    Raises:
        ValueError: when the numbers of seeds and ids differ, or an id or step is out of range.
    """
    if isinstance(seeds, int):
        ids = [0] if ids is None else ids
        seeds = [seeds] * len(ids)
    ids = [0] * len(seeds) if ids is None else ids
    if len(seeds) != len(ids):
        raise ValueError(f"got {len(seeds)} seeds for {len(ids)} samples; pass one seed, or one for each sample")
    if not all(0 <= i <= _MASK for i in (step, *ids)):
        raise ValueError(f"step {step} and sample ids {list(ids)} must lie in [0, 2**32)")

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)[:, None]

    count = math.prod(shape)
    quad = torch.arange(-(-count // 4), dtype=torch.int64, device=device)[None]
    zero = torch.zeros_like(quad)
    counter = (quad, zero + tag, zero + step, column(ids))
    words = philox(counter, (column([s & _MASK for s in seeds]), column([(s >> 32) & _MASK for s in seeds])))
    normals = torch.stack(_box_muller(*words[:2]) + _box_muller(*words[2:]), dim=-1)
    return normals.flatten(1)[:, :count].reshape(len(seeds), *shape).to(dtype)


def sample_seed(seed: int, index: int) -> int:
    """Returns the 63-bit seed of the index-th sample of a run: what the harness gives to per-sample generators.

    torch's CPU generator reads the low 32 bits alone, so these never repeat within a run of 2**32 samples.

    Args:
        seed: seed of the run, any integer, taken modulo 2**64.
        index: number of the sample, in [0, 2**64).
    """
    key = seed & _MASK, (seed >> 32) & _MASK
    start, _, _, _ = philox((0, SEED, 1, 0), key)
    high, _, _, _ = philox((index & _MASK, SEED, 0, (index >> 32) & _MASK), key)
    low = (start + _WEYL[0] * index) & _MASK  # an odd factor: one to one modulo 2**32
    return low | (high & 0x7FFFFFFF) << 32


def keys(
    generator: Generator | Sequence[Generator] | None, batch: int, seed: int | None = None
) -> tuple[list[int], list[int]]:
    """Returns seeds and sample ids for keyed noise from what a diffusers pipeline is given as ``generator``.

    Args:
        generator: one generator (its initial seed serves all samples, numbered 0 ... B-1), a list with one for each sample
            (each its own seed, sample 0 of it), or None (the seeds of `default_seeds`, or else ``seed``).
        batch: number of samples B.
        seed: for want of a generator; None means a fresh random one.

    Raises:
        ValueError: for a list of another length than the batch.
    """
    if isinstance(generator, Sequence):
        if len(generator) != batch:
            raise ValueError(
                f"got {len(generator)} generators for a batch of {batch}; pass one, or one for each sample"
            )
        return [g.initial_seed() for g in generator], [0] * batch
    seeds = _default.get()
    if generator is None and seeds is not None and len(seeds) == batch:
        return seeds, [0] * batch
    if generator is not None:
        seed = generator.initial_seed()
    elif seed is None:
        seed = int(torch.randint(2**62, ()).item())
    return [seed] * batch, list(range(batch))


@contextmanager
def default_seeds(seeds: Sequence[int]) -> Iterator[None]:
    """Gives `keys` seeds for where it is given no generator: many pipelines keep theirs from ``scheduler.step``.

    Args:
        seeds: one for each sample of the batch; for another number of samples they do not count.
    """
    token = _default.set(list(seeds))
    try:
        yield
    finally:
        _default.reset(token)

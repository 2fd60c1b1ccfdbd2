from __future__ import annotations

import math

import pytest
import torch

from flowkit import rng

# Known answers of the Random123 library for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: rng.Words[int], key: tuple[int, int], words: rng.Words[int]) -> None:
    assert rng.philox(counter, key) == words
    a, b, c, d = (torch.tensor([v]) for v in counter)
    tensors = rng.philox((a, b, c, d), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(w) for w in tensors) == words


def test_normals_are_box_muller_in_float64_to_1e6() -> None:
    quad = torch.arange(100_000)
    zero = torch.zeros_like(quad)
    words = rng.philox((quad, zero + rng.STEP, zero + 3, zero + 7), (zero + 5, zero))
    exact = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log((radius_word.double() + 1) / 2**32))
        angle = angle_word.double() / 2**32 * 2 * math.pi
        exact += [radius * angle.cos(), radius * angle.sin()]
    drawn = rng.normal((400_000,), 5, [7], step=3)
    assert (drawn[0] - torch.stack(exact, -1).flatten()).abs().max() < 1e-6


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_noise_does_not_depend_on_the_batch(batch: int) -> None:
    whole = rng.normal((3, 5, 7), 11, range(64), step=2)
    parts = [rng.normal((3, 5, 7), 11, range(i, min(i + batch, 64)), step=2) for i in range(0, 64, batch)]
    assert torch.equal(torch.cat(parts), whole)
    alone = [rng.normal((3, 5, 7), [seed], step=2) for seed in range(5)]
    assert torch.equal(torch.cat(alone), rng.normal((3, 5, 7), range(5), step=2))


def test_every_part_of_the_key_matters() -> None:
    base = rng.normal((64,), 1, [0])
    others = [
        rng.normal((64,), 2, [0]),
        rng.normal((64,), 1 + 2**32, [0]),
        rng.normal((64,), 1, [1]),
        rng.normal((64,), 1, [0], step=1),
        rng.normal((64,), 1, [0], tag=rng.INITIAL),
    ]
    drawn = torch.cat([base, *others])
    assert (torch.corrcoef(drawn) - torch.eye(6)).abs().max() < 4 / math.sqrt(64)
    assert torch.equal(rng.normal((63,), 1, [0]), base[:, :63])


def test_statistics_of_a_stream() -> None:
    x = rng.normal((1_000_000,), 2026, [0])[0].double()
    n = len(x)
    assert abs(x.mean()) < 3.3 / math.sqrt(n)
    assert abs(x.var() - 1) < 3.3 * math.sqrt(2 / n)
    assert abs(x.pow(4).mean() - 3) < 3.3 * math.sqrt(96 / n)
    for lag in (1, 2, 3):  # partners of one quad among them
        assert abs((x[lag:] * x[:-lag]).mean()) < 3.3 / math.sqrt(n)
    ordered = x.sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    distance = (cdf - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at p = 1e-3
    shifted = 0.5 * (1 + torch.erf((ordered + 0.01) / math.sqrt(2)))
    assert (shifted - torch.arange(1, n + 1) / n).abs().max() > 1.95 / math.sqrt(n)


def test_seeds_of_samples_and_generators() -> None:
    seeds = [rng.sample_seed(0, i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= s < 2**63 for s in seeds)
    low = {rng.sample_seed(3, i) % 2**32 for i in range(100_000)}
    assert len(low) == 100_000  # random ones would meet
    assert rng.sample_seed(0, 3) != rng.sample_seed(1, 3)
    one = torch.Generator().manual_seed(9)
    assert rng.keys(one, 3) == ([9, 9, 9], [0, 1, 2])
    assert rng.keys([torch.Generator().manual_seed(s) for s in (4, 5)], 2) == ([4, 5], [0, 0])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        rng.keys([one, one], 3)


def test_default_seeds_stand_in_for_generators() -> None:
    with rng.default_seeds([4, 5]):
        assert rng.keys(None, 2) == ([4, 5], [0, 0])
        assert rng.keys(torch.Generator().manual_seed(9), 2) == ([9, 9], [0, 1])
        with rng.default_seeds([6]):
            assert rng.keys(None, 1) == ([6], [0])
            assert rng.keys(None, 2)[1] == [0, 1]  # fresh ones: the default is for another batch
        assert rng.keys(None, 2) == ([4, 5], [0, 0])
    assert rng.keys(None, 2) != rng.keys(None, 2)


def test_bad_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="2 seeds for 3 samples"):
        rng.normal((4,), [1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="must lie in"):
        rng.normal((4,), 1, [-1])

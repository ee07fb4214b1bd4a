"""Philox4x32-10 against the published known answers, and the normal numbers made of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from savl.ops.philox import philox_4x32, standard_normal

WORD = 2**32


def philox_by_hand(counter: int, key: int) -> list[int]:
    """The generator in Python integers, with its whole 128-bit counter, for one counter at a time."""
    words = [counter >> shift & WORD - 1 for shift in (0, 32, 64, 96)]
    low_key, high_key = key & WORD - 1, key >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second // WORD ^ words[1] ^ low_key,
            second % WORD,
            first // WORD ^ words[3] ^ high_key,
            first % WORD,
        ]
        low_key, high_key = (low_key + 0x9E3779B9) % WORD, (high_key + 0xBB67AE85) % WORD
    return words


def philox_of(counter: int, seed: int) -> list[int]:
    return [int(word) for word in philox_4x32(torch.tensor(counter), seed)]


def from_words(*words: int) -> int:
    """Little end first, as the known answers are printed."""
    return sum(word << 32 * position for position, word in enumerate(words))


# The three known answers of philox4x32-10 in the Random123 distribution (tests/kat_vectors): counter, key, output.
KNOWN_ANSWERS = [
    pytest.param((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="all-zeros"),
    pytest.param((WORD - 1,) * 4, (WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="all-ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="digits-of-pi",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_generator_written_by_hand_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    assert philox_by_hand(from_words(*counter), from_words(*key)) == list(answer)


def test_philox_gives_the_known_answer_whose_counter_fits() -> None:
    # The other two have bits in the high half of the counter, which is always zero here.
    assert philox_of(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("counter", [0, 1, 2, 12345, WORD - 1, WORD, 0x85A308D3_243F6A88 >> 1, 2**63 - 1])
@pytest.mark.parametrize("seed", [0, 1, WORD - 1, WORD, 0x299F31D0_A4093822, 2**63, 2**64 - 1])
def test_philox_equals_the_generator_written_by_hand(counter: int, seed: int) -> None:
    assert philox_of(counter, seed) == philox_by_hand(counter, seed)


def test_counters_of_any_shape_are_independent_of_each_other() -> None:
    counters = torch.tensor([[5, 0, 2**40], [7, 1, 3]])
    words = torch.stack(philox_4x32(counters, 9), dim=-1)
    assert words.shape == (2, 3, 4)
    assert words[1, 2].tolist() == philox_by_hand(3, 9)
    assert words[0, 2].tolist() == philox_by_hand(2**40, 9)


def test_words_are_uniform_over_32_bits() -> None:
    words = torch.stack(philox_4x32(torch.arange(50_000), 2024)).flatten()
    assert 0 <= int(words.min()) <= int(words.max()) < WORD
    counts = torch.bincount(words >> 24, minlength=256)
    expected = words.numel() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, standard deviation √510; five of them either way.
    assert abs(chi_square - 255) < 5 * math.sqrt(510), f"chi-square {chi_square:.0f}"
    ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
    limit = 5 * 0.5 / math.sqrt(words.numel())
    assert float((ones - 0.5).abs().max()) < limit, f"a bit is biased: {ones}"


# Normal numbers


@pytest.fixture(scope="module")
def normals() -> Tensor:
    return standard_normal((200_000,), 7).double()


def test_the_numbers_are_standard_normal(normals: Tensor) -> None:
    ordered = normals.sort().values
    count = normals.numel()
    cumulative = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    empirical = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = float((cumulative - empirical).abs().max())
    # Kolmogorov–Smirnov: a normal sample exceeds this once in a thousand seeds, and the seed is fixed.
    assert distance < 1.95 / math.sqrt(count), f"Kolmogorov–Smirnov distance {distance:.5f}"


@pytest.mark.parametrize(
    ("order", "moment", "deviation"),
    [(1, 0.0, 1.0), (2, 1.0, math.sqrt(2)), (3, 0.0, math.sqrt(15)), (4, 3.0, math.sqrt(96))],
)
def test_the_moments_are_those_of_a_normal(normals: Tensor, order: int, moment: float, deviation: float) -> None:
    assert float((normals**order).mean()) == pytest.approx(moment, abs=5 * deviation / math.sqrt(normals.numel()))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8])
def test_neighbours_are_uncorrelated_and_so_are_their_squares(normals: Tensor, lag: int) -> None:
    limit = 5 / math.sqrt(normals.numel() - lag)
    for name, value in (("values", normals), ("squares", normals**2)):
        correlation = float(torch.corrcoef(torch.stack((value[:-lag], value[lag:])))[0, 1])
        assert abs(correlation) < limit, f"{name} at lag {lag}: {correlation:.4f}"


def test_the_tails_are_there_and_finite(normals: Tensor) -> None:
    assert torch.isfinite(normals).all()
    beyond = float((normals.abs() > 3).double().mean())
    assert beyond == pytest.approx(0.0026998, abs=5 * math.sqrt(0.0027 / normals.numel()))
    assert float(normals.abs().max()) < math.sqrt(2 * 33 * math.log(2)), "farther than 32 bits can reach"


def test_element_n_is_made_of_word_n_mod_4_of_counter_n_div_4() -> None:
    seed = 0x0123456789ABCDEF
    noise = standard_normal((3, 5), seed).flatten().tolist()
    for n, value in enumerate(noise):
        uniform = [(word + 0.5) / WORD for word in philox_by_hand(n // 4, seed)]
        first = n % 4 // 2 * 2
        radius, angle = math.sqrt(-2 * math.log(uniform[first])), 2 * math.pi * uniform[first + 1]
        expected = radius * (math.sin(angle) if n % 2 else math.cos(angle))
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-7), f"element {n}"


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(standard_normal((103,), 1)[:10], standard_normal((10,), 1))


@pytest.mark.parametrize("offset", [1, 7, WORD - 1, WORD, 2**62 - 8])
def test_an_offset_begins_at_that_counter(offset: int) -> None:
    noise = standard_normal((9,), 5, offset=offset).tolist()
    for n, value in enumerate(noise):
        uniform = [(word + 0.5) / WORD for word in philox_by_hand(offset + n // 4, 5)]
        first = n % 4 // 2 * 2
        radius, angle = math.sqrt(-2 * math.log(uniform[first])), 2 * math.pi * uniform[first + 1]
        expected = radius * (math.sin(angle) if n % 2 else math.cos(angle))
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-7), f"element {n}"


def test_draws_whose_offsets_follow_each_other_are_one_stream() -> None:
    whole = standard_normal((24,), 3)
    parts = [standard_normal((8,), 3, offset=offset) for offset in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_shape_only_arranges_the_stream() -> None:
    assert torch.equal(standard_normal((2, 3, 4), 1).flatten(), standard_normal((24,), 1))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    assert torch.equal(standard_normal((64,), 1), standard_normal((64,), 1))
    for other in (2, 1 + WORD, 2**63 + 1):
        assert not (standard_normal((64,), 1) == standard_normal((64,), other)).any(), f"seeds 1 and {other}"


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
def test_any_shape_can_be_drawn(shape: tuple[int, ...]) -> None:
    noise = standard_normal(shape, 1)
    assert noise.shape == shape
    assert noise.dtype == torch.float32

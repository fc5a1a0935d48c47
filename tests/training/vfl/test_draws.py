"""Random numbers by key: the same for ever, uniform, and without an order's cost."""

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from kvae_comfyui.training.vfl.draws import Draws

MASK = 2**64 - 1


def philox(key: int, block: int) -> list[int]:
    """Philox-4x64 with ten rounds, as Salmon et al. (2011) define it: block `block` of four numbers."""
    k0, k1 = key & MASK, key >> 64
    x = [block, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ k0, b & MASK, a >> 64 ^ x[3] ^ k1, a & MASK]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
    return x


def test_the_numbers_are_those_of_philox():
    key = int.from_bytes(hashlib.sha256(b'[42, "sample", 7]').digest()[:16], "little")
    draws = Draws(42, "sample", 7)
    assert [draws.bits() for _ in range(8)] == [*philox(key, 1), *philox(key, 2)]


def test_another_process_draws_the_same():
    code = "from kvae_comfyui.training.vfl.draws import Draws; print(Draws(1, 'crop', 2).unit())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(out.stdout) == Draws(1, "crop", 2).unit()


def test_keys_that_look_alike_give_other_numbers():
    keys = [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,), ("1, 23",), (1, 23, "")]
    assert len({Draws(*key).bits() for key in keys}) == len(keys)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_numbers_below_n_are_uniform(n):
    draws = Draws(0, "below", n)
    counts = np.bincount([draws.below(n) for _ in range(100 * n)], minlength=n)
    assert len(counts) == n and ((counts - 100) ** 2 / 100).sum() <= n + 4 * np.sqrt(
        2 * n
    )  # chi-square, four deviations


def test_numbers_between_stay_between():
    draws = Draws(0)
    numbers = [draws.between(-0.5, 2.0) for _ in range(2000)]
    assert -0.5 <= min(numbers) < -0.48 and 1.98 < max(numbers) <= 2.0


def test_every_order_is_as_likely():
    counts = {order: 0 for order in itertools.permutations(range(4))}
    for k in range(4800):
        counts[tuple(Draws(5, k).shuffled(4))] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 23 + 4 * np.sqrt(46)


def test_the_first_of_very_many_cost_nothing():
    some = list(itertools.islice(Draws(3).shuffled(10**15), 1000))
    assert len(set(some)) == 1000 and max(some) > 10**14

"""Calls that run ahead in threads give their results in order, raise where they should, and stop when nobody asks."""

import threading
import time
from contextlib import closing

import pytest

from kvae_comfyui.training.runtime import ahead
from kvae_comfyui.training.runtime.ahead import in_order


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)


def test_results_come_in_order_whatever_takes_long():
    assert list(in_order(lambda i: time.sleep(0.002 * (i % 3 == 0)) or i, range(40))) == list(range(40))
    assert list(in_order(str, [])) == []


def test_calls_run_at_the_same_time():
    together = threading.Barrier(4, timeout=10)
    assert len(list(in_order(lambda _: together.wait(), range(4)))) == 4


def test_an_error_is_raised_in_place_of_its_result():
    found = []
    with pytest.raises(ZeroDivisionError), closing(in_order(lambda i: 1 / (5 - i), range(9))) as results:
        found.extend(results)
    assert len(found) == 5


def test_few_calls_begin_before_they_are_asked_for_and_none_after_it_is_closed():
    begun, threads = [], threading.active_count()
    with closing(in_order(begun.append, range(1000))) as results:
        next(results)
        time.sleep(0.05)
        assert len(begun) <= 5
    assert len(begun) <= 5 and threading.active_count() == threads

"""The time that a run still takes is said when it is known, and worth saying; tries that failed do not spoil it."""

import pytest

from kvae_comfyui.serving.remaining import ProgressText, Remaining, in_words


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run(steps, total, teller):
    """What is told at the start and after each (seconds, done)."""
    clock = Clock()
    told = teller(clock)
    said = [told.after(0, total)]
    for seconds, done in steps:
        clock.now += seconds
        said.append(told.after(done, total))
    return said


def test_nothing_is_said_before_the_second_segment_and_the_first_does_not_count():
    assert run([(60, 5), (8, 9), (8, 13), (8, 17)], 25, Remaining) == [None, None, 32, 24, 16]


def test_a_segment_that_was_tried_again_does_not_count_as_the_pace_of_the_others():
    said = run([(60, 5), (8, 9), (8, 13), (300, 17), (8, 21), (8, 25)], 29, Remaining)
    assert said == [None, None, 40, 32, 24, 16, 8]


def test_a_slower_pace_is_noticed():
    slower = [(8, 9), (8, 13), (300, 17), (24, 21), (24, 25), (24, 29)]
    assert run([(60, 5), *slower], 101, Remaining)[-1] == 72 * 6


def test_a_new_run_does_not_count_the_time_before_it():
    clock = Clock()
    left = Remaining(clock)
    for done in (0, 5, 9):
        left.after(done, 25)
        clock.now += 8
    clock.now += 10_000
    assert [left.after(done, 25) for done in (0, 9)] == [None, None]
    clock.now += 4
    assert left.after(13, 25) == 12


def test_a_run_that_ends_soon_says_nothing():
    assert run([(1, 5), (0.1, 9), (0.1, 10)], 10, ProgressText) == [None] * 4


def test_a_long_run_says_its_progress_and_in_the_end_that_it_is_done():
    said = run([(60, 5), (8, 9), (8, 13), (8, 17), (2, 18)], 18, ProgressText)
    assert said == [None, None, "50 %, about 20 s left", "72 %, about 10 s left", "94 %, about 5 s left", "done"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "5 s"),
        (37, "35 s"),
        (57, "55 s"),
        (58, "1 min"),
        (200, "3 min"),
        (3580, "1 h"),
        (4700, "1 h 20 min"),
        (36000, "10 h"),
    ],
)
def test_a_duration_is_said_as_roughly_as_it_is_known(seconds, words):
    assert in_words(seconds) == words
